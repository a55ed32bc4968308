"""`hf-uib app` as a user sees it: both charts say what the two models say; what is missing is told in one line."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request

import numpy as np
import pytest
import torch
from conftest import make_model, make_rows
from PIL import Image
from test_cli import COMMAND, ENVIRONMENT
from transformers import BertTokenizerFast, ViTImageProcessorPil

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.cli import app
from hf_uib.cli.comparison import AppArguments, load
from hf_uib.cli.digits import digits_colour

pytestmark = [
    pytest.mark.xdist_group("demo_app"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),
]
PAGE = 180_000  # milliseconds, so that a busy machine has time
PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "flight", "crew", "late"]


def probabilities(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits.softmax(-1).numpy()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium; without it, playwright or gradio the pages are not tested."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    opened = browser.new_page(viewport={"width": 390, "height": 844})
    opened.set_default_timeout(PAGE)
    opened.hosts = set()
    opened.on("request", lambda request: opened.hosts.add(urllib.request.urlparse(request.url).hostname))
    yield opened
    assert opened.hosts <= {"127.0.0.1", None}, "the page fetches from the net"
    opened.close()


@pytest.fixture
def serve():
    """Serves the page of some arguments from a thread; returns its address."""
    pages = []

    def start(**arguments):
        pages.append(app.build(load(AppArguments(**arguments))))
        return pages[-1].launch(prevent_thread_lock=True, quiet=True)[1]

    yield start
    for served in pages:
        served.close()


def chart(page, side: str) -> dict[str, float]:
    bars = page.locator(f"#{side} meter").evaluate_all("bars => bars.map(b => [b.ariaLabel, b.getAttribute('value')])")
    return {name: float(value) for name, value in bars}


def expect_answer(page, names, before, after):
    """Sentence and charts become those of two arrays of probabilities."""
    wanted = [
        {names[i]: pytest.approx(float(answer[i]), abs=1e-4) for i in np.argsort(-answer)[: app.MOST_BARS]}
        for answer in (before, after)
    ]
    page.get_by_text(app.decision(names, before, after).replace("*", ""), exact=True).wait_for()
    for _ in range(PAGE // 50):
        shown = [chart(page, side) for side in ("before", "after")]
        if shown == wanted:
            break
        page.wait_for_timeout(50)
    assert shown == wanted


@pytest.fixture(scope="module")
def unlearned(tmp_path_factory):
    """What a short run on pictures leaves: original model, merged one, output folder; the base is saved nowhere."""
    folder = tmp_path_factory.mktemp("run") / "out"
    original = make_model("vit", num_labels=10, num_channels=3)
    original.config.id2label = {i: f"digit_{i}" for i in range(10)}

    def rows(seed):
        pixels = np.random.default_rng(seed).normal(size=(24, 3, 8, 8)).astype("float32")
        return make_rows(n=24, num_labels=10, seed=seed).remove_columns("pixel_values").with_format(None).add_column(
            "pixel_values", pixels.tolist()
        ).with_format("torch")  # fmt: skip

    trainer = UIBTrainer(
        make_model("vit", num_labels=10, num_channels=3, id2label=original.config.id2label),
        UIBConfig(str(folder), prior="none", max_steps=8, learning_rate=0.05, use_cpu=True, disable_tqdm=True),
        forget_dataset=rows(1),
        retain_dataset=rows(2),
        processing_class=PROCESSOR,
    )
    trainer.request = "the hue"
    trainer.train()
    trainer.save_model()
    trainer.save_merged(str(folder / "merged"))
    return original, trainer.merge_and_unload(), folder


@pytest.mark.browser
def test_uploaded_picture_with_an_adapter(unlearned, serve, page, tmp_path):
    original, merged, folder = unlearned
    for seed in (0, 1):
        picture = np.random.default_rng(seed).integers(0, 255, (30, 20, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{seed}.png")
    page.goto(serve(adapter=str(folder)))
    page.get_by_text("Asked to forget: the hue.").wait_for()
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Give a picture first.").wait_for()
    answers = []
    for seed in (0, 1):
        page.locator("input[type=file]").set_input_files(tmp_path / f"{seed}.png")
        page.locator(f"img[src*='{seed}.png']").wait_for()
        page.get_by_role("button", name="Compare").click()
        inputs = PROCESSOR(Image.open(tmp_path / f"{seed}.png"), return_tensors="pt")
        (before,), (after,) = probabilities(original, **inputs), probabilities(merged, **inputs)
        names = list(original.config.id2label.values())
        expect_answer(page, names, before, after)
        answers += [before, after]
        page.get_by_role("button", name=re.compile("Remove|Clear")).first.click()
    assert min(abs(a - b).max() for i, a in enumerate(answers) for b in answers[:i]) > 0.01  # four answers, not one


@pytest.mark.browser
def test_digits_in_every_hue(unlearned, serve, page, tmp_path):
    original, merged, folder = unlearned
    shutil.copytree(folder, tmp_path / "digits")
    (tmp_path / "digits" / "report.json").write_text(json.dumps({"task": "digits-colour", "seed": 3}))
    test = digits_colour(3).sets["test"].with_format(None)
    names = list(original.config.id2label.values())

    def answers(row):
        inputs = PROCESSOR(app.paint_hues(row["image"]), return_tensors="pt")
        return probabilities(original, **inputs), probabilities(merged, **inputs)

    page.goto(serve(adapter=str(tmp_path / "digits")))
    before, after = answers(test[0])
    expect_answer(page, names, before[0], after[0])
    page.locator("input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    expect_answer(page, names, before[1], after[1])
    page.locator(".digits button").nth(4).click()
    before, after = answers(test[44])
    expect_answer(page, names, before[4], after[4])
    table = page.locator(".hues tr").all_inner_texts()
    assert [row.split() for row in table[1:]] == [
        [title, *(names[a] for a in answer.argmax(-1))] for title, answer in (("Before", before), ("After", after))
    ]


def test_hues_are_those_of_the_task():
    test = digits_colour(0).sets["test"].with_format(None)
    painted = [np.asarray(p, int) for p in app.paint_hues(test[7]["image"])]
    for copy, hue in enumerate(painted):
        assert abs(hue - np.asarray(test[copy]["image"], int)).max() <= 1
        again = app.paint_hues(Image.fromarray(hue.astype(np.uint8)))
        assert abs(np.asarray(again, int) - painted).max() <= 1


@pytest.mark.nightly
@pytest.mark.browser
def test_sentence_with_two_checkpoints_from_the_command_line(browser, page, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    models = {name: make_model("bert", num_labels=2, seed=i) for i, name in enumerate(("before", "after"))}
    for name, model in models.items():
        model.config.id2label = {0: "negative", 1: "positive"}
        model.save_pretrained(tmp_path / name)
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "before")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["--model", tmp_path / "after", "--reference", tmp_path / "before", "--server_port", port]
    served = subprocess.Popen(
        [*COMMAND, "app", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        for _ in range(600):
            try:
                page.goto(f"http://127.0.0.1:{port}")
                break
            except Exception:
                assert served.poll() is None, served.stdout.read()
                time.sleep(0.2)
        for text in ("bad crew", "good flight " * 50, "late"):  # the second is longer than the model's positions
            page.get_by_label("Sentence").fill(text)
            page.get_by_role("button", name="Compare").click()
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=40)
            (before,), (after,) = (probabilities(models[name], **inputs) for name in ("before", "after"))
            expect_answer(page, ["negative", "positive"], before, after)
    finally:
        served.terminate()
        said = served.communicate(timeout=120)[0]
    assert "Traceback" not in said and "Warning" not in said


def test_decision():
    names, yes, no = ["no", "yes"], np.array([0.2, 0.8]), np.array([0.9, 0.1])
    assert app.decision(names, yes, yes) == "**The decision is the same**: yes, with 80% before and 80% after."
    assert app.decision(names, yes, no) == "**The decision changed**: yes (80%) before, no (90%) after."


def test_what_is_missing_is_one_line(unlearned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original, merged, folder = unlearned
    original.save_pretrained(tmp_path / "original")
    merged.save_pretrained(tmp_path / "merged")
    make_model("vit", num_labels=3, num_channels=3).save_pretrained(tmp_path / "three")
    make_model("bert").save_pretrained(tmp_path / "texts")
    shutil.copytree(folder, tmp_path / "alone", ignore=shutil.ignore_patterns("merged", "preprocessor_config.json"))
    for arguments, said in (
        ({}, "run `hf-uib demo` first"),
        ({"adapter": "alone"}, "does not name its base, and has no merged/; give --base"),
        ({"adapter": "alone", "base": "merged"}, "merged is not, to the bit, what alone was trained on"),
        ({"adapter": "alone", "base": "texts"}, "alone does not fit texts"),
        ({"adapter": "alone", "base": "original"}, "alone and original have no image processor"),
        ({"model": "merged"}, "--model and --reference go together"),
        ({"model": "merged", "reference": "original", "adapter": "alone"}, "--model and --reference go together"),
        ({"model": "merged", "reference": "three"}, "10 classes from pixel_values and 3 classes from pixel_values"),
        ({"model": "three", "reference": "texts"}, "3 classes from pixel_values and 3 classes from input_ids"),
        ({"model": "merged", "reference": "nowhere"}, "No checkpoint nowhere"),
    ):
        with pytest.raises(ValueError) as error:
            load(AppArguments(**arguments))
        assert said in str(error.value) and "\n" not in str(error.value), arguments
    PROCESSOR.save_pretrained(tmp_path / "original")
    assert load(AppArguments(adapter="alone", base="original")).request == "the hue"
