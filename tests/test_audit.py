"""The audit passes models that were retrained and flags every planted fake."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from conftest import make_model, make_rows
from peft import LoraConfig, get_peft_model
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from transformers import TrainingArguments

from hf_uib import audit_model, retrain
from hf_uib.audit.deep import compress, erased
from hf_uib.audit.fakes import FAKES
from hf_uib.audit.statistics import Resampler
from hf_uib.cli import digits
from hf_uib.inference import blocks_of, head_of, observe
from hf_uib.metrics.bias_correlation import cramers_v

ONE_WORKER = pytest.mark.xdist_group("digits")  # their models are trained once
CAUGHT_BY = {
    "head-only distillation": "encoder_untouched",
    "threshold shift": "logits_shifted",
    "reversed bias": "bias_reversed",
    "detached adapter": "unchanged",
    "ten steps only": "membership_remains",
    "collapsed": "collapsed",
    "error in a third group": "group_harmed",
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Task, checkpoint and four models retrained from the pre-trained one with other seeds."""
    folder = str(tmp_path_factory.mktemp("digits"))
    task = digits.digits_colour(0)
    models = digits.prepare_models(task, 0, folder)
    retrained = []
    for seed in range(4):
        model = copy.deepcopy(models["start"])
        digits.fit(model, task.sets["retain"], task, task.train_settings["retrain_steps"], folder, seed, 1e-3)
        retrained.append(model.eval())
    return task, models["original"].eval(), retrained


def run(model, reference, task, **settings):
    return audit_model(
        model, reference_model=reference, forget_dataset=task.sets["forget"], retain_dataset=task.sets["retain"],
        test_dataset=task.sets["test"], bias_column=task.bias_column, processing_class=task.processing_class, **settings,
    )  # fmt: skip


@ONE_WORKER
def test_retrained_models_pass(digits):
    task, original, (oracle, *others) = digits
    for model in others:
        report = run(model, original, task, retrained_model=oracle)
        assert report.passed, report.flags


@ONE_WORKER
@pytest.mark.parametrize("fake", FAKES)
def test_each_fake_is_flagged(digits, fake):
    task, original, (oracle, *_) = digits
    report = run(
        FAKES[fake](original, oracle, task.sets, task.processing_class), original, task, retrained_model=oracle
    )
    assert not report.passed and CAUGHT_BY[fake] in report.flags, report.flags


@ONE_WORKER
def test_report_without_an_oracle_says_what_was_not_measured(digits, tmp_path):
    task, original, (oracle, *_) = digits
    report = run(oracle, original, task)
    assert report.passed and any("retrained" in entry for entry in report.not_measured)
    assert next(c for c in report.checks if c.name == "bias_remains").fired is None
    assert "not a proof" in report.verdict and "retrained_model" in str(report)
    report.to_json(str(tmp_path / "report.json"))
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["schema"] == 1 and content["passed"] is True and content["flags"] == []
    assert (
        content["metrics"]["test"]["model"]["follow_rate"]["low"]
        <= content["metrics"]["test"]["model"]["follow_rate"]["value"]
    )
    assert [os.path.basename(p) for p in report.plot(str(tmp_path))] == ["audit.png"]


@ONE_WORKER
def test_several_oracles_and_exact_counterfactuals(digits):
    task, original, (first, second, third, _) = digits
    report = run(third, original, task, retrained_model=[first, second], example_column="example")
    assert report.passed and {"retrained 1", "retrained 2"} <= set(report.metrics["test"])
    gaps = {name: row["counterfactual_gap"]["value"] for name, row in report.metrics["test"].items()}
    assert gaps["reference"] > max(gaps["model"], gaps["retrained 1"])
    assert report.metrics["gap"]["reference"]["average_gap"] > report.metrics["gap"]["model"]["average_gap"]


# ---- parts, on small models ----


def small(**changes):
    rows = dict(
        forget_dataset=make_rows(n=40, seed=1),
        retain_dataset=make_rows(n=30, seed=2),
        test_dataset=make_rows(n=60, seed=3),
    )
    return audit_model(
        changes.pop("model", make_model(seed=1)), **({"reference_model": make_model()} | rows | changes)
    )


def test_deep_audit_of_a_peft_model(tmp_path, capsys):
    def with_attribute(n, seed, telling=False):
        rows = make_rows(n=n, seed=seed).with_format(None)
        colours = rows["labels"][:] if telling else np.random.default_rng(seed + 100).integers(0, 3, n).tolist()
        return rows.add_column("colour", colours).with_format("torch")

    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3)
    report = small(
        model=model, reference_model=None, deep=True, bias_column="colour", retrained_model=make_model(seed=2),
        forget_dataset=with_attribute(40, 1, telling=True), retain_dataset=with_attribute(30, 2),
        test_dataset=with_attribute(60, 3),
    )  # fmt: skip
    assert "Deep audit: about" in capsys.readouterr().out
    assert set(report.deep["probes"]["model"]["block 1"]) == {"linear", "mlp", "control", "chance", "erased"}
    assert set(report.deep["compression"]) == {"int8", "4-bit", "pruned 30%"}
    assert [step for step, *_ in report.deep["relearning"]["model"]["curve"]["forget"]][:3] == [0, 1, 2]
    scales = {factor: row["bias"] for factor, row in report.deep["scaled"]}
    assert scales[0.0] == report.metrics["test"]["reference"]["follow_rate"]["value"]
    assert 0 <= report.deep["rmia"]["model"]["auc"] <= 1
    text = str(report)
    for line in (
        "groups: worst accuracy",
        "gap: average gap",
        "bias, 4-bit",
        "bias after relearning: forget",
        "RMIA: AUC",
    ):
        assert line in text, line
    assert {"relearns_faster", "comes_back_compressed"} <= {c.name for c in report.checks}
    assert [os.path.basename(p) for p in report.plot(str(tmp_path))] == ["audit.png", "deep.png"]


def test_a_peft_models_base_is_its_reference():
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["classifier"]))
    untouched = small(model=model, reference_model=None)
    assert "unchanged" in untouched.flags
    model.get_base_model().classifier.modules_to_save["default"].weight.data.normal_(0, 1.0)
    assert "encoder_untouched" in small(model=model, reference_model=None).flags


@pytest.mark.parametrize("architecture", ["vit", "bert"])
def test_observing_does_not_depend_on_batch_size(architecture):
    model, rows = make_model(architecture), make_rows(architecture, 20, seed=4)
    one, many = (
        observe(model, rows, every_block=True, batch_size=20),
        observe(model, rows, every_block=True, batch_size=7),
    )
    assert set(one.features) == {*blocks_of(model), "head"}
    for key, value in one.features.items():
        np.testing.assert_allclose(value, many.features[key], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.logits, many.logits, rtol=1e-4, atol=1e-5)


def test_resampling_keeps_copies_together():
    rng = np.random.default_rng(0)
    rows = rng.random(100) < 0.7
    alone, copied = Resampler(None, 100), Resampler(np.repeat(np.arange(100), 5), 500)
    first, second = alone.ratio(rows, np.ones(100)), copied.ratio(np.repeat(rows, 5), np.ones(500))
    assert first.value == second.value == rows.mean()
    assert first.error == pytest.approx(second.error) == pytest.approx(np.sqrt(0.7 * 0.3 / 100), rel=0.15)
    a, b = rng.integers(0, 3, 300), rng.integers(0, 4, 300)
    v = Resampler(None, 300).cramers_v(a, b)
    assert v.value == pytest.approx(cramers_v(a, b)) and v.low <= v.value <= v.high
    assert (first - first).error == 0


def test_linear_erasure_leaves_nothing_linear():
    rng = np.random.default_rng(0)
    attribute, fitting = rng.integers(0, 3, 600), np.arange(600) % 2 == 0
    x = rng.normal(size=(600, 8)) @ rng.normal(size=(8, 8)) + 2 * rng.normal(size=(3, 8))[attribute]

    def score(probe, target, x=x):
        return probe().fit(x[fitting], target[fitting]).score(x[~fitting], target[~fitting])

    plain = score(lambda: LogisticRegression(max_iter=300), attribute)
    assert plain > 0.8 and erased(x, attribute, fitting, score) < 0.45


def test_compression():
    model = make_model()
    for kind, error in (("int8", 0.01), ("4-bit", 0.15), ("pruned 30%", 0.3)):
        changed = head_of(compress(model, kind)).weight - head_of(model).weight
        relative = changed.norm() / head_of(model).weight.norm()
        assert 0 < relative < error
    assert (head_of(compress(model, "pruned 30%")).weight == 0).float().mean() == pytest.approx(0.3, abs=0.03)


def test_retrain_is_cached_by_data_weights_and_settings(tmp_path, monkeypatch):
    trained = []
    train = retrain.__globals__["Trainer"].train
    monkeypatch.setattr(retrain.__globals__["Trainer"], "train", lambda self: trained.append(1) or train(self))
    args = TrainingArguments(str(tmp_path / "x"), max_steps=3, use_cpu=True, disable_tqdm=True, report_to="none")
    rows, cache = make_rows(n=16, seed=1), str(tmp_path / "cache")
    first = retrain(make_model(), rows, args, cache_dir=cache)
    again = retrain(make_model(), rows, args, cache_dir=cache)
    assert len(trained) == 1
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    retrain(make_model(), make_rows(n=16, seed=2), args, cache_dir=cache)
    retrain(make_model(seed=5), rows, args, cache_dir=cache)
    retrain(make_model(), rows, args, cache_dir=cache, from_scratch=True)
    args.learning_rate = 1e-4
    retrain(make_model(), rows, args, cache_dir=cache)
    assert len(trained) == 5


def injected():
    model = make_model()
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    return model


class TorchRows(torch.utils.data.Dataset):
    """Rows that are no `datasets.Dataset`."""

    def __init__(self, rows, repeat=1):
        self.rows = [rows[i] for i in range(len(rows))] * repeat

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def test_any_dataset_and_any_architecture():
    rows = dict(forget_dataset=TorchRows(make_rows(n=40, seed=1), 30), test_dataset=TorchRows(make_rows(n=60, seed=3)))
    report = small(bias_column="source", model=make_model(hidden_size=24), **rows)
    assert next(c for c in report.checks if c.name == "encoder_untouched").fired is None
    small(bias_column="source", model=make_model(num_hidden_layers=3), retain_dataset=None, **rows)


def test_a_retrained_model_with_the_same_encoder_or_without_a_class_is_no_alarm():
    reference, head_only = make_model(), make_model()
    head_of(head_only).weight.data.normal_(0, 1.0)
    report = small(model=copy.deepcopy(head_only), reference_model=reference, retrained_model=head_only)
    assert "encoder_untouched" not in report.flags and "encoder_untouched" in small(model=head_only).flags
    one_class = make_model()
    head_of(one_class).bias.data[0] += 1e3
    assert "collapsed" in small(model=one_class).flags
    assert "collapsed" not in small(model=one_class, retrained_model=copy.deepcopy(one_class)).flags


def test_few_rows_and_chance_attributes_give_no_alarm():
    few = small(
        forget_dataset=make_rows(n=3, seed=1), test_dataset=make_rows(n=5, seed=3), retrained_model=make_model(seed=2)
    )
    assert few.passed and any("most checks" in entry for entry in few.not_measured)
    by_chance = small(bias_column="source", forget_dataset=make_rows(n=200, seed=1))
    assert (
        "follow_rate" not in by_chance.metrics["test"]["model"] and "cramers_v" in by_chance.metrics["test"]["model"]
    )


def test_copies_are_sampled_together(monkeypatch):
    monkeypatch.setitem(audit_model.__globals__["SAMPLE"], "test", 40)
    rows = make_rows(n=60, seed=3).with_format(None)
    copies = rows.select(np.repeat(np.arange(60), 3)).add_column("example", np.repeat(np.arange(60), 3).tolist())
    report = small(test_dataset=copies.with_format("torch"), example_column="example")
    assert report.metrics["test"]["model"]["flip_rate"]["value"] == 0.0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(reference_model=None), "Give reference_model"),
        (dict(bias_column="hue"), "bias_column 'hue' is not among"),
        (dict(forget_dataset=make_rows(n=0)), "forget_dataset has no examples"),
        (dict(reference_model=make_model(num_labels=5)), "different numbers of classes"),
        (dict(example_column="copy"), "example_column 'copy' is not among"),
        (dict(test_dataset=make_rows(n=60, num_labels=9, seed=3)), "outside the model's 3 classes"),
        (dict(reference_model=injected()), "has an adapter injected"),
    ],
)
def test_bad_input_gets_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)


def test_auc_is_resampled_by_example():
    """Four copies of every test row: the AUC stays, its interval must not shrink as if there were four times the examples."""
    rng = np.random.default_rng(0)
    forget, test = rng.normal(0.5, 1, 150), rng.normal(0, 1, 100)
    single = Resampler(None, 150).auc(forget, test, Resampler(None, 100))
    copies, ids = np.repeat(test, 4), np.repeat(np.arange(100), 4)
    together = Resampler(None, 150).auc(forget, copies, Resampler(ids, 400))
    apart = Resampler(None, 150).auc(forget, copies, Resampler(None, 400))
    truth = [1] * 150 + [0] * 100
    assert single.value == pytest.approx(roc_auc_score(truth, np.concatenate([forget, test])))
    assert together.value == pytest.approx(single.value) and together.error == pytest.approx(single.error, rel=0.15)
    assert apart.error < 0.9 * single.error  # the control: rows taken for examples
    assert single.samples.mean() == pytest.approx(single.value, abs=0.01)
