"""A simple head that is fitted without the rows that it misreads, and how far these are from chance. NumPy alone."""

from collections.abc import Callable

import numpy as np

from ..contrast import CHUNKS
from ..mean_tokens import centred, contrast_z

FOLDS = 5
ROUNDS = 10  # of trimming, at most
FLOOR = 0.05  # added to every variance, in units of that of a standardised feature
TO_DIAGONAL = 0.03  # of a covariance that classes share
MOST_MISREAD = 1 / 3  # a head that misreads more of the rows has not found what gives the label away
RARE = 0.05  # share of the rows: a class of fewer that is misread is left out, of more it speaks against the head
MASKS = 199  # random ones


def quadratic_margins(
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
    logs, fold = _no_logs(labels), _folds(len(x), seed)
    for k in range(FOLDS):
        unseen = fold == k
        for label in range(logs.shape[1]):
            rows = x[~unseen & kept & (labels == label)]
            if not len(rows):
                continue
            mean = rows.mean(0)
            factor = np.linalg.cholesky((rows - mean).T @ (rows - mean) / len(rows) + FLOOR * np.eye(x.shape[1]))
            distance = np.square(np.linalg.solve(factor, (x[unseen] - mean).T)).sum(0)
            logs[unseen, label] = np.log(len(rows)) - np.log(factor.diagonal()).sum() - distance / 2
    return _margins(logs, labels)


def linear_margins(
    x: np.ndarray, labels: np.ndarray, kept: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`quadratic_margins` of classes that share one covariance (linear discriminant analysis), for features that are many. A small
    part of it (`TO_DIAGONAL`) is given up for its diagonal, and a thousandth of the mean variance is added."""
    logs, fold = _no_logs(labels), _folds(len(x), seed)
    classes, d = logs.shape[1], x.shape[1]
    sums, counts, squares = np.zeros((FOLDS, classes, d)), np.zeros((FOLDS, classes)), np.zeros((FOLDS, d, d))
    for k in range(FOLDS):
        rows = x[kept & (fold == k)]
        mine = np.eye(classes)[labels[kept & (fold == k)]]
        sums[k], counts[k], squares[k] = mine.T @ rows, mine.sum(0), rows.T @ rows
    every_sum, every_count, every_square = sums.sum(0), counts.sum(0), squares.sum(0)
    for k in range(FOLDS):
        count = every_count - counts[k]
        there = np.flatnonzero(count)
        means = (every_sum - sums[k])[there] / count[there, None]
        covariance = (every_square - squares[k] - (means.T * count[there]) @ means) / count.sum()
        variance = covariance.diagonal()
        covariance = (1 - TO_DIAGONAL) * covariance + np.diag(TO_DIAGONAL * variance + 1e-3 * variance.mean())
        directions = np.linalg.solve(covariance, means.T)
        offset = np.log(count[there]) - (means.T * directions).sum(0) / 2
        logs[np.ix_(fold == k, there)] = x[fold == k] @ directions + offset
    return _margins(logs, labels)


def _folds(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n) % FOLDS


def _no_logs(labels: np.ndarray) -> np.ndarray:
    return np.full((len(labels), int(labels.max()) + 1), -np.inf)


def _margins(logs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Margins and most likely other classes of log densities ``[n, classes]``, which it changes."""
    rows = np.arange(len(logs))
    own = logs[rows, labels]
    logs[rows, labels] = -np.inf
    margins = np.where(np.isneginf(own), np.finfo(np.float64).min, own) - logs.max(1)
    return margins, logs.argmax(1)


def trimmed_margins(
    x: np.ndarray, labels: np.ndarray, seed: int = 0, margins_of: Callable = quadratic_margins
) -> tuple[np.ndarray, np.ndarray] | None:
    """Margins of classes that are fitted again and again without the rows that they misread, until these stay the same.

    What most rows of a class share becomes sharper with each round: rows that conflict with it move far away, rows that are only
    hard do not.

    Args:
        margins_of: `quadratic_margins` or `linear_margins`.

    Returns:
        Margins ``[n]`` and the most likely other classes ``[n]``; None where more than a third of the rows, or more than half of
        those of a class, are misread. A class of few rows (`RARE`) is then left out instead: its margins are 0.
    """
    rows = np.bincount(labels)
    kept, without = np.ones(len(x), dtype=bool), np.zeros(len(rows), dtype=bool)
    for _ in range(ROUNDS):
        margins, others = margins_of(x, labels, kept, seed)
        misread = (margins < 0) | without[labels]
        half = np.bincount(labels, misread) > rows / 2
        if misread.mean() > MOST_MISREAD or (half & (rows >= RARE * len(x))).any():
            return None
        without = half
        if (kept == ~misread).all():
            break
        kept = ~misread
    return np.where(without[labels], 0.0, margins), others


def distance_ratio(margins: np.ndarray) -> float:
    """How far the misread rows are in another class, as a share of how far the others are in their own (medians of margins).

    1 where they look just like the rows of another class; more where the next class is a near one for most rows and not for these.
    Hard rows lie between two classes: less. Rows with a margin of 0 do not count.
    """
    misread, others = margins < 0, margins > 0
    if not misread.any() or not others.any():
        return 0.0
    return float(np.median(-margins[misread]) / max(np.median(margins[others]), 1e-12))


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
