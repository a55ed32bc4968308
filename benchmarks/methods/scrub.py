"""SCRUB (Kurmanji et al., arXiv 2302.09880)."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import Budget, grid, register_method
from .training import forget_batches, retain_batches, train


@register_method("scrub", "SCRUB", grid=grid(ascent=[0.1, 0.3], alpha=[0.01, 0.5]))
def scrub(model: nn.Module, task, budget: Budget, ascent: float = 0.25, alpha: float = 0.5) -> nn.Module:
    """The student leaves the teacher (the checkpoint) on forget rows and stays with it on retained ones.

    In the first ``ascent`` of the steps every other one is a max-step ``-KL_forget``; all others are min-steps
    ``alpha KL_retain + (1 - alpha) CE_retain``.
    """
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    retain, forget = retain_batches(model, task, budget), forget_batches(model, task, budget)

    def divergence(inputs: dict, logits: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(**inputs).logits.log_softmax(-1)
        return F.kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)

    def loss(step: int) -> Tensor:
        if step < ascent * budget.steps and step % 2 == 0:
            inputs, _ = next(forget)
            return -divergence(inputs, model(**inputs).logits)
        inputs, labels = next(retain)
        logits = model(**inputs).logits
        return alpha * divergence(inputs, logits) + (1 - alpha) * F.cross_entropy(logits, labels)

    return train(model, loss, budget)
