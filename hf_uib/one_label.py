"""One label of a multi-label classifier, seen as a classifier of two classes, and which class is the positive one: what the audit
and the results table read."""

from typing import Any

import numpy as np

from .data.labels import known, model_names
from .models import num_labels_of


def label_number(model: Any, label: str | int | None, forget_labels: np.ndarray) -> int:
    """The number of the label that is looked at.

    Args:
        label: its name or number; None takes the one that most forget rows have.
        forget_labels: ``[n, labels]`` of 0 and 1, -1 where none is given.

    Raises:
        ValueError: the model has no such label.
    """
    if label is None:
        return int((forget_labels > 0).sum(0).argmax())
    return _number_of(model, label)


def positive_class(model: Any, positive_label: str | int | None, several: bool = False) -> int | None:
    """The class that false alarms and misses are about; of several labels a row, having the one that is looked at.

    Args:
        positive_label: its name or number; None takes class 1 of two, and none of more.
        several: the model gives several labels a row.

    Raises:
        ValueError: the model has no such label, or gives several labels a row and ``positive_label`` is not None.
    """
    if several and positive_label is not None:
        raise ValueError(
            f"positive_label '{positive_label}' is for a model of one label a row; name the label that is looked at instead."
        )
    if positive_label is None:
        return 1 if several or num_labels_of(model) == 2 else None
    return _number_of(model, positive_label)


def _number_of(model: Any, label: str | int) -> int:
    names = {name: number for number, name in model_names(model.config).items()}
    if label in names:
        return names[str(label)]
    if len(alike := [number for name, number in names.items() if name.casefold() == str(label).casefold()]) == 1:
        return alike[0]
    if str(label).isdecimal() and int(label) < num_labels_of(model):
        return int(label)
    raise ValueError(f"The model has no label '{label}'; it has {known(model.config)}.")


def two_classes(logits: np.ndarray, labels: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``[n, 2]`` of not having the label and of having it, whose softmax is the label's probability, and class ids ``[n]``.

    Args:
        logits, labels: ``[n, labels]``; the label is given in every row.
    """
    own = logits[:, number]
    return np.stack([np.zeros_like(own), own], 1), np.asarray(labels[:, number] > 0.5, dtype=np.int64)


def rows_with_label(labels: np.ndarray, number: int) -> np.ndarray:
    """Numbers of the rows in which the label is given."""
    return np.flatnonzero(labels[:, number] >= 0)
