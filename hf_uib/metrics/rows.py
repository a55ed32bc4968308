"""Metrics of what a model says: from logits to a row of figures."""

import numpy as np
import torch

from ..objective import margin
from .membership import membership_attack
from .table import METRICS, MetricInputs


def bias_row(logits: np.ndarray, labels: np.ndarray, attributes: np.ndarray, coded: bool = True) -> dict[str, float]:
    """One row of a bias table: every figure of `METRICS` that can be measured on the test rows.

    Args:
        logits: ``[n, classes]``; labels and attributes: ``[n]``.
        coded: whether the attribute is coded by the class it stands for; conflicting accuracy and shortcut rate need that.
    """
    inputs = MetricInputs(np.asarray(logits), np.asarray(labels), np.asarray(attributes), coded)
    values = {key: metric.measure(inputs) for key, metric in METRICS.items() if metric.measure is not None}
    return {key: value for key, value in values.items() if value is not None}


def attack(seen: dict[str, tuple[np.ndarray, np.ndarray]], n_bootstrap: int = 1000, seed: int = 0) -> dict[str, float]:
    """`membership_attack` on margins.

    Args:
        seen: what `predict` gave, logits ``[n, classes]`` and labels ``[n]``, for ``forget``, unseen rows as ``test`` and, for the
            published attack, ``retain``.
        n_bootstrap, seed: as in `membership_attack`.
    """
    margins = [margin(torch.from_numpy(logits), torch.from_numpy(labels)).numpy() for logits, labels in seen.values()]
    return membership_attack(
        scores=np.concatenate(margins),
        references=np.concatenate([labels for _, labels in seen.values()]),
        splits=np.repeat(list(seen), [len(m) for m in margins]),
        n_bootstrap=n_bootstrap,
        seed=seed,
    )
