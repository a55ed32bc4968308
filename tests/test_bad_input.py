"""Bad input as a table: one clear line each (ValueError or OSError), nothing half-written."""

import os
import re

import datasets
import pytest
import transformers
from conftest import make_model, make_rows
from datasets.distributed import split_dataset_by_node
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from test_cli import pictures  # noqa: F401
from test_trainer import config, make_trainer

from hf_uib import UIBConfig, UIBTrainer, audit_model
from hf_uib.cli.unlearn import UnlearnArguments, unlearn
from hf_uib.data.sources import load_processor
from hf_uib.models import load_classifier


def other_head(name):
    config = make_model("bert").config
    config.is_decoder = name == "BertLMHeadModel"
    return getattr(transformers, name)(config)


def train(path, model=None, forget=None, retain=None, calibration=None, peft_config=None, **settings):
    """Build a trainer from good parts but for those given, and train."""
    trainer = UIBTrainer(
        make_model() if model is None else model,
        config(path, max_steps=2, **settings),
        make_rows(n=24, seed=1) if forget is None else forget,
        make_rows(n=16, seed=2) if retain is None else retain,
        calibration_dataset=make_rows(n=12, seed=3) if calibration is None else calibration,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model()


def rows_with(change, n=24, seed=1, **settings):
    """Rows with one of them changed."""
    rows = make_rows(n=n, seed=seed, **settings).with_format(None)
    return rows.map(lambda row, i: change(row) if i == 3 else {}, with_indices=True).with_format("torch")


def pixels(value):
    return lambda row: {"pixel_values": [[[value] * 8] * 8]}


def relabelled(values, seed=1):
    rows = make_rows(n=len(values), seed=seed).with_format(None).remove_columns("labels")
    return rows.add_column("labels", values).with_format("torch")


def breaking_stream():
    def rows():
        yield from make_rows(n=5)
        raise OSError("gone")

    return datasets.IterableDataset.from_generator(rows)


def over_two_devices():
    model = make_model()
    model.hf_device_map = {"vit": 0, "classifier": 1}
    return model


def texts():
    return [make_rows("bert", seed=seed) for seed in (1, 2, 3)]


def saved_adapter(path, trainable=True):
    path = path.parent / "adapter"
    get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(path)
    return PeftModel.from_pretrained(make_model(), path, is_trainable=trainable)


def checkpoint(path, **settings):
    make_trainer(path, save_strategy="steps", save_steps=3, **settings).train()
    return str(path / "checkpoint-3")


def resume_with_another_forget_set(path):
    trainer = UIBTrainer(make_model(), config(path), make_rows(n=20, seed=9), make_rows(n=16, seed=2))
    trainer.train(resume_from_checkpoint=checkpoint(path))


def broken(path, name, content=b"\x00\x01not what it should be"):
    folder = path / "model"
    make_model().save_pretrained(folder)
    (folder / name).write_bytes(content)
    return str(folder)


TRAINER = {
    "no forget set": (lambda p: UIBTrainer(make_model(), config(p), None, make_rows()), "needs a forget_dataset"),
    "empty forget set": (lambda p: train(p, forget=make_rows(n=0)), "forget_dataset has no examples"),
    "empty retained set": (lambda p: train(p, retain=make_rows(n=0)), "retain_dataset has no examples"),
    "empty calibration set": (lambda p: train(p, calibration=make_rows(n=0)), "calibration_dataset has no examples"),
    "the same rows in both sets": (lambda p: train(p, retain=make_rows(n=24, seed=1)), "are in retain_dataset too"),
    "one row in both sets": (lambda p: train(p, retain=make_rows(n=24, seed=1).select([5])), "1 rows of forget_dataset"),
    "calibration rows that are to be forgotten": (
        lambda p: train(p, calibration=make_rows(n=24, seed=1).select([3, 4])), "2 rows of forget_dataset are in calibration",
    ),
    "calibration rows that were trained on": (
        lambda p: train(p, calibration=make_rows(n=16, seed=2).select([3])), "1 rows of retain_dataset are in calibration_dataset",
    ),
    "label too large": (lambda p: train(p, forget=relabelled([0, 1, 7])), "has label 7, outside the model's 3 classes"),
    "negative label": (lambda p: train(p, retain=relabelled([0, -100, 1])), "has label -100"),
    "label too large in calibration": (lambda p: train(p, calibration=relabelled([0, 9])), "has label 9"),
    "labels that are no integers": (lambda p: train(p, forget=relabelled([0.5, 1.0])), "are not integers"),
    "labels that are text": (lambda p: train(p, forget=relabelled(["a", "b"])), "The label 'a' of forget_dataset is no class"),
    "no label column": (lambda p: train(p, forget=make_rows().remove_columns("labels")), "No column 'label'"),
    "NaN in forget pixels": (lambda p: train(p, forget=rows_with(pixels(float("nan")))), "not finite"),
    "NaN in retained pixels": (lambda p: train(p, retain=rows_with(pixels(float("nan")), 16, 2)), "not finite"),
    "infinite pixels": (lambda p: train(p, forget=rows_with(pixels(float("inf")))), "not finite"),
    "texts for a picture model": (lambda p: train(p, forget=make_rows("bert"), retain=make_rows("bert", seed=5)), "pixel_values"),
    "pictures for a text model": (lambda p: train(p, model=make_model("bert")), "input_ids"),
    "a stream that breaks off": (lambda p: train(p, forget=breaking_stream()), "is a stream that breaks off (OSError: gone)"),
    "an empty stream": (lambda p: train(p, retain=make_rows().to_iterable_dataset().take(0)), "retain_dataset has no examples"),
    "a stream split by process": (
        lambda p: train(p, calibration=split_dataset_by_node(make_rows().to_iterable_dataset(), 0, 2)), "give every process the",
    ),
    "a model over several devices": (lambda p: train(p, model=over_two_devices()), "layers are on several devices (0, 1)"),
    "a model that is not loaded": (lambda p: train(p, model=make_model().to("meta")), "holds no weight (it is on `meta`)"),
    "regression": (lambda p: train(p, model=make_model(num_labels=1, problem_type="regression")), "problem_type"),
    "a model of several labels": (lambda p: train(p, model=make_model(problem_type="multi_label_classification")), "3 numbers"),
    "labels of rows for a model of tokens": (
        lambda p: train(p, other_head("BertForTokenClassification"), *texts()), "takes a label for each word",
    ),
    "answers to questions": (lambda p: train(p, model=other_head("BertForQuestionAnswering")), "Answering answers questions"),
    "generation": (lambda p: train(p, model=other_head("BertLMHeadModel")), "generates; for those see OpenUnlearning"),
    "an adapter that cannot be trained": (lambda p: train(p, model=saved_adapter(p, False)), "is_trainable=True"),
    "an adapter and a peft_config": (
        lambda p: train(p, model=saved_adapter(p), peft_config=LoraConfig()), "leave peft_config out",
    ),
    "an adapter that is not LoRA": (
        lambda p: train(p, model=get_peft_model(make_model(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))),
        "not LoRA",
    ),
    "an adapter on embeddings": (
        lambda p: train(p, make_model("bert"), *texts(), LoraConfig(r=2, target_modules=["word_embeddings"])), "Embedding",
    ),
    "an adapter on nothing": (lambda p: train(p, peft_config=LoraConfig(target_modules=["nothing"])), "nothing"),
    "influence without retained rows": (
        lambda p: UIBTrainer(make_model(), config(p, prior="influence"), make_rows()), "give a retain_dataset",
    ),
    "no level for the calibrated prior": (
        lambda p: UIBTrainer(make_model(), config(p, forget_target=float("-inf")), make_rows(), make_rows(seed=2)), "finite number",
    ),
    "unknown prior": (lambda p: config(p, prior="magic"), "choose one of"),
    "unknown subspace": (lambda p: config(p, prior_subspace="magic"), "choose one of"),
    "negative beta": (lambda p: config(p, beta=-1.0), "must be at least 0"),
    "negative gamma": (lambda p: config(p, prior_strength=-1.0), "must be at least 0"),
    "negative noise": (lambda p: config(p, noise_to_signal=-0.1), "must be at least 0"),
    "more than all rows": (lambda p: config(p, swap_fraction=1.5), "between 0 and 1"),
    "rank 0": (lambda p: config(p, subspace_rank=0), "must be at least 1"),
    "more than all steps": (lambda p: config(p, prior_fraction=1.5), "between 0 and 1"),
    "all retained rows held out": (lambda p: config(p, calibration_fraction=1.0), "between 0 and 0.9"),
    "no forget rows a step": (lambda p: config(p, forget_batch_size=0), "must be at least 1"),
    "one row to measure on": (lambda p: config(p, contrast_samples=1), "must be at least 2"),
    "resume from nowhere": (lambda p: make_trainer(p).train(resume_from_checkpoint=str(p)), "has no uib_state.safetensors"),
    "resume with another forget set": (resume_with_another_forget_set, "belongs to another forget set"),
    "resume with another model": (
        lambda p: make_trainer(p, model=make_model(seed=5)).train(resume_from_checkpoint=checkpoint(p)), "belongs to another model",
    ),
    "a folder without a model": (lambda p: load_classifier(str(p.parent)), "has no config.json"),
    "a model that is no classifier": (
        lambda p: load_classifier(broken(p, "config.json", b'{"model_type": "vit", "architectures": ["ViTModel"]}')),
        "which is no classifier of pictures",
    ),
    "a text model without its tokenizer": (
        lambda p: (make_model("bert").save_pretrained(p.parent / "bare"), load_processor(str(p.parent / "bare"), kind="text")),
        "has no tokenizer",
    ),
    "a broken config": (lambda p: load_classifier(broken(p, "config.json")), "config.json"),
    "broken weights": (lambda p: load_classifier(broken(p, "model.safetensors")), "model.safetensors"),
    "an audit without a reference": (
        lambda p: audit_model(make_model(), forget_dataset=make_rows(), test_dataset=make_rows(seed=3)), "Give the model before",
    ),
    "an audit of other classes": (
        lambda p: audit_model(
            make_model(), reference_model=make_model(num_labels=5), forget_dataset=make_rows(), test_dataset=make_rows()
        ),
        "different numbers of classes",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TRAINER)
def test_python(case, tmp_path):
    call, message = TRAINER[case]
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as caught:
        call(tmp_path / "out")
    assert "\n" not in str(caught.value).strip()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def parquet(path, columns, features=None):
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path / "train.parquet")
    return str(path / "train.parquet")


def damaged(path):
    (path / "train.parquet").write_bytes(b"PAR1 but not really")
    return str(path / "train.parquet")


def not_a_picture(path):
    image = {"bytes": b"no picture at all", "path": None}
    return parquet(
        path,
        {"image": [image] * 6, "label": [0, 1, 2] * 2, "source": ["clinic_a", "clinic_b"] * 3},
        datasets.Features(
            {"image": datasets.Image(), "label": datasets.Value("int64"), "source": datasets.Value("string")}
        ),
    )


def unknown_class(path):
    return parquet(path, {"text": ["x", "y"], "label": ["a", "zebra"], "source": ["clinic_a", "clinic_b"]})


COMMAND_LINE = {
    "no such data": (dict(dataset_name="no/such"), "neither here nor on the Hub"),
    "no such model": (dict(model_name_or_path="no/such-model"), "no/such-model"),
    "no condition": (dict(forget_where=[]), "--forget_where is missing"),
    "no equals sign": (dict(forget_where=["source"]), "write COLUMN=VALUE"),
    "unknown column": (dict(forget_where=["hue=3"]), "Column 'hue' is not in the dataset"),
    "unknown value": (dict(forget_where=["source=nowhere"]), "nothing to forget"),
    "unknown class": (dict(forget_where=["label=zebra"]), "No row of split 'train' meets label=zebra"),
    "a condition on pictures": (dict(forget_where=["image=x"]), "cannot be compared"),
    "unknown bias column": (dict(forget_where=["source=clinic_a"], bias_column=["hue"]), "bias_column 'hue'"),
    "unknown test split": (dict(forget_where=["source=clinic_a"], test_split="dev"), "No split 'dev'"),
    "unknown calibration split": (dict(forget_where=["source=clinic_a"], calibration_split="dev"), "No split 'dev'"),
    "no such oracle": (dict(forget_where=["source=clinic_a"], retrained_model="no/such-oracle"), "no/such-oracle"),
    "damaged Parquet": (dict(dataset_name=damaged), "train.parquet"),
    "a picture that is none": (
        dict(dataset_name=not_a_picture),
        "has a picture that cannot be read (UnidentifiedImageError)",
    ),
    "a class the model lacks": (
        dict(dataset_name=unknown_class),
        "The label 'zebra' of retain_dataset is no class of the model",
    ),
    "a file of another kind": (dict(dataset_name=__file__), "no CSV, JSON or Parquet file"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", COMMAND_LINE)
def test_command_line(case, pictures, tmp_path):  # noqa: F811
    changes, message = COMMAND_LINE[case]
    job = UnlearnArguments(str(pictures / "model"), str(pictures / "data"), forget_where=["source=clinic_a"])
    for name, value in changes.items():
        setattr(job, name, value(tmp_path) if callable(value) else value)
    args = UIBConfig(str(tmp_path / "out"), max_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no")
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as caught:
        unlearn(args, job)
    assert "\n" not in str(caught.value).strip()
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_good_parts_are_good(tmp_path):
    """The control of the table."""
    train(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
