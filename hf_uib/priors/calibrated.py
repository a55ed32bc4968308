"""The forget margins are brought down to a calibrated level (method, section 3b)."""

import math
from typing import cast

import torch
from torch import Tensor

from .base import Prior, PriorContext, register_prior

GRID = 257
WATCHED = 3  # the refresh at which label noise is looked for: the running model has then left the checkpoint
RESOLUTION = 1e-4  # nats; what lies closer to its level is at it, whatever the rounding


def quantiles(values: Tensor, points: int = GRID) -> Tensor:
    """The empirical quantile function of ``values [n]`` at ``points`` equally spaced u in [0, 1], ascending."""
    u = torch.linspace(0, 1, points, device=values.device, dtype=values.dtype)
    return (
        torch.quantile(values, u) if values.numel() <= 2**24 else values.sort().values[(u * (len(values) - 1)).long()]
    )


def interpolate(curve: Tensor, u: Tensor) -> Tensor:
    """Linear interpolation of a curve on a regular grid of [0, 1] at ``u``."""
    position = torch.nan_to_num(u).clamp(0, 1) * (len(curve) - 1)
    low = position.floor().long().clamp(max=len(curve) - 2)
    return torch.lerp(curve[low], curve[low + 1], (position - low).to(curve.dtype))


def rank_of(values: Tensor, curve: Tensor) -> Tensor:
    """The inverse of `interpolate`: u in [0, 1] at which a rising ``curve`` reaches ``values``; the middle of a flat part."""
    low, high = torch.searchsorted(curve, values), torch.searchsorted(curve, values, right=True)
    left, right = (low - 1).clamp(min=0), low.clamp(max=len(curve) - 1)
    step = (curve[right] - curve[left]).clamp_min(torch.finfo(curve.dtype).tiny)
    inside = left + ((values - curve[left]) / step).clamp(0, 1)
    return torch.where(high > low, (low + high - 1) / 2, inside) / (len(curve) - 1)


def label_noise_z(forget: Tensor, unseen: Tensor) -> float:
    """z-value of the forget set's share of negative margins against that of unseen rows: two proportions, pooled."""
    wrong, count = (
        [(margins < 0).cpu().double().mean().item() for margins in (forget, unseen)],
        (len(forget), len(unseen)),
    )
    pooled = (wrong[0] * count[0] + wrong[1] * count[1]) / sum(count)
    error = (pooled * (1 - pooled) * (1 / count[0] + 1 / count[1])) ** 0.5
    return (wrong[0] - wrong[1]) / error if error > 0 else 0.0


@register_prior("calibrated")
class CalibratedPrior(Prior):
    r"""One-sided quantile match ``mean_i max(0, m_i - c(u_i))`` of the forget margins.

    ``c`` is the quantile function of margins on data that the checkpoint never saw and ``u_i`` the rank of example i in the
    quantile function of a sample of the forget set, both measured at each refresh: an upper Wasserstein-1 distance between the two
    margin distributions, independent of batch size, accumulation and processes. At the level the gradient is zero.

    The level never falls: ``c_k = max(c_{k-1}, quantiles of the running model)``, which stops the spiral in which
    forgetting lowers its own target. One exception: a calibration set that the checkpoint has fitted (a fold of the
    retained data, held out only now) starts too high, so the level follows it down until it first rises, and holds from then on.

    Under a pattern there is no reason to get the forget examples wrong: only what lifts them above the typical unseen
    example is taken away, so the level is not let under its own median. Randomly drawn rows are matched in full.

    Another exception is label noise: forget labels that are *wrong* by what the retained data say (an older labelling scheme, say).
    It shows after the first steps: under a bias the running model gets the forget set right more often than unseen rows. Where it
    gets it wrong more often by more than chance, at the third refresh, forget batches come to the end
    (``keep_forget_batches``), and rows on which the running model disagrees with their label (``m < 0``) have the level of a
    label it clearly refuses, minus the median.

    Args:
        target: a fixed level in nats instead of a measured one.
        label_noise_z: over it the forget set's errors exceed those on unseen rows by more than chance.
    """

    def __init__(self, target: float | None = None, label_noise_z: float = 2.0):
        self.target, self.label_noise_z = target, label_noise_z
        self.needs_calibration_margins = target is None
        self._start()

    @classmethod
    def from_config(cls, args) -> "CalibratedPrior":
        """Takes ``forget_target``."""
        if args.forget_target is not None and not math.isfinite(args.forget_target):
            raise ValueError(
                "forget_target is a level in nats, a finite number, for the prior calibrated; leave it out to measure it."
            )
        return cls(target=args.forget_target)

    rests_under_a_pattern = True
    """Whether no forget batches come where the forget set carries a pattern, unless its labels turn out to be noise: the channel
    does the work there."""

    _may_rest = False
    _seeks_label_noise = False

    def attach(self, context: PriorContext) -> None:
        """As in `Prior`; under a pattern the prior rests."""
        super().attach(context)
        self._may_rest = self.rests_under_a_pattern and context.retain is not None
        # Neither rows that the checkpoint fitted nor forget rows of one label say anything about errors
        self._seeks_label_noise = not (context.calibration_seen_in_training or context.one_label)
        self._rest_under_a_pattern()

    def _rest_under_a_pattern(self) -> None:
        self.needs_forget_batches = not (self._may_rest and self.pattern_detected and not self.keep_forget_batches)

    @property
    def watches(self) -> bool:  # type: ignore[override]
        """Whether label noise may still be found."""
        seeks = self._seeks_label_noise and self.target is None
        return seeks and not self.needs_forget_batches and self.refreshes < WATCHED

    def prepare(self, context) -> None:
        """Forget level and ranks of an earlier run."""
        self._start()

    def _start(self) -> None:
        self.track_decrease = self.calibration_seen_in_training
        self.refreshes = 0
        self.level: Tensor | None = None if self.target is None else torch.full((GRID,), float(self.target))
        self.ranks: Tensor | None = None

    def forget_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean excess of the margins over their level, in nats per forget example (scalar)."""
        excess = self.excess(logits, labels)
        return torch.where(excess > RESOLUTION, excess, 0.0).mean()

    def excess(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How far each margin lies above its level, ``[n]`` in nats."""
        margins = self.task.margin(logits, labels)
        return margins - self.level_of(margins.detach())

    def level_of(self, margins: Tensor) -> Tensor:
        """The level ``c(u_i)`` of each margin ``[n]``, in nats."""
        assert self.level is not None, "refresh measures the level"
        level = self.level.to(margins)
        if self.target is not None:
            return level[0].expand_as(margins)
        median = level[GRID // 2]
        level = interpolate(level, rank_of(margins, cast(Tensor, self.ranks).to(margins)))
        if not self.pattern_detected:
            return level
        level = level.maximum(median)
        return torch.where(margins < 0, level.minimum(-median), level) if self.keep_forget_batches else level

    def refresh(self, forget_margins, calibration_margins) -> None:
        """Re-measure the ranks of the forget set and raise the level."""
        self.refreshes += 1
        if self.target is not None:
            return
        if not self.needs_forget_batches and self.refreshes < WATCHED:
            return
        margins = forget_margins().cpu().double()
        self.ranks = quantiles(margins)
        values = calibration_margins()
        if values is None:
            # Nothing unseen at hand: the least certain tenth of the forget set stands for it, and stays.
            if self.level is None:
                self.level = torch.full((GRID,), interpolate(self.ranks, torch.tensor(0.1)).item())
            return
        if self.refreshes == WATCHED and self.pattern_detected and self._seeks_label_noise:
            self.keep_forget_batches = label_noise_z(margins, values.cpu()) > self.label_noise_z
            self._rest_under_a_pattern()
        now = quantiles(values.cpu().double())
        if self.level is None or self.track_decrease and now.mean() < self.level.mean():
            self.level = now
        else:
            self.track_decrease = False
            self.level = torch.maximum(self.level, now)

    def state_dict(self) -> dict[str, Tensor]:
        """Level and ranks, whether the level still follows, and whether label noise was found."""
        state = {
            name: torch.tensor(getattr(self, name))
            for name in ("track_decrease", "pattern_detected", "keep_forget_batches", "refreshes")
        }
        if self.level is not None:
            state["level"] = self.level
        if self.ranks is not None:
            state["ranks"] = self.ranks
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up level and ranks of an earlier run."""
        self.track_decrease, self.pattern_detected = bool(state["track_decrease"]), bool(state["pattern_detected"])
        self.keep_forget_batches, self.refreshes = bool(state["keep_forget_batches"]), int(state["refreshes"])
        self._rest_under_a_pattern()
        self.level = state.get("level", self.level)
        self.ranks = state.get("ranks", self.ranks)
