"""Metrics against worked examples by hand and against SciPy; the table of the metrics; the `evaluate` modules."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats.contingency import association, crosstab

import hf_uib.metrics
from hf_uib.metrics import (
    METRICS,
    BiasCorrelation,
    Metric,
    attack,
    attribute_classes,
    bias_correlation,
    bias_row,
    flip_rate,
    membership_attack,
    text_table,
    worst_group_accuracy,
)


def test_bias_correlation_by_hand():
    # Five disagree: two follow the attribute, two are right, one is wrong otherwise; one agrees and is right.
    result = bias_correlation(
        predictions=[1, 2, 0, 0, 1, 2], references=[0, 0, 0, 0, 0, 2], attributes=[1, 2, 1, 2, 2, 2]
    )
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
        value = bias_correlation(predictions=predictions, references=predictions, attributes=attributes)["cramers_v"]
        assert value == pytest.approx(association(table, method="cramer"), abs=1e-12)
    assert bias_correlation(predictions=[1, 1, 1], references=[1, 0, 1], attributes=[0, 1, 2])["cramers_v"] == 0.0


def test_a_reversed_bias_is_negative():
    result = bias_correlation(predictions=[2, 2, 2, 2], references=[0, 0, 0, 0], attributes=[1, 1, 1, 1])
    assert result["follow_rate"] == 0 and result["signed_follow_rate"] < 0
    assert math.isnan(result["aligned_accuracy"])


def test_worst_group_by_hand():
    result = worst_group_accuracy(
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


# ---- The table ----


def rows(n=400, classes=5, seed=0):
    """Logits that lean to the label and to the attribute, labels, and attributes."""
    rng = np.random.default_rng(seed)
    logits, labels, attributes = (
        rng.normal(size=(n, classes)),
        rng.integers(0, classes, n),
        rng.integers(0, classes, n),
    )
    logits[np.arange(n), labels] += 1
    logits[np.arange(n), attributes] += 1
    return logits, labels, attributes


def test_a_row_holds_the_metrics_own_figures():
    logits, labels, attributes = rows()
    row, predictions = bias_row(logits, labels, attributes), logits.argmax(-1)
    bias = bias_correlation(predictions, labels, attributes, num_classes=5)
    groups = worst_group_accuracy(predictions, labels, attributes, min_group_size=10)
    assert list(row) == ["accuracy", "conflicting_accuracy", "follow_rate", "cramers_v", "worst_group_accuracy"]
    assert row == {"accuracy": groups["weighted_accuracy"]} | {key: (bias | groups)[key] for key in list(row)[1:]}
    # accuracy is the mean of its two parts, by how many rows each has
    share = (attributes != labels).mean()
    parts = share * bias["conflicting_accuracy"] + (1 - share) * bias["aligned_accuracy"]
    assert row["accuracy"] == pytest.approx(parts, abs=1e-12)
    assert set(bias_row(logits, labels, attributes, coded=False)) == set(row) - {"conflicting_accuracy", "follow_rate"}


def test_an_added_metric_is_one_row_of_the_table(monkeypatch):
    def brier(inputs):
        probabilities = np.exp(inputs.logits) / np.exp(inputs.logits).sum(-1, keepdims=True)
        return float(((probabilities - np.eye(5)[inputs.labels]) ** 2).sum(-1).mean())

    monkeypatch.setitem(METRICS, "brier", Metric("Brier score", "lower", ".2f", measure=brier))
    row = bias_row(*rows())
    assert 0 < row["brier"] < 2
    table = text_table({"a model": row, "another": {"accuracy": 0.5, "seconds": 12.34}})
    head, _, first, second = table.splitlines()
    titles = [
        "accuracy",
        "bias-conflicting accuracy",
        "shortcut rate",
        "Cramér's V",
        "worst group",
        "seconds",
        "Brier score",
    ]
    assert head.split() == " ".join(titles).split()
    assert f"{row['brier']:.2f}" in first and second.split()[-2:] == ["12.3", "-"]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_every_metric_has_title_direction_and_format():
    for metric in METRICS.values():
        assert metric.title and metric.direction in ("higher", "lower", "that of the retrained model")
        assert metric.part in ("test", "forget", "retain") and float(metric.text(0.25)) in (0.0, 0.2, 0.25)
    assert METRICS["follow_rate"].title == "shortcut rate"


def test_attack_is_the_membership_attack_on_margins():
    logits, labels, _ = rows()
    seen = {"forget": (logits[:100], labels[:100]), "test": (logits[100:], labels[100:])}
    own = np.exp(logits)[np.arange(400), labels] / np.exp(logits).sum(-1)
    splits = np.repeat(["forget", "test"], [100, 300])
    expected = membership_attack(np.log(own) - np.log1p(-own), labels, splits, n_bootstrap=0)
    found = attack(seen, n_bootstrap=0)
    assert found["auc"] == pytest.approx(expected["auc"], abs=1e-12)
    assert found["advantage"] == pytest.approx(expected["advantage"], abs=1e-12)


# ---- As `evaluate` modules ----


def columns_of(name):
    rng, (logits, labels, attributes) = np.random.default_rng(0), rows()
    predictions, splits = logits.argmax(-1), rng.choice(["forget", "retain", "test"], 400)
    labelled = {"predictions": predictions, "references": labels}
    ids = np.repeat(np.arange(100), 4)
    return {
        "BiasCorrelation": labelled | {"attributes": attributes, "num_classes": 9},
        "WorstGroupAccuracy": labelled | {"attributes": attributes, "min_group_size": 10},
        "CounterfactualGap": {
            "predictions": predictions,
            "scores": rng.random(400),
            "references": ids % 5,
            "examples": ids,
        },
        "MembershipAttack": {"scores": rng.normal(size=400), "references": labels, "splits": splits, "seed": 3},
        "UnlearningGap": labelled
        | {"retrained_predictions": rng.integers(0, 5, 400), "splits": splits, "n_bootstrap": 9},
    }[name]


FUNCTIONS = {
    "BiasCorrelation": "bias_correlation",
    "WorstGroupAccuracy": "worst_group_accuracy",
    "CounterfactualGap": "counterfactual_gap",
    "MembershipAttack": "membership_attack",
    "UnlearningGap": "unlearning_gap",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_module_gives_what_its_function_gives(name):
    columns, function = columns_of(name), getattr(hf_uib.metrics, FUNCTIONS[name])
    module = getattr(hf_uib.metrics, name)(keep_in_memory=True)
    np.testing.assert_equal(module.compute(**columns), function(**columns))
    assert module.name == FUNCTIONS[name] and "@" in module.citation
    assert module.description and "Returns:" in module.inputs_description


def test_evaluate_is_not_imported_before_a_module_is_asked_for():
    code = "import sys, hf_uib.metrics\nassert not {'evaluate', 'datasets', 'torch'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(FUNCTIONS) <= set(dir(hf_uib.metrics))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        hf_uib.metrics.Nothing  # noqa: B018
