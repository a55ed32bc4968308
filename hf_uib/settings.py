"""Settings that are set once for all tasks, and that research or a test may want to change."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChannelSettings:
    """The noise channel's settings that are set once for all tasks (docs/method.md, sections 2 and 3a).

    Attributes:
        label_information: fraction of the nats that the checkpoint's predictions tell about the forget labels, which they still
            tell under the default noise.
        probe_rows: forget rows on which that is measured.
        max_noise_to_signal: the largest noise that is tried; 4 leaves a capacity of 0.03 nats per direction.
        pattern_z: under it the contrast is chance: a randomly drawn forget set has no pattern to close a channel for.
        over_unlearning_z: under it the forget margins lie so low that they give the forget set away.
        code_scale: A starts as V_l rms(W x) / rms(V x) / code_scale, so that one learning rate fits every layer.
        floor: epsilon_l, as a noise-to-signal ratio.
        min_relative_scale: what is smaller, relative to the mean input or to the usual output scale, counts as zero.
    """

    label_information: float = 0.65
    probe_rows: int = 128
    max_noise_to_signal: float = 4.0
    pattern_z: float = 2.0
    over_unlearning_z: float = -2.0
    code_scale: float = 0.0375
    floor: float = 0.05
    min_relative_scale: float = 1e-3


@dataclass(frozen=True)
class InfluenceSettings:
    """How ``prior="influence"`` solves for its mean (docs/method.md, section 3c).

    Attributes:
        damping: Lambda_0, relative to the mean of the curvature's diagonal.
        exact: weights, up to which the curvature is formed and factorised.
        iterations: of conjugate gradients above that, each one pass over the retained sample.
        tolerance: of the squared residual, relative.
        max_increase: nats of the retained loss that the step may add.
        halvings: of the step, at most.
    """

    damping: float = 1.0
    exact: int = 512
    iterations: int = 20
    tolerance: float = 1e-10
    max_increase: float = 0.05
    halvings: int = 8
