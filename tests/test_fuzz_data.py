"""Data of every kind through both entry points: the right labels and inputs, or one line that says what is wrong."""

import io
import os
import warnings

import datasets
import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_door import WORDS, named
from test_trainer import config
from transformers import BertTokenizerFast, ViTImageProcessorPil

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.cli.unlearn import UnlearnArguments, trainer_for
from hf_uib.data.columns import Columns
from hf_uib.data.labels import labels_of

pytestmark = pytest.mark.slow
NAMES = ["cat", "dog", "cow"]
ROWS = 8
MODES = ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I", "I;16", "F"]
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of a picture and a text classifier whose classes have names, with their processors."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    processors = {
        "vit": ViTImageProcessorPil(do_resize=True, size={"height": 8, "width": 8}),
        "bert": BertTokenizerFast(str(folder / "vocab.txt")),
    }
    for kind, processor in processors.items():
        settings = {"num_channels": 3} if kind == "vit" else {}
        named(make_model(kind, **settings), *NAMES).save_pretrained(folder / kind)
        processor.save_pretrained(folder / kind)
    return folder


# ---- Labels, with what they have to become; None: they have to be refused ----


@st.composite
def labels(draw):
    kind = draw(
        st.sampled_from(
            ["ids", "floats", "names", "digits", "classes", "unknown", "some unknown", "missing", "lists", "bools"]
        )
    )
    ids = draw(st.lists(st.integers(0, 2), min_size=ROWS, max_size=ROWS))
    if kind == "bools":
        return kind, [bool(i % 2) for i in ids], datasets.Value("bool"), [i % 2 for i in ids]
    if kind == "ids":
        return kind, ids, datasets.Value(draw(st.sampled_from(["int8", "int64", "uint16"]))), ids
    if kind == "floats":
        return kind, [float(i) for i in ids], datasets.Value("float32"), ids
    spell = draw(st.sampled_from([str.upper, str.title, str.lower, lambda s: f" {s} "]))
    if kind == "names":
        return kind, [spell(NAMES[i]) for i in ids], datasets.Value("string"), ids
    if kind == "digits":
        return kind, [str(i) for i in ids], datasets.Value("string"), ids
    order = draw(st.permutations(NAMES))
    if kind == "classes":
        return kind, [order.index(NAMES[i]) for i in ids], datasets.ClassLabel(names=[spell(n) for n in order]), ids
    if kind == "unknown":
        return kind, ["horse"] * ROWS, datasets.Value("string"), None
    if kind == "some unknown":
        return kind, ["horse", *(NAMES[i] for i in ids[1:])], datasets.Value("string"), None
    if kind == "lists":
        return kind, [[i] for i in ids], datasets.List(datasets.Value("int64")), None
    at = draw(st.integers(0, ROWS - 1))
    return kind, [None if i == at else NAMES[k] for i, k in enumerate(ids)], datasets.Value("string"), None


@st.composite
def pictures(draw):
    """Encoded pictures of a mode each, one of which may be missing or broken."""
    rng, found = np.random.default_rng(draw(st.integers(0, 99))), []
    for _ in range(ROWS):
        mode = draw(st.sampled_from(MODES))
        size = draw(st.sampled_from([(8, 8), (5, 9), (1, 1)]))
        buffer = io.BytesIO()
        if mode in ("I;16", "I", "F"):
            kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
            values = rng.random(size[::-1]) if mode == "F" else rng.integers(0, 65536, size[::-1])
            picture = Image.fromarray(values.astype(kind))
        else:
            picture = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3)).astype(np.uint8)).convert(mode)
        picture.save(buffer, "TIFF" if mode in ("F", "I", "CMYK") else "PNG")
        found.append({"bytes": buffer.getvalue(), "path": None})
    fault = draw(st.sampled_from([None, None, "missing", "cut", "no picture"]))
    if fault:
        at = draw(st.integers(0, ROWS - 1))
        found[at] = {
            "missing": None,
            "cut": {"bytes": found[at]["bytes"][:40], "path": None},
            "no picture": {"bytes": b"\0" * 50, "path": None},
        }[fault]
    return found, fault


@st.composite
def texts(draw):
    words = st.text(st.sampled_from([*"abz éß漢😀", "\n", "\x00"]), max_size=12)
    found = [f"{draw(words)} {i}" for i in range(ROWS)]
    fault = draw(st.sampled_from([None, None, "missing"]))
    if fault:
        found[draw(st.integers(0, ROWS - 1))] = None
    return found, fault


@st.composite
def tables(draw):
    """A data set, the flags that it needs, and what has to come out: labels, or None where it has to be refused."""
    kind, values, feature, expected = draw(labels())
    picture = draw(st.booleans())
    inputs, fault = draw(pictures() if picture else texts())
    label = draw(st.sampled_from(["label", "labels", "gold", "fine_label"]))
    name = draw(st.sampled_from(["image", "img"] if picture else ["text", "sentence", "review", "tweet"]))
    columns = {name: inputs, label: values, "source": draw(st.permutations(["a", "b"] * (ROWS // 2)))}
    kinds = {name: datasets.Image(decode=False) if picture else datasets.Value("string"), label: feature}
    kinds["source"] = datasets.Value("string")
    extra = draw(st.sampled_from([None, "city", "note"]))
    if extra:
        columns[extra], kinds[extra] = [f"{extra} {i}" for i in range(ROWS)], datasets.Value("string")
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    if picture:
        dataset = dataset.cast_column(name, datasets.Image())
    flags = {
        "label": label if draw(st.booleans()) else None,
        "image" if picture else "text": name if draw(st.booleans()) else None,
    }
    unclear = not flags["label"] and label in ("gold", "fine_label") and kind != "classes"
    unclear |= not picture and flags["text"] is None and name in ("review", "tweet") and extra is not None
    event(f"{'picture' if picture else 'text'}, labels: {kind}")
    return dataset, flags, None if fault or unclear else expected, "vit" if picture else "bert"


def one_line(error: BaseException) -> None:
    assert isinstance(error, ValueError), repr(error)
    assert str(error) and "\n" not in str(error), repr(error)


def check(make, expected, rows: np.ndarray) -> None:
    """``make`` gives a trainer with the right labels and finite inputs, or refuses what has to be refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer = make()
        except Exception as error:
            one_line(error)
            assert expected is None, error
            event("refused")
            return
    assert expected is not None, "taken, but it has to be refused"
    event("taken")
    found = np.concatenate([labels_of(trainer.forget_dataset), labels_of(trainer.retain_dataset)])
    assert found.tolist() == [expected[i] for i in rows]
    batch = trainer.data_collator([trainer.forget_dataset[i] for i in range(len(trainer.forget_dataset))])
    assert batch["labels"].tolist() == found[: len(trainer.forget_dataset)].tolist()
    main = batch.get("pixel_values", batch.get("input_ids"))
    assert torch.isfinite(main.float()).all() and len(main) == len(trainer.forget_dataset)
    assert "pixel_values" not in batch or (main.shape[1:] == (3, 8, 8) and main.abs().max() <= 1.001)


@FUZZ
@given(table=tables())
def test_python(table, checkpoints, tmp_path):
    dataset, flags, expected, kind = table
    picture = kind == "vit"
    processor = (
        ViTImageProcessorPil.from_pretrained(checkpoints / kind)
        if picture
        else BertTokenizerFast.from_pretrained(checkpoints / kind)
    )
    forget = np.asarray([s == "a" for s in dataset["source"][:]])
    rows = np.concatenate([np.flatnonzero(forget), np.flatnonzero(~forget)])
    given_columns = Columns(text=flags.get("text"), image=flags.get("image"), label=flags["label"], bias="source")

    def make():
        model = named(make_model(kind, **({"num_channels": 3} if picture else {})), *NAMES)
        parts = dataset.select(np.flatnonzero(forget)), dataset.select(np.flatnonzero(~forget))
        return UIBTrainer(model, config(tmp_path), *parts, processing_class=processor, columns=given_columns)

    check(make, expected, rows)


@FUZZ
@given(table=tables(), file=st.sampled_from(["parquet", "save_to_disk"]))
def test_command_line(table, file, checkpoints, tmp_path_factory):
    dataset, flags, expected, kind = table
    folder = tmp_path_factory.mktemp("data")
    if file == "parquet":
        path = str(folder / "data.parquet")
        dataset.to_parquet(path)
    else:
        path = str(folder / "data")
        dataset.save_to_disk(path)
    forget = np.asarray([s == "a" for s in dataset["source"][:]])
    rows = np.concatenate([np.flatnonzero(forget), np.flatnonzero(~forget)])
    job = UnlearnArguments(
        model_name_or_path=str(checkpoints / kind), dataset_name=path, forget_where=["source=a"], label_column=flags["label"],
        text_column=[flags["text"]] if flags.get("text") else [], image_column=flags.get("image"),
    )  # fmt: skip
    check(lambda: trainer_for(UIBConfig(str(folder / "out"), use_cpu=True, max_steps=2), job), expected, rows)
