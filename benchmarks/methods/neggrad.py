"""NegGrad+ (Kurmanji et al., arXiv 2302.09880)."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import Budget, grid, register_method
from .training import both_logits, train


@register_method(
    "neggrad",
    "NegGrad+",
    grid=grid(alpha=[0.99, 0.999], rate=[0.5, 1]),
    wrong_grid=grid(alpha=[0.9, 0.99], rate=[0.5, 1]),
)
def neggrad_plus(model: nn.Module, task, budget: Budget, alpha: float = 0.99) -> nn.Module:
    """``alpha CE_retain - (1 - alpha) CE_forget``."""
    both = both_logits(model, task, budget)

    def loss(step: int) -> Tensor:
        kept, gone = both()
        return alpha * F.cross_entropy(*kept) - (1 - alpha) * F.cross_entropy(*gone)

    return train(model, loss, budget)
