"""A simple head that is fitted without the rows that it misreads, and how far these are from chance. NumPy alone."""

import numpy as np
import torch

from ..contrast import CHUNKS, pattern_z

FOLDS = 5
ROUNDS = 10  # of trimming, at most
DIRECTIONS = 48  # principal components that are looked at, at most
FLOOR = 0.05  # added to every variance, in units of that of a standardised feature
MOST_MISREAD = 1 / 3  # a head that misreads more of the rows has not found what gives the label away
MASKS = 199  # random ones


def principal_components(features: np.ndarray) -> np.ndarray:
    """The standardised features' first principal components, ``[n, d]`` with ``d`` at most `DIRECTIONS`."""
    x = features.astype(np.float64)
    scale = x.std(0)
    x = (x - x.mean(0))[:, scale > 0] / scale[scale > 0]
    values, vectors = np.linalg.eigh(x.T @ x)
    kept = np.flatnonzero(values > 1e-9 * values.max(initial=0))[::-1][:DIRECTIONS]
    return x @ vectors[:, kept]


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


def contrast_z(x: np.ndarray, labels: np.ndarray, mask: np.ndarray, chunk: np.ndarray) -> float:
    """`hf_uib.contrast.pattern_z` of a mask: do its rows differ from the others of their class in the same way in every chunk?

    A row's score is its product with the contrast of the means of its class, of the chunks before its own. It is the contrast of
    the margins' gradients in the weights of a linear head, class by class.

    Args:
        x: ``[n, d]``, centred within classes; mask: ``[n]`` booleans; chunk: ``[n]`` in 0..CHUNKS-1.
    """
    classes = int(labels.max()) + 1
    one_hot = np.eye(classes)[labels]
    sides = (~mask, mask)
    sums, counts = np.zeros((2, classes, x.shape[1])), np.zeros((2, classes, 1))
    moments = torch.zeros(CHUNKS, 2, 3, dtype=torch.float64)
    for k in range(CHUNKS):
        there = chunk == k
        means = sums / np.maximum(counts, 1)
        direction = (means[0] - means[1]) * (counts > 0).all(0)
        scores = (x[there] * direction[labels[there]]).sum(1)
        for side, rows in enumerate(sides):
            mine = scores[rows[there]]
            moments[k, side] = torch.tensor([len(mine), mine.sum(), np.square(mine).sum()], dtype=torch.float64)
            weights = one_hot[there & rows]
            sums[side] += weights.T @ x[there & rows]
            counts[side] += weights.sum(0)[:, None]
    return pattern_z(moments)


def mask_p_value(x: np.ndarray, labels: np.ndarray, mask: np.ndarray, seed: int = 0) -> float:
    """The share of random masks with as many rows of each class whose `contrast_z` is as large: ``(1 + count) / 200``."""
    rng = np.random.default_rng(seed)
    x = x.copy()
    for label in np.unique(labels):
        x[labels == label] -= x[labels == label].mean(0)
    chunk = rng.permutation(len(x)) % CHUNKS
    found, as_large = contrast_z(x, labels, mask, chunk), 0
    for _ in range(MASKS):
        drawn = mask.copy()
        for label in np.unique(labels):
            drawn[labels == label] = rng.permutation(mask[labels == label])
        as_large += contrast_z(x, labels, drawn, chunk) >= found
    return (1 + as_large) / (1 + MASKS)
