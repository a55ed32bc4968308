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
    klom,
    membership_attack,
    memorisation_strata,
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
    missing = worst_group_accuracy([0, 1, 1], [0, 1, 0], np.array(["a", None, "a"], dtype=object))
    assert missing["worst_group"] == "0/a" and missing["groups"]["1/None"] == {"accuracy": 1.0, "size": 1}
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


# ---- Against retrained models ----


def test_klom_by_hand():
    """Margins from 0 to 4 in four bins."""
    # p = (1/2, 0, 0, 1/2), q = (1/2, 1/2, 0, 0): the last bin has no retrained model
    first = 0.5 * np.log(0.5 / 0.5) + 0.5 * np.log(0.5 / 1e-5)
    # p = (0, 1/2, 1/2, 0), q = (1/4, 1/4, 1/4, 1/4)
    second = np.log(0.5 / 0.25)
    mine, theirs = [[0.0, 4.0]], [[0.5, 1.5]]
    assert klom(mine, theirs, bins=4)["klom"] == pytest.approx(first, abs=1e-12)
    with pytest.raises(ValueError, match="bins is 0"):
        klom(mine, theirs, bins=0)
    four = klom([[1.2, 2.2]], [[0.0, 1.0, 2.0, 4.0]], bins=4)
    assert four["klom"] == pytest.approx(second, abs=1e-12)
    both = klom([[0.0, 4.0, 0.0, 4.0], [1.2, 2.2, 1.2, 2.2]], [[0.5, 1.5, 0.5, 1.5], [0.0, 1.0, 2.0, 4.0]], bins=4)
    assert both["klom"] == pytest.approx((first + second) / 2, abs=1e-12)
    assert both["klom_95"] == pytest.approx(np.quantile([first, second], 0.95))
    assert klom([[3.0, 3.0]], [[3.0]])["klom"] == 0  # no width
    assert klom([[500.0]], [[100.0]])["klom"] == 0  # clipped
    assert klom([[1.0]], [[2.0]])["klom"] == pytest.approx(-np.log(1e-5))  # the ceiling


def test_klom_of_two_gaussians():
    """Over many models it is the divergence of the distributions, (m - n)² / 2 s² nats, but for the bins' width."""
    rng = np.random.default_rng(0)
    for shift in (0.5, 1.0):
        mine, theirs = rng.normal(shift, 1, (4, 40_000)), rng.normal(0, 1, (4, 40_000))
        assert klom(mine, theirs, bins=40)["klom"] == pytest.approx(shift**2 / 2, rel=0.05)
    assert klom(rng.normal(size=(4, 40_000)), rng.normal(size=(4, 40_000)))["klom"] < 0.002
    # Two retrained models tell nothing: as far from each other as from anything else
    few = rng.normal(size=(50, 3))
    assert klom(few[:, :1], few[:, 1:2])["klom"] == klom(few[:, :1] + 9, few[:, 1:2])["klom"]


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        ([[1.0]], [[1.0], [2.0]], "of the same examples"),
        ([1.0], [2.0], "must be .examples, models."),
        ([[float("nan")]], [[1.0]], "must be numbers"),
    ],
)
def test_klom_of_what_does_not_go_together(mine, theirs, message):
    with pytest.raises(ValueError, match=message):
        klom(mine, theirs)


def test_strata_show_gaps_that_cancel():
    """Six rows in order of confidence: the model keeps both memorised rows, loses both easy ones, and is as good overall."""
    labels, order = np.zeros(6, int), np.array([3, 0, 5, 1, 4, 2])
    put = lambda values: np.asarray(values)[np.argsort(order)]
    mine, retrained = put([0, 0, 0, 1, 1, 1]), put([1, 1, 0, 1, 0, 0])
    result = memorisation_strata(
        mine, retrained, labels, margins=put([3.0, 1.0, 0, 0, -2.0, -2.0]), retrained_margins=np.zeros(6),
        confidences=put([0.1, 0.2, 0.5, 0.6, 0.9, 0.95]), n_bootstrap=50,
    )  # fmt: skip
    assert (mine == labels).sum() == (retrained == labels).sum()
    strata = result["strata"]
    assert [strata[name]["accuracy_gap"] for name in ("high", "medium", "low")] == [1.0, 0.0, -1.0]
    assert [strata[name]["margin_gap"] for name in ("high", "medium", "low")] == [2.0, 0.0, -2.0]
    assert strata["high"]["rows"] == 2 and strata["high"]["retrained_accuracy"] == 0.0
    assert strata["high"]["margin_gap_low"] == 1.0 and strata["high"]["margin_gap_high"] == 3.0
    assert result["largest_accuracy_gap"] == 1.0
    with pytest.raises(ValueError, match="three forget rows or more, not 2"):
        memorisation_strata([0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 1])
    with pytest.raises(ValueError, match="must be numbers"):
        memorisation_strata([0] * 3, [0] * 3, [0] * 3, [0] * 3, [0] * 3, [0, 1, float("nan")])


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
        "Klom": {
            "margins": rng.normal(size=(400, 3)).tolist(),
            "retrained_margins": rng.normal(size=(400, 5)).tolist(),
        },
        "MemorisationStrata": labelled
        | {"retrained_predictions": rng.integers(0, 5, 400), "n_bootstrap": 9}
        | {name: rng.normal(size=400) for name in ("margins", "retrained_margins", "confidences")},
        "UnlearningGap": labelled
        | {"retrained_predictions": rng.integers(0, 5, 400), "splits": splits, "n_bootstrap": 9},
    }[name]


FUNCTIONS = {
    "BiasCorrelation": "bias_correlation",
    "WorstGroupAccuracy": "worst_group_accuracy",
    "CounterfactualGap": "counterfactual_gap",
    "Klom": "klom",
    "MembershipAttack": "membership_attack",
    "MemorisationStrata": "memorisation_strata",
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
