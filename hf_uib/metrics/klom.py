"""KLoM: the margins of unlearned models against those of retrained ones, as distributions over models."""

import numpy as np
from numpy.typing import ArrayLike


def klom(
    margins: ArrayLike, retrained_margins: ArrayLike, bins: int = 20, floor: float = 1e-5, largest: float = 100.0
) -> dict[str, float]:
    """KL divergence of margins: how far the margins of one example over unlearned models are from those over retrained models.

    Target: the value of further retrained models in place of the unlearned ones; lower is closer, about 0 with many models.
    Georgiev et al. (2024), "Attribute-to-Delete", arXiv 2410.23232, with the bins of EasyDUB (Rinberg et al., 2026, arXiv
    2602.16400). They train a hundred models of each kind. With few, most bins are empty and the value is near its ceiling,
    ``-log(floor)``: then nothing but the difference from the target says something.

    Args:
        margins: ``[n, models]`` of each example's label in nats (its logit minus the logsumexp of the others), a column for each
            unlearned model.
        retrained_margins: ``[n, retrained models]`` of the same examples.
        bins: equally wide, from the smallest to the largest margin of the example in either kind of model. The largest is in the
            last bin (EasyDUB's code leaves it out).
        floor: smallest share of the retrained models that a bin counts with.
        largest: margins are clipped to plus and minus this.

    Returns:
        klom: mean over examples of ``sum(p log(p / max(q, floor)))`` in nats, where p and q are the shares of unlearned and of
            retrained models in a bin.
        klom_95: the 95th percentile over examples, which EasyDUB reports.

    Raises:
        ValueError: the shapes do not go together, or a margin is not a number.
    """
    mine, theirs = (np.clip(np.asarray(x, dtype=float), -largest, largest) for x in (margins, retrained_margins))
    if mine.ndim != 2 or theirs.ndim != 2 or len(mine) != len(theirs) or not mine.size or not theirs.size:
        raise ValueError(
            f"margins {list(mine.shape)} and retrained_margins {list(theirs.shape)} must be [examples, models] of the same examples"
        )
    if bins < 1:
        raise ValueError(f"bins is {bins}; give 1 or more")
    if np.isnan(mine).any() or np.isnan(theirs).any():
        raise ValueError("margins must be numbers: take the label's logit minus the logsumexp of the others")
    both = np.concatenate([mine, theirs], axis=1)
    low, high = both.min(1, keepdims=True), both.max(1, keepdims=True)
    width = np.where(high > low, (high - low) / bins, 1.0)

    def shares(values: np.ndarray) -> np.ndarray:
        numbers = np.minimum((values - low) // width, bins - 1).astype(int) + bins * np.arange(len(values))[:, None]
        return np.bincount(numbers.ravel(), minlength=bins * len(values)).reshape(-1, bins) / values.shape[1]

    p, q = shares(mine), shares(theirs)
    terms = p * np.log(np.where(p > 0, p, 1.0) / np.maximum(q, floor))
    divergences = terms.sum(1)
    return {"klom": float(divergences.mean()), "klom_95": float(np.quantile(divergences, 0.95))}
