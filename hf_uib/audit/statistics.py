"""Uncertainty of the audit's figures: resampling of whole examples, the same for all models."""

import copy
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ..metrics.bias import cramers_v_of
from ..metrics.membership import weighted_auc


@dataclass
class Estimate:
    """A figure with its bootstrap samples ``[n]``; differences of two estimates on the same resamples are paired."""

    value: float
    samples: np.ndarray

    @property
    def low(self) -> float:
        """Lower end of the 95% interval."""
        return float(np.nanquantile(self.samples, 0.025)) if np.isfinite(self.samples).any() else float("nan")

    @property
    def high(self) -> float:
        """Upper end of the 95% interval."""
        return float(np.nanquantile(self.samples, 0.975)) if np.isfinite(self.samples).any() else float("nan")

    @property
    def error(self) -> float:
        """Standard error."""
        return float(np.nanstd(self.samples)) if np.isfinite(self.samples).any() else float("nan")

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.samples - other.samples)

    def as_dict(self) -> dict[str, float]:
        """``value``, ``low``, ``high``."""
        return {"value": self.value, "low": self.low, "high": self.high}


class Resampler:
    """Bootstrap over examples; rows with the same example (copies that differ in the attribute alone) go together.

    Args:
        examples: ``[n]`` ids of the rows' examples; None makes each row its own.
        rows: n.
        count: of resamples.
    """

    def __init__(self, examples: np.ndarray | None, rows: int, count: int = 500, seed: int = 0):
        ids = np.arange(rows) if examples is None else np.unique(examples, return_inverse=True)[1]
        self.ids, self.groups = ids, int(ids.max()) + 1 if rows else 0
        draws = np.random.default_rng(seed).integers(0, max(self.groups, 1), (count, self.groups))
        self.weights = np.stack([np.bincount(draw, minlength=self.groups) for draw in draws]).astype(float)

    def of_groups(self) -> "Resampler":
        """The same resamples of the examples themselves, each as one row, in the order of their ids."""
        other = copy.copy(self)
        other.ids = np.arange(self.groups)
        return other

    def _sums(self, values: np.ndarray) -> np.ndarray:
        sums = np.zeros((self.groups, *values.shape[1:]))
        np.add.at(sums, self.ids, values)
        return sums

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
        """``sum(numerator) / sum(denominator)`` of row-wise values ``[n]``."""
        return self.ratios(numerator[:, None], denominator[:, None])[0]

    def ratios(self, numerators: np.ndarray, denominators: np.ndarray) -> list[Estimate]:
        """`ratio` of each column of ``[n, k]``."""
        top, bottom = self._sums(numerators.astype(float)), self._sums(denominators.astype(float))
        with np.errstate(invalid="ignore", divide="ignore"):
            samples = (self.weights @ top) / (self.weights @ bottom)
            values = top.sum(0) / bottom.sum(0)
        return [Estimate(float(value), column) for value, column in zip(values, samples.T, strict=True)]

    def wilson(self, rate: float, counted: np.ndarray) -> tuple[float, float]:
        """95% interval of a rate over the rows ``counted [n]`` by Wilson (1927), with the examples that they come from as its n.

        Unlike resampling it is not empty where all rows are alike: 0 of 3 says little.
        """
        n = len(np.unique(self.ids[counted]))
        if not n:
            return float("nan"), float("nan")
        z2 = NormalDist().inv_cdf(0.975) ** 2
        middle, half = rate + z2 / (2 * n), (z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) ** 0.5
        return max((middle - half) / (1 + z2 / n), 0.0), min((middle + half) / (1 + z2 / n), 1.0)

    def cramers_v(self, first: np.ndarray, second: np.ndarray, counted: np.ndarray | None = None) -> Estimate:
        """Cramér's V of two codes ``[n]``, of the rows that are ``counted [n]`` (all by default); resampling inflates it, so its
        samples are centred on the value."""
        a, b = (np.unique(x, return_inverse=True)[1] for x in (first, second))
        shape = (a.max() + 1, b.max() + 1)
        cells = np.zeros((self.groups, shape[0] * shape[1]))
        np.add.at(cells, (self.ids, a * shape[1] + b), 1.0 if counted is None else counted.astype(float))
        tables = np.concatenate([cells.sum(0)[None], self.weights @ cells]).reshape(-1, *shape)
        values = cramers_v_of(tables)
        return Estimate(float(values[0]), (values[1:] - values[1:].mean() + values[0]).clip(0, 1))

    def auc(self, scores: np.ndarray, others: np.ndarray, theirs: "Resampler") -> Estimate:
        """AUC of ``scores [n]`` of these rows against ``others [m]`` of another set's."""
        mine, order = np.argsort(scores), np.argsort(others)
        scores, others = scores[mine], others[order]
        counts, other_counts = self.weights[:, self.ids[mine]], theirs.weights[:, theirs.ids[order]]
        total = counts.sum(1) * other_counts.sum(1) / (len(scores) * len(others))
        samples = weighted_auc(scores, others, counts, other_counts) / total
        return Estimate(float(weighted_auc(scores, others)[0]), samples)
