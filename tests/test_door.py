"""What ordinary people bring: columns, labels, pictures, missing values, settings. Each test holds the right value."""

import io
import pickle
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas
import pytest
import torch
from conftest import make_model, make_rows
from peft import LoraConfig
from PIL import Image
from test_trainer import adapter_weights, config, same
from transformers import (
    BertTokenizerFast,
    GPT2Config,
    GPT2ForSequenceClassification,
    ProcessorMixin,
    TrainingArguments,
    ViTImageProcessorPil,
)

from hf_uib import UIBConfig, UIBTrainer, audit_model
from hf_uib.data.columns import Columns, image_column, label_column, text_columns
from hf_uib.data.labels import class_ids, labels_of, named_config
from hf_uib.data.reading import Reader
from hf_uib.data.sources import load_splits, matching_rows, near_misses, split_forget, without_rows_of
from hf_uib.data.transforms import to_channels, waveform
from hf_uib.inference import part_for
from hf_uib.lora import require_additive
from hf_uib.models import blocks_of

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "crew", "late", "seat"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return BertTokenizerFast(str(path))


def named(model, *names):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    return model


def texts(n=12, **columns):
    rng = np.random.default_rng(0)
    review = [" ".join(rng.choice(WORDS[5:], 4)) + f" {i}" for i in range(n)]
    return datasets.Dataset.from_dict({"review": review, "label": [i % 3 for i in range(n)], **columns})


def picture_of(value, mode="L", size=(8, 8)):
    if mode == "I;16":
        return Image.fromarray(np.full(size, value, np.uint16))
    return Image.new(mode, size, value)


# ---- Columns ----


@pytest.mark.parametrize(
    "names", [("question", "sentence"), ("question", "passage"), ("text", "text_pair"), ("premise", "hypothesis")]
)
def test_both_texts_of_a_pair_are_read(names):
    columns = {name: [f"{name} {i}" for i in range(3)] for name in reversed(names)}
    rows = datasets.Dataset.from_dict({"idx": [0, 1, 2], **columns, "label": [0, 1, 0]})
    assert text_columns(rows) == names


def test_pictures_in_a_column_with_the_input_s_own_name():
    pictures = [picture_of(value) for value in range(24)]
    rows = datasets.Dataset.from_dict({"pixel_values": pictures, "label": [i % 3 for i in range(24)]})
    rows = rows.cast_column("pixel_values", datasets.Image())
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    one = Reader(make_model(num_channels=3).config, "pixel_values", processor)(rows)[0]
    assert one["pixel_values"].shape == (3, 8, 8) and one["labels"] == 0


def test_a_collator_of_one_s_own_gets_what_trainer_would_give_it(tmp_path):
    seen = []

    def collate(rows):
        seen.append(set(rows[0]))
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.stack([row["label"] for row in rows]),
        }

    forget, retain = (make_rows(n=16, seed=seed).rename_column("labels", "label") for seed in (1, 2))
    UIBTrainer(make_model(), config(tmp_path), forget, retain, data_collator=collate).train()
    assert all(columns == {"pixel_values", "label"} for columns in seen)


def test_a_processor_of_several_parts(tokenizer):
    class Both(ProcessorMixin):
        attributes = ("image_processor", "tokenizer")

        def __init__(self, image_processor, tokenizer):
            self.image_processor, self.tokenizer = image_processor, tokenizer

    images = ViTImageProcessorPil(size={"height": 8, "width": 8})
    both = Both(images, tokenizer)
    assert part_for(make_model(), both) is images and part_for(make_model("bert"), both) is tokenizer
    assert part_for(make_model(), images) is images and part_for(make_model(), None) is None


@pytest.mark.parametrize(
    "columns, said",
    [
        ({"picture": ["a.png"] * 12}, "no column of pictures .*--image_column"),
        ({"image": [[[1]]] * 12}, "--image_column"),
    ],
)
def test_what_is_missing_is_named_where_a_processor_was_given(tmp_path, columns, said):
    rows = datasets.Dataset.from_dict({**columns, "label": [0, 1, 2] * 4, "i": range(12)})
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    with pytest.raises(ValueError, match=said):
        UIBTrainer(make_model(), config(tmp_path), rows, processing_class=processor)
    listed = [dict(row) for row in rows]
    with pytest.raises(ValueError, match="datasets.Dataset"):
        UIBTrainer(make_model(), config(tmp_path), listed, processing_class=processor)


def test_a_column_of_a_condition_or_the_bias_is_never_the_text():
    rows = texts(airline=["x", "y"] * 6)
    with pytest.raises(ValueError, match=r"More than one column of text: review, airline; .*--text_column"):
        text_columns(rows)
    assert (
        text_columns(rows, Columns(other=("airline",))) == text_columns(rows, Columns(bias="airline")) == ("review",)
    )
    assert text_columns(rows, Columns(text="airline")) == ("airline",)
    assert text_columns(rows.rename_column("review", "sentence")) == ("sentence",)
    assert text_columns(rows.remove_columns("review"), Columns(bias="airline")) == ()


@pytest.mark.parametrize("pair", [("premise", "hypothesis"), ("sentence1", "sentence2"), ("left", "right")])
def test_sentence_pairs_go_in_as_pairs(tokenizer, pair):
    rows = datasets.Dataset.from_dict({pair[0]: ["good crew"], pair[1]: ["bad seat"], "gold": ["a"]})
    columns = Columns(text=pair if pair[0] == "left" else None, label="gold")
    model = named(make_model("bert"), "a", "b", "c")
    encoded = Reader(model.config, "input_ids", tokenizer, columns)(rows)
    assert encoded[0]["input_ids"] == tokenizer("good crew", "bad seat")["input_ids"]
    assert encoded[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1] and encoded[0]["labels"] == 0


def test_label_columns():
    names = {"fine": datasets.ClassLabel(names=["a", "b"]), "coarse": datasets.ClassLabel(names=["c"])}
    rows = datasets.Dataset.from_dict({"fine": [0, 1], "coarse": [0, 0]}, features=datasets.Features(names))
    with pytest.raises(ValueError, match=r"more than one column of classes \(fine, coarse\); .*--label_column"):
        label_column(rows)
    assert label_column(rows, Columns(label="coarse")) == "coarse"
    assert label_column(rows.remove_columns("coarse")) == "fine"
    with pytest.raises(ValueError, match="'nowhere' is not among fine, coarse"):
        label_column(rows, Columns(label="nowhere"))


def test_a_chosen_label_goes_before_one_that_is_called_label():
    rows = make_rows(n=6).with_format(None).rename_column("labels", "label").add_column("gold", [2, 2, 1, 1, 0, 0])
    encoded = Reader(make_model().config, "pixel_values", None, Columns(label="gold"))(rows)
    assert labels_of(encoded).tolist() == encoded[:]["labels"] == [2, 2, 1, 1, 0, 0] and "label" not in encoded[0]


def test_two_columns_of_pictures_are_refused():
    features = datasets.Features({"a": datasets.Image(), "b": datasets.Image()})
    rows = datasets.Dataset.from_dict({"a": [picture_of(0)], "b": [picture_of(0)]}, features=features)
    with pytest.raises(ValueError, match="More than one column of pictures: a, b"):
        image_column(rows)
    assert image_column(rows, Columns(image="b")) == "b"


# ---- Labels ----


def as_class_labels(values, names):
    features = datasets.Features({"label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"label": values}, features=features)


@pytest.mark.parametrize(
    "rows, expected",
    [
        (as_class_labels([0, 1, 2], ["Dog", "CAT", "cow"]), [1, 0, 2]),  # another order, another case
        (as_class_labels([0, 1], ["hot_dog", "cat"]), None),
        (datasets.Dataset.from_dict({"label": ["cow", " Cat", "DOG"]}), [2, 0, 1]),
        (datasets.Dataset.from_dict({"label": ["2", "0"]}), [2, 0]),
        (datasets.Dataset.from_dict({"label": [2.0, 0.0]}), [2, 0]),
        (datasets.Dataset.from_dict({"label": [True, False]}), [1, 0]),
        (datasets.Dataset.from_dict({"label": [2, 0]}), [2, 0]),
        (as_class_labels([1, 0], ["0", "1"]), [1, 0]),  # no name of the model
        (datasets.Dataset.from_dict({"label": ["cat", "horse"]}), None),
        (datasets.Dataset.from_dict({"label": ["horse"]}), None),
        (datasets.Dataset.from_dict({"label": [0.5]}), None),
        (datasets.Dataset.from_dict({"label": [[0, 1]]}), None),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the labels")
def test_labels_are_matched_by_name_or_refused(rows, expected):
    config = named(make_model(), "cat", "dog", "cow").config
    if expected is None:
        with pytest.raises(ValueError) as caught:
            class_ids(rows, config)
        assert "\n" not in str(caught.value)
        return
    ids, column = class_ids(rows, config), rows["label"][:]
    assert [value if ids is None else ids[value] for value in column] == expected
    assert labels_of(Reader(config, "input_ids")(rows)).tolist() == expected


def test_labels_taken_by_their_number_are_told():
    rows = as_class_labels([0, 1], ["neg", "pos"])
    with pytest.warns(UserWarning, match="neg = NEGATIVE, pos = POSITIVE"):
        assert class_ids(rows, named(make_model(num_labels=2), "NEGATIVE", "POSITIVE").config) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert class_ids(rows, make_model(num_labels=2).config) is None  # LABEL_0, LABEL_1: nobody named them


def test_names_that_differ_in_case_alone_are_matched_exactly():
    config = named(make_model(num_labels=2), "us", "US").config
    assert class_ids(datasets.Dataset.from_dict({"label": ["US", "us"]}), config) == {"US": 1, "us": 0}


def test_id2label_alone_is_enough():
    model = make_model()
    model.config.id2label, model.config.label2id = {0: "cat", 1: "dog", 2: "cow"}, None
    assert class_ids(datasets.Dataset.from_dict({"label": ["cow", "cat"]}), model.config) == {"cow": 2, "cat": 0}


def test_conditions_are_read_on_the_data_as_they_came():
    rows = datasets.Dataset.from_dict(
        {"label": ["cat", "dog", "cat"], "when": ["2024-01-01", "2025-01-01", "2024-01-01"]}
    )
    assert matching_rows(rows, ["label=cat"]).tolist() == [True, False, True]
    dated = rows.cast_column("when", datasets.Value("date32"))
    assert matching_rows(dated, ["when=2024-01-01"]).tolist() == [True, False, True]
    forget, retain = split_forget(as_class_labels([1, 0, 1], ["dog", "cat"]), ["label=cat"], "train")
    assert len(forget) == 2 and labels_of(
        Reader(named(make_model(), "cat", "dog", "x").config, "x")(forget)
    ).tolist() == [0, 0]
    assert labels_of(Reader(named(make_model(), "cat", "dog", "x").config, "x")(retain)).tolist() == [1]


def test_one_decision_for_the_labels_of_every_set():
    """Names are matched over all names of the data: a set that holds the unknown one alone is refused too."""
    config = named(make_model(), "cat", "dog", "bird").config
    classes = ["bird", "dog", "kitty"]
    assert class_ids(as_class_labels([0, 1], classes), config) == {0: 2, 1: 1}
    with pytest.raises(ValueError, match="The label 'kitty' of the data is no class of the model"):
        class_ids(as_class_labels([2, 2], classes), config)


def test_numbers_as_class_names():
    stars = named(make_model(num_labels=5), "1", "2", "3", "4", "5").config
    with pytest.raises(ValueError, match="the model calls class 0 .1.: give the labels as text"):
        class_ids(datasets.Dataset.from_dict({"label": [1, 2]}), stars)
    for others in ([1.0, 2.0], ["1.0", "2.0"]):  # a column of integers with a gap, and as text
        with pytest.raises(ValueError, match="the model calls class 0 .1.: give the labels as text"):
            class_ids(datasets.Dataset.from_dict({"label": others}), stars)
    assert class_ids(datasets.Dataset.from_dict({"label": ["1", "5"]}), stars) == {"1": 0, "5": 4}
    assert (
        class_ids(datasets.Dataset.from_dict({"label": [1, 0]}), named(make_model(num_labels=2), "0", "1").config)
        is None
    )
    booleans = named(make_model(num_labels=2), "True", "False").config
    assert class_ids(datasets.Dataset.from_dict({"label": [True, False]}), booleans) == {True: 0, False: 1}


def test_labels_that_some_sets_have_by_another_number(tmp_path):
    """The forget set's class has the same number in data and model, the others' have not; a batch holds both."""
    model = named(make_model(), "cat", "dog", "bird")
    rows = make_rows(n=48, seed=1).with_format(None).rename_column("labels", "label")
    rows = rows.cast_column("label", datasets.ClassLabel(names=["bird", "dog", "cat"]))
    forget, retain = split_forget(rows, ["label=DOG"], "train")
    trainer = UIBTrainer(model, config(tmp_path), forget, retain, make_rows(n=8, seed=3))
    assert set(labels_of(trainer.forget_dataset)) == {1}
    assert labels_of(trainer.retain_dataset).tolist() == [2 - label for label in retain["label"]]
    trainer.train()


def test_columns_are_decided_once(tmp_path, tokenizer):
    names = {"text": ["good 1", "bad 2"] * 6, "review": [f"late {i}" for i in range(12)], "label": [0, 1, 2] * 4}
    train = datasets.Dataset.from_dict(names)
    with pytest.raises(ValueError, match="text column 'text' is not among review, label"):
        UIBTrainer(
            make_model("bert"), config(tmp_path), train, None, train.remove_columns("text"), processing_class=tokenizer
        )
    with pytest.raises(ValueError, match="Column 'text' is used in a condition"):
        text_columns(train, Columns(other=("text",)))
    for wrong in (Columns(text="label", label="label"), Columns(text=("a", "b", "c"))):
        with pytest.raises(ValueError, match="one column, or two of a pair"):
            text_columns(train, wrong)
    with pytest.raises(ValueError, match="columns 'labels' and 'label'; say which"):
        label_column(train.add_column("labels", train["label"]))


@pytest.mark.parametrize("kind, most", [("bert", 40), ("roberta", 38)])
def test_texts_are_cut_to_the_positions_of_the_model(tokenizer, kind, most):
    rows = datasets.Dataset.from_dict({"text": ["good " * 300], "label": [0]})
    encoded = Reader(make_model(kind).config, "input_ids", tokenizer)(rows)
    assert len(encoded[0]["input_ids"]) == most
    assert len(Reader(make_model(kind).config, "input_ids", tokenizer, max_length=7)(rows)[0]["input_ids"]) == 7


def test_a_column_of_paths_that_is_named_holds_pictures(tmp_path):
    picture_of(90).save(tmp_path / "a.png")
    rows = datasets.Dataset.from_dict({"file": [str(tmp_path / "a.png")], "label": [0]})
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.5], image_std=[0.5])
    read = Reader(make_model().config, "pixel_values", processor, Columns(image="file"))
    assert read(rows)[0]["pixel_values"].shape == (1, 8, 8)
    with pytest.raises(ValueError, match="Row 0 of the data has a picture that cannot be read"):
        read(datasets.Dataset.from_dict({"file": [str(tmp_path / "gone.png")], "label": [0]}))


@pytest.mark.parametrize(
    "condition, expected",
    [("score=0.1", [1, 0, 0]), ("when=2020-01-01", [1, 0, 0]), ("source=", [0, 1, 0]), ("kind=dog", [0, 0, 1])],
)
def test_conditions_on_values_of_every_kind(condition, expected):
    import datetime

    rows = datasets.Dataset.from_dict(
        {
            "score": [0.1, 0.2, None],
            "when": [datetime.datetime(2020, 1, 1, 5), datetime.datetime(2021, 1, 1), None],
            "source": ["x", None, "y"],
            "kind": [0, 0, 1],
        },
        features=datasets.Features(
            {
                "score": datasets.Value("float32"),
                "when": datasets.Value("timestamp[s]"),
                "source": datasets.Value("string"),
                "kind": datasets.ClassLabel(names=["Cat", "Dog"]),
            }
        ),
    )
    assert matching_rows(rows, [condition]).tolist() == [bool(e) for e in expected]


def test_values_that_nearly_meet_a_condition_are_counted():
    rows = datasets.Dataset.from_dict({"source": ["x", "x ", "X", None, "y"], "n": [1, 1, 2, 3, 4]})
    assert near_misses(rows, ["source=x", "n=1"]) == {"source": 2} and near_misses(rows, ["source=z"]) == {}


def test_models_whose_classes_have_another_order():
    one, other = (named(make_model(), *names).config for names in (("a", "b", "c"), ("C", "b", "a")))
    assert named_config({"the model": make_model().config, "x": one}) is one
    with pytest.raises(ValueError, match="The classes of it and the model have the same names in another order"):
        named_config({"the model": one, "it": other})


def test_what_is_no_set_of_rows_is_named(tmp_path):
    for wrong in (datasets.DatasetDict(train=make_rows(n=4)), "train.csv"):
        with pytest.raises(ValueError, match=r"forget_dataset is a (DatasetDict|str); give one set of rows"):
            UIBTrainer(make_model(), config(tmp_path), wrong)
    model = make_model()
    UIBTrainer(model, config(tmp_path), make_rows(n=8, seed=1), make_rows(n=8, seed=2), make_rows(n=8, seed=3))
    with pytest.raises(ValueError, match="has the layers of an adapter in it already"):
        UIBTrainer(model, config(tmp_path), make_rows(n=8, seed=1), make_rows(n=8, seed=2), make_rows(n=8, seed=3))


# ---- Missing values ----


@pytest.mark.parametrize(
    "rows, said",
    [
        (
            {"text": ["good", None, "bad"], "label": [0, 1, 2]},
            r"Row 1 of retain_dataset has no text \(column 'text'\)",
        ),
        (
            {"text": ["good", "late", "bad"], "label": ["a", None, ""]},
            r"Row 1 .* no label \(column 'label'\) \(2 such rows\)",
        ),
        ({"text": ["good", "late", "bad"], "label": [0.0, 1.0, None]}, r"Row 2 .* no label"),
        ({"text": ["good", "late", "bad"], "label": [-1, -1, -1]}, "No row of retain_dataset has a label"),
        ({"text": ["good", "late", "bad"], "label": [0, -1, 1]}, "Row 1 .* no label"),
    ],
)
def test_missing_values_are_named_by_row(tokenizer, rows, said):
    read = Reader(named(make_model("bert"), "a", "b", "c").config, "input_ids", tokenizer)
    dataset = datasets.Dataset.from_dict(rows)
    with pytest.raises(ValueError, match=said):
        read(dataset, "retain_dataset")
    complete = [i for i in range(3) if i not in read.incomplete_rows(dataset)]
    assert complete == [i for i in range(3) if rows["text"][i] is not None and rows["label"][i] not in (None, "", -1)]


def encoded_picture(kind, **settings):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_pictures_that_cannot_be_read_are_named_by_row(kind):
    whole = encoded_picture(kind)
    rows = [{"bytes": whole, "path": None}, {"bytes": whole[: len(whole) // 2], "path": None}, None]
    rows.append({"bytes": b"no picture", "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({"image": rows, "label": [0] * 4}, features=features)
    dataset = dataset.cast_column("image", datasets.Image())
    read = Reader(make_model().config, "pixel_values", ViTImageProcessorPil(size={"height": 8, "width": 8}))
    faults = read.incomplete_rows(dataset)
    assert list(faults) == [1, 2, 3] and faults[2].startswith("no picture") and "cannot be read" in faults[1]
    with pytest.raises(ValueError, match=r"Row 1 of forget_dataset has a picture that cannot be read .*3 such rows"):
        read(dataset, "forget_dataset")


def test_rows_of_paths_may_be_incomplete(tmp_path):
    (tmp_path / "whole.png").write_bytes(encoded_picture("PNG"))
    (tmp_path / "cut.png").write_bytes(encoded_picture("PNG")[:500])
    paths = [str(tmp_path / "whole.png"), None, str(tmp_path / "cut.png")]
    dataset = datasets.Dataset.from_dict({"file": paths, "label": [0, 1, 1]})
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    faults = Reader(make_model().config, "pixel_values", processor, Columns(image="file")).incomplete_rows(dataset)
    assert list(faults) == [1, 2] and faults[1].startswith("no picture") and "cannot be read" in faults[2]


# ---- Pictures ----


@pytest.mark.parametrize(
    "picture, channels, expected",
    [
        (picture_of(65535, "I;16"), 1, 255),
        (picture_of(32768, "I;16"), 3, 128),
        (picture_of(257, "I;16"), 1, 1),
        (picture_of(65535, "I"), 1, 255),
        (picture_of(257, "I"), 1, 1),
        (picture_of(0.5, "F"), 1, 128),
        (picture_of(1.0, "F"), 3, 255),
        (picture_of(90), 3, 90),
        (picture_of((90, 90, 90), "RGB"), 1, 90),
        (picture_of(1, "1"), 3, 255),
        (picture_of((90, 90, 90, 255), "RGBA"), 3, 90),
        (picture_of((90, 255), "LA"), 1, 90),
        (picture_of((0, 0, 0, 165), "CMYK"), 3, 90),
        (picture_of((90, 90, 90), "RGB").quantize(2), 3, 90),
    ],
)
def test_pictures_of_any_mode_keep_their_range(picture, channels, expected):
    values = np.asarray(to_channels(picture, channels))
    assert values.dtype == np.uint8 and values.shape == ((8, 8) if channels == 1 else (8, 8, 3))
    assert np.abs(values.astype(int) - expected).max() <= 1


def test_pictures_of_mixed_modes_make_one_batch():
    pictures = [picture_of(90), picture_of((90, 90, 90), "RGB"), picture_of(90 * 257, "I;16")]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"img": pictures, "label": [0, 1, 2]}, features=features)
    for channels, processor in (
        (1, ViTImageProcessorPil(do_resize=False, image_mean=[0.5], image_std=[0.5])),
        (3, ViTImageProcessorPil(do_resize=False)),
    ):
        read = Reader(make_model(num_channels=channels).config, "pixel_values", processor)
        pixels = torch.as_tensor(np.stack(read(rows)[:]["pixel_values"]))
        assert pixels.shape == (3, channels, 8, 8)
        torch.testing.assert_close(pixels, torch.full_like(pixels, 90 / 255 * 2 - 1), atol=0.01, rtol=0)


# ---- Sources ----


def write(folder: Path, **files) -> str:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_csv", ".csv").replace("_md", ".md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return str(folder)


@pytest.mark.parametrize(
    "files, said",
    [
        (dict(a_csv="text,label\nx,0\n", b_csv="text,other\ny,1\n"), "do not have the same columns"),
        (
            dict(
                a_csv="text,label\nx,0\n",
                b_csv="text,label\ny,1\n",
                README_md="---\nconfigs:\n- config_name: one\n  data_files: a.csv\n- config_name: two\n  data_files: b.csv\n---\n",
            ),
            "several configurations: one, two; choose one with --dataset_config_name",
        ),
        (dict(notes_md="nothing here"), "data holds no file of data that can be read"),
    ],
)
def test_what_datasets_says_becomes_one_line(tmp_path, files, said):
    with pytest.raises(ValueError, match=said) as caught:
        load_splits(write(tmp_path / "data", **files))
    assert "\n" not in str(caught.value) and "data" in str(caught.value)


def test_class_folders_with_metadata_keep_their_classes(tmp_path):
    lines = ["file_name,source"]
    for i in range(3):
        for name in ("dog", "cat"):
            (tmp_path / "pics" / name).mkdir(parents=True, exist_ok=True)
            picture_of(i).save(tmp_path / "pics" / name / f"{i}.png")
            lines.append(f"{name}/{i}.png,{'ab'[i % 2]}")
    (tmp_path / "pics" / "metadata.csv").write_text("\n".join(lines))
    train = load_splits(tmp_path / "pics")["train"]
    folders = {
        Path(row["path"]).parent.name for row in train.cast_column("image", datasets.Image(decode=False))["image"]
    }
    assert folders == {"cat", "dog"} and train.features["label"].names == ["cat", "dog"]
    for row, encoded in zip(train, train.cast_column("image", datasets.Image(decode=False)), strict=True):
        assert Path(encoded["image"]["path"]).parent.name == ["cat", "dog"][row["label"]]
    assert set(train["source"]) == {"a", "b"}


def test_shared_rows_leave_the_less_important_set():
    rows = make_rows(n=10).with_format(None)
    assert (
        without_rows_of(rows.select(range(3, 8)), [rows.select(range(5)), rows.select([9])])[:]["source"]
        == rows[5:8]["source"]
    )
    whole = rows.select(range(5, 8))
    assert without_rows_of(whole, [rows.select(range(5))]) is whole


# ---- Through the trainer ----


def text_trainer(path, tokenizer, **settings):
    forget, retain = texts(9, airline=["x"] * 9), texts(24, airline=["y"] * 24).select(range(9, 24))
    names = dict(processing_class=tokenizer, columns=Columns(text="review", bias="airline"))
    return UIBTrainer(make_model("bert"), config(path, **settings), forget, retain, **names)


@pytest.mark.filterwarnings("ignore:No calibration_dataset")
def test_nothing_is_written_beside_the_data_of_the_user(tmp_path, tokenizer):
    texts(24, airline=["x", "y"] * 12).save_to_disk(str(tmp_path / "data"))
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    forget, retain = split_forget(load_splits(tmp_path / "data")["train"], ["airline=x"], "train")
    trainer = UIBTrainer(
        make_model("bert"), config(tmp_path / "out"), forget, retain, processing_class=tokenizer,
        columns=Columns(other=("airline",)),
    )  # fmt: skip
    trainer.train()
    assert {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()} == before


@pytest.mark.filterwarnings("ignore:No calibration_dataset")
def test_transforms_can_be_sent_to_workers_of_every_kind(tmp_path, tokenizer):
    trainer = text_trainer(tmp_path, tokenizer)
    again = pickle.loads(pickle.dumps(trainer.forget_dataset))
    assert again[0]["input_ids"] == trainer.forget_dataset[0]["input_ids"]
    pickle.dumps(trainer.data_collator)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No calibration_dataset")
def test_spawned_workers_give_the_same_trajectory(tmp_path, tokenizer):
    runs = []
    for workers in (0, 1):
        trainer = text_trainer(tmp_path, tokenizer, dataloader_num_workers=workers)
        if workers:
            trainer.get_train_dataloader = partial(spawning, trainer.get_train_dataloader)
        trainer.train()
        runs.append(adapter_weights(trainer))
    assert same(*runs)


def spawning(make_loader):
    loader = make_loader()
    loader.base_dataloader.multiprocessing_context = "spawn"
    return loader


@pytest.mark.filterwarnings("ignore:No calibration_dataset")
def test_raw_rows_are_evaluated_and_predicted_as_in_trainer(tmp_path, tokenizer):
    trainer = text_trainer(tmp_path, tokenizer)
    raw = texts(7, airline=["x"] * 7)
    plain = Reader(trainer.model.config, "input_ids", tokenizer, Columns(text="review"))(raw)
    assert trainer.evaluate(raw)["eval_loss"] == trainer.evaluate(plain)["eval_loss"]
    assert (trainer.predict(raw).predictions == trainer.predict(plain).predictions).all()
    assert set(trainer.evaluate({"a": raw, "b": raw})) >= {"eval_a_loss", "eval_b_loss"}
    assert trainer.predict(raw.remove_columns("label")).predictions.shape == (7, 3)


def test_training_arguments_are_taken_over(tmp_path):
    stock = TrainingArguments(
        str(tmp_path), max_steps=7, seed=5, use_cpu=True, per_device_train_batch_size=4, report_to="none"
    )
    trainer = UIBTrainer(make_model(), stock, make_rows(n=24, seed=1), make_rows(n=16, seed=2), make_rows(n=8, seed=3))
    args = trainer.args
    assert isinstance(args, UIBConfig) and (args.max_steps, args.seed, args.per_device_train_batch_size) == (7, 5, 4)
    assert (
        args.learning_rate == UIBConfig(str(tmp_path)).learning_rate
        and args.use_cpu
        and args.output_dir == str(tmp_path)
    )
    explicit = UIBConfig.from_training_arguments(
        TrainingArguments(str(tmp_path), learning_rate=3e-4, eval_strategy="steps")
    )
    with pytest.warns(UserWarning, match=r"UIBConfig: learning_rate 0\.002, per_device_train_batch_size 32"):
        UIBConfig.from_training_arguments(TrainingArguments(str(tmp_path), learning_rate=5e-5))
    assert explicit.learning_rate == 3e-4 and explicit.eval_strategy == "steps"


def test_remove_unused_columns_changes_nothing(tmp_path):
    runs = []
    for remove in (False, True):
        args = config(tmp_path, remove_unused_columns=remove)
        trainer = UIBTrainer(
            make_model(), args, make_rows(n=24, seed=1), make_rows(n=16, seed=2), make_rows(n=8, seed=3)
        )
        trainer.train()
        runs.append(adapter_weights(trainer))
    assert same(*runs)


def label_rows(batch):
    return {"pixel_values": torch.as_tensor(batch["pixel_values"]), "labels": torch.as_tensor(batch["source"])}


def test_labels_that_a_transform_makes(tmp_path):
    sets = [
        make_rows(n=n, seed=seed).with_format(None).remove_columns("labels") for n, seed in ((24, 1), (16, 2), (8, 3))
    ]
    trainer = UIBTrainer(make_model(), config(tmp_path), *(rows.with_transform(label_rows) for rows in sets))
    assert labels_of(trainer.forget_dataset).tolist() == sets[0]["source"][:]
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize(
    "test, said",
    [
        (make_rows(n=8, seed=4).with_format(None).remove_columns("labels"), "No column 'label' or 'labels'"),
        (
            make_rows(n=8, seed=4, num_labels=9).with_format(None),
            "eval_dataset has label 8, outside the model's 3 classes",
        ),
        (
            {"late": make_rows(n=8, seed=4).map(lambda row: {"labels": -1})},
            "No row of eval_dataset 'late' has a label",
        ),
    ],
)
def test_every_set_is_checked_before_the_first_step(tmp_path, test, said):
    with pytest.raises(ValueError, match=said):
        UIBTrainer(
            make_model(),
            config(tmp_path),
            make_rows(n=24, seed=1),
            make_rows(n=16, seed=2),
            make_rows(n=8, seed=3),
            test,
        )
    assert not any(tmp_path.iterdir())


def test_a_run_of_a_few_rows_gets_a_length_that_is_one(tmp_path):
    sets = make_rows(n=24, seed=1), make_rows(n=36, seed=2), make_rows(n=8, seed=3)
    with pytest.warns(UserWarning, match="36 rows make 27 steps in 3 epochs, too few to forget; 100 steps are taken"):
        trainer = UIBTrainer(make_model(), config(tmp_path, max_steps=-1), *sets)
    assert trainer.args.max_steps == 100
    with pytest.warns(UserWarning, match="9 steps are too few to forget anything; set max_steps to 100"):
        trainer = UIBTrainer(
            make_model(), config(tmp_path, max_steps=-1, num_train_epochs=1, prior_update_steps=20), *sets
        )
    assert trainer.args.max_steps == -1  # as it was asked for
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        UIBTrainer(make_model(), config(tmp_path, max_steps=5), *sets)


def test_an_empty_share_of_the_rows_is_an_empty_tensor(tmp_path):
    trainer = UIBTrainer(
        make_model(), config(tmp_path), make_rows(n=24, seed=1), make_rows(n=16, seed=2), make_rows(n=8, seed=3)
    )
    logits, labels = trainer.inference.forward(trainer.forget_dataset, [])
    assert logits.shape == (0, 3) and labels.shape == (0,) and labels.dtype == torch.long


def test_the_audit_reads_as_the_trainer_does(tokenizer):
    rows = texts(40, airline=["x", "y"] * 20)
    model = named(make_model("bert"), "a", "b", "c")
    named_rows = rows.map(lambda row: {"gold": ["c", "a", "b"][row["label"]]}).remove_columns("label")
    settings = dict(
        processing_class=tokenizer, bias_column="airline", columns=Columns(label="gold", bias="airline", text="review")
    )
    report = audit_model(
        model,
        reference_model=make_model("bert", seed=1),
        forget_dataset=named_rows,
        test_dataset=named_rows,
        **settings,
    )
    ids = rows.map(lambda row: {"label": [2, 0, 1][row["label"]]})
    settings["columns"] = Columns(bias="airline", text="review")
    again = audit_model(
        model, reference_model=make_model("bert", seed=1), forget_dataset=ids, test_dataset=ids, **settings
    )
    assert report.metrics["test"] == again.metrics["test"]


def test_a_decoder_whose_config_has_no_padding_token(tmp_path, tokenizer):
    """As with Trainer the tokenizer's is taken."""
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, num_labels=3, n_positions=32)
    )
    assert model.config.pad_token_id is None
    forget, retain = texts(12), texts(24).select(range(12, 24))
    trainer = UIBTrainer(model, config(tmp_path), forget, retain, processing_class=tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert trainer.predict(retain).predictions.shape == (12, 3)
    trainer.train()


@pytest.mark.parametrize("positions, longest", [(-1, None), (None, None), (24, 24)])
def test_truncation_where_a_model_has_no_number_of_positions(tokenizer, positions, longest):
    """XLNet's config says -1."""
    described = SimpleNamespace(max_position_embeddings=positions, model_type="xlnet", pad_token_id=5)
    assert Reader(described, "input_ids", tokenizer).longest() == longest


def test_blocks_in_lists_of_lists():
    """As PoolFormer's and PVT's: the lists are never called, their items are."""
    block = lambda: torch.nn.Linear(4, 4)
    model = torch.nn.ModuleDict(
        {"stages": torch.nn.ModuleList([torch.nn.ModuleList([block(), block()]) for _ in range(2)])}
    )
    blocks = blocks_of(model)
    assert list(blocks) == [f"block {i}" for i in (1, 2, 3, 4)]
    assert blocks["block 3"] is model["stages"][1][0]


def test_an_adapter_for_which_peft_set_nothing(tmp_path):
    """Of a mixture of experts it sets an empty set of parameters."""
    require_additive(LoraConfig(r=2, target_parameters=set()))
    with pytest.raises(ValueError, match="target_parameters"):
        require_additive(LoraConfig(r=2, target_parameters={"experts"}))
    with pytest.raises(ValueError, match="peft_config is a dict; give a LoraConfig"):
        UIBTrainer(make_model(), config(tmp_path), make_rows(n=12, seed=1), peft_config={"r": 2})


def test_a_table_is_told_how_to_become_a_set(tmp_path):
    with pytest.raises(ValueError, match="from_pandas"):
        UIBTrainer(make_model(), config(tmp_path), pandas.DataFrame({"label": [0, 1, 2]}))


def test_a_sound_as_an_array(tmp_path):
    array = np.sin(np.arange(80) / 5)
    assert np.allclose(waveform({"array": array, "path": None, "sampling_rate": 16000}, 16000), array)
    assert len(waveform({"array": array, "sampling_rate": 8000}, 16000)) == 160


def test_a_column_may_have_the_name_of_a_set(tmp_path):
    rows = [make_rows(n=12, seed=i).rename_column("source", "retain") for i in (1, 2)]
    trainer = UIBTrainer(make_model(), config(tmp_path, max_steps=2), *rows)
    trainer.train()
    assert trainer.state.global_step == 2


class Tuples(torch.utils.data.Dataset):
    """As torchvision gives rows."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.zeros(1, 8, 8), 0


@pytest.mark.parametrize("where", ["forget_dataset", "eval_dataset"])
def test_rows_without_columns_are_refused(tmp_path, where):
    sets = {"forget_dataset": make_rows(n=8)} | {where: Tuples()}
    with pytest.raises(ValueError, match=f"The rows of {where} are tuples; give dictionaries, with columns by name"):
        UIBTrainer(make_model(), config(tmp_path), retain_dataset=make_rows(n=8, seed=2), **sets)
