"""Distance of a model from the one retrained without the forget set."""

import numpy as np
from numpy.typing import ArrayLike

from .membership import SPLITS, check_splits


def unlearning_gap(
    predictions: ArrayLike,
    retrained_predictions: ArrayLike,
    references: ArrayLike,
    splits: ArrayLike,
    attack: float | None = None,
    retrained_attack: float | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Differences in accuracy (and in a membership attack) from a model retrained without the forget set, and two summaries.

    Target: gaps 0, average_gap 0 (lower is better), tug_of_war 1 (higher is better). What a second retrained model reaches,
    with another seed, is the best that can be asked.

    Args:
        predictions: classes predicted by the model ``[n]``.
        retrained_predictions: by the retrained model, on the same rows ``[n]``.
        references: true classes ``[n]``.
        splits: ``[n]`` of "forget", "retain" or "test".
        attack, retrained_attack: a membership attack's value of both models, in [0, 1]; the published tables use the
            mia_efficacy of `membership_attack`. Give both or none.
        n_bootstrap: resamples of the intervals; 0 makes them NaN.
        seed: of the resampling.

    Returns:
        forget_gap, retain_gap, test_gap: accuracy of the model minus that of the retrained one, in [-1, 1]; NaN without
            rows. A positive forget_gap: forgotten too little; a negative one: over-unlearned.
        attack_gap: attack minus retrained_attack, in [-1, 1]; only when they are given.
        average_gap: mean of the absolute gaps that are measured, in [0, 1], lower is better. Avg. Gap of SalUn, arXiv
            2310.12508, as a fraction.
        tug_of_war: product of 1 - |gap| over forget, retain and test, in [0, 1], higher is better; NaN when one is not
            measured. Zhao et al. (2024), arXiv 2406.01257.
        tug_of_war_mia: the same with the attack's gap in place of forget's, only when that is given; ToW-MIA of the same
            authors' code.
        average_gap_low, average_gap_high, tug_of_war_low, tug_of_war_high: intervals of at least 95%, see `gap_margin`.

    Raises:
        ValueError: an unknown split; one attack value without the other, or outside [0, 1].
    """
    predictions, retrained = np.asarray(predictions), np.asarray(retrained_predictions)
    references, splits = np.asarray(references), np.asarray(splits)
    check_splits(splits)
    changes = (predictions == references).astype(int) - (retrained == references).astype(int)
    by_split = {name: changes[splits == name] for name in SPLITS}
    gaps = {name: float(rows.mean()) if len(rows) else float("nan") for name, rows in by_split.items()}
    gaps |= _attack_gap(attack, retrained_attack)

    measured = [abs(gap) for gap in gaps.values() if not np.isnan(gap)]
    result = {f"{name}_gap": gap for name, gap in gaps.items()}
    result |= {"average_gap": float(np.mean(measured)), "tug_of_war": _tug_of_war([gaps[name] for name in SPLITS])}
    margin = gap_margin(by_split, n_bootstrap, np.random.default_rng(seed))
    for name, width in (("average_gap", margin / len(measured)), ("tug_of_war", margin)):
        result[f"{name}_low"], result[f"{name}_high"] = (
            float(np.clip(result[name] + side * width, 0, 1)) for side in (-1, 1)
        )
    if "attack" in gaps:
        result["tug_of_war_mia"] = _tug_of_war([gaps[name] for name in ("attack", "retain", "test")])
    return result


def _attack_gap(attack: float | None, retrained_attack: float | None) -> dict[str, float]:
    if attack is None and retrained_attack is None:
        return {}
    if attack is None or retrained_attack is None:
        raise ValueError("attack and retrained_attack go together: give the value of both models or of none")
    if not (0 <= attack <= 1 and 0 <= retrained_attack <= 1):
        raise ValueError(f"attack values must be in [0, 1], not {attack} and {retrained_attack}: pass fractions")
    return {"attack": float(attack - retrained_attack)}


def _tug_of_war(gaps: list[float]) -> float:
    return float(np.prod([1 - abs(gap) for gap in gaps]))


def gap_margin(by_split: dict[str, np.ndarray], n_bootstrap: int, rng: np.random.Generator) -> float:
    """Half the width of tug-of-war's interval: the 95% quantile of the largest change that a resample's gaps allow.

    Rows are resampled within splits, the same rows for both models; the attacks' values are held fixed. Absolute values make a
    percentile interval miss a true gap of 0, the target. So the value is given plus and minus a quantile of the summed distances
    of a resample's gaps from the gaps seen (for average_gap: their mean). True gaps of 0 are covered about 95% of the time, others
    more often.

    Args:
        by_split: changes in {-1, 0, 1} ``[n]`` of each split.
        n_bootstrap: number of resamples; below 1 the margin is NaN.
    """
    deviation = np.zeros(max(n_bootstrap, 0))
    for changes in by_split.values():
        if len(changes):
            deviation += gap_deviations(changes, len(deviation), rng)
    return float(np.quantile(deviation, 0.95)) if len(deviation) else float("nan")


def gap_deviations(changes: np.ndarray, n_bootstrap: int, rng: np.random.Generator) -> np.ndarray:
    """``[n_bootstrap]`` distances of a resampled gap from the gap, the mean of ``changes`` in {-1, 0, 1} ``[n]``.

    A bootstrap draw of rows that take three values only is a multinomial draw of how many take each.
    """
    shares = np.bincount(changes + 1, minlength=3) / len(changes)
    counts = rng.multinomial(len(changes), shares, size=n_bootstrap)
    return np.abs((counts[:, 2] - counts[:, 0]) / len(changes) - changes.mean())
