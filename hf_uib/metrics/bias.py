"""How far predictions depend on a bias attribute."""

import numpy as np
from numpy.typing import ArrayLike


def bias_correlation(
    predictions: ArrayLike, references: ArrayLike, attributes: ArrayLike, num_classes: int | None = None
) -> dict[str, float]:
    """Dependence between predictions and a bias attribute, and accuracy where label and attribute disagree.

    Target of every value: that of a model retrained without the forget set, not 0 or 1.

    Args:
        predictions: predicted classes ``[n]``.
        references: true classes ``[n]``.
        attributes: the bias attribute ``[n]``. Where it gives the label away, it is coded by the class it stands for.
        num_classes: of the task; None takes the largest class that occurs.

    Returns:
        cramers_v: in [0, 1], lower is less dependence; 0 when predictions or attribute are constant. Cramér (1946), without bias
            correction.
        conflicting_accuracy: accuracy where attribute and reference disagree, in [0, 1], higher is better; NaN when there are none.
        aligned_accuracy: accuracy where they agree; NaN when there are none.
        follow_rate: the shortcut rate, the share of the disagreeing examples that are given the attribute's class, in [0, 1], lower
            is less bias.
        signed_follow_rate: follow_rate minus the rate at which an unrelated class is hit, (errors on the disagreeing examples) /
            (classes - 1); positive when errors go to the attribute's class, negative when they avoid it (a reversed bias).
    """
    predictions, references, attributes = (np.asarray(x) for x in (predictions, references, attributes))
    conflicting = attributes != references
    right, followed = predictions == references, predictions == attributes
    classes = num_classes or int(max(predictions.max(), references.max(), attributes.max())) + 1
    followed_rate, error_rate = _mean(followed[conflicting]), 1 - _mean(right[conflicting])
    return {
        "cramers_v": cramers_v(predictions, attributes),
        "conflicting_accuracy": _mean(right[conflicting]),
        "aligned_accuracy": _mean(right[~conflicting]),
        "follow_rate": followed_rate,
        "signed_follow_rate": followed_rate - error_rate / max(classes - 1, 1),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def cramers_v(first: np.ndarray, second: np.ndarray) -> float:
    r"""Cramér's V of two codes ``[n]``, :math:`\sqrt{\chi^2 / (n \min(r - 1, c - 1))}`, in [0, 1]; 0 when either is constant."""
    _, rows = np.unique(first, return_inverse=True)
    _, columns = np.unique(second, return_inverse=True)
    table = np.zeros((rows.max(initial=0) + 1, columns.max(initial=0) + 1))
    np.add.at(table, (rows, columns), 1)
    return float(cramers_v_of(table[None])[0])


def cramers_v_of(tables: np.ndarray) -> np.ndarray:
    """Cramér's V of contingency tables ``[m, r, c]``: ``[m]``, 0 where only one row or one column is used."""
    total = tables.sum((1, 2), keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = tables.sum(2, keepdims=True) * tables.sum(1, keepdims=True) / total
        squared = np.where(expected > 0, (tables - expected) ** 2 / expected, 0.0).sum((1, 2))
        smaller = np.minimum((tables.sum(2) > 0).sum(1), (tables.sum(1) > 0).sum(1)) - 1
        return np.where(smaller > 0, np.sqrt(squared / total[:, 0, 0] / np.maximum(smaller, 1)), 0.0)


def attribute_classes(forget_attributes: np.ndarray, forget_labels: np.ndarray) -> dict | None:
    """The class each value of the attribute stands for in the forget set, the label most of its rows have.

    Args:
        forget_attributes, forget_labels: ``[n]``.

    Returns:
        Class by value, or None where all values stand for one class.
    """
    majority = {}
    for value in np.unique(forget_attributes):
        labels, counts = np.unique(forget_labels[forget_attributes == value], return_counts=True)
        majority[value.item()] = int(labels[counts.argmax()])
    return majority if len(set(majority.values())) > 1 else None
