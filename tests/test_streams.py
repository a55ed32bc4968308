"""Streams are written to disk once: the same run as on the same rows, and nothing left behind."""

import gc
import io
import itertools
import re
import zipfile

import datasets
import numpy as np
import pytest
import torch
from conftest import make_model, make_rows
from datasets.distributed import split_dataset_by_node
from PIL import Image
from test_trainer import adapter_weights, config, same

from hf_uib import UIBTrainer
from hf_uib.data import streams
from hf_uib.data.fingerprints import fingerprint, row_hashes
from hf_uib.data.streams import StreamFolder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where `datasets` caches."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def left_in(cache):
    """Folders of streams."""
    return list(cache.glob("hf_uib_*"))


class TorchStream(torch.utils.data.IterableDataset):
    """Rows in torch's way."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def to_stream(rows):
    return rows.to_iterable_dataset()


def trainer_on(path, made=lambda rows: rows, **settings):
    """The usual four sets, given as ``made`` makes them."""
    forget, retain, calibration, test = (made(make_rows(n=n, seed=i)) for i, n in enumerate((24, 16, 12, 9), 1))
    return UIBTrainer(
        make_model(),
        config(path, **settings),
        forget,
        retain,
        calibration_dataset=calibration,
        eval_dataset={"test": test},
    )


def test_the_run_is_that_on_the_rows_to_the_bit(tmp_path, cache):
    steps = dict(max_steps=4, save_strategy="steps", save_steps=2)
    plain, streamed = trainer_on(tmp_path / "a", **steps), trainer_on(tmp_path / "b", to_stream, **steps)
    assert plain.fingerprints == streamed.fingerprints
    assert plain.forget_dataset.format["type"] == streamed.forget_dataset.format["type"] == "torch"
    plain.train()
    streamed.train()
    assert same(adapter_weights(plain), adapter_weights(streamed))
    assert plain.evaluate()["eval_test_loss"] == streamed.evaluate()["eval_test_loss"]
    test = make_rows(n=20, seed=7)
    streamed.audit(to_stream(test))
    assert fingerprint(streamed.raw_eval_dataset) == fingerprint(test)

    resumed = trainer_on(tmp_path / "c", TorchStream, max_steps=4)
    for folder in ("a", "b"):  # of a run on rows, and of one on streams
        resumed.train(resume_from_checkpoint=tmp_path / folder / "checkpoint-2")
        assert same(adapter_weights(plain), adapter_weights(resumed))
    assert len(left_in(cache)) == 2
    del streamed, resumed
    gc.collect()
    assert not left_in(cache)


def test_one_other_row_is_another_set(tmp_path):
    """The control of equal fingerprints."""
    rows = make_rows(n=24, seed=1)
    with StreamFolder() as folder:
        assert fingerprint(folder.stored(to_stream(rows), "x")) == fingerprint(rows)
        assert fingerprint(folder.stored(to_stream(rows).take(23), "x")) != fingerprint(rows)


def encoded(seed, kind):
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    picture.save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def test_columns_keep_their_kinds_and_files_their_bytes():
    files = [{"path": None, "bytes": encoded(i, "JPEG")} for i in range(150)]  # more than are written at a time
    features = datasets.Features(
        image=datasets.Image(),
        frames=datasets.List(datasets.Image()),
        sound={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        label=datasets.ClassLabel(names=["cat", "dog"]),
        text=datasets.Value("large_string"),
        date=datasets.Value("timestamp[s]"),
    )
    columns = {"image": files, "frames": [files[i : i + 2] for i in range(150)], "sound": files, "label": [0, 1] * 75}
    columns |= {"text": ["a", None, "c"] * 50, "date": [i * 86_400 for i in range(150)]}
    rows = datasets.Dataset.from_dict(columns, features).cast_column("sound", datasets.Audio(sampling_rate=8_000))
    with StreamFolder() as folder:
        stored = folder.stored(to_stream(rows), "x")
        assert stored.features == rows.features
        assert np.array_equal(row_hashes(stored), row_hashes(rows))  # JPEG is not encoded again
        assert stored.select_columns(["image", "label", "text", "date"])[140]["label"] == 0
        assert all(file["filename"].startswith(folder.path) for file in stored.cache_files)


def test_files_in_an_archive_are_fetched(tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for i in range(4):
            archive.writestr(f"{i}.png", encoded(i, "PNG"))
    stream = datasets.load_dataset(
        "imagefolder", data_files=str(tmp_path / "pictures.zip"), split="train", streaming=True, drop_labels=True
    )
    with StreamFolder() as folder:
        stored = folder.stored(stream, "x").cast_column("image", datasets.Image(decode=False))
        assert [row["image"]["bytes"] for row in stored] == [encoded(i, "PNG") for i in range(4)]


def breaks_off():
    yield from make_rows(n=130, seed=1).with_format(None)
    raise ConnectionError("the server went away\nand more")


def endless():
    for i in itertools.count():
        yield {"input_ids": [i], "labels": i % 2}


REFUSED = {
    "empty": (lambda: to_stream(make_rows()).take(0), "forget_dataset has no examples"),
    "empty, features unknown": (
        lambda: datasets.IterableDataset.from_generator(lambda: iter(())),
        "forget_dataset has no examples",
    ),
    "breaks off": (
        lambda: datasets.IterableDataset.from_generator(breaks_off),
        "forget_dataset is a stream that breaks off (ConnectionError: the server went away)",
    ),
    "breaks off, torch": (lambda: TorchStream(breaks_off()), "(ConnectionError: the server went away)"),
    "without an end": (
        lambda: datasets.IterableDataset.from_generator(endless),
        "more than 1,000 rows; if it has no end",
    ),
    "pairs": (lambda: TorchStream([(1, 2)]), "The rows of forget_dataset are tuples; give dictionaries"),
    "columns that change": (
        lambda: TorchStream([{"a": 1}] * 100 + [{"a": [2]}]),
        "is a stream that breaks off (TypeError",
    ),
    "split by process": (
        lambda: split_dataset_by_node(to_stream(make_rows()), 0, 2),
        "forget_dataset is a stream that is split by process",
    ),
    "a label too large": (lambda: to_stream(make_rows(num_labels=9)), "outside the model's 3 classes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_and_nothing_left_behind(tmp_path, cache, monkeypatch, case):
    monkeypatch.setattr(streams, "MAX_ROWS", 1_000)
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        UIBTrainer(make_model(), config(tmp_path / "out"), make(), to_stream(make_rows(n=16, seed=2)))
    assert "\n" not in str(caught.value)
    assert not left_in(cache)


def test_a_disk_that_is_nearly_full_is_left_alone(tmp_path, cache, monkeypatch):
    rows = make_rows(n=250, seed=1)
    assert len(StreamFolder().stored(to_stream(rows), "x")) == 250  # the control
    monkeypatch.setattr(streams, "LEFT_FREE", 2**62)
    with pytest.raises(ValueError, match="does not fit on the disk of .*cache, where its rows are written; cut it"):
        UIBTrainer(make_model(), config(tmp_path / "out"), to_stream(rows), make_rows(n=16, seed=2))
    assert not left_in(cache)
