"""Accuracy of every group, and of the worst."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def _in_order(group: tuple) -> list:
    """A key that also puts a missing attribute somewhere."""
    return [(value is not None, value if value is not None else 0) for value in group]


def worst_group_accuracy(
    predictions: ArrayLike, references: ArrayLike, attributes: ArrayLike, min_group_size: int = 1
) -> dict[str, Any]:
    """Accuracy by group (label and attribute), of the worst group, and the plain and the weighted mean over groups.

    Target: the values of a model retrained without the forget set. Sagawa et al. (2020), arXiv 1911.08731.

    Args:
        predictions: predicted classes ``[n]``.
        references: true classes ``[n]``.
        attributes: any attribute ``[n]``; a group is one pair of class and attribute.
        min_group_size: smaller groups are listed but cannot be the worst.

    Returns:
        worst_group_accuracy: in [0, 1], higher is better; NaN when all groups are too small.
        worst_group: its name ``label/attribute``; None when all groups are too small.
        mean_group_accuracy: plain mean over groups, in [0, 1], higher is better.
        weighted_accuracy: mean over examples, the ordinary accuracy.
        groups: accuracy and size of every group, by name.
    """
    predictions, references, attributes = (np.asarray(x) for x in (predictions, references, attributes))
    right = predictions == references
    groups = {}
    for label, attribute in sorted(set(zip(references.tolist(), attributes.tolist(), strict=True)), key=_in_order):
        members = (references == label) & (attributes == attribute)
        groups[f"{label}/{attribute}"] = {"accuracy": float(right[members].mean()), "size": int(members.sum())}
    eligible = {name: group["accuracy"] for name, group in groups.items() if group["size"] >= min_group_size}
    worst = min(eligible, key=lambda name: eligible[name]) if eligible else None
    return {
        "worst_group_accuracy": float("nan") if worst is None else eligible[worst],
        "worst_group": worst,
        "mean_group_accuracy": float(np.mean([group["accuracy"] for group in groups.values()])),
        "weighted_accuracy": float(right.mean()),
        "groups": groups,
    }
