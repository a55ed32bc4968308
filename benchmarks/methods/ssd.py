"""Selective synaptic dampening (Foster et al., arXiv 2308.07707)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import Budget, grid, register_method
from .training import gradients, one_pass


def importances(model: nn.Module, rows, processing_class, seed: int) -> list[Tensor]:
    """Diagonal of the empirical Fisher information of every weight, from single rows of a sample."""
    model.eval()
    weights = list(model.parameters())
    totals = [torch.zeros_like(p) for p in weights]
    count = 0
    for inputs, labels in one_pass(model, rows, processing_class, seed, 1):
        loss = F.cross_entropy(model(**inputs).logits, labels)
        for total, gradient in zip(totals, gradients(loss, weights), strict=True):
            total += gradient.square()
        count += 1
    return [total / count for total in totals]


@register_method("ssd", "SSD", grid=grid(alpha=[1, 1.05], damping=[0.1, 1]), one_shot=True)
def ssd(model: nn.Module, task, budget: Budget, alpha: float = 10.0, damping: float = 1.0) -> nn.Module:
    """Weights ``alpha`` times more important to the forget set than to all data are multiplied by
    ``min(damping I_D / I_forget, 1)``; no training. I_D is taken over both sets by their sizes."""
    forget, retain = task.sets["forget"], task.sets["retain"]
    gone, kept = (importances(model, rows, task.processing_class, budget.seed) for rows in (forget, retain))
    fraction = len(forget) / (len(forget) + len(retain))
    with torch.no_grad():
        for weight, of_forget, of_retain in zip(model.parameters(), gone, kept, strict=True):
            everything = fraction * of_forget + (1 - fraction) * of_retain
            factor = (damping * everything / of_forget.clamp_min(1e-30)).clamp(max=1.0)
            weight.mul_(torch.where(of_forget > alpha * everything, factor, 1.0))
    return model.eval()
