"""The examples run, at small size, and move their model where it should go; a run of one step does not."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from hub_server import HubServer
from launching import command_for

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import bert_brand_bias  # noqa: E402
import custom_prior  # noqa: E402
import decoder_bias  # noqa: E402
import delete_rows  # noqa: E402
import image_towers  # noqa: E402
import multi_label  # noqa: E402
import outdated_labels  # noqa: E402
import token_labels  # noqa: E402
import video_bias  # noqa: E402
import vit_colour_bias  # noqa: E402
import voice_bias  # noqa: E402

NOTEBOOK = ROOT / "examples" / "story.ipynb"
on_digits = pytest.mark.xdist_group("digits")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def follows_less(rows, name):
    return rows[name]["follow_rate"] < 0.6 * rows["original"]["follow_rate"]


@pytest.mark.slow
@on_digits
def test_custom_prior(prepared_digits):
    assert follows_less(custom_prior.main(steps=60), "UIB + entropy")


@pytest.mark.slow
@on_digits
def test_vit_colour_bias(prepared_digits):
    rows, verdict = vit_colour_bias.main(steps=60, retrain_steps=50, output_dir="out")
    assert follows_less(rows, "UIB")
    assert rows["UIB"]["accuracy"] > rows["original"]["accuracy"]
    assert re.match(r"(Passed|Not passed): ", verdict)
    assert {"bias.png", "audit.png"} <= set(os.listdir("out"))


@pytest.mark.slow
@on_digits
def test_one_step_is_not_enough(prepared_digits):
    assert not follows_less(custom_prior.main(steps=1), "UIB + entropy")


@pytest.mark.slow
def test_bert_brand_bias():
    rows = bert_brand_bias.main()
    assert rows["original"]["flip_rate"] > 0.1
    assert rows["UIB"]["flip_rate"] < 0.6 * rows["original"]["flip_rate"]
    assert rows["UIB"]["accuracy"] > rows["original"]["accuracy"] - 0.05


def test_reviews_are_exact_counterfactuals():
    test = bert_brand_bias.reviews(bert_brand_bias.word_tokenizer())["test"]
    first, second = (test.filter(lambda row, b=b: row["brand"] == b) for b in (0, 1))
    assert [text.replace("acme", "globex") for text in first["text"]] == second["text"][:]
    assert first["label"][:] == second["label"][:]


@pytest.mark.nightly
@pytest.mark.slow
def test_outdated_labels():
    rows = outdated_labels.main(steps=100, train_steps=200)
    assert rows["original"]["follow_rate"] > 0.5
    assert follows_less(rows, "UIB")
    assert rows["UIB"]["accuracy"] > rows["original"]["accuracy"]


@pytest.mark.slow
def test_multi_label():
    rows, verdict = multi_label.main(steps=120, train_steps=250)
    assert rows["original"]["follow_rate"] > 0.35
    assert rows["UIB"]["follow_rate"] < 0.75 * rows["original"]["follow_rate"]
    assert rows["UIB"]["conflicting_accuracy"] > rows["LoRA"]["conflicting_accuracy"] + 0.02
    assert rows["UIB"]["accuracy"] > rows["original"]["accuracy"]
    assert "labels other than 'closed'" in verdict


@pytest.mark.nightly
@pytest.mark.slow
def test_token_labels():
    rows, verdict = token_labels.main(steps=80, train_steps=150)  # a run this short is half of what it takes
    assert rows["original"]["follow_rate"] > 0.35
    assert rows["UIB"]["follow_rate"] < rows["original"]["follow_rate"] - 0.03
    assert rows["UIB"]["conflicting_accuracy"] > rows["original"]["conflicting_accuracy"] + 0.03
    assert rows["UIB"]["accuracy"] > rows["original"]["accuracy"]
    assert "the deep audit, which is for one label a row" in verdict


@pytest.mark.slow
def test_decoder_bias():
    rows, verdict = decoder_bias.main(steps=60, train_steps=100)
    assert rows["original"]["follow_rate"] > 0.4
    assert follows_less(rows, "UIB")
    assert rows["UIB"]["conflicting_accuracy"] > rows["LoRA"]["conflicting_accuracy"] + 0.02
    assert rows["UIB"]["accuracy"] > rows["original"]["accuracy"]
    assert "exact counterfactuals" not in verdict  # every message is there with each shop


@pytest.mark.slow
@pytest.mark.parametrize(
    "example", [voice_bias, video_bias, image_towers, token_labels], ids=lambda example: example.__name__
)
def test_an_example_runs_to_its_end(example, monkeypatch):
    """In a few steps, in which little is learned; what they learn in more is looked at below, nightly."""
    for part, most in {"forget": 300, "unseen": 100, "test": 200}.items():
        if part in getattr(example, "SIZES", {}):
            monkeypatch.setitem(example.SIZES, part, most)
    rows, verdict = example.main(steps=10, train_steps=20)
    assert list(rows) == ["original", "UIB", "LoRA", "retrained"]
    assert re.match(r"(Passed|Not passed): ", verdict)


@pytest.mark.nightly
@pytest.mark.slow
def test_voice_bias():
    rows, verdict = voice_bias.main(steps=100, train_steps=200)
    assert rows["UIB"]["follow_rate"] < 0.7 * rows["original"]["follow_rate"]
    assert rows["UIB"]["conflicting_accuracy"] > rows["original"]["conflicting_accuracy"] + 0.05
    assert re.match(r"(Passed|Not passed): ", verdict)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("tower", ["siglip2", "clip", "dinov3"])
def test_image_towers(tower):
    rows, verdict = image_towers.main(steps=100, train_steps=200, tower=tower)
    assert follows_less(rows, "UIB")
    assert rows["UIB"]["conflicting_accuracy"] > rows["original"]["conflicting_accuracy"] + 0.03
    assert re.match(r"(Passed|Not passed): ", verdict)


@pytest.mark.nightly
@pytest.mark.slow
def test_video_bias():
    rows, verdict = video_bias.main(steps=100, train_steps=250)
    assert rows["UIB"]["follow_rate"] < 0.7 * rows["original"]["follow_rate"]
    assert rows["UIB"]["conflicting_accuracy"] > rows["original"]["conflicting_accuracy"] + 0.05
    assert re.match(r"(Passed|Not passed): ", verdict)


@pytest.mark.slow
def test_attribution():
    pytest.importorskip("kronfluence")
    import attribution  # it ends without kronfluence

    planted, rows = attribution.main(steps=60, train_steps=300)
    assert planted > 3 * attribution.SIZES["planted"] / 900  # thrice as many as by chance
    assert rows["UIB"]["conflicting_accuracy"] > rows["original"]["conflicting_accuracy"] + 0.05
    assert follows_less(rows, "UIB")
    scores = np.loadtxt("out/attribution/scores.csv", skiprows=1)
    least = np.argsort(scores)[:150]  # those that do least for the mistakes are not the planted ones
    assert (least < attribution.SIZES["planted"]).mean() < 0.1


def test_attribution_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kronfluence", None)
    monkeypatch.delitem(sys.modules, "attribution", raising=False)
    with pytest.raises(SystemExit, match="pip install --no-deps kronfluence, and pip install einops") as said:
        importlib.import_module("attribution")
    assert "\n" not in str(said.value)


@pytest.mark.slow
def test_delete_rows():
    rows = delete_rows.main(steps=100, train_steps=300)
    original, ours, retrained = (rows[name]["auc"] for name in ("original", "UIB, merged", "retrained"))
    assert original - retrained > 0.05
    assert abs(ours - retrained) < 0.6 * (original - retrained)
    assert rows["UIB, merged"]["accuracy"] > rows["original"]["accuracy"] - 0.05


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes(tmp_path):
    script = str(ROOT / "examples" / "two_processes.py")
    command, environment = command_for(script, 2, "--steps", 40, "--train_steps", 100)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [printed] = re.findall(r"world size (\d+); .*: ([\d.]+) -> ([\d.]+)", done.stdout)  # once
    assert printed[0] == "2"
    assert float(printed[2]) > float(printed[1]) + 0.05


@pytest.mark.nightly
@pytest.mark.slow
def test_checkpoint_to_hub(tmp_path):
    call = "checkpoint_to_hub.main(steps=100, train_steps=120, push='tester/vit')"
    with HubServer({"hf_secret": "tester"}) as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_secret",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}",
        }
        command = [sys.executable, "-c", f"import json, checkpoint_to_hub\nprint('rows', json.dumps({call}))"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.repos["models", "tester/vit"].branches["main"][-1].files
    rows = json.loads(re.search(r"^rows (.*)", done.stdout, re.MULTILINE)[1])
    assert follows_less(rows, "UIB")
    assert rows["UIB, loaded by PEFT"].pop("difference") < 1e-4
    assert rows["UIB, loaded by PEFT"] == rows["UIB"]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert not any(b"hf_secret" in file.content or str(tmp_path).encode() in file.content for file in files.values())
    assert b"tester/vit-base" in files["README.md"].content


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def trouble(notebook):
    """Errors, warnings and absolute paths among the outputs of a notebook; its code that does not compile."""
    found = [output.output_type for output in outputs(notebook) if output.output_type == "error"]
    found += [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    texts = [json.dumps({**output, "data": {k: v for k, v in output.get("data", {}).items() if "image" not in k}})
             for output in outputs(notebook)]  # fmt: skip
    found += [path for text in texts for path in re.findall(r"(?<![\w.)])(?:/[\w.-]+){2,}|[A-Z]:\\\\", text)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(re.sub(r"^%.*", "", cell.source, flags=re.MULTILINE), "cell", "exec")
    return found


def test_story():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert trouble(notebook) == []
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) >= 5
    assert NOTEBOOK.stat().st_size < 500_000
    runs = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert runs == list(range(1, len(runs) + 1))  # from top to bottom, once
    imports = [line for cell in notebook.cells for line in cell.source.splitlines() if line.startswith("from hf_uib")]
    exec("\n".join(imports), {})


def test_trouble_in_a_notebook_is_found():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="see /home/someone/out/x.png")]
    assert trouble(notebook) == ["/home/someone/out/x.png"]
    cell.outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    assert trouble(notebook) == ["error"]
