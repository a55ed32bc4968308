"""The audit passes models that were retrained and flags every planted fake."""

import copy
import json
import os

import pytest

from hf_uib import audit_model
from hf_uib.audit.fakes import FAKES
from hf_uib.cli import digits

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("digits")]
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
def models(digits_models, tmp_path_factory):
    """Task, checkpoint and three models retrained from the pre-trained one with other seeds."""
    task, trained = digits_models
    folder, retrained = str(tmp_path_factory.mktemp("retrained")), []
    for seed in range(3):
        model = copy.deepcopy(trained["start"])
        digits.fit(model, task.sets["retain"], task, task.train_settings["retrain_steps"], folder, seed, 1e-3)
        retrained.append(model.eval())
    return task, trained["original"].eval(), retrained


def run(model, reference, task, **settings):
    return audit_model(
        model, reference_model=reference, forget_dataset=task.sets["forget"], retain_dataset=task.sets["retain"],
        test_dataset=task.sets["test"], bias_column=task.bias_column, processing_class=task.processing_class, **settings,
    )  # fmt: skip


def test_retrained_models_pass(models):
    task, original, (oracle, *others) = models
    for model in others:
        report = run(model, original, task, retrained_model=oracle)
        assert report.passed, report.flags


@pytest.mark.parametrize("fake", FAKES)
def test_each_fake_is_flagged(models, fake):
    task, original, (oracle, *_) = models
    report = run(
        FAKES[fake](original, oracle, task.sets, task.processing_class), original, task, retrained_model=oracle
    )
    assert not report.passed and CAUGHT_BY[fake] in report.flags, report.flags


def test_report_without_an_oracle_says_what_was_not_measured(models, tmp_path):
    task, original, (oracle, *_) = models
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


def test_several_oracles_and_exact_counterfactuals(models):
    task, original, (first, second, third) = models
    report = run(third, original, task, retrained_model=[first, second], example_column="example")
    assert report.passed and {"retrained 1", "retrained 2"} <= set(report.metrics["test"])
    gaps = {name: row["counterfactual_gap"]["value"] for name, row in report.metrics["test"].items()}
    assert gaps["reference"] > max(gaps["model"], gaps["retrained 1"])
    assert report.metrics["gap"]["reference"]["average_gap"] > report.metrics["gap"]["model"]["average_gap"]
