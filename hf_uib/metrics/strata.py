"""The distance from a retrained model in parts of the forget set: what was memorised most, and least."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .bootstrap import bootstrap_interval

STRATA = ("high", "medium", "low")


def memorisation_strata(
    predictions: ArrayLike,
    retrained_predictions: ArrayLike,
    references: ArrayLike,
    margins: ArrayLike,
    retrained_margins: ArrayLike,
    confidences: ArrayLike,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Gaps to a retrained model on thirds of the forget set, by how much the original model is thought to have memorised them.

    Target of every gap: 0. A gap over the whole set can be small because those of its parts cancel: what was memorised is
    forgotten too little, and what any model knows is forgotten too much. The strata of RUM, Zhao et al. (2024), arXiv 2406.01257.
    Memorisation is not measured but ordered by a proxy, as in Zhao and Triantafillou (2024), arXiv 2410.16516: rows of which the
    original is least sure are taken for the most memorised. One that it gets wrong was not memorised either.

    Args:
        predictions, retrained_predictions: classes predicted for the forget rows ``[n]`` by the model and by a retrained one.
        references: true classes ``[n]``.
        margins, retrained_margins: of the label by both, in nats ``[n]``.
        confidences: the proxy ``[n]``, *low* for what was memorised: the original's margin (or probability) of the label, or any
            score of the kind, as the margin of a model that never saw the rows.
        n_bootstrap: resamples of the intervals; 0 makes them NaN.
        seed: of the resampling.

    Returns:
        strata: for ``high``, ``medium`` and ``low`` memorisation ``rows``, ``accuracy`` and ``retrained_accuracy``,
            ``accuracy_gap`` (model minus retrained, in [-1, 1]) and ``margin_gap`` (mean, in nats), both with ``_low`` and
            ``_high``, 95% by resampling rows. Positive: forgotten too little.
        largest_accuracy_gap: the largest absolute value of the three, in [0, 1], lower is better.

    Raises:
        ValueError: fewer than three rows, or a score is not a number.
    """
    confidences = np.asarray(confidences, dtype=float)
    if len(confidences) < len(STRATA):
        raise ValueError(f"memorisation_strata needs three forget rows or more, not {len(confidences)}")
    right, retrained = (np.asarray(x) == np.asarray(references) for x in (predictions, retrained_predictions))
    nats = np.asarray(margins, dtype=float) - np.asarray(retrained_margins, dtype=float)
    if not len(confidences) == len(right) == len(nats):
        raise ValueError(
            f"{len(right)} references and {len(nats)} margins do not go with {len(confidences)} confidences"
        )
    if np.isnan(confidences).any() or np.isnan(nats).any():
        raise ValueError("confidences and margins must be numbers")
    gaps = {"accuracy_gap": right.astype(float) - retrained, "margin_gap": nats}
    strata: dict[str, dict[str, float]] = {}
    for name, rows in zip(STRATA, np.array_split(np.argsort(confidences, kind="stable"), len(STRATA)), strict=True):
        strata[name] = {"rows": len(rows), "accuracy": float(right[rows].mean())}
        strata[name]["retrained_accuracy"] = float(retrained[rows].mean())
        for key, values in gaps.items():
            mean_of = lambda counts, values=values[rows]: counts @ values / len(values)
            low, high = bootstrap_interval(mean_of, [len(rows)], n_bootstrap, seed)
            strata[name] |= {key: float(values[rows].mean()), f"{key}_low": low, f"{key}_high": high}
    return {
        "strata": strata,
        "largest_accuracy_gap": max(abs(stratum["accuracy_gap"]) for stratum in strata.values()),
    }
