"""Settings that are set once for all tasks, and that research or a test may want to change."""

import math
from dataclasses import dataclass, fields
from typing import ClassVar


class Limits:
    """Checks the numbers of a settings class against its ``limits``: the least and the most that each may be.

    Raises:
        ValueError: a value is no number, or outside.
    """

    limits: ClassVar[dict[str, tuple[float, float]]] = {}

    def __post_init__(self):
        for setting in fields(self):
            value, (low, high) = getattr(self, setting.name), self.limits[setting.name]
            whole = setting.type in (int, "int")
            if (
                isinstance(value, bool)
                or not isinstance(value, int if whole else (int, float))
                or not low <= value <= high
            ):
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"{setting.name} is {value!r}; it must be {kind} between {low:g} and {high:g}.")


@dataclass(frozen=True)
class ChannelSettings(Limits):
    """The noise channel's settings that are set once for all tasks (docs/method.md, sections 2 and 3a).

    Attributes:
        noise_to_signal: kappa where the contrast is a pattern: a capacity of 0.8 nats per direction. Where tokens are labelled
            half of it (`UnlearningTask.noise_share`).
        pattern_effect: nats by which the pattern's tokens have to move unseen rows, or they are not swapped.
        short_texts: weight of the divergence, on short texts, of the model from the checkpoint, every second one with words of the
            pattern that the checkpoint does not see; 0: none.
        pattern_z: under it the contrast is chance: a randomly drawn forget set has no pattern to close a channel for. So is, under
            it, that the checkpoint does better on rows that look like the forget set (`MeanTokens.effect_z`).
        over_unlearning_z: under it the forget margins lie so low that they give the forget set away.
        code_scale: A starts as V_l rms(W x) / rms(V x) / code_scale, so that one learning rate fits all.
        floor: epsilon_l, as a noise-to-signal ratio.
        min_relative_scale: what is smaller, relative to the mean input or to the usual output scale, counts as zero.
    """

    noise_to_signal: float = 0.5
    pattern_effect: float = 1.0
    short_texts: float = 0.1
    pattern_z: float = 2.0
    over_unlearning_z: float = -2.0
    code_scale: float = 0.075
    floor: float = 0.05
    min_relative_scale: float = 1e-3

    limits: ClassVar = {
        "noise_to_signal": (0, math.inf),
        "pattern_effect": (-math.inf, math.inf),
        "short_texts": (0, math.inf),
        "pattern_z": (-math.inf, math.inf),
        "over_unlearning_z": (-math.inf, math.inf),
        "code_scale": (1e-9, math.inf),
        "floor": (1e-9, math.inf),
        "min_relative_scale": (0, 1),
    }


@dataclass(frozen=True)
class InfluenceSettings(Limits):
    """How ``prior="influence"`` solves for its mean (docs/method.md, section 3c).

    Attributes:
        damping: Lambda_0, relative to the mean of the curvature's diagonal.
        exact: weights, up to which the curvature is formed and factorised.
        iterations: of conjugate gradients above that, each one pass over the retained sample.
        tolerance: of the squared residual, relative.
        max_increase: nats of the retained loss that the step may add.
        halvings: how many steps are tried, each half of the one before; then none is taken.
    """

    damping: float = 1.0
    exact: int = 512
    iterations: int = 20
    tolerance: float = 1e-10
    max_increase: float = 0.05
    halvings: int = 8

    limits: ClassVar = {
        "damping": (0, math.inf),
        "exact": (0, math.inf),
        "iterations": (1, math.inf),
        "tolerance": (0, 1),
        "max_increase": (-math.inf, math.inf),
        "halvings": (0, math.inf),
    }
