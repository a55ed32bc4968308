"""How far a prediction moves when the bias attribute alone is changed."""

import numpy as np
from numpy.typing import ArrayLike

from .bootstrap import bootstrap_interval


def counterfactual_gap(
    predictions: ArrayLike,
    scores: ArrayLike,
    references: ArrayLike,
    examples: ArrayLike,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Change of the model over copies of an example that differ in the bias attribute alone.

    Target: the value of a model retrained without the forget set, which need not be 0.

    Args:
        predictions: predicted classes ``[n]``.
        scores: probability given to the reference label ``[n]``, in [0, 1].
        references: true classes ``[n]``; the copies of an example share theirs.
        examples: ids ``[n]``; rows with the same id are the copies of one example. An example with one row is left out.
        n_bootstrap: resamples of the intervals; 0 makes the intervals NaN.
        seed: of the resampling.

    Returns:
        counterfactual_gap: mean over examples of the largest minus the smallest score of the copies, in [0, 1], lower is
            less dependence on the attribute. It grows with the number of copies: compare models on the same copies only.
            After Garg et al. (2019), arXiv 1809.10610, with the range in place of the mean distance to the original.
        flip_rate: share of examples whose copies are not all given one class, in [0, 1], lower is better.
        counterfactual_gap_low, counterfactual_gap_high, flip_rate_low, flip_rate_high: 95% percentile bootstrap over
            examples. A rate of 0 has the interval [0, 0]; read it as below 3 / examples.
        examples: number of examples with at least two copies.

    Raises:
        ValueError: no example has two copies; copies with different references; a score outside [0, 1].
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    scores = np.asarray(scores, dtype=float)
    if not ((scores > -1e-6) & (scores < 1 + 1e-6)).all():
        raise ValueError("scores must be probabilities in [0, 1]: pass the softmax output of the reference label")
    ids, owners, copies = np.unique(np.asarray(examples), return_inverse=True, return_counts=True)
    paired = copies > 1
    if not paired.any():
        raise ValueError("no example has two copies: give the copies of an example the same id in `examples`")
    mixed = spread(references, owners) > 0
    if mixed.any():
        raise ValueError(f"copies of example {ids[mixed][0]} differ in references: only the attribute may differ")
    measured = {
        "counterfactual_gap": spread(scores, owners)[paired],
        "flip_rate": (spread(predictions, owners)[paired] > 0).astype(float),
    }
    total, result = int(paired.sum()), {}
    for name, values in measured.items():
        mean_of = lambda counts, values=values: counts @ values / total
        result[name] = float(values.mean())
        result[f"{name}_low"], result[f"{name}_high"] = bootstrap_interval(mean_of, [total], n_bootstrap, seed)
    return {**result, "examples": total}


def spread(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Largest minus smallest of ``values`` ``[n]`` among the rows of each owner ``0 .. max(owners)``."""
    low = np.full(owners.max() + 1, np.inf)
    high = -low
    np.minimum.at(low, owners, values)
    np.maximum.at(high, owners, values)
    return high - low


def flip_rate(logits: np.ndarray, copies: int) -> float:
    """Share of examples whose prediction is not the same for all copies, in [0, 1], lower is better.

    Args:
        logits: ``[n * copies, classes]``, the copies of an example, which differ in the attribute alone, next to each other.
    """
    predictions = logits.argmax(-1).reshape(-1, copies)
    return float((predictions != predictions[:, :1]).any(1).mean())
