"""What happens at which step: pure functions of the step."""

import math


def noise_scale(step: int, total: int) -> float:
    """The channel noise at optimizer step ``step`` of ``total``, relative to its first: the root of ``1 - t / T``, so that its
    variance falls in a straight line.

    >>> noise_scale(0, 100), noise_scale(75, 100), noise_scale(100, 100)
    (1.0, 0.5, 0.0)
    """
    return math.sqrt(max(0.0, 1.0 - step / max(total, 1)))


def prior_acts(step: int, total: int, fraction: float, to_the_end: bool = False) -> bool:
    """Whether forget rows come at a step: for the first ``fraction`` of the steps, or to the end.

    >>> [prior_acts(step, 10, 0.4) for step in (0, 3, 4)]
    [True, True, False]
    """
    return to_the_end or step < math.ceil(fraction * total)


def sample_size(limit: int, rows: int) -> int:
    """How many rows of a set the passes outside the steps see, so that a short run does not pay more for them than for its steps:
    a thirtieth of the ``rows`` that the run trains on, but at least 64, and ``limit`` at most.

    >>> sample_size(512, 120 * 16), sample_size(512, 300 * 64), sample_size(32, 300 * 64)
    (64, 512, 32)
    """
    return min(limit, max(64, rows // 30))


def refresh_is_due(step: int, every: int) -> bool:
    """Whether the prior is refreshed before a step.

    >>> [step for step in range(7) if refresh_is_due(step, 3)]
    [0, 3, 6]
    """
    return step % every == 0
