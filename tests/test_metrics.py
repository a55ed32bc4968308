"""Metrics against worked examples by hand and against SciPy."""

import math

import numpy as np
import pytest
from scipy.stats.contingency import association, crosstab

from hf_uib.metrics import BiasCorrelation, WorstGroupAccuracy
from hf_uib.metrics.tables import attribute_classes, flip_rate


def bias(**columns):
    return BiasCorrelation(keep_in_memory=True).compute(**columns)


def test_bias_correlation_by_hand():
    # Five disagree: two follow the attribute, two are right, one is wrong otherwise; one agrees and is right.
    result = bias(predictions=[1, 2, 0, 0, 1, 2], references=[0, 0, 0, 0, 0, 2], attributes=[1, 2, 1, 2, 2, 2])
    assert result["conflicting_accuracy"] == pytest.approx(2 / 5)
    assert result["aligned_accuracy"] == 1.0
    assert result["follow_rate"] == pytest.approx(2 / 5)
    assert result["signed_follow_rate"] == pytest.approx(2 / 5 - (3 / 5) / 2)


def test_cramers_v_agrees_with_scipy():
    rng = np.random.default_rng(0)
    for classes in (2, 5):
        attributes = rng.integers(0, classes, 300)
        predictions = np.where(rng.random(300) < 0.4, attributes, rng.integers(0, classes, 300))
        table = crosstab(predictions, attributes).count
        value = bias(predictions=predictions, references=predictions, attributes=attributes)["cramers_v"]
        assert value == pytest.approx(association(table, method="cramer"), abs=1e-12)
    assert bias(predictions=[1, 1, 1], references=[1, 0, 1], attributes=[0, 1, 2])["cramers_v"] == 0.0


def test_a_reversed_bias_is_negative():
    result = bias(predictions=[2, 2, 2, 2], references=[0, 0, 0, 0], attributes=[1, 1, 1, 1])
    assert result["follow_rate"] == 0 and result["signed_follow_rate"] < 0
    assert math.isnan(result["aligned_accuracy"])


def test_worst_group_by_hand():
    result = WorstGroupAccuracy(keep_in_memory=True).compute(
        predictions=[0, 0, 1, 1, 1, 0], references=[0, 0, 0, 1, 1, 1], attributes=[0, 0, 1, 0, 0, 1]
    )
    assert result["groups"]["0/0"] == {"accuracy": 1.0, "size": 2}
    assert result["worst_group_accuracy"] == 0.0 and result["worst_group"] == "0/1"
    assert result["mean_group_accuracy"] == pytest.approx(0.5)
    assert result["weighted_accuracy"] == pytest.approx(4 / 6)


def test_metrics_take_batches_and_tensors():
    metric = BiasCorrelation(keep_in_memory=True)
    metric.add_batch(predictions=np.array([0, 1]), references=np.array([0, 0]), attributes=np.array([1, 1]))
    metric.add_batch(predictions=np.array([1]), references=np.array([1]), attributes=np.array([0]))
    assert metric.compute()["follow_rate"] == pytest.approx(1 / 3)


def test_flip_rate_and_attribute_classes():
    logits = np.eye(3)[[0, 0, 1, 2, 1, 1]]
    assert flip_rate(logits, 2) == pytest.approx(1 / 3)
    assert attribute_classes(np.array([5, 5, 7, 7, 7]), np.array([0, 0, 1, 1, 0])) == {5: 0, 7: 1}
    assert attribute_classes(np.array([5, 5, 5]), np.array([0, 1, 1])) is None
