"""A deletion request as a file, answered by the merged model and deletion_report.html; and runs that end early."""

import contextlib
import hashlib
import html
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from test_cli import COMMAND, ENVIRONMENT, FAST, call, pictures  # noqa: F401
from transformers import AutoModelForImageClassification

from hf_uib.cli import main
from hf_uib.cli.parser import flags_of
from hf_uib.cli.unlearn import UnlearnArguments, audit_command

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def request_file(folder, pictures, **changes):  # noqa: F811
    content = {
        "what": "the pictures of clinic A", "why": "consent <withdrawn>", "due": "2031-05-01", "reference": "2031-17",
        "model_name_or_path": str(pictures / "model"), "dataset_name": str(pictures / "data"),
        "forget_where": ["source=clinic_a"], "bias_column": "source", "train_split": "train",
    } | changes  # fmt: skip
    path = folder / "request.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


@pytest.fixture(scope="module")
def answered(pictures, tmp_path_factory):  # noqa: F811
    root, printed = tmp_path_factory.mktemp("request"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        call("unlearn", "--request", request_file(root, pictures), "--output_dir", root / "out", *FAST)
    return root / "out", printed.getvalue()


def test_deletion_report(answered, pictures):  # noqa: F811
    folder, printed = answered
    page = (folder / "deletion_report.html").read_text()
    assert "deletion_report.html" in printed
    merged = AutoModelForImageClassification.from_pretrained(folder / "merged")
    record = merged.config.unlearning[0]
    assert record["request"] == "the pictures of clinic A" and record["forget_examples"] == 20
    for said in (
        "the pictures of clinic A", "consent &lt;withdrawn&gt;", "2031-05-01", "2031-17", "Done in time", "source=clinic_a",
        record["forget_fingerprint"], record["base_fingerprint"], "merged/model.safetensors", "not a proof of deletion",
        "No retrained model", "unlearned (UIB)", "This run deleted no data",
    ):  # fmt: skip
        assert said in page, said
    assert page.count("data:image/png;base64,") == 2
    outside = [link for link in re.findall(r'(?:src|href)="([^"]*)"', page) if not link.startswith("data:")]
    assert not outside  # one file
    for never in (str(pictures), str(folder), ".png<", "clinic_b", "certified", "guarantee"):
        assert never not in page, never


def test_the_auditor_s_command_can_be_pasted():
    job = UnlearnArguments(forget_where=["source=Clinic A; echo x"], test_split="held out", retrained_model="r")
    command = audit_command(job)
    assert command.startswith("hf-uib audit --model merged ") and command.endswith("--retrained RETRAINED")
    assert "--forget_where 'source=Clinic A; echo x'" in command and "--test_split 'held out'" in command


def test_the_auditor_s_command_of_a_report_runs(answered, pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    folder, _ = answered
    command = html.unescape(
        re.search("<code>(hf-uib audit .*)</code>", (folder / "deletion_report.html").read_text())[1]
    )
    filled = command.replace("MODEL_BEFORE", str(pictures / "model")).replace("DATA", str(pictures / "data"))
    shutil.copytree(folder / "merged", tmp_path / "merged")
    monkeypatch.chdir(tmp_path)
    call(*shlex.split(filled)[1:])
    assert (tmp_path / "audit" / "report.json").is_file() and "Not measured" in capsys.readouterr().out


def test_texts_are_read_as_written(tmp_path):
    (tmp_path / "r.yaml").write_text("reference: 0017\nwhat: no\ndue: 2031-05-01\nmax_steps: 3\n")
    flags = flags_of(str(tmp_path / "r.yaml"), {"reference", "what", "due", "max_steps"})
    assert flags == ["--reference=0017", "--what=no", "--due=2031-05-01", "--max_steps=3"]


def test_hashes_of_the_artefacts(answered):
    folder, _ = answered
    page = (folder / "deletion_report.html").read_text()
    for name in ("adapter_model.safetensors", "merged/model.safetensors", "report.json"):
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() in page


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_deletion_report_prints(answered, tmp_path):
    """In a real browser: nothing is loaded from elsewhere, and it becomes a PDF of several pages."""
    page = answered[0] / "deletion_report.html"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [CHROMIUM, *flags, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'report.pdf'}", page.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF") and 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 8
    seen = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", page.as_uri()], check=True, capture_output=True, text=True, timeout=120
    )
    assert "Deletion report" in seen.stdout


BAD = {
    "no reason": (dict(why=None), "has no `why`"),
    "no date": (dict(due=None), "has no `due`"),
    "a date that is none": (dict(due="soon"), "write a date as YYYY-MM-DD"),
    "a date in another spelling": (dict(due="20261101"), "write a date as YYYY-MM-DD"),
    "who asks, in a condition": (dict(forget_where=["source=jane@example.org"]), "holds an e-mail address"),
    "who asks, as a field": (dict(requester="me"), "who asks is not stored"),
    "who asks, in the text": (dict(why="jane@example.org withdrew"), "holds an e-mail address"),
    "an unknown field": (dict(priority="high"), "'priority' that is not known"),
    "no model": (dict(model_name_or_path=None), "--model_name_or_path is missing"),
    "no rows": (dict(forget_where=["source=nowhere"]), "nothing to forget"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(case, pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    changes, message = BAD[case]
    path = request_file(tmp_path, pictures, **changes)
    monkeypatch.setattr(
        "sys.argv", ["hf-uib", "unlearn", "--request", str(path), "--output_dir", str(tmp_path / "out"), *FAST]
    )
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert message in str(ended.value.code) and "\n" not in str(ended.value.code)
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_a_late_answer_says_so(pictures, tmp_path):  # noqa: F811
    path = request_file(tmp_path, pictures, due="2020-01-01")
    call("unlearn", "--request", path, "--output_dir", tmp_path / "out", *FAST)
    assert "Done late" in (tmp_path / "out" / "deletion_report.html").read_text()


def job(pictures, out, *more):  # noqa: F811
    return [
        *COMMAND, "unlearn", "--model_name_or_path", str(pictures / "model"), "--dataset_name", str(pictures / "data"),
        "--forget_where", "source=clinic_a", "--output_dir", str(out), *FAST, *more,
    ]  # fmt: skip


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("strategy, limit", [pytest.param("no", 40000, marks=pytest.mark.nightly), ("steps", 5000)])
def test_disk_full(pictures, tmp_path, strategy, limit):  # noqa: F811
    """From the first step on no file may grow beyond 5 kB, or 40 kB: a checkpoint, or a figure, cannot be written. One line says
    so, nothing is half-written, and what could be written is there."""
    command = job(pictures, tmp_path / "out", "--save_strategy", strategy, "--save_steps", "2")
    code = (
        f"import resource, sys\nsys.argv = {['hf-uib', *command[len(COMMAND) :]]!r}\n"
        "from hf_uib.cli.main import main\nfrom hf_uib import UIBTrainer\ntrain = UIBTrainer.train\n"
        "def full(self, *args, **kwargs):\n"
        f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "    return train(self, *args, **kwargs)\n"
        "UIBTrainer.train = full\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and "too large" in line
    written = {str(path.relative_to(tmp_path / "out")) for path in files(tmp_path / "out")}
    if limit == 5000:
        assert not written
        return
    assert f"Adapter and state are saved in {tmp_path / 'out'}; go on with: hf-uib audit " in line
    assert {"adapter_model.safetensors", "uib_state.safetensors", "README.md"} <= written
    assert not [
        name for name in written if name.endswith((".png", ".tmp")) or "_unfinished" in name or name == "report.json"
    ]


@pytest.mark.slow
def test_interrupted(pictures, tmp_path):  # noqa: F811
    command = job(
        pictures,
        tmp_path / "out",
        "--max_steps",
        "100000",
        "--logging_steps",
        "1",
        "--save_strategy",
        "steps",
        "--save_steps",
        "5",
    )
    with open(tmp_path / "errors", "w") as errors:
        # Of tests that run in the background the shell has let SIGINT be ignored
        heeded = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        running = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env=ENVIRONMENT, preexec_fn=heeded
        )
        while not list((tmp_path / "out").glob("checkpoint-*")):  # training is on
            assert running.poll() is None, (tmp_path / "errors").read_text()
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        running.wait()
    errors = (tmp_path / "errors").read_text()
    assert running.returncode == 1 and "Traceback" not in errors
    assert "error: interrupted" in errors.strip().splitlines()[-1]
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    checkpoints = list((tmp_path / "out").glob("checkpoint-*"))
    assert checkpoints and all((path / "uib_state.safetensors").is_file() for path in checkpoints)


def test_resumed_from_the_command_line(pictures, tmp_path, capsys):  # noqa: F811
    saving = ("--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1")
    words = job(pictures, tmp_path / "out", *saving)[len(COMMAND) :]
    call(*words)
    capsys.readouterr()
    first = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    os.remove(tmp_path / "out" / "adapter_model.safetensors")
    call(*words, "--resume_from_checkpoint", "true")
    assert capsys.readouterr().out.count("'loss'") == 2  # steps 3 and 4
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == first
