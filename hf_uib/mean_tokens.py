"""Do the sets differ in the mean over their rows' tokens, label by label? (method, section 3a)"""

import numpy as np
import torch
from torch import Tensor

from .contrast import CHUNKS, pattern_z

DIFFERENT_Z = 3.0  # from which on two sets differ
DIRECTIONS = 48  # principal components that are looked at, at most


class MeanTokens:
    """What enters a model's first block, as the means over the tokens of forget rows and of retained rows of their labels.

    Args:
        forget, retained: means ``[n, d]``, and labels ``[n]``. Of several labels a row, or where tokens are labelled,
            ``[n, labels]``: each combination is one.
    """

    def __init__(self, forget: tuple[Tensor, Tensor], retained: tuple[Tensor, Tensor]):
        means = torch.cat([forget[0], retained[0]]).cpu().double().numpy()
        labels = torch.cat([forget[1], retained[1]]).cpu().float().nan_to_num(-1)
        self.labels = labels.unique(dim=0, return_inverse=True)[1].numpy()
        self.retained = np.arange(len(means)) >= len(forget[0])
        self.shared = np.intersect1d(self.labels[self.retained], self.labels[~self.retained])
        self.x = centred(principal_components(means), self.labels)

    def z(self, seed: int = 0) -> float:
        """Do the sets differ, label by label, in what differs between the labels? `contrast_z`, whose chunks are drawn from
        ``seed``; 0 where no label is in both sets."""
        there = np.isin(self.labels, self.shared)
        if not there.any():
            return 0.0
        _, labels = np.unique(self.labels[there], return_inverse=True)
        chunk = np.random.default_rng(seed).permutation(len(labels)) % CHUNKS
        return contrast_z(self.x[there], labels, self.retained[there], chunk, between_labels=True)

    def effect_z(self, margins: Tensor) -> float:
        """Does the model do better on retained rows that look like the forget set? The correlation of how much they do with the
        rank of their margin, label by label, as a z-value: about standard normal where the one tells nothing of the other.

        Args:
            margins: of the retained rows, ``[n]`` in nats.
        """
        sides = [[(self.labels == label) & (self.retained == side) for label in self.shared] for side in (False, True)]
        means = np.array([[self.x[rows].mean(0) for rows in side] for side in sides])
        counts = np.array([[rows.sum() for rows in side] for side in sides])
        common = common_part(means[0] - means[1], counts) if len(self.shared) > 1 else 0.0
        values = margins.cpu().numpy()
        scores, ranks = [], []
        for rows, mine, n in zip(sides[1], means[0], counts[1], strict=True):
            if n < 2:
                continue
            x = self.x[rows]
            others = (x.sum(0) - x) / (n - 1)  # the mean of the other rows: no row tells of itself
            score = (x * (mine - others - common)).sum(1)
            rank = average_ranks(values[rows[self.retained]])
            scores.append(score - score.mean())
            ranks.append((rank - rank.mean()) / n)
        if not scores:
            return 0.0
        a, b = np.concatenate(scores), np.concatenate(ranks)
        correlation = a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300)
        return float(correlation * (len(a) - len(scores)) ** 0.5)  # each label's mean is taken off


def average_ranks(values: np.ndarray) -> np.ndarray:
    """``[n]``, from 1 on; equal values share theirs.

    >>> average_ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, kind, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[kind]


def common_part(contrasts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What the forget rows have on all labels alike, ``[d]``: it tells nothing of a label.

    Args:
        contrasts: means of forget rows less those of retained rows, ``[labels, d]``; counts: of both sets' rows, ``[2, labels]``.
    """
    # With these weights a shift of all forget rows moves no mean score
    weights = counts.prod(0) / np.maximum(counts.sum(0), 1)
    return weights @ contrasts / max(weights.sum(), 1e-300)


def principal_components(features: np.ndarray, most: int = DIRECTIONS) -> np.ndarray:
    """The standardised features' first principal components, ``[n, d]`` with ``d`` at most ``most``."""
    return projected(features, features[:0], most)[0]


def projected(features: np.ndarray, others: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """`principal_components` of features ``[n, width]``, and what other rows ``[m, width]`` have of the same components."""
    x = features.astype(np.float64)
    mean, scale = x.mean(0), x.std(0)
    differ = scale > 1e-6 * np.abs(mean)  # else what differs is rounding
    x, y = ((rows - mean)[:, differ] / scale[differ] for rows in (x, others.astype(np.float64)))
    wide = len(x) < x.shape[1]  # then the smaller of the two products tells the same
    values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = np.flatnonzero(values > 1e-9 * values.max(initial=0))[::-1][:most]
    vectors, roots = vectors[:, kept], np.sqrt(values[kept])
    return (vectors * roots, y @ (x.T @ vectors / roots)) if wide else (x @ vectors, y @ vectors)


def centred(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``x [n, d]`` without the mean of each label."""
    x = x.copy()
    for label in np.unique(labels):
        x[labels == label] -= x[labels == label].mean(0)
    return x


def contrast_z(
    x: np.ndarray, labels: np.ndarray, mask: np.ndarray, chunk: np.ndarray, between_labels: bool = False
) -> float:
    """`hf_uib.contrast.pattern_z` of a mask: do its rows differ from the others of their class in the same way in every chunk?

    A row's score is its product with the contrast of the means of its class, of the chunks before its own. It is the contrast of
    the margins' gradients in the weights of a linear head, class by class.

    Args:
        x: ``[n, d]``, centred within classes; mask: ``[n]`` booleans; chunk: ``[n]`` in 0..CHUNKS-1.
        between_labels: leave out what the contrasts of all classes have in common, where there are several.
    """
    classes = int(labels.max()) + 1
    one_hot = np.eye(classes)[labels]
    sides = (~mask, mask)
    rows_of = np.array([np.bincount(labels[rows], minlength=classes) for rows in sides])
    sums, counts = np.zeros((2, classes, x.shape[1])), np.zeros((2, classes, 1))
    moments = torch.zeros(CHUNKS, 2, 3, dtype=torch.float64)
    for k in range(CHUNKS):
        there = chunk == k
        means = sums / np.maximum(counts, 1)
        known = np.asarray((counts > 0).all(0))
        direction = (means[0] - means[1]) * known
        if between_labels and classes > 1:
            direction = known * (direction - common_part(direction, rows_of * known[:, 0]))
        scores = (x[there] * direction[labels[there]]).sum(1)
        for side, rows in enumerate(sides):
            mine = scores[rows[there]]
            moments[k, side] = torch.tensor([len(mine), mine.sum(), np.square(mine).sum()], dtype=torch.float64)
            weights = one_hot[there & rows]
            sums[side] += weights.T @ x[there & rows]
            counts[side] += weights.sum(0)[:, None]
    return pattern_z(moments)
