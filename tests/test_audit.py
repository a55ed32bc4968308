"""The audit on small models: its parts, its checks and its thresholds."""

import copy
import json
import os
import subprocess
import sys
import warnings

import datasets
import numpy as np
import pytest
import torch
from conftest import make_model, make_rows
from peft import LoraConfig, get_peft_model
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from transformers import TrainingArguments, ViTImageProcessorPil

from hf_uib import UIBConfig, UIBTrainer, audit_model, retrain
from hf_uib.audit.checks import CHECKS, Check, register_check
from hf_uib.audit.deep import compress, erase
from hf_uib.audit.gather import gather
from hf_uib.audit.report import _told_apart
from hf_uib.audit.statistics import Resampler
from hf_uib.audit.thresholds import AuditThresholds
from hf_uib.data.columns import Columns
from hf_uib.inference import blocks_of, head_of, observe
from hf_uib.metrics import bias_correlation, klom, membership_attack, unlearning_gap
from hf_uib.metrics.bias import cramers_v


def small(**changes):
    rows = dict(
        forget_dataset=make_rows(n=40, seed=1),
        retain_dataset=make_rows(n=30, seed=2),
        test_dataset=make_rows(n=60, seed=3),
    )
    return audit_model(
        changes.pop("model", make_model(seed=1)), **({"reference_model": make_model()} | rows | changes)
    )


def with_attribute(n, seed, label_is_colour=False):
    """Rows with a column ``colour``: the label on the forget set, at random elsewhere."""
    rows = make_rows(n=n, seed=seed).with_format(None)
    colours = rows["labels"][:] if label_is_colour else np.random.default_rng(seed + 100).integers(0, 3, n).tolist()
    return rows.add_column("colour", colours).with_format("torch")


COLOURED = dict(
    forget_dataset=with_attribute(40, 1, label_is_colour=True), retain_dataset=with_attribute(30, 2),
    test_dataset=with_attribute(60, 3), bias_column="colour",
)  # fmt: skip


def test_deep_audit_of_a_peft_model(tmp_path, capsys):
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3)
    report = small(
        model=model, reference_model=None, deep=True, retrained_model=make_model(seed=2),
        thresholds=AuditThresholds(relearning_steps=(0, 1, 2, 4)), **COLOURED,
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

    def accuracy(x):
        probe = LogisticRegression(max_iter=300).fit(x[fitting], attribute[fitting])
        return probe.score(x[~fitting], attribute[~fitting])

    erased = erase(x, attribute, fitting)
    assert accuracy(x) > 0.8 and accuracy(erased) < 0.45
    means = np.stack([erased[fitting & (attribute == value)].mean(0) for value in range(3)])
    np.testing.assert_allclose(means, means[:1].repeat(3, 0), atol=1e-6)  # what erasure promises


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
    other = rows.add_column("gold", [(int(y) + 1) % 3 for y in rows["labels"]])
    retrain(make_model(), other, args, cache_dir=cache)
    retrain(make_model(), other, args, cache_dir=cache, columns=Columns(label="gold"))
    for size in (8, 16):
        retrain(make_model(), rows, args, ViTImageProcessorPil(size={"height": size, "width": size}), cache_dir=cache)
    assert len(trained) == 9
    args.output_dir, args.logging_steps, args.eval_strategy = str(tmp_path / "y"), 7, "steps"
    args.load_best_model_at_end = True  # what the user's own run had; here is nothing to evaluate on
    retrain(make_model(), rows, args, cache_dir=cache)
    assert len(trained) == 9
    retrain(make_model(), rows, args)


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


def test_copies_are_sampled_together():
    rows = make_rows(n=60, seed=3).with_format(None)
    copies = rows.select(np.repeat(np.arange(60), 3)).add_column("example", np.repeat(np.arange(60), 3).tolist())
    sampled = dict(example_column="example", thresholds=AuditThresholds(test_rows=40))
    report = small(test_dataset=copies.with_format("torch"), **sampled)
    assert report.metrics["test"]["model"]["flip_rate"]["value"] == 0.0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(reference_model=None), "Give the model before unlearning"),
        (dict(bias_column="hue"), "bias_column 'hue' is not among"),
        (dict(forget_dataset=make_rows(n=0)), "forget_dataset has no examples"),
        (dict(reference_model=make_model(num_labels=5)), "different numbers of classes"),
        (dict(example_column="copy"), "example_column 'copy' is not among"),
        (dict(test_dataset=make_rows(n=60, num_labels=9, seed=3)), "outside the model's 3 classes"),
        (dict(reference_model=injected()), "has an adapter injected"),
        (dict(reference_model=make_model("bert")), "different kinds of input"),
        (dict(test_dataset=datasets.DatasetDict(test=make_rows())), "test_dataset is a DatasetDict; give one set"),
        (
            dict(test_dataset=make_rows().rename_column("pixel_values", "pixels")),
            "has no pixel_values .* processing_class",
        ),
    ],
)
def test_bad_input_gets_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)


def test_test_rows_that_are_forget_rows_are_told():
    forget = make_rows(n=40, seed=1)
    with pytest.warns(UserWarning, match="40 test rows are forget rows too"):
        small(test_dataset=datasets.concatenate_datasets([make_rows(n=60, seed=3), forget]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*forget rows too.*")
        small()


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


# ---- Checks of one's own ----


@pytest.fixture
def registry():
    """Checks that a test registers are gone after it."""
    before = dict(CHECKS)
    yield CHECKS
    CHECKS.clear()
    CHECKS.update(before)


def register_too_sure(limit, **settings):
    @register_check("too_sure", meaning="The model is surer of the forget examples than before.", **settings)
    def too_sure(context):
        mine, before = (context.outputs[name]["forget"].margins.mean() for name in ("model", "reference"))
        return Check(mine - before > limit, mine - before, limit, f"{mine - before:+.2f} nats of margin")

    return too_sure


@pytest.mark.parametrize(("limit", "fires"), [(-100.0, True), (100.0, False)])
def test_a_check_of_ones_own(registry, tmp_path, limit, fires):
    register_too_sure(limit)
    report = small()
    (check,) = [c for c in report.checks if c.name == "too_sure"]
    assert check.fired is fires and check.limit == limit and check.meaning.startswith("The model is surer")
    assert ("too_sure" in report.flags) is fires and (check.meaning in report.verdict) is fires
    assert "too_sure" in str(report) and "nats of margin" in str(report)
    report.to_json(str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text())["checks"][-1]["name"] == "too_sure"


def test_no_check_is_left_over():
    assert "too_sure" not in CHECKS and "too_sure" not in [check.name for check in small().checks]


def test_a_name_is_taken_once(registry):
    with pytest.raises(ValueError, match="There is a check 'unchanged' already"):
        register_check("unchanged", meaning="")(lambda context: None)


def test_few_rows_and_deep_results(registry):
    register_too_sure(-100.0)
    few = dict(forget_dataset=make_rows(n=5, seed=1))
    assert "too_sure" not in small(**few).flags
    registry.pop("too_sure")
    register_too_sure(-100.0, any_size=True)
    assert "too_sure" in small(**few).flags
    registry.pop("too_sure")
    register_too_sure(-100.0, deep=True)
    assert "too_sure" not in [check.name for check in small().checks]


# ---- Thresholds ----


def test_thresholds_change_the_outcome_and_are_in_the_report(tmp_path):
    assert "unchanged" not in small().flags
    report = small(thresholds=AuditThresholds(unchanged=1e6))
    assert "unchanged" in report.flags
    report.to_json(str(tmp_path / "report.json"))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert content["thresholds"]["unchanged"] == 1e6 and content["thresholds"]["test_rows"] == 5000
    assert content["thresholds"]["relearning_steps"] == [0, 1, 2, 4, 8, 16, 32, 64]
    assert {c["name"]: c["limit"] for c in content["checks"]}["unchanged"] == 1e6
    assert content["metrics"]["membership"]["model"]["auc_balanced"]["low"] is None  # NaN
    few = dict(forget_dataset=make_rows(n=5, seed=1), test_dataset=make_rows(n=9, seed=3))
    assert small(**few).checks[-2].fired is None
    assert small(thresholds=AuditThresholds(min_rows=1), **few).checks[-2].fired is not None


@pytest.mark.parametrize("wrong", [dict(test_rows=0), dict(bias_remains=-0.1), dict(unchanged=float("nan"))])
def test_thresholds_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=f"AuditThresholds: {next(iter(wrong))} is .* at least"):
        AuditThresholds(**wrong)
    with pytest.raises(ValueError, match="relearning_steps .* must increase"):
        AuditThresholds(relearning_steps=(0, 4, 2))


# ---- Identities ----


def test_figures_are_those_of_the_metrics():
    models = {"model": make_model(seed=1), "reference": make_model(), "retrained": make_model(seed=2)}
    sets = {part: COLOURED[f"{part}_dataset"] for part in ("forget", "retain", "test")}
    context = gather(models, ["retrained"], sets, bias_column="colour")
    test = context.outputs["model"]["test"]
    colours = np.asarray(sets["test"].with_format(None)["colour"])
    assert context.coded and (context.codes == colours).all()
    bias = bias_correlation(test.predictions, test.labels, colours)
    assert context.bias("model", "follow_rate").value == pytest.approx(bias["follow_rate"], abs=1e-12)
    assert context.bias("model", "cramers_v").value == pytest.approx(bias["cramers_v"], abs=1e-12)
    gap = bias["aligned_accuracy"] - bias["conflicting_accuracy"]
    assert context.bias("model", "aligned_advantage").value == pytest.approx(gap, abs=1e-12)
    margins = {part: context.outputs["model"][part].margins for part in context.parts}
    labels = {part: context.outputs["model"][part].labels for part in context.parts}
    splits = np.repeat(list(margins), [len(m) for m in margins.values()])
    every = lambda columns: np.concatenate(list(columns.values()))
    attack = membership_attack(every(margins), every(labels), splits, n_bootstrap=0)
    assert context.attack("model")["mia_efficacy"] == attack["mia_efficacy"]
    assert context.auc("model").value == pytest.approx(attack["auc"], abs=1e-12)
    to_itself = unlearning_gap(every(labels), every(labels), every(labels), splits)
    assert to_itself["average_gap"] == 0 == context.gap("retrained")["average_gap"]
    accuracies = {key: entry["value"] for key, entry in context.groups("model")["every"].items()}
    sizes = {key: rows.sum() for key, rows in context.members.items()}
    classes = [key for key in sizes if key.startswith("class") and "," not in key]
    assert sum(sizes[k] for k in classes) <= len(test.labels)
    for key, rows in context.members.items():
        assert accuracies[key] == pytest.approx((test.predictions == test.labels)[rows].mean(), abs=1e-12)


def test_several_retrained_models_are_compared_with_each_other():
    rows = {part: COLOURED[f"{part}_dataset"] for part in ("forget", "test")}
    names = ["retrained 1", "retrained 2", "retrained 3"]
    models = {name: make_model(seed=seed) for seed, name in enumerate(["reference", "model", *names])}
    context = gather(models, names, rows)
    margins = {name: context.outputs[name]["forget"].margins for name in models}
    columns = lambda *which: np.stack([margins[name] for name in which], axis=1)
    assert context.klom(names[0], "forget") == klom(columns(names[0]), columns(*names[1:]))
    pairs = [klom(columns("model"), columns(*(n for n in names if n != out)))["klom"] for out in names]
    assert context.klom("model", "forget")["klom"] == pytest.approx(np.mean(pairs))
    report = small(
        model=models["model"], reference_model=models["reference"], retrained_model=[models[n] for n in names]
    )
    assert set(report.metrics["klom"]) == set(models) and "forget: KLoM" in str(report)
    strata = report.metrics["strata"]["model"]
    assert [strata[name]["rows"] for name in ("high", "medium", "low")] == [14, 13, 13]
    gap = (
        report.metrics["forget"]["model"]["accuracy"]["value"]
        - report.metrics["forget"][names[0]]["accuracy"]["value"]
    )
    assert sum(stratum["accuracy_gap"] * stratum["rows"] for stratum in strata.values()) / 40 == pytest.approx(gap)
    assert "high memorisation: accuracy gap" in str(report)
    one = small(retrained_model=models[names[0]])
    assert "klom" not in one.metrics and "strata" in one.metrics and "strata" not in small().metrics


@pytest.mark.slow
def test_the_audit_does_not_import_the_trainer():
    code = (
        "import sys, hf_uib.audit.report, hf_uib.audit.deep, hf_uib.audit.fakes, hf_uib.audit.figures, hf_uib.audit.oracle\n"
        "assert not {'hf_uib.trainer', 'evaluate', 'fairlearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_class_names_of_whichever_model_has_some(tmp_path):
    """The data say the names; the model after, say, lost them. Other orders of the same names are refused."""
    names = {0: "a", 1: "b", 2: "c"}
    rows = make_rows(n=40, seed=1).with_format(None)
    named = rows.add_column("label", [names[i] for i in rows["labels"]]).remove_columns("labels").with_format("torch")

    def model(seed, order=None):
        made = make_model(seed=seed)
        if order:
            made.config.id2label = dict(enumerate(order))
            made.config.label2id = {n: i for i, n in enumerate(order)}
        return made

    def metrics(data, first, second):
        return audit_model(
            model(0, first), reference_model=model(1, second), forget_dataset=data, test_dataset=data
        ).metrics["test"]

    expected = metrics(make_rows(n=40, seed=1), None, None)
    assert metrics(named, "abc", None) == metrics(named, None, "abc") == metrics(named, "ABC", "abc") == expected
    with pytest.raises(ValueError, match="same names in another order"):
        metrics(named, "cab", "abc")


def test_classes_that_nobody_named_get_the_names_of_the_data(tmp_path):
    """So that an audit sees where a model has them in another order."""
    names = ["cat", "dog", "cow"]
    named = lambda seed, n: (
        make_rows(n=n, seed=seed).with_format(None).cast_column("labels", datasets.ClassLabel(names=names))
    )
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, report_to="none")
    retrained = retrain(make_model(), named(1, 16).with_format("torch"), args)
    assert retrained.config.id2label == dict(enumerate(names))
    alike = make_rows(n=16, seed=1).cast_column("labels", datasets.ClassLabel(names=["cat", "dog", "cow", "Cow"]))
    assert retrain(make_model(), alike, args).config.id2label[0] == "LABEL_0"  # four names for three classes
    rows = dict(
        zip(("forget_dataset", "retain_dataset", "test_dataset"), (named(i, 40) for i in (1, 2, 3)), strict=True)
    )
    rows = {name: dataset.with_format("torch") for name, dataset in rows.items()}
    model = make_model(
        id2label=dict(enumerate(reversed(names))), label2id={n: i for i, n in enumerate(reversed(names))}
    )
    with pytest.raises(ValueError, match="same names in another order"):
        small(model=model, reference_model=model, retrained_model=retrained, **rows)
    with pytest.warns(UserWarning, match="retrained: no class names, so the classes are taken to be cow, dog, cat"):
        small(model=model, reference_model=model, retrained_model=make_model(), **rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(model=retrained, reference_model=retrained, retrained_model=make_model(), **rows)


def test_the_verdict_names_what_still_tells_the_models_apart():
    report = small(retrained_model=make_model(seed=2))
    verdict = report.verdict
    report.metrics["test"]["model"]["accuracy"] = {"value": 0.9, "low": 0.8, "high": 0.95}
    report.metrics["test"]["retrained"]["accuracy"] = {"value": 0.5, "low": 0.4, "high": 0.79}
    assert "test: accuracy" in _told_apart(report.metrics, ["retrained"])
    report.metrics["test"]["retrained"]["accuracy"]["high"] = 0.81
    assert "test: accuracy" not in _told_apart(report.metrics, ["retrained"])
    assert report.passed is ("do not meet the retrained model's" in verdict)


def test_an_example_without_an_id_is_one_of_its_own():
    ids = [0, 0, 1, 1, None, None] + [None] * 54
    rows = make_rows(n=60, seed=3).with_format(None).add_column("pair", ids)
    context = gather(
        {"model": make_model(), "reference": make_model()}, [],
        {"forget": make_rows(n=20, seed=1), "test": rows.with_format("torch")}, example_column="pair",
    )  # fmt: skip
    assert len(np.unique(context.examples)) == 58
    with pytest.raises(ValueError, match="No two test rows have the same pair"):
        small(test_dataset=make_rows(n=60, seed=3).add_column("pair", list(range(60))), example_column="pair")


def test_values_of_an_attribute_are_the_same_whatever_the_type_of_its_column():
    """A column of integers with a gap is one of floats; a row without a value is in no group."""
    gaps = [None if i < 30 else float(i % 3) for i in range(60)]
    test = make_rows(n=60, seed=3).with_format(None).add_column("colour", gaps).with_format("torch")
    context = gather(
        {"model": make_model(), "reference": make_model()}, [], {"forget": COLOURED["forget_dataset"], "test": test},
        bias_column="colour", thresholds=AuditThresholds(min_group_rows=1),
    )  # fmt: skip
    assert context.coded and (context.attribute.codes[30:] >= 0).all() and (context.attribute.codes[:30] == -1).all()
    assert {name for name in context.members if name.startswith("attribute")} == {f"attribute {i}" for i in range(3)}


def test_a_trainer_audits_the_columns_it_was_given(tmp_path):
    wrong = lambda seed: make_rows(n=40, seed=seed).rename_column("labels", "gold").add_column("label", [0] * 40)
    args = UIBConfig(str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no")
    trainer = UIBTrainer(make_model(), args, wrong(1), wrong(2), columns=Columns(label="gold"))
    trainer.train()
    given = trainer.audit(wrong(3)).metrics["test"]["reference"]["accuracy"]["value"]
    assert given == small(test_dataset=make_rows(n=40, seed=3)).metrics["test"]["reference"]["accuracy"]["value"]
