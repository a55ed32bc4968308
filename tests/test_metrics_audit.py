"""The audit's metrics against worked examples, scikit-learn, SciPy, and what must not change them."""

import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import mannwhitneyu, norm
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.svm import SVC

from hf_uib.metrics import UnlearningGap, counterfactual_gap, membership_attack, unlearning_gap
from hf_uib.metrics.bootstrap import bootstrap_interval
from hf_uib.metrics.membership import weighted_auc
from hf_uib.metrics.unlearning import gap_deviations


def run(metric, *, order=None, **columns):
    """Compute a metric; ``order`` permutes the rows of every column."""
    if order is not None:
        columns = {k: v[order] if isinstance(v, np.ndarray) else v for k, v in columns.items()}
    return metric(**columns)


def membership_columns(forget, test, retain=(), references=None):
    """Columns of `membership_attack`, in the order forget, retain, test; every label is 0 unless given."""
    sets = {"forget": np.asarray(forget), "retain": np.asarray(retain, dtype=float), "test": np.asarray(test)}
    scores = np.concatenate(list(sets.values()))
    return {
        "scores": scores,
        "references": np.zeros(len(scores), dtype=int) if references is None else references,
        "splits": np.repeat(list(sets), [len(v) for v in sets.values()]),
    }


def gap_columns(rng, size=300, right=0.8, retrained_right=0.8, splits=("forget", "retain", "test")):
    """Columns of `unlearning_gap` with independent errors, ``size`` rows a split."""
    count = size * len(splits)
    references = rng.integers(0, 5, count)
    wrong = lambda share: (references + (rng.random(count) > share)) % 5
    return {
        "predictions": wrong(right),
        "retrained_predictions": wrong(retrained_right),
        "references": references,
        "splits": np.repeat(list(splits), size),
    }


# -- counterfactual_gap


def test_counterfactual_gap_by_hand():
    # Example 7: spread .6, flips; example 3: spread .1 over three copies, same class; example 9 has one copy.
    result = run(
        counterfactual_gap,
        predictions=[1, 2, 2, 2, 2, 0],
        scores=[0.9, 0.3, 0.5, 0.55, 0.6, 0.1],
        references=[1, 1, 2, 2, 2, 0],
        examples=[7, 7, 3, 3, 3, 9],
    )
    assert result["counterfactual_gap"] == pytest.approx((0.6 + 0.1) / 2)
    assert result["flip_rate"] == 0.5 and result["examples"] == 2
    assert result["counterfactual_gap_low"] == pytest.approx(0.1)
    assert result["counterfactual_gap_high"] == pytest.approx(0.6)
    assert (result["flip_rate_low"], result["flip_rate_high"]) == (0, 1)


def test_counterfactual_gap_of_a_blind_model_is_zero_and_order_is_irrelevant():
    rng = np.random.default_rng(0)
    examples, scores = np.repeat(np.arange(50), 4), rng.random(200)
    columns = dict(predictions=rng.integers(0, 3, 200), scores=scores, references=examples % 3, examples=examples)
    assert run(counterfactual_gap, **columns) == run(counterfactual_gap, order=rng.permutation(200), **columns)
    blind = run(counterfactual_gap, **{**columns, "scores": examples / 50, "predictions": examples % 3})
    assert blind["counterfactual_gap"] == 0 and blind["flip_rate"] == 0
    off = run(counterfactual_gap, n_bootstrap=0, **columns)
    assert math.isnan(off["flip_rate_low"]) and off["flip_rate"] > 0


def test_bootstrap_interval_covers_and_does_not_depend_on_blocks(monkeypatch):
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        values = rng.exponential(size=80)
        low, high = bootstrap_interval(lambda c, v=values: c @ v / len(v), [80], 400, seed=trial)
        covered += low <= 1 <= high
    assert 0.88 <= covered / 200 <= 0.99
    values = rng.random(2**20)  # two draws a block
    low, high = bootstrap_interval(lambda c: c @ values / len(values), [len(values)], 5)
    assert abs(low - values.mean()) < 2e-3 and abs(high - values.mean()) < 2e-3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"examples": [0, 1]}, "no example has two copies"),
        ({"references": [0, 1]}, "copies of example 4 differ in references"),
        ({"scores": [0.5, 3.0]}, "probabilities"),
        ({"scores": [0.5, math.nan]}, "probabilities"),
    ],
)
def test_counterfactual_gap_errors_are_one_line(changed, message):
    columns = {"predictions": [0, 0], "scores": [0.5, 0.5], "references": [0, 0], "examples": [4, 4]}
    with pytest.raises(ValueError, match=message) as error:
        run(counterfactual_gap, **{**columns, **changed})
    assert "\n" not in str(error.value)


# -- membership_attack


def test_membership_attack_by_hand():
    # Pairs (forget, test): 3 beats 2, 1, 0; 2 ties with 2 and beats 1, 0; together 5.5 of 6.
    result = run(membership_attack, **membership_columns(forget=[3.0, 2.0], test=[2.0, 1.0, 0.0]))
    assert result["auc"] == result["auc_balanced"] == pytest.approx(5.5 / 6)
    assert result["advantage"] == pytest.approx(1 - 1 / 3)  # threshold 2: TPR 1, FPR 1/3
    assert result["tpr_at_1_fpr"] == 0.5  # threshold 3: no test row
    assert math.isnan(result["logistic_accuracy"]) and math.isnan(result["mia_efficacy"])


def test_membership_attack_agrees_with_sklearn_and_scipy():
    rng = np.random.default_rng(0)
    for shift in (-1.0, 0.0, 0.7):
        forget, test = rng.normal(shift, 1, 150).round(1), rng.normal(0, 1, 400).round(1)  # rounded: many ties
        result = run(membership_attack, n_bootstrap=0, **membership_columns(forget, test))
        truth, scores = np.repeat([1, 0], [150, 400]), np.concatenate([forget, test])
        assert result["auc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
        assert result["auc"] == pytest.approx(mannwhitneyu(forget, test).statistic / (150 * 400), abs=1e-12)
        fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
        assert result["advantage"] == pytest.approx((tpr - fpr).max(), abs=1e-12)
        assert result["tpr_at_1_fpr"] == pytest.approx(tpr[fpr <= 0.01].max(), abs=1e-12)
        assert math.isnan(result["auc_low"])


def test_weighted_auc_is_the_auc_of_the_repeated_rows():
    rng = np.random.default_rng(0)
    forget, test = np.sort(rng.normal(0.5, 1, 40).round(1)), np.sort(rng.normal(0, 1, 60).round(1))
    counts = [rng.multinomial(len(side), np.full(len(side), 1 / len(side)), size=20) for side in (forget, test)]
    for value, *drawn in zip(weighted_auc(forget, test, *counts), *counts, strict=True):
        scores = np.concatenate([np.repeat(side, count) for side, count in zip((forget, test), drawn, strict=True)])
        assert value == pytest.approx(roc_auc_score(np.repeat([1, 0], [40, 60]), scores), abs=1e-12)


def test_mia_efficacy_is_the_published_attack():
    rng = np.random.default_rng(0)
    logit = {k: rng.normal(mean, 1.5, 200) for k, mean in {"forget": 1.0, "retain": 3.0, "test": 0.0}.items()}
    attack = SVC(C=3, gamma="auto").fit(
        expit(np.concatenate([logit["retain"], logit["test"]]))[:, None], np.repeat([1, 0], 200)
    )
    expected = (attack.predict(expit(logit["forget"])[:, None]) == 0).mean()
    assert 0.1 < expected < 0.9
    assert run(membership_attack, **membership_columns(**logit))["mia_efficacy"] == pytest.approx(expected)
    logit["forget"] = logit["retain"]  # a model that has forgotten nothing has less of it
    assert run(membership_attack, **membership_columns(**logit))["mia_efficacy"] < expected - 0.1


def test_membership_attack_is_deterministic_and_ignores_the_order_of_rows():
    rng = np.random.default_rng(0)
    sets = {"forget": rng.normal(0.5, 1, 90), "test": rng.normal(0, 1, 130), "retain": rng.normal(1, 1, 170)}
    columns = membership_columns(**sets, references=rng.integers(0, 3, 390))
    first = run(membership_attack, **columns)
    assert first == run(membership_attack, **columns)
    assert first == run(membership_attack, order=rng.permutation(390), **columns)
    assert first["auc_low"] != run(membership_attack, seed=1, **columns)["auc_low"]


def test_another_mix_of_classes_is_not_membership():
    # No membership at all: the score depends on the class only, and the forget set has more of the easy class.
    rng = np.random.default_rng(0)
    labels = {"forget": rng.random(1500) < 0.8, "test": rng.random(1500) < 0.3}
    scores = {k: 2.0 * v + rng.normal(0, 1, 1500) for k, v in labels.items()}
    labels = {k: v.astype(int) for k, v in labels.items()}
    columns = membership_columns(**scores, references=np.concatenate([labels["forget"], labels["test"]]))
    result = run(membership_attack, **columns)
    assert result["auc"] > 0.65 and result["auc_low"] > 0.6
    assert result["auc_balanced"] == pytest.approx(0.5, abs=0.03)
    assert result["logistic_accuracy"] == pytest.approx(0.5, abs=0.04)
    within = [
        roc_auc_score(columns["splits"][rows] == "forget", columns["scores"][rows])
        for rows in (columns["references"] == label for label in (0, 1))
    ]
    shares = np.bincount(labels["forget"]) / 1500
    assert result["auc_balanced"] == pytest.approx(np.dot(within, shares), abs=1e-12)


def test_both_directions_away_from_the_target():
    rng = np.random.default_rng(0)
    test = rng.normal(0, 1, 300)
    kept = run(membership_attack, **membership_columns(rng.normal(2, 1, 300), test))
    over = run(membership_attack, **membership_columns(rng.normal(-2, 1, 300), test))
    assert kept["auc"] > 0.85 and kept["logistic_accuracy"] > 0.75
    assert over["auc"] < 0.15 and over["advantage"] < 0.1
    assert over["logistic_accuracy"] > 0.75  # its slope is fitted: it cannot tell the two apart


def test_auc_interval_covers():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        forget, test = np.sort(rng.normal(0.8, 1, 60)), np.sort(rng.normal(0, 1, 90))
        auc = lambda *counts, f=forget, t=test: weighted_auc(f, t, *counts)
        low, high = bootstrap_interval(auc, [60, 90], 400, seed=trial)
        covered += low <= norm.cdf(0.8 / math.sqrt(2)) <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_classes_that_do_not_meet_leave_no_balanced_value():
    result = run(membership_attack, **membership_columns([2.0, 3.0], [1.0, 0.0], references=[1, 1, 0, 0]))
    assert result["auc"] == 1 and math.isnan(result["auc_balanced"]) and math.isnan(result["logistic_accuracy"])


@pytest.mark.parametrize(
    ("splits", "scores", "message"),
    [
        (["test", "retain"], [0.0, 1.0], "no forget rows"),
        (["forget", "retain"], [0.0, 1.0], "no test rows"),
        (["forget", "tset"], [0.0, 1.0], "unknown split 'tset'"),
        (["forget", "test"], [0.0, math.inf], "finite"),
    ],
)
def test_membership_attack_errors_are_one_line(splits, scores, message):
    with pytest.raises(ValueError, match=message) as error:
        run(membership_attack, scores=scores, references=[0, 0], splits=splits)
    assert "\n" not in str(error.value)


# -- unlearning_gap


def test_unlearning_gap_by_hand():
    # forget: 1 of 2 against 0 of 2; retain: 1 of 2 against 2 of 2; test: 3 of 4 against 2 of 4.
    columns = {
        "predictions": [1, 0, 1, 0, 1, 1, 1, 0],
        "retrained_predictions": [0, 0, 1, 1, 1, 1, 0, 0],
        "references": [1] * 8,
        "splits": ["forget"] * 2 + ["retain"] * 2 + ["test"] * 4,
    }
    result = run(unlearning_gap, attack=0.9, retrained_attack=0.8, **columns)
    assert (result["forget_gap"], result["retain_gap"], result["test_gap"]) == (0.5, -0.5, 0.25)
    assert result["attack_gap"] == pytest.approx(0.1)
    assert result["average_gap"] == pytest.approx((0.5 + 0.5 + 0.25 + 0.1) / 4)
    assert result["tug_of_war"] == pytest.approx(0.5 * 0.5 * 0.75)
    assert result["tug_of_war_mia"] == pytest.approx(0.9 * 0.5 * 0.75)
    plain = run(unlearning_gap, n_bootstrap=0, **columns)
    assert plain["average_gap"] == pytest.approx(1.25 / 3)
    assert math.isnan(plain["average_gap_low"]) and math.isnan(plain["tug_of_war_high"])
    assert "attack_gap" not in plain and "tug_of_war_mia" not in plain


def test_the_retrained_model_has_no_gap_to_itself():
    columns = gap_columns(np.random.default_rng(0))
    columns["retrained_predictions"] = columns["predictions"]
    result = run(unlearning_gap, attack=0.4, retrained_attack=0.4, **columns)
    assert result["average_gap"] == 0 and result["tug_of_war"] == result["tug_of_war_mia"] == 1
    assert result["average_gap_low"] == result["average_gap_high"] == 0


def test_unlearning_gap_ignores_the_order_of_rows_and_swaps_sign():
    rng = np.random.default_rng(0)
    columns = gap_columns(rng, right=0.6)
    result = run(unlearning_gap, **columns)
    assert result == run(unlearning_gap, order=rng.permutation(900), **columns)
    swapped = dict(predictions=columns["retrained_predictions"], retrained_predictions=columns["predictions"])
    other = run(unlearning_gap, **{**columns, **swapped})
    assert other["forget_gap"] == -result["forget_gap"] and other["tug_of_war"] == result["tug_of_war"]
    absent = run(unlearning_gap, **gap_columns(rng, splits=("retain", "test")))
    assert math.isnan(absent["forget_gap"]) and math.isnan(absent["tug_of_war"]) and absent["average_gap"] >= 0


def test_gap_deviations_are_those_of_resampled_rows():
    rng = np.random.default_rng(0)
    changes = rng.choice([-1, 0, 1], size=120, p=[0.1, 0.7, 0.2])
    rows = changes[rng.integers(120, size=(20000, 120))].mean(axis=1)
    drawn = gap_deviations(changes, 20000, rng)
    for level in (0.5, 0.9, 0.95):
        assert np.quantile(drawn, level) == pytest.approx(np.quantile(abs(rows - changes.mean()), level), abs=0.01)


@pytest.mark.parametrize(("right", "retrained_right"), [(0.8, 0.8), (0.6, 0.8)])
def test_unlearning_gap_intervals_cover(right, retrained_right):
    # Errors of the two models are independent, so that the true gap of every split is the difference.
    rng, gap, average, product = np.random.default_rng(0), abs(right - retrained_right), 0, 0
    for trial in range(150):
        columns = gap_columns(rng, 80, right, retrained_right)
        result = run(unlearning_gap, n_bootstrap=400, seed=trial, **columns)
        average += result["average_gap_low"] <= gap + 1e-12 <= result["average_gap_high"]
        product += result["tug_of_war_low"] <= (1 - gap) ** 3 + 1e-12 and (1 - gap) ** 3 <= result["tug_of_war_high"]
        assert result["average_gap_low"] <= result["average_gap"] <= result["average_gap_high"]
    assert average / 150 >= 0.9 and product / 150 >= 0.9


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"splits": ["forget", "train"]}, "unknown split 'train'"),
        ({"attack": 0.5}, "go together"),
        ({"attack": 55.0, "retrained_attack": 50.0}, r"in \[0, 1\]"),
    ],
)
def test_unlearning_gap_errors_are_one_line(changed, message):
    columns = {"predictions": [0, 0], "retrained_predictions": [0, 0], "references": [0, 0]}
    with pytest.raises(ValueError, match=message) as error:
        run(unlearning_gap, **{**columns, "splits": ["forget", "test"], **changed})
    assert "\n" not in str(error.value)


# -- as `evaluate` modules


def test_batches_and_use_after_an_error():
    rng = np.random.default_rng(0)
    columns = gap_columns(rng)
    metric = UnlearningGap(keep_in_memory=True)
    with pytest.raises(ValueError, match="go together"):
        metric.compute(attack=0.5, **columns)
    for start in range(0, 900, 250):
        metric.add_batch(**{name: column[start : start + 250] for name, column in columns.items()})
    assert metric.compute() == run(unlearning_gap, **columns)
