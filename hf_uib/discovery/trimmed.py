"""A simple head that is fitted without the rows that it misreads, and how far these are from chance. NumPy alone."""

import numpy as np

from ..contrast import CHUNKS
from ..mean_tokens import centred, contrast_z

FOLDS = 5
ROUNDS = 10  # of trimming, at most
FLOOR = 0.05  # added to every variance, in units of that of a standardised feature
MOST_MISREAD = 1 / 3  # a head that misreads more of the rows has not found what gives the label away
MASKS = 199  # random ones


def held_out_margins(
    x: np.ndarray, labels: np.ndarray, kept: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """How much more likely a row's features are in its own class than in the most likely other one, in nats, and which one that is.

    A class is a Gaussian with a covariance of its own and a prior by its rows (quadratic discriminant analysis), fitted on the
    kept rows of the other folds.

    Args:
        x: ``[n, d]``; labels: ``[n]`` in 0..classes-1; kept: ``[n]`` booleans.
        seed: of the folds.

    Returns:
        Margins ``[n]`` and classes ``[n]``.
    """
    n, classes = len(x), int(labels.max()) + 1
    logs, fold = np.full((n, classes), -np.inf), np.random.default_rng(seed).permutation(n) % FOLDS
    for k in range(FOLDS):
        unseen = fold == k
        for label in range(classes):
            rows = x[~unseen & kept & (labels == label)]
            if not len(rows):
                continue
            mean = rows.mean(0)
            factor = np.linalg.cholesky((rows - mean).T @ (rows - mean) / len(rows) + FLOOR * np.eye(x.shape[1]))
            distance = np.square(np.linalg.solve(factor, (x[unseen] - mean).T)).sum(0)
            logs[unseen, label] = np.log(len(rows)) - np.log(factor.diagonal()).sum() - distance / 2
    own = logs[np.arange(n), labels]
    logs[np.arange(n), labels] = -np.inf
    margins = np.where(np.isneginf(own), np.finfo(np.float64).min, own) - logs.max(1)
    return margins, logs.argmax(1)


def trimmed_margins(x: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray] | None:
    """`held_out_margins` of classes that are fitted again and again without the rows that they misread, until these stay the same.

    What most rows of a class share becomes sharper with each round: rows that conflict with it move far away, rows that are only
    hard do not.

    Returns:
        None where more than a third of the rows, or more than half of those of a class, are misread.
    """
    rows = np.bincount(labels)
    kept = np.ones(len(x), dtype=bool)
    for _ in range(ROUNDS):
        margins, others = held_out_margins(x, labels, kept, seed)
        if (margins < 0).mean() > MOST_MISREAD or (np.bincount(labels, margins < 0) > rows / 2).any():
            return None
        if (kept == (margins >= 0)).all():
            break
        kept = margins >= 0
    return margins, others


def distance_ratio(margins: np.ndarray) -> float:
    """How far the misread rows are in another class, as a share of how far the others are in their own (medians of margins).

    1 where they look just like the rows of another class; more where the next class is a near one for most rows and not for these.
    Hard rows lie between two classes: less.
    """
    misread = margins < 0
    if not misread.any() or misread.all():
        return 0.0
    return float(np.median(-margins[misread]) / max(np.median(margins[~misread]), 1e-12))


def mask_p_value(x: np.ndarray, labels: np.ndarray, mask: np.ndarray, seed: int = 0) -> float:
    """The share of random masks with as many rows of each class whose `contrast_z` is as large: ``(1 + count) / 200``."""
    rng = np.random.default_rng(seed)
    x = centred(x, labels)
    chunk = rng.permutation(len(x)) % CHUNKS
    found, as_large = contrast_z(x, labels, mask, chunk), 0
    for _ in range(MASKS):
        drawn = mask.copy()
        for label in np.unique(labels):
            drawn[labels == label] = rng.permutation(mask[labels == label])
        as_large += contrast_z(x, labels, drawn, chunk) >= found
    return (1 + as_large) / (1 + MASKS)
