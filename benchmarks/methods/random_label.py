"""Random labels (Golatkar et al., arXiv 1911.04933), and SalUn, which adds a mask (Fan et al., arXiv 2310.12508)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import Budget, grid, register_method
from .training import both_logits, gradients, one_pass, train

GRIDS = {
    "grid": grid(weight=[0.01, 0.1], rate=[0.5, 1]),
    "wrong_grid": grid(weight=[0.1, 1], rate=[0.5, 1]),
}


def other_labels(classes: int, seed: int) -> Callable[[Tensor], Tensor]:
    """Draws labels that are not the given ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(labels: Tensor) -> Tensor:
        offset = torch.randint(1, classes, labels.shape, generator=generator).to(labels.device)
        return (labels + offset) % classes

    return draw


@register_method("random_label", "random label", **GRIDS)
def random_label(model: nn.Module, task, budget: Budget, weight: float = 1.0, after_backward=None) -> nn.Module:
    """Cross-entropy on retained rows and, with a ``weight``, on forget rows under random other labels."""
    both, other = both_logits(model, task, budget), other_labels(model.config.num_labels, budget.seed)

    def loss(step: int) -> Tensor:
        kept, (logits, labels) = both()
        return F.cross_entropy(*kept) + weight * F.cross_entropy(logits, other(labels))

    return train(model, loss, budget, after_backward)


@register_method("salun", "SalUn", **GRIDS)
def salun(model: nn.Module, task, budget: Budget, weight: float = 1.0, fraction: float = 0.5) -> nn.Module:
    """`random_label` on the ``fraction`` of all weights whose gradient of the forget loss is largest; the others do not move."""
    masks = saliency_masks(model, task, budget, fraction)

    def mask(step: int) -> None:
        for p, m in masks:
            if p.grad is not None:
                p.grad.mul_(m)

    return random_label(model, task, budget, weight, mask)


def saliency_masks(model: nn.Module, task, budget: Budget, fraction: float = 0.5) -> list[tuple[nn.Parameter, Tensor]]:
    """Each weight and which of its entries may move; one threshold over all layers."""
    model.eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    totals = [torch.zeros_like(p) for p in weights]
    for inputs, labels in one_pass(model, task.sets["forget"], task.processing_class, budget.seed):
        loss = F.cross_entropy(model(**inputs).logits, labels, reduction="sum")
        for total, gradient in zip(totals, gradients(loss, weights), strict=True):
            total += gradient
    sizes = torch.cat([total.abs().flatten() for total in totals])
    least = sizes.kthvalue(max(1, round((1 - fraction) * len(sizes)))).values
    return [(p, total.abs() > least) for p, total in zip(weights, totals, strict=True)]
