"""Models of several labels a row: the same trainer, and an audit that looks at one of the labels."""

import copy
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import make_model, make_rows
from launching import unlearn_words
from test_trainer import adapter_weights, config, losses, same
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from bert_brand_bias import word_tokenizer

from hf_uib import UIBConfig, UIBTrainer, audit_model, retrain
from hf_uib.cli.main import dispatch
from hf_uib.data.labels import labels_of
from hf_uib.data.reading import Reader
from hf_uib.models import load_classifier
from hf_uib.unlearning_task import MultiLabel, task_of


def multi_model(architecture="vit", **settings):
    return make_model(architecture, problem_type="multi_label_classification", **settings)


def multi_rows(n=24, seed=0, missing=0.0, architecture="vit"):
    rows = make_rows(architecture, n, seed=seed)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (n, 3)).astype(float)
    labels[:, 1:][rng.random((n, 2)) < missing] = -1
    return rows.with_format(None).remove_columns("labels").add_column("labels", labels.tolist()).with_format("torch")


def multi_trainer(path, architecture="vit", missing=0.0, **settings):
    return UIBTrainer(
        multi_model(architecture),
        config(path, **settings),
        multi_rows(24, 1, missing, architecture),
        multi_rows(16, 2, missing, architecture),
        calibration_dataset=multi_rows(12, 3, missing, architecture),
    )


def test_terms_are_those_of_independent_binary_labels():
    logits, labels = torch.randn(5, 4), torch.randint(0, 2, (5, 4)).float()
    task = MultiLabel()
    plain = torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(task.fit_loss(logits, labels), plain(logits, labels))
    p = logits.sigmoid()
    log_odds = torch.where(labels > 0, p.log() - (1 - p).log(), (1 - p).log() - p.log())
    torch.testing.assert_close(task.margin(logits, labels), log_odds.sum(1))
    for missing in (-1.0, float("nan")):
        partly = labels.clone()
        partly[:, 2:] = missing  # not given
        torch.testing.assert_close(task.fit_loss(logits, partly), plain(logits[:, :2], labels[:, :2]))
        torch.testing.assert_close(task.margin(logits, partly), log_odds[:, :2].sum(1))
    assert task.fit_without_retained_data(logits, logits, labels).abs() < 1e-12
    moved = torch.where(labels > 0, logits - 3, logits)  # forgetting the labels that a row has costs nothing
    assert task.fit_without_retained_data(moved, logits, labels).abs() < 1e-12
    assert task.fit_without_retained_data(logits - 3, logits, labels) > 1e-2


def test_without_prior_and_noise_it_is_fine_tuning_to_the_bit(tmp_path):
    settings = dict(max_steps=9, per_device_train_batch_size=4, learning_rate=0.01, seed=3, weight_decay=0.0)
    settings |= dict(use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True)
    args = UIBConfig(str(tmp_path / "a"), prior="none", beta=0.0, posterior="map", subspace_rank=4, **settings)
    retain = multi_rows(15, 2)  # of which the last batch is smaller
    trainer = UIBTrainer(multi_model(), args, multi_rows(24, 1), retain)
    trainer.run_statistics_pass()
    twin = copy.deepcopy(trainer.model)
    trainer.train()
    stock = TrainingArguments(str(tmp_path / "b"), label_names=["labels"], **settings)
    Trainer(twin, stock, train_dataset=retain.remove_columns("source")).train()
    mine, theirs = trainer.model.state_dict(), twin.state_dict()
    assert any("lora_B" in name and mine[name].any() for name in mine)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("retained", [True, False])
def test_a_step_is_the_mean_over_its_given_labels_however_it_is_split(tmp_path, monkeypatch, retained):
    def run(name, size):
        settings = dict(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=3)
        trainer = UIBTrainer(
            multi_model(),
            config(tmp_path / name, optim="sgd", max_grad_norm=0.0, learning_rate=0.1, **settings),
            multi_rows(21, 1, missing=0.5),
            multi_rows(21, 2, missing=0.5) if retained else None,
            calibration_dataset=multi_rows(12, 3),
        )
        trainer.train()
        return adapter_weights(trainer), losses(trainer)

    weights, nats = run("whole", 8)
    split, theirs = run("split", 2)
    assert max(abs(a - b) for a, b in zip(nats, theirs, strict=True)) < 1e-6
    assert max((value - split[name]).abs().max() for name, value in weights.items()) < 1e-6
    monkeypatch.setattr(MultiLabel, "labels_given", lambda self, labels, retained: torch.tensor(1))  # each batch alike
    assert max(abs(a - b) for a, b in zip(nats, run("old", 2)[1], strict=True)) > 1e-4


NAMES = ["toxic", "Severe toxic", "insult"]
VECTORS = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]] * 4
SHAPES = {
    "vectors": {"labels": VECTORS},
    "class labels": {"labels": [[i for i, given in enumerate(row) if given] for row in VECTORS]},
    "ids": {"label": [[i for i, given in enumerate(row) if given] for row in VECTORS]},
    "names": {"labels": [[NAMES[i].upper() for i, given in enumerate(row) if given] for row in VECTORS]},
    "columns": {"severe_toxic": [v[1] for v in VECTORS], "toxic": [v[0] for v in VECTORS], "insult": [int(v[2]) for v in VECTORS]},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_in_the_shapes_that_data_have(tmp_path, shape):
    """Numbers for each label, lists of those that a row has (GoEmotions), and a column for each (Jigsaw)."""
    model = multi_model()
    model.config.id2label, model.config.label2id = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}
    given = make_rows(n=16).with_format(None).remove_columns("labels").to_dict() | SHAPES[shape]
    rows = datasets.Dataset.from_dict(given)
    if shape == "class labels":
        rows = rows.cast_column("labels", datasets.List(datasets.ClassLabel(names=NAMES)))
    read = Reader(model.config, "pixel_values")(rows)
    assert labels_of(read).tolist() == VECTORS
    trainer = UIBTrainer(model, config(tmp_path, max_steps=2), rows.select(range(8)), rows.select(range(8, 16)))
    trainer.train()
    assert labels_of(trainer.forget_dataset).tolist() == VECTORS[:8]


@pytest.mark.parametrize("labels", [[[0, 1, 0], [1, 0]] * 8, [[0, 1]] * 16, [[0, 7], [1]] * 8])
def test_lists_that_are_neither_are_refused(tmp_path, labels):
    rows = datasets.Dataset.from_dict(make_rows(n=16).with_format(None).to_dict() | {"labels": labels})
    with pytest.raises(ValueError, match=r"takes 3 numbers a row"):
        UIBTrainer(multi_model(), config(tmp_path), rows)


@pytest.mark.parametrize("architecture", ["vit", "bert"])
def test_it_trains_detaches_merges_and_resumes(tmp_path, architecture):
    settings = dict(save_strategy="steps", save_steps=3, max_steps=6)
    trainer = multi_trainer(tmp_path / "a", architecture, missing=0.3, **settings)
    assert isinstance(trainer.task, MultiLabel)
    base = {name: weight.clone() for name, weight in multi_model(architecture).state_dict().items()}
    trainer.train()
    after = adapter_weights(trainer)
    detached = trainer.detach().state_dict()
    assert all(torch.equal(detached[name], weight) for name, weight in base.items())
    rows = multi_rows(8, 5, architecture=architecture)
    batch = {k: v for k, v in trainer.data_collator.collate([rows[i] for i in range(8)]).items() if k != "labels"}
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(**batch).logits
        merged = trainer.merge_and_unload()
        assert (merged.eval()(**batch).logits - logits).abs().max() < 1e-4
    again = multi_trainer(tmp_path / "a", architecture, missing=0.3, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert same(after, adapter_weights(again))
    assert np.isfinite(again.evaluate(multi_rows(8, 6, 0.3, architecture))["eval_loss"])


def test_the_audit_looks_at_one_label_as_at_two_classes(tmp_path):
    trainer = multi_trainer(tmp_path, max_steps=4)
    trainer.train()
    test = multi_rows(120, 7, missing=0.2)
    for label in (None, "LABEL_1", 2):
        report = trainer.audit(test, bias_column="source", label=label)
        number = {None: int(labels_of(trainer.forget_dataset).sum(0).argmax()), "LABEL_1": 1, 2: 2}[label]
        rows = test.with_format(None)["labels"][:]
        given = [i for i, row in enumerate(rows) if row[number] >= 0]
        merged = trainer.detach()
        with torch.no_grad():
            logits = merged.eval()(pixel_values=test["pixel_values"][:][given]).logits[:, number]
        right = (logits > 0).numpy() == np.array([rows[i][number] > 0 for i in given])
        assert report.metrics["test"]["reference"]["accuracy"]["value"] == pytest.approx(right.mean())
        assert f"labels other than 'LABEL_{number}'" in " ".join(report.not_measured)
    deep = trainer.audit(test, bias_column="source", deep=True)
    assert not deep.deep
    with pytest.raises(ValueError, match="no label 'sad'; it has LABEL_0, LABEL_1, LABEL_2"):
        trainer.audit(test, label="sad")
    with pytest.raises(ValueError, match="label '1' is for a model of several labels"):
        audit_model(
            make_model(),
            reference_model=make_model(),
            forget_dataset=make_rows(),
            test_dataset=make_rows(seed=4),
            label=1,
        )


@pytest.mark.parametrize(
    "labels, settings, message",
    [
        ([[0.0, 1.0]] * 24, {}, "vectors of 2; a model with problem_type .* and 3 labels takes 3 numbers"),
        ([1] * 24, {}, "no vectors of one length"),
        ([[0.0, 1.0, 0.5]] * 24, {}, "label value 0.5; give 0 or 1, or -1"),
        ([[0, 1, 1]] * 23 + [[-1, -1, -1]], {}, "Row 23 of forget_dataset has none of its labels"),
        ([[0, 1, 1]] * 24, dict(prior="ascent"), "AscentPrior is for single-label classifiers"),
    ],
)
def test_bad_labels_get_one_line(tmp_path, labels, settings, message):
    rows = (
        multi_rows(24, 1).with_format(None).remove_columns("labels").add_column("labels", labels).with_format("torch")
    )
    with pytest.raises(ValueError, match=message):
        UIBTrainer(multi_model(), config(tmp_path, **settings), rows, multi_rows(16, 2)).train()


def test_lists_for_a_single_label_model_say_what_to_set(tmp_path):
    with pytest.raises(ValueError, match="problem_type='multi_label_classification'"):
        UIBTrainer(make_model(), config(tmp_path), multi_rows(24, 1).with_format(None), multi_rows(16, 2))


def test_the_command_line(tmp_path):
    model = multi_model("bert")
    model.save_pretrained(tmp_path / "model")
    names = {"train": multi_rows(60, 1, 0.2, "bert"), "test": multi_rows(40, 2, 0.2, "bert")}
    for split, rows in names.items():
        rows.with_format(None).to_parquet(tmp_path / "data" / f"{split}.parquet")
    word_tokenizer().save_pretrained(tmp_path / "model")
    dispatch(unlearn_words(tmp_path, "source=1", "--bias_column", "source", "--audit_label", "LABEL_2"))
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert "labels other than 'LABEL_2'" in " ".join(audit["not_measured"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert isinstance(task_of(load_classifier(str(tmp_path / "out")).get_base_model()), MultiLabel)


def listed(labels):
    return datasets.Dataset.from_dict(make_rows(n=len(labels)).with_format(None).to_dict() | {"labels": labels})


def test_what_the_labels_are_is_decided_over_all_sets():
    """[0, 1] of two labels: two ids where other sets list ids, else a number for each label."""
    both = listed([[0, 1]] * 8)
    lists, vectors = listed([[0], [0, 1], [1], [1]] * 2), listed([[0, 1], [1, 1]] * 4)
    read = Reader(multi_model(num_labels=2).config, "pixel_values")
    assert labels_of(read.of_sets([both, lists])(both)).tolist() == [[1, 1]] * 8
    assert labels_of(read.of_sets([both, vectors])(both)).tolist() == [[0, 1]] * 8
    ones = listed([[2]] * 8)  # lists of one length, one of which is no vector's value
    assert labels_of(Reader(multi_model().config, "pixel_values")(ones)).tolist() == [[0, 0, 1]] * 8


@pytest.mark.parametrize("missing", [-1.0, float("nan")])
def test_retraining_fits_the_labels_that_are_given(tmp_path, missing):
    args = TrainingArguments(
        str(tmp_path), max_steps=20, learning_rate=0.1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    rows, start = listed([[1.0, missing, 0.0]] * 16), multi_model()
    bias = lambda model: model.classifier.bias.detach()
    moved = bias(retrain(start, rows, args)) - bias(start)
    assert moved[0] > 0.1 and moved[2] < -0.1 and abs(moved[1]) < 1e-6
    assert torch.isfinite(bias(retrain(start, listed([[1, 0, 1], [0, 0, 1]] * 8), args))).all()  # integers
