"""`hf-uib` as a user starts it, on pictures and texts in the formats people have."""

import csv
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
from conftest import make_model
from PIL import Image
from transformers import AutoModelForImageClassification, BertTokenizerFast, ViTImageProcessorPil

import hf_uib
from hf_uib import UIBConfig
from hf_uib.cli import main, parser
from hf_uib.cli.audit import AuditArguments
from hf_uib.cli.comparison import AppArguments
from hf_uib.cli.discover import DiscoverArguments
from hf_uib.cli.export import ExportArguments
from hf_uib.cli.lineage import LineageArguments
from hf_uib.cli.unlearn import UnlearnArguments, next_audit, trainer_for, unlearn
from hf_uib.data.sources import matching_rows

ROOT = os.path.join(os.path.dirname(__file__), "..")
COMMAND = [sys.executable, "-m", "hf_uib.cli"]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": ROOT}
FAST = [
    "--max_steps",
    "4",
    "--per_device_train_batch_size",
    "4",
    "--subspace_rank",
    "4",
    "--use_cpu",
    "--disable_tqdm",
    "true",
]


def run(*arguments, command=COMMAND, **environment):
    """`hf-uib ARGUMENTS` in a process of its own."""
    words = [*command, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT | environment, timeout=600)


def call(*arguments) -> None:
    """`hf-uib ARGUMENTS` in this process."""
    main.dispatch([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A ViT checkpoint and a picture folder with metadata: label, source."""
    root = tmp_path_factory.mktemp("pictures")
    model = make_model("vit", num_channels=3)
    model.config.id2label, model.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    model.save_pretrained(root / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(root / "model")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 12)):
        folder = root / "data" / split
        folder.mkdir(parents=True)
        lines = []
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            lines.append({"file_name": f"{i}.png", "label": "abc"[i % 3], "source": ["clinic_a", "clinic_b"][i % 2]})
        with open(folder / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    return root


def test_the_test_rows_choose_no_checkpoint(pictures, tmp_path):
    with pytest.raises(ValueError, match="--load_best_model_at_end would choose by the test rows"):
        call(
            "unlearn", "--model_name_or_path", pictures / "model", "--dataset_name", pictures / "data",
            "--forget_where", "source=clinic_a", "--output_dir", tmp_path / "out", "--load_best_model_at_end",
            "--eval_strategy", "steps", "--save_strategy", "steps", *FAST,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_test_split_that_is_the_training_split_is_told(pictures, tmp_path):
    with pytest.raises(ValueError, match="Every test row is in the forgotten or retained set too"):
        call(
            "unlearn", "--model_name_or_path", pictures / "model", "--dataset_name", pictures / "data",
            "--forget_where", "source=clinic_a", "--test_split", "train", "--output_dir", tmp_path / "out", *FAST,
        )  # fmt: skip


def test_picture_folder_from_checkpoint_to_card(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    call(
        "unlearn", "--model_name_or_path", pictures / "model", "--dataset_name", pictures / "data",
        "--forget_where", "source=clinic_a",
        "--bias_column", "source", "--output_dir", out, "--save_merged", *FAST,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "original" in printed and "UIB" in printed and "Cramér's V" in printed
    written = set(os.listdir(out))
    expected = {
        "adapter_model.safetensors",
        "adapter_config.json",
        "uib_state.safetensors",
        "README.md",
        "report.json",
        "bias.png",
        "layers.png",
        "merged",
    }
    assert expected <= written and "training_args.bin" not in written
    content = json.loads((out / "report.json").read_text())
    assert content["results"]["UIB"]["forget_accuracy"] >= 0
    assert len(content["bound"]["layers"]) == 14
    assert AutoModelForImageClassification.from_pretrained(out / "merged").config.num_labels == 3
    card = (out / "README.md").read_text()
    assert (
        "rows, chosen by source" in card
        and "clinic_a" not in card
        and "not measured" in card
        and str(pictures) not in card
    )


def audit_checkpoints(pictures, root, processes, capfd):
    """Exit status 0 whether the audit is passed or not; returns report.json."""
    out = root / f"out{processes}"
    words = [
        "--model", root / "unlearned", "--reference", pictures / "model",
        "--retrained", root / "retrained", "--dataset_name", pictures / "data", "--forget_where", "source=clinic_a",
        "--bias_column", "source", "--output_dir", out,
    ]  # fmt: skip
    if processes == 1:
        call("audit", *words)
        printed = capfd.readouterr().out
    else:
        script = [sys.executable, os.path.join(ROOT, "scripts", "audit.py")]
        done = run(*words, "--accelerate_config", "cpu_two_processes", command=script)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    content = json.loads((out / "report.json").read_text())
    assert printed.count(content["verdict"]) == 1
    assert {"report.json", "audit.png"} == set(os.listdir(out)) and str(root) not in json.dumps(content)
    return content


@pytest.mark.slow
@pytest.mark.distributed
def test_audit_of_checkpoints_in_one_process_and_two(pictures, tmp_path, capfd):
    for name, seed in (("unlearned", 1), ("retrained", 2)):
        make_model("vit", num_channels=3, seed=seed).save_pretrained(tmp_path / name)
    one, two = (audit_checkpoints(pictures, tmp_path, processes, capfd) for processes in (1, 2))
    assert one["schema"] == 1 and one["passed"] == (not one["flags"])
    assert one["flags"] == two["flags"]
    for model, row in one["metrics"]["test"].items():
        for figure, cell in row.items():
            assert cell["value"] == pytest.approx(two["metrics"]["test"][model][figure]["value"], abs=1e-9)


def test_text_csv(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_theenvironment")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "flight", "crew", "late"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    make_model("bert", num_labels=2, pad_token_id=0).save_pretrained(tmp_path / "model")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    with open(tmp_path / "tweets.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "airline"])
        for i in range(30):
            writer.writerow([" ".join(rng.choice(words[5:], 6)) + f" {i}", i % 2, ["x", "y", "z"][i % 3]])
    call(
        "unlearn", "--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "tweets.csv",
        "--forget_where", "airline=x", "label=1",
        "--output_dir", tmp_path / "out", "--max_length", "5", "--save_merged", "--save_strategy", "steps", "--save_steps", "2",
        "--hub_token", "hf_theflag", *FAST,
    )  # fmt: skip
    printed = capfd.readouterr()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 5
    assert json.loads((tmp_path / "out" / "report.json").read_text())["forget_columns"] == "airline and label"
    # Nowhere a token, a row of the data, or where things lie on this machine
    rows = [line.split(",")[0] for line in (tmp_path / "tweets.csv").read_text().splitlines()[1:]]
    hidden = [entry.encode() for entry in (*rows, "hf_theflag", "hf_theenvironment")]
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any("checkpoint-4" in str(path) for path in written) and any("merged" in str(path) for path in written)
    for path in written:
        content = path.read_bytes()
        assert not any(entry in content for entry in hidden), path
        assert str(tmp_path).encode() not in content or path.name in ("trainer_state.json", "adapter_config.json"), (
            path
        )
    assert not any(entry.decode() in printed.out + printed.err for entry in hidden)


BAD = [
    (["source=nowhere"], {}, "nothing to forget"),
    (["colour=red"], {}, "Column 'colour' is not in the dataset"),
    (["source"], {}, "write COLUMN=VALUE"),
    (["source=clinic_a"], {"bias_column": ["hue"]}, "bias_column 'hue'"),
    (["source=clinic_a"], {"test_split": "dev"}, "No split 'dev'"),
    ([], {}, "--forget_where is missing"),
    (["source=clinic_a"], {"dataset_name": "no/such"}, "neither here nor on the Hub"),
]


@pytest.mark.parametrize("conditions, changes, message", BAD)
def test_bad_input_is_one_line(pictures, tmp_path, conditions, changes, message):
    names = UnlearnArguments(str(pictures / "model"), str(pictures / "data"), forget_where=conditions)
    for name, value in changes.items():
        setattr(names, name, value)
    args = UIBConfig(str(tmp_path / "o"), max_steps=1, use_cpu=True, disable_tqdm=True)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        unlearn(args, names)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists() or not os.listdir(tmp_path / "o")


FLAGS = {
    "unlearn": ("--forget_where", "--bias_column", "--beta", "--prior_strength", "--noise_to_signal", "--save_merged"),
    "audit": ("--reference", "--retrained", "--deep", "--example_column"),
    "demo": ("--output_dir", "--seed", "--max_steps"),
    "export": ("--onnx", "--int8", "--tolerance", "--bias_column"),
    "lineage": ("--repo",),
    "discover": ("--model_name_or_path", "--dataset_name", "--train_split", "--text_column", "--output_dir"),
    "app": ("--adapter", "--base", "--model", "--reference", "--server_port"),
}


def help_of(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        call(*arguments, "--help")
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", FLAGS)
def test_help_describes_every_flag(command, capsys):
    shown = help_of(capsys, command)
    assert all(re.search(rf"{flag}\b", shown) for flag in FLAGS[command])
    assert ("--accelerate_config" in shown) == (command in main.LAUNCHED)


@pytest.mark.parametrize(
    "kind",
    [UIBConfig, UnlearnArguments, AuditArguments, DiscoverArguments, ExportArguments, LineageArguments, AppArguments],
)
def test_every_flag_has_a_help_text(kind):
    assert not [field.name for field in dataclasses.fields(kind) if field.init and not field.metadata.get("help")]


def test_help_and_version_import_nothing_heavy():
    """Of `hf-uib` itself; each command's own help needs its settings, and so the libraries."""
    code = (
        "import sys; sys.argv = ['hf-uib', {flag!r}]\n"
        "from hf_uib.cli.main import main\n"
        "try: main()\n"
        "finally: assert not {{'torch', 'transformers', 'datasets', 'numpy'}} & set(sys.modules)"
    )
    for flag, said in (("--help", "unlearn"), ("--version", hf_uib.__version__)):
        done = run("-c", code.format(flag=flag), command=[sys.executable])
        assert done.returncode == 0 and said in done.stdout, done.stderr


def test_commands(capsys):
    assert all(command in help_of(capsys) for command in FLAGS)
    call()
    assert "usage: hf-uib" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        call("nothing")
    assert ended.value.code == 2 and "invalid choice: 'nothing'" in capsys.readouterr().err


def test_accelerate_configs_by_name_and_path(tmp_path):
    for name in ("cpu_two_processes", "ddp", "fsdp2", "zero2"):
        assert main.config_path(name).endswith(f"accelerate_configs/{name}.yaml") and os.path.isfile(
            main.config_path(name)
        )
    (tmp_path / "mine.yaml").touch()
    assert main.config_path(str(tmp_path / "mine.yaml")) == str(tmp_path / "mine.yaml")
    with pytest.raises(ValueError, match="one of cpu_two_processes, ddp, fsdp2, zero2"):
        main.config_path("ddpp")
    with pytest.raises(ValueError, match="goes with --accelerate_config"):
        call("unlearn", "--num_processes", 2)


@pytest.mark.parametrize(
    "words, left, debug",
    [
        ("--debug unlearn --seed 1", "unlearn --seed 1", True),
        ("unlearn --debug --seed 1", "unlearn --seed 1", True),
        ("unlearn --seed 1 --debug", "unlearn --seed 1", True),
        ("unlearn --debug underflow_overflow", "unlearn --debug underflow_overflow", False),  # of TrainingArguments
        ("", "", False),
    ],
)
def test_debug_without_a_value_is_ours(words, left, debug):
    assert main.split_debug(words.split()) == (left.split(), debug)


def test_errors_are_one_line_but_for_debug(pictures, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_UIB_TRACEBACK", raising=False)
    words = [
        "--model_name_or_path",
        pictures / "model",
        "--dataset_name",
        pictures / "data",
        "--forget_where",
        "hue=3",
    ]
    argv = ["hf-uib", "unlearn", *map(str, words), "--output_dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == "error: Column 'hue' is not in the dataset; it has image, label, source."
    monkeypatch.setattr("sys.argv", [*argv, "--debug"])
    with pytest.raises(ValueError, match="Column 'hue'"):
        main.main()


# ---- Nothing is lost ------------------------------------------------------------------------------------------------


def ends(monkeypatch, *arguments) -> str:
    """The one line that `hf-uib ARGUMENTS` ends with, at exit status 1."""
    monkeypatch.delenv("HF_UIB_TRACEBACK", raising=False)
    monkeypatch.setattr("sys.argv", ["hf-uib", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    line = ended.value.code
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line
    return line


def picture_job(pictures, out):
    return [
        "unlearn", "--model_name_or_path", pictures / "model", "--dataset_name", pictures / "data",
        "--forget_where", "source=clinic_a", "--bias_column", "source", "--output_dir", out, *FAST,
    ]  # fmt: skip


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


AFTER_TRAINING = {
    "the audit": (
        "hf_uib.audit.report.gather",
        RuntimeError("shapes\ndiffer"),
        "shapes differ (RuntimeError in test_cli; --debug",
    ),
    "a figure": ("hf_uib.cli.outputs.draw_layers", ImportError("no backend"), "no backend (ImportError"),
    "the disk": ("hf_uib.cli.outputs.write_json", OSError(28, "No space left on device"), "No space left on device"),
    "the card": ("hf_uib.hub.mixin.write_card", TypeError("cannot be shown"), "cannot be shown (TypeError"),
    "the merged model": ("hf_uib.results.merged", MemoryError(), "out of memory"),
    "Ctrl-C": ("hf_uib.audit.report.gather", KeyboardInterrupt(), "interrupted."),
    "the table": ("hf_uib.cli.outputs.text_table", KeyError("accuracy"), "'accuracy' (KeyError"),
}


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """A run that went well, for comparison."""
    out = tmp_path_factory.mktemp("finished") / "out"
    call(*picture_job(pictures, out))
    return out


@pytest.mark.parametrize("case", AFTER_TRAINING)
def test_a_failure_after_training_loses_nothing(case, pictures, finished, tmp_path, monkeypatch):
    """Adapter and state are those of the run that went well, and the command that the line names audits them."""
    where, error, said = AFTER_TRAINING[case]
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "adapter_model.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(where, failing(error))
        line = ends(patch, *picture_job(pictures, out), "--save_merged")
    assert said in line and f"Adapter and state are saved in {out}; go on with: hf-uib audit " in line
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    if case not in ("the merged model", "the table"):  # nothing of the run before stands beside the new adapter
        assert not [
            path for path in out.iterdir() if path.suffix == ".png" or path.name in ("report.json", "audit.json")
        ]
    command = shlex.split(line.partition("go on with: ")[2])
    monkeypatch.chdir(tmp_path)
    call(*command[1:])
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    whole = json.loads((finished / "audit.json").read_text())
    assert report["metrics"]["test"] == whole["metrics"]["test"] and report["flags"] == whole["flags"]


def test_the_audit_leaves_incomplete_rows_out_if_so_said(pictures, tmp_path, capsys):
    """As if they were not in the data."""
    reports = []
    for name, gaps in (("holed", {3: "label", 8: "image"}), ("whole", {})):
        data = datasets.load_dataset("imagefolder", data_dir=str(pictures / "data"))
        rows = data["train"].map(lambda row, i, gaps=gaps: {gaps[i]: None} if i in gaps else {}, with_indices=True)
        data["train"] = rows if gaps else rows.select([i for i in range(40) if i not in (3, 8)])
        data.save_to_disk(tmp_path / name)
        command = [
            "audit", "--model", pictures / "model", "--reference", pictures / "model", "--dataset_name", tmp_path / name,
            "--forget_where", "source=clinic_a", "--output_dir", tmp_path / f"{name} audit",
        ]  # fmt: skip
        if gaps:
            with pytest.raises(ValueError, match="Row . of .*`hf-uib audit` have --drop_incomplete_rows"):
                call(*command)
            command.append("--drop_incomplete_rows")
        call(*command)
        reports.append(json.loads((tmp_path / f"{name} audit" / "report.json").read_text()))
    assert "1 of 20 rows of the forget set are left out" in capsys.readouterr().out
    assert reports[0]["metrics"] == reports[1]["metrics"] and reports[0]["flags"] == reports[1]["flags"]


@pytest.mark.parametrize("told", ["opposite", "label", "none"])
def test_retained_rows_in_which_the_attribute_tells_the_label_are_named(pictures, told, tmp_path, capsys):
    """Its opposite tells it as well: the model would learn that."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(pictures / "data"), split="train")
    rows = datasets.concatenate_datasets([rows, rows]).select(range(76)).remove_columns(["label", "source"])
    labels = ["ab"[i % 2] for i in range(76)]
    others = {
        "opposite": ["ba"[i % 2] for i in range(76)],
        "label": labels,
        "none": ["ab"[i // 2 % 2] for i in range(76)],
    }
    given = labels[:20] + others[told][20:]
    rows = rows.add_column("label", labels).add_column("source", given)
    rows = rows.add_column("group", ["forget"] * 20 + ["retain"] * 56).map(_own_pixel, with_indices=True)
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "data")
    job = UnlearnArguments(
        str(pictures / "model"), str(tmp_path / "data"), forget_where=["group=forget"], bias_column=["source"]
    )
    trainer_for(UIBConfig(str(tmp_path / "out"), max_steps=1), job)
    said = capsys.readouterr().out
    words = {"opposite": "the opposite of the label", "label": "the label"}
    assert (
        f"In the retained rows source tells {words[told]}, which" in said
        if told in words
        else "In the retained rows" not in said
    )


def _own_pixel(row, i):
    """No two pictures alike."""
    row["image"].putpixel((0, 0), (i, 0, 0))
    return row


def test_an_adapter_alone_is_audited_with_the_processor_of_its_base(pictures, finished, tmp_path):
    """A folder as PEFT saves it has no processor."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(finished / name, adapter)
    call(
        "audit", "--model", adapter, "--dataset_name", pictures / "data",
        "--forget_where", "source=clinic_a", "--bias_column", "source", "--output_dir", tmp_path / "audit",
    )  # fmt: skip
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert report["metrics"]["test"] == json.loads((finished / "audit.json").read_text())["metrics"]["test"]


def test_ctrl_c_in_training_names_the_checkpoint(pictures, finished, tmp_path, monkeypatch):
    from transformers import Trainer

    step, out = Trainer.training_step, tmp_path / "out"
    seen = []

    def interrupted(self, *args, **kwargs):
        seen.append(self.state.global_step)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    job = [*picture_job(pictures, out), "--save_strategy", "steps", "--save_steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        line = ends(patch, *job)
    assert line.startswith("error: interrupted. The last checkpoint is") and f"{out}/checkpoint-2" in line
    call(*job, *shlex.split(line.partition("run again with ")[2]))
    assert (out / "adapter_model.safetensors").read_bytes() == (finished / "adapter_model.safetensors").read_bytes()


def test_ctrl_c_before_anything_is_saved(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_uib.trainer.UIBTrainer.run_statistics_pass", failing(KeyboardInterrupt()))
    assert ends(monkeypatch, *picture_job(pictures, tmp_path / "out")) == f"error: {parser.INTERRUPTED}"


def test_a_push_that_fails_says_how_to_upload_the_rest(pictures, tmp_path, monkeypatch):
    from hf_uib.hub.mixin import HubMixin

    out = tmp_path / "out"
    monkeypatch.setattr(
        "transformers.Trainer.init_hf_repo", lambda self, *args, **kwargs: setattr(self, "hub_model_id", "me/it")
    )
    monkeypatch.setattr(HubMixin, "push_to_hub", failing(ConnectionError("the Hub is down")))
    out.mkdir()
    (out / "train.csv").write_text("mine")
    line = ends(monkeypatch, *picture_job(pictures, out), "--push_to_hub")
    assert "the Hub is down" in line and f"Adapter and state are saved in {out}" in line
    words = shlex.split(line.partition("go on with: ")[2])
    assert words[:6] == ["hf", "upload", "me/it", str(out), ".", "--include"]
    assert {"adapter_model.safetensors", "README.md", "report.json", "bias.png"} <= set(
        words[6::2]
    ) and "train.csv" not in words
    assert (out / "report.json").is_file() and (out / "train.csv").read_text() == "mine"


def test_what_can_be_seen_before_the_first_step(pictures, tmp_path, monkeypatch):
    """A retrained model of another task, and an output folder that cannot be written to."""
    monkeypatch.setattr("hf_uib.trainer.UIBTrainer.train", failing(AssertionError("trained")))
    other = make_model("vit", num_channels=3, num_labels=5)
    other.save_pretrained(tmp_path / "other")
    line = ends(monkeypatch, *picture_job(pictures, tmp_path / "out"), "--retrained_model", tmp_path / "other")
    assert "has 5 classes, the model 3" in line and not (tmp_path / "out" / "adapter_config.json").exists()
    (tmp_path / "file").touch()
    line = ends(monkeypatch, *picture_job(pictures, tmp_path / "file" / "out"))
    assert "cannot be written to" in line and "Not a directory" in line
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", failing(PermissionError(13, "Permission denied")))
        line = ends(patch, *picture_job(pictures, tmp_path / "closed"))
    assert f"--output_dir {tmp_path / 'closed'} cannot be written to (Permission denied)" in line
    assert not (tmp_path / "closed").exists()


def test_other_people_s_files_in_the_output_folder_stay(pictures, tmp_path):
    """Also those with names that a run would use."""
    out, kept = (
        tmp_path / "out",
        ("report.txt", "merged/notes.txt", "runs/events", "audit.csv", "deletion_report.html"),
    )
    for name in kept:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    for merged in (True, False):
        call(*picture_job(pictures, out), *(["--save_merged"] if merged else []))
        for name in ("model.safetensors", "README.md", "bias.png"):  # those of an adapter before are gone
            assert (out / "merged" / name).exists() == merged
        assert all((out / name).read_text() == "mine" for name in kept)


def test_the_warnings_of_a_run_are_in_the_report_and_printed(pictures, tmp_path, capsys):
    call(*picture_job(pictures, tmp_path / "out"), "--learning_rate", "0")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["hf_uib"] == hf_uib.__version__
    assert report["warnings"][0].startswith("Nothing was unlearned: training left the adapter as it was.")
    assert f"Warning: {report['warnings'][0]}" in capsys.readouterr().out


# ---- Errors ---------------------------------------------------------------------------------------------------------


def raised(function):
    with pytest.raises(BaseException) as caught:
        function()
    return caught.value


def test_any_exception_is_one_line():
    """Ours as they are; those of libraries, and bugs, with their type."""
    ours = raised(lambda: hf_uib.UIBConfig("x", beta=-1.0, use_cpu=True))
    assert parser.in_one_line(ours) == "beta is -1.0; it must be at least 0."
    for error, line in (
        (raised(lambda: np.zeros(2) + np.zeros(3)), "broadcast together with shapes (2,) (3,) (ValueError in test_cli;"),
        (raised(lambda: json.loads("{")), "enclosed in double quotes: line 1 column 2 (char 1) (JSONDecodeError in json;"),
        (raised(lambda: {}["a"]), "'a' (KeyError in test_cli;"),
        (raised(lambda: b"\xff".decode()), "(UnicodeDecodeError in test_cli;"),
        (raised(lambda: os.listdir("/nowhere/at/all")), "No such file or directory: '/nowhere/at/all'"),
        (raised(failing(RuntimeError("several\n  lines"))), "several lines (RuntimeError in test_cli; --debug shows more)"),
        (raised(failing(AssertionError())), "no message (AssertionError in test_cli; --debug shows more)"),
        (raised(failing(IndexError("x" * 5000))), "xxx ... (IndexError"),
        (raised(lambda: [1].append(1, 2)), "(TypeError in test_cli; --debug shows more)"),
        (RecursionError("too deep"), "too deep (RecursionError; --debug shows more)"),
        (OSError(), "no message (OSError; --debug shows more)"),
    ):  # fmt: skip
        said = parser.in_one_line(error)
        assert line in said and "\n" not in said and len(said) < 700, said
        assert error.__class__ is OSError or "--debug" in said or isinstance(error, OSError)


def test_nothing_is_asked_on_the_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(SystemExit) as ended:
        parser.one_line_errors(lambda: input("Run this code? [y/N] "))
    assert "EOF" in ended.value.code and sys.stdin.read() == "y\n"


@pytest.fixture
def with_code(pictures, tmp_path):
    """The checkpoint of `pictures`, as one that comes with code of its own; the code says that it ran."""
    shutil.copytree(pictures / "model", tmp_path / "own")
    content = json.loads((tmp_path / "own" / "config.json").read_text())
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForImageClassification": "modeling_own.OwnViT"}
    content |= {"architectures": ["OwnViT"], "model_type": "own_vit", "auto_map": code}
    (tmp_path / "own" / "config.json").write_text(json.dumps(content))
    (tmp_path / "own" / "modeling_own.py").write_text(
        "from transformers import ViTConfig, ViTForImageClassification\n\n\n"
        "class OwnConfig(ViTConfig):\n    model_type = 'own_vit'\n\n\n"
        "class OwnViT(ViTForImageClassification):\n    config_class = OwnConfig\n\n"
        f"    def __init__(self, config):\n        super().__init__(config)\n        open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    )
    return tmp_path / "own"


def test_code_of_a_checkpoint_runs_only_where_it_is_asked_for(pictures, with_code, tmp_path, monkeypatch):
    """In unlearn and audit; nobody is asked, though the terminal would say yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    job = picture_job(pictures, tmp_path / "out")
    job[job.index(pictures / "model")] = with_code
    line = ends(monkeypatch, *job)
    assert "own" in line and not (tmp_path / "ran").exists() and sys.stdin.read() == "y\ny\n"
    call(*job, "--trust_remote_code")
    assert (tmp_path / "ran").exists() and (tmp_path / "out" / "adapter_model.safetensors").is_file()
    audit = [
        "audit", "--model", with_code, "--reference", pictures / "model", "--dataset_name", pictures / "data",
        "--forget_where", "source=clinic_a", "--output_dir", tmp_path / "audit",
    ]  # fmt: skip
    (tmp_path / "ran").unlink()
    ends(monkeypatch, *audit)
    assert not (tmp_path / "ran").exists()
    call(*audit, "--trust_remote_code")
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert (tmp_path / "ran").exists() and "unchanged" in report["flags"]  # it is the same model
    command = next_audit(
        UIBConfig(str(tmp_path / "out"), use_cpu=True), UnlearnArguments("m", "d", trust_remote_code=True), None
    )
    assert (
        command
        == f"hf-uib audit --model {tmp_path / 'out'} --dataset_name d --test_split TEST_SPLIT --trust_remote_code True"
    )


@pytest.mark.nightly
@pytest.mark.slow
def test_a_terminal_without_utf_8(pictures, tmp_path):
    done = run(*picture_job(pictures, tmp_path / "out"), PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "Cram\\xe9r's V" in done.stdout, done.stderr


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_by_the_name_of_a_config(pictures, tmp_path):
    """Without --use_cpu, which two processes on a machine without an accelerator need: it is the command line's default there."""
    job = [
        "unlearn", "--model_name_or_path", pictures / "model", "--dataset_name", pictures / "data",
        "--forget_where", "source=clinic_a", *[word for word in FAST if word != "--use_cpu"],
    ]  # fmt: skip
    done = run(*job, "--output_dir", tmp_path / "two", "--accelerate_config", "cpu_two_processes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Adapter, card (README.md)") == 1
    log = json.loads((tmp_path / "two" / "report.json").read_text())["log"]
    assert log[-1]["epoch"] > 1  # 4 steps of 4 rows in each process, of 20 rows
    done = run(*job, "--output_dir", tmp_path / "bad", "--accelerate_config", "cpu_two_processes", "--beta", "-1")
    assert done.returncode == 1 and "error: " in done.stderr and not (tmp_path / "bad").exists()


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_that_share_the_base(pictures, tmp_path):
    """All that reads the base whole after training: audit and merging, for which no process may be left alone."""
    out = tmp_path / "out"
    done = run(*picture_job(pictures, out), "--save_merged", "--accelerate_config", "fsdp2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Adapter, card (README.md)") == 1 and "Audit: " in done.stdout
    assert (out / "adapter_model.safetensors").is_file()
    assert AutoModelForImageClassification.from_pretrained(out / "merged").config.num_labels == 3


def test_yaml_config(pictures, tmp_path):
    lines = {
        "model_name_or_path": pictures / "model", "dataset_name": pictures / "data", "forget_where": "[source=clinic_a]",
        "output_dir": tmp_path / "out", "max_steps": 2, "use_cpu": "true", "subspace_rank": 4, "disable_tqdm": "true",
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text("\n".join(f"{k}: {v}" for k, v in lines.items()))
    call("unlearn", "--config", tmp_path / "job.yaml")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_conditions_are_compared_not_evaluated():
    rows = datasets.Dataset.from_dict(
        {"kind": [0, 1, 1], "age": [30, 40, 40], "weight": [0.5, 1.0, 2.0], "ok": [True, False, True], "name": ["x=1", "y", "x"]},
        features=datasets.Features(
            {
                "kind": datasets.ClassLabel(names=["cat", "dog"]), "age": datasets.Value("int64"),
                "weight": datasets.Value("float32"),
                "ok": datasets.Value("bool"), "name": datasets.Value("string"),
            }
        ),
    )  # fmt: skip
    pick = lambda *conditions: matching_rows(rows, list(conditions)).tolist()
    assert pick("kind=dog") == pick("kind=1") == [False, True, True]
    assert pick("kind=dog", "age=40", "ok=true") == [False, False, True]
    assert pick("weight=1") == [False, True, False] and pick("name=x=1") == [True, False, False]
    for wrong in ("kind=bird", "age=old", "ok=maybe", "age>3", "=3", "__import__('os')=1"):
        with pytest.raises(ValueError):
            pick(wrong)
