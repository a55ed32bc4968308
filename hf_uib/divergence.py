"""The divergence R^(l) in closed form (method, section 3a): pure functions of tensors."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def outside(
    lora_a: Tensor,
    lora_b: Tensor,
    prior_a: Tensor,
    prior_b: Tensor,
    subspace: Tensor | None,
    scaling: Tensor | float = 1.0,
) -> Tensor:
    """``|D|^2 - |D V'|^2`` of ``D = scaling * (B A - B_0 A_0)``: what layers moved outside the subspace that the prior leaves free.

    Args:
        lora_a, prior_a: A and A_0, ``[..., r, in]``; lora_b, prior_b: B and B_0, ``[..., out, r]``.
        subspace: V, ``[..., k, in]``, orthonormal (or zero) rows; None: nothing is free.
        scaling: ``[...]`` or one for all.

    Returns:
        ``[...]``, up to rounding not negative. Gradients go to A and B alone.
    """
    return _SquaredNorm.apply(lora_a, lora_b, prior_a, prior_b, subspace) * scaling**2


class _SquaredNorm(torch.autograd.Function):
    """``|L R P|^2`` with ``L = [B - B_0, B_0]``, ``R = [A; A - A_0]`` and ``P = 1 - V'V``: L R is ``B A - B_0 A_0``, without a
    difference of nearly equal products near the prior's mean, and is not formed. The gradient is ``2 L (R P R')`` in L and
    ``2 (L'L) R P`` in R."""

    @staticmethod
    def forward(ctx: Any, lora_a: Tensor, lora_b: Tensor, prior_a: Tensor, prior_b: Tensor, subspace: Tensor | None):
        left = torch.cat([lora_b - prior_b, prior_b], -1)
        right = torch.cat([lora_a, lora_a - prior_a], -2)
        if subspace is not None:
            right = right - (right @ subspace.mT) @ subspace
        inputs, outputs = right @ right.mT, left.mT @ left
        ctx.save_for_backward(left, right, inputs, outputs)
        return (inputs * outputs).sum((-2, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        left, right, inputs, outputs = ctx.saved_tensors
        rank, twice = inputs.shape[-1] // 2, 2 * gradient[..., None, None]
        of_a = (outputs[..., :rank, :] + outputs[..., rank:, :]) @ right
        return of_a * twice, left @ inputs[..., :rank] * twice, None, None, None
