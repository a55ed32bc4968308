"""Nothing of the forget set is left behind: every file that a run writes anywhere is searched for what stands in its rows.

Each run is a process of its own, with its own home, caches, temporary and working folder. It ends well, by an error or by Ctrl-C,
or it pushes. Looked for are words and token numbers of texts, and names, pixels and encoded bytes of pictures.
"""

import csv
import json
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pyarrow.parquet
import pytest
from conftest import make_model
from hub_server import HubServer
from PIL import Image
from test_cli import FAST, ROOT, ends, failing
from transformers import BertTokenizerFast, ViTImageProcessorPil

slow = pytest.mark.slow
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(50))]
FORGET, ALL, TEST = 14, 40, 12
FAULTS = {  # what goes wrong, as code in the process of the run
    "success": "",
    # of texts the table fails, as there is no test set to audit on
    "error": "import hf_uib.cli.outputs as outputs\noutputs.draw_layers = lambda *a: fail()\nimport hf_uib.audit.report as report\n"
    "def fail(*a, **k): raise RuntimeError('the audit failed')\nreport.gather = fail",
    "push": "from hf_uib.hub.mixin import HubMixin\n"
    "def fail(*a, **k): raise ConnectionError('the Hub is down')\nHubMixin._upload = fail",
    "ctrl-c": "from transformers import Trainer\nstep = Trainer.training_step\n"
    "def stop(self, *a, **k):\n if self.state.global_step == 3: raise KeyboardInterrupt\n return step(self, *a, **k)\n"
    "Trainer.training_step = stop",
}
TOKEN = "hf_owner_of_everything"


def texts(root):
    """A BERT classifier and a CSV file; what must not be found."""
    rng = np.random.default_rng(0)
    (root / "vocab.txt").write_text("\n".join(WORDS))
    settings = dict(vocab_size=len(WORDS), pad_token_id=0, num_labels=2)
    make_model("bert", **settings).save_pretrained(root / "model")
    BertTokenizerFast(str(root / "vocab.txt")).save_pretrained(root / "model")
    needles = {}
    with open(root / "data.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for i in range(ALL):
            ids = rng.integers(5, len(WORDS), 9)
            word = f"zqforget{i:03d}word" if i < FORGET else f"other{i}"
            writer.writerow([f"{' '.join(WORDS[j] for j in ids)} {word}", i % 2, "gone" if i < FORGET else "kept"])
            if i < FORGET:
                needles |= {
                    word.encode(): f"the word of row {i}",
                    " ".join(WORDS[j] for j in ids).encode(): f"the text of row {i}",
                }
                needles |= {ids.astype(kind).tobytes(): f"{kind} tokens of row {i}" for kind in ("<i8", "<i4")}
    return root / "data.csv", needles


def pictures(root):
    """A ViT classifier and a folder of pictures; what must not be found."""
    rng = np.random.default_rng(0)
    model = make_model("vit", num_channels=3)
    model.config.id2label, model.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    model.save_pretrained(root / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(root / "model")
    needles = {}
    for split, count in (("train", ALL), ("test", TEST)):
        folder, rows = root / "data" / split, []
        folder.mkdir(parents=True)
        for i in range(count):
            forgotten = split == "train" and i < FORGET
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            name = f"zqpatient{i:03d}.png" if forgotten else f"{i}.png"
            Image.fromarray(pixels).save(folder / name)
            rows.append([name, "abc"[i % 3], "gone" if forgotten else "kept"])
            if forgotten:
                encoded = (folder / name).read_bytes()
                needles |= {
                    name.encode(): f"the name of picture {i}", pixels.tobytes()[:48]: f"pixels of picture {i}",
                    encoded[60:90]: f"bytes of picture {i}",
                    ((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1).astype("<f4").tobytes()[:32]: f"input of picture {i}",
                }  # fmt: skip
        with open(folder / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([["file_name", "label", "source"], *rows])
    return root / "data", needles


def run(root, kind, fault, *more, **environment):
    """`hf-uib unlearn` on the data; returns the process, what must not be found, and what was there before."""
    data, needles = {"texts": texts, "pictures": pictures}[kind](root)
    places = {name: root / name for name in ("home", "tmp", "cwd")}
    for place in places.values():
        place.mkdir()
    (root / "request.yaml").write_text("what: the rows of one source\nwhy: asked for\ndue: 2031-05-01\n")
    job = [
        "hf-uib", "unlearn", "--model_name_or_path", str(root / "model"), "--dataset_name", str(data),
        "--forget_where", "source=gone", "--output_dir", str(root / "out"),
        "--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1",
        "--request", str(root / "request.yaml"), *(["--test_split", "test"] if kind == "pictures" else []), *FAST, *more,
    ]  # fmt: skip
    code = f"import sys\nsys.argv = {job!r}\nfrom hf_uib.cli.main import main\n{FAULTS[fault]}\nmain()"
    there = {path: _state(path) for path in root.rglob("*")}
    settings = {
        "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "HOME": str(places["home"]), "HF_HOME": str(places["home"] / "hf"),
        "XDG_CACHE_HOME": str(places["home"] / "cache"), "TMPDIR": str(places["tmp"]), "HF_HUB_OFFLINE": "1",
        "MPLCONFIGDIR": str(places["home"] / "mpl"),
    }  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TMP"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=places["cwd"],
        env=kept | settings | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done, needles, there


def _state(path):
    seen = path.stat()
    return seen.st_mtime_ns, seen.st_size


def contents(path):
    """A file's bytes, and what is packed in them."""
    content = path.read_bytes()
    yield content
    if path.suffix == ".parquet":
        yield repr(pyarrow.parquet.read_table(path).to_pylist()).encode()
    if path.suffix == ".json":
        yield json.dumps(json.loads(content), ensure_ascii=False).encode()
    if path.suffix == ".png":
        yield b"".join(_inflated(content))


def _inflated(content: bytes):
    """The pixels of a PNG file."""
    position, packed = 8, b""
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        if content[position + 4 : position + 8] == b"IDAT":
            packed += content[position + 8 : position + 8 + length]
        position += length + 12
    yield zlib.decompress(packed)


def found(root, needles, there, done):
    """Where something of the forget set is that was not there before."""
    written = [path for path in root.rglob("*") if path.is_file() and there.get(path) != _state(path)]
    seen = {str(path.relative_to(root)): content for path in written for content in contents(path)}
    seen |= {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    leaks = {(place, what) for place, content in seen.items() for needle, what in needles.items() if needle in content}
    return leaks, [str(path.relative_to(root)) for path in written]


@slow
@pytest.mark.parametrize(
    "kind, ending",
    [
        ("pictures", "success"),
        ("texts", "error"),
        ("texts", "ctrl-c"),
        pytest.param("texts", "success", marks=pytest.mark.nightly),
        pytest.param("pictures", "error", marks=pytest.mark.nightly),
        pytest.param("pictures", "ctrl-c", marks=pytest.mark.nightly),
    ],
)
def test_nothing_is_left_behind(kind, ending, tmp_path):
    done, needles, there = run(tmp_path, kind, ending)
    assert done.returncode == (ending != "success"), done.stderr[-2000:]
    said = {"success": "", "error": "the audit failed", "ctrl-c": "error: interrupted. The last checkpoint is"}[ending]
    assert said in done.stderr
    leaks, written = found(tmp_path, needles, there, done)
    assert any("checkpoint-2" in path for path in written)  # the search looks where things are written
    assert ("out/deletion_report.html" in written) == (ending == "success")
    assert not leaks
    assert not [path for path in written if path.startswith(("tmp/", "cwd/"))]


def environment_of(hub) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip


@pytest.mark.nightly
@slow
def test_the_command_after_a_push_that_failed_uploads_what_the_push_would_have(tmp_path):
    """And no other file of the folders, which hold some."""
    with HubServer({TOKEN: "tester"}) as hub:
        environment = environment_of(hub)
        for folder in (tmp_path / "out", tmp_path / "out" / "merged"):
            folder.mkdir()
            (folder / "train.csv").write_text("mine")
        flags = ("--push_to_hub", "--hub_model_id", "tester/pushed", "--hub_artifact", "both")
        done, *_ = run(tmp_path, "texts", "push", *flags, **environment)
        line = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and line.startswith("error: the Hub is down. Adapter and state are saved in ")
        command = line.partition("go on with: ")[2]
        path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
        settings = os.environ | environment | {"PATH": path, "HF_HOME": str(tmp_path / "home" / "hf")}
        subprocess.run(["sh", "-c", command], env=settings, check=True, capture_output=True, timeout=120)
        files = {name: set(repo.branches["main"][-1].files) for (_, name), repo in hub.repos.items()}
    figures = {"bias.png", "layers.png"}
    assert (
        files["tester/pushed"]
        >= {"adapter_model.safetensors", "uib_state.safetensors", "README.md", "report.json"} | figures
    )
    assert files["tester/pushed-merged"] >= {"config.json", "model.safetensors", "tokenizer.json"} | figures
    assert not [names for names in files.values() if names & {"train.csv", "deletion_report.html"}]


@slow
def test_nothing_is_pushed(tmp_path):
    with HubServer({TOKEN: "tester"}) as hub:
        environment = environment_of(hub)
        flags = (
            "--push_to_hub",
            "--hub_model_id",
            "tester/pushed",
            "--hub_strategy",
            "all_checkpoints",
            "--hub_artifact",
            "both",
        )
        done, needles, there = run(tmp_path, "texts", "success", *flags, **environment)
        assert done.returncode == 0, done.stderr[-2000:]
        blobs = [
            (name, path, blob.content)
            for (_, name), repo in hub.repos.items()
            for commits in repo.branches.values()
            for commit in commits
            for path, blob in commit.files.items()
        ]
    assert {"adapter_model.safetensors", "checkpoint-2/optimizer.pt", "model.safetensors"} <= {
        path for _, path, _ in blobs
    }
    assert not [
        (name, path, what) for name, path, content in blobs for needle, what in needles.items() if needle in content
    ]
    assert not [path for path in found(tmp_path, needles, there, done)[1] if path.startswith("tmp/")]


def test_the_search_finds_what_is_there(tmp_path):
    """In a cache of datasets, a Parquet file, a picture and a log."""
    data, needles = texts(tmp_path)
    rows = datasets_of(data)
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "rows")
    (_, picture_needles), done = pictures(tmp_path), subprocess.CompletedProcess([], 0, "", "zqforget003word\n")
    there = {path: _state(path) for path in (tmp_path / "data").rglob("*")}
    os.utime(tmp_path / "data" / "train" / "zqpatient002.png", ns=(1, 1))
    leaks, _ = found(tmp_path, needles | picture_needles, there, done)
    assert ("rows.parquet", "the word of row 3") in leaks and (
        "rows/data-00000-of-00001.arrow",
        "the text of row 3",
    ) in leaks
    assert ("stderr", "the word of row 3") in leaks and ("data.csv", "the word of row 13") in leaks
    assert ("data/train/zqpatient002.png", "bytes of picture 2") in leaks
    assert ("data/train/metadata.csv", "the name of picture 2") not in leaks  # as it was


def datasets_of(path):
    import datasets

    with open(path, newline="") as file:
        return datasets.Dataset.from_list(list(csv.DictReader(file)))


BAD_ROWS = {
    "no label": (lambda row: [row[0], "", row[2]], "Row 4"),
    "an unknown label": (lambda row: [row[0], "7", row[2]], "7"),
    "no text": (lambda row: ["", *row[1:]], "Row 4"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_an_error_about_a_row_names_its_number_and_not_what_stands_in_it(case, tmp_path, monkeypatch):
    change, said = BAD_ROWS[case]
    data, needles = texts(tmp_path)
    with open(data, newline="") as file:
        rows = list(csv.reader(file))
    rows[5] = change(rows[5])
    with open(data, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    line = ends(
        monkeypatch, "unlearn", "--model_name_or_path", tmp_path / "model", "--dataset_name", data, "--forget_where", "source=gone",
        "--output_dir", tmp_path / "out", *FAST,
    )  # fmt: skip
    assert said in line and not [what for needle, what in needles.items() if needle.decode("latin-1") in line]


def test_an_error_about_a_picture_names_its_number_and_not_its_file(tmp_path, monkeypatch):
    data, needles = pictures(tmp_path)
    (data / "train" / "zqpatient004.png").write_bytes(b"no picture")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    line = ends(
        monkeypatch, "unlearn", "--model_name_or_path", tmp_path / "model", "--dataset_name", data, "--forget_where", "source=gone",
        "--output_dir", tmp_path / "out", *FAST,
    )  # fmt: skip
    assert "Row 4" in line and "zqpatient" not in line


def test_an_upload_that_fails_leaves_no_copy(tmp_path, monkeypatch):
    from hf_uib.hub import push

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text('{"base_model_name_or_path": "/here"}')
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    class Api:
        upload_folder = staticmethod(failing(ConnectionError("down")))

    with pytest.raises(ConnectionError):
        push.upload_files(Api(), str(tmp_path / "out"), ["adapter_config.json"], repo_id="a/b")
    with pytest.raises(FileNotFoundError):
        push.upload_files(Api(), str(tmp_path / "out"), ["gone.json"], repo_id="a/b")
    assert not os.listdir(tmp_path / "temporary")
