"""Intervals of the metrics."""

from collections.abc import Callable, Sequence

import numpy as np


def bootstrap_interval(
    statistic: Callable[..., np.ndarray], sizes: Sequence[int], n_bootstrap: int, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval, each of the samples resampled separately (Efron, 1979).

    Args:
        statistic: gets, for each sample, how often its rows were drawn, ``[draws, size]``; returns ``[draws]``.
        sizes: rows of each sample.
        n_bootstrap: number of draws; below 1 both ends are NaN. The draws come in blocks of about 2 million rows.
        seed: of the draws.
    """
    if n_bootstrap < 1:
        return float("nan"), float("nan")
    rng, block, values = np.random.default_rng(seed), max(1, 2**21 // sum(sizes)), []
    for start in range(0, n_bootstrap, block):
        draws = min(block, n_bootstrap - start)
        counts = []
        for size in sizes:
            rows = rng.integers(size, size=(draws, size)) + size * np.arange(draws)[:, None]
            counts.append(np.bincount(rows.ravel(), minlength=draws * size).reshape(draws, size))
        values.append(statistic(*counts))
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975])
    return float(low), float(high)
