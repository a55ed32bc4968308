"""How far predictions depend on a bias attribute."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """Dependence between predictions and a bias attribute: Cramer's V, accuracy where label and attribute disagree, and
the signed follow rate. Target: the value of a model retrained without the forget set, not 0 or 1."""

_INPUTS = """
Args:
    predictions (list of int): predicted classes.
    references (list of int): true classes.
    attributes (list of int): the bias attribute. Where it gives the label away, it is coded by the class it stands for.
Returns:
    cramers_v: in [0, 1], lower is less dependence; 0 when predictions or attribute are constant. Cramer (1946), without bias
        correction.
    conflicting_accuracy: accuracy where attribute and reference disagree, in [0, 1], higher is better; NaN when there are none.
    aligned_accuracy: accuracy where they agree; NaN when there are none.
    follow_rate: share of the disagreeing examples that are given the attribute's class, in [0, 1], lower is less bias.
    signed_follow_rate: follow_rate minus the rate at which an unrelated class is hit, (errors on the disagreeing examples) /
        (classes - 1); positive when errors go to the attribute's class, negative when they avoid it (a reversed bias).
"""

_CITATION = (
    """@book{cramer1946, author = {Harald Cram\\'er}, title = {Mathematical Methods of Statistics}, year = {1946}}"""
)


def cramers_v(first: np.ndarray, second: np.ndarray) -> float:
    """Cramer's V of two integer arrays ``[n]``, in [0, 1]; 0 when either is constant."""
    _, rows = np.unique(first, return_inverse=True)
    _, columns = np.unique(second, return_inverse=True)
    table = np.zeros((rows.max(initial=0) + 1, columns.max(initial=0) + 1))
    np.add.at(table, (rows, columns), 1)
    return float(cramers_v_of(table[None])[0])


def cramers_v_of(tables: np.ndarray) -> np.ndarray:
    """Cramer's V of contingency tables ``[m, r, c]``: ``[m]``, 0 where only one row or one column is used."""
    total = tables.sum((1, 2), keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = tables.sum(2, keepdims=True) * tables.sum(1, keepdims=True) / total
        squared = np.where(expected > 0, (tables - expected) ** 2 / expected, 0.0).sum((1, 2))
        smaller = np.minimum((tables.sum(2) > 0).sum(1), (tables.sum(1) > 0).sum(1)) - 1
        return np.where(smaller > 0, np.sqrt(squared / total[:, 0, 0] / np.maximum(smaller, 1)), 0.0)


class BiasCorrelation(evaluate.Metric):
    """See `_INPUTS`; the name in a combined result is ``bias_correlation``."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {name: datasets.Value("int64") for name in ("predictions", "references", "attributes")}
            ),
        )

    def _compute(self, predictions, references, attributes, num_classes: int | None = None):
        predictions, references, attributes = (np.asarray(x) for x in (predictions, references, attributes))
        conflicting = attributes != references
        right, followed = predictions == references, predictions == attributes
        classes = num_classes or int(max(predictions.max(), references.max(), attributes.max())) + 1
        mean = lambda values: float(values.mean()) if len(values) else float("nan")  # noqa: E731
        follow, errors = mean(followed[conflicting]), 1 - mean(right[conflicting])
        return {
            "cramers_v": cramers_v(predictions, attributes),
            "conflicting_accuracy": mean(right[conflicting]),
            "aligned_accuracy": mean(right[~conflicting]),
            "follow_rate": follow,
            "signed_follow_rate": follow - errors / max(classes - 1, 1),
        }
