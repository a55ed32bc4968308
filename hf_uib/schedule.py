"""What happens at which step: pure functions of the step."""

import math


def anneal(step: int, total: int) -> float:
    """Width of the channel noise at optimizer step ``step`` of ``total``, relative to its first: the root of ``1 - t / T``,
    so that its variance falls in a straight line."""
    return math.sqrt(max(0.0, 1.0 - step / max(total, 1)))
