"""`METRICS`: every figure that a table, a card or a picture shows, with its title, direction and format."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .bias import bias_correlation
from .groups import worst_group_accuracy

MIN_GROUP_SIZE = 10  # rows from which on a group can be the worst of a table
RETRAINED = "that of the retrained model"


@dataclass
class MetricInputs:
    """What a metric of a bias table is computed from.

    Attributes:
        logits: ``[n, classes]``; labels and attributes: ``[n]``.
        coded: whether the attribute is coded by the class it stands for.
    """

    logits: np.ndarray
    labels: np.ndarray
    attributes: np.ndarray
    coded: bool = True

    @cached_property
    def predictions(self) -> np.ndarray:
        """``[n]``, the most probable class."""
        return self.logits.argmax(-1)

    @cached_property
    def bias(self) -> dict[str, float]:
        """See `bias_correlation`."""
        return bias_correlation(self.predictions, self.labels, self.attributes, num_classes=self.logits.shape[1])


@dataclass(frozen=True)
class Metric:
    """A figure of the tables.

    Attributes:
        title: what people read.
        direction: what is better: "higher", "lower" or `RETRAINED`.
        format: of the value, a format specification.
        part: the set it is measured on.
        measure: computes it for `bias_row`; None is left out of the row. Without it the figure is measured elsewhere.
    """

    title: str
    direction: str
    format: str = ".3f"
    part: str = "test"
    measure: Callable[[MetricInputs], float | None] | None = None

    @property
    def goal(self) -> str:
        """The direction as a phrase."""
        return self.direction if self.direction == RETRAINED else f"{self.direction} is better"

    def text(self, value: float) -> str:
        """The value as it is shown."""
        return format(value, self.format)


def _of_coded(name: str) -> Callable[[MetricInputs], float | None]:
    return lambda rows: rows.bias[name] if rows.coded else None


def _worst_group(rows: MetricInputs) -> float:
    groups = worst_group_accuracy(rows.predictions, rows.labels, rows.attributes, MIN_GROUP_SIZE)
    return groups["worst_group_accuracy"]


# In the order of the columns
METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy", "higher", measure=lambda rows: float((rows.predictions == rows.labels).mean())),
    "conflicting_accuracy": Metric("bias-conflicting accuracy", "higher", measure=_of_coded("conflicting_accuracy")),
    "follow_rate": Metric("shortcut rate", "lower", measure=_of_coded("follow_rate")),
    "cramers_v": Metric("Cramér's V", "lower", measure=lambda rows: rows.bias["cramers_v"]),
    "worst_group_accuracy": Metric("worst group", "higher", measure=_worst_group),
    "forget_accuracy": Metric("accuracy, forget set", RETRAINED, part="forget"),
    "retain_accuracy": Metric("accuracy, retained set", RETRAINED, part="retain"),
    "test_accuracy": Metric("accuracy, test", RETRAINED),
    "removed_accuracy": Metric("accuracy, unseen rows of the class", RETRAINED),
    "attack_auc": Metric("membership attack, AUC", RETRAINED, part="forget"),
    "mia_efficacy": Metric("MIA-Efficacy", RETRAINED, part="forget"),
    "flip_rate": Metric("counterfactual flip rate", "lower"),
    "selection_rate": Metric("predicted positives", RETRAINED),
    "false_positive_rate": Metric("false alarms", "lower"),
    "false_negative_rate": Metric("misses", "lower"),
    "demographic_parity_difference": Metric("demographic parity difference", RETRAINED),
    "equalized_odds_difference": Metric("equalised odds difference", "lower"),
    "false_positive_rate_difference": Metric("false alarms, largest difference", "lower"),
    "false_negative_rate_difference": Metric("misses, largest difference", "lower"),
    "steps": Metric("steps", "lower", ".0f"),
    "seconds": Metric("seconds", "lower", ".1f"),
}


def bias_row(logits: np.ndarray, labels: np.ndarray, attributes: np.ndarray, coded: bool = True) -> dict[str, float]:
    """One row of a bias table: every figure of `METRICS` that can be measured on the test rows.

    Args:
        logits: ``[n, classes]``; labels and attributes: ``[n]``.
        coded: whether the attribute is coded by the class it stands for; conflicting accuracy and shortcut rate need that.
    """
    inputs = MetricInputs(np.asarray(logits), np.asarray(labels), np.asarray(attributes), coded)
    values = {key: metric.measure(inputs) for key, metric in METRICS.items() if metric.measure is not None}
    return {key: value for key, value in values.items() if value is not None}


def title_of(key: str) -> str:
    """The title of a figure; of one that is not in `METRICS`, its key in words."""
    return METRICS[key].title if key in METRICS else key.replace("_", " ")


def measured(results: dict[str, dict]) -> list[str]:
    """Keys of the `METRICS` that any of the models' rows has, in the order of the columns."""
    return [key for key in METRICS if any(key in row for row in results.values())]


def text_table(results: dict[str, dict]) -> str:
    """Rows by model name, as they are printed."""
    keys = measured(results)
    lines = [["", *(METRICS[key].title for key in keys)]]
    for model, row in results.items():
        values = [row.get(key) for key in keys]
        cells = ["-" if v is None else METRICS[key].text(v) for key, v in zip(keys, values, strict=True)]
        lines.append([model, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *body = [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))])
        for name, *cells in lines
    ]
    return "\n".join([head, "-" * len(head), *body])
