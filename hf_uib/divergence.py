"""The divergence R^(l) in closed form (method, section 3a): pure functions of tensors."""

from torch import Tensor


def outside(
    lora_a: Tensor,
    lora_b: Tensor,
    prior_a: Tensor,
    prior_b: Tensor,
    subspace: Tensor | None,
    scaling: Tensor | float = 1.0,
) -> Tensor:
    """``|D|^2 - |D V'|^2`` of ``D = scaling * (B A - B_0 A_0)``: what layers moved outside the subspace that the prior leaves free.

    With ``D = (B - B_0) A + B_0 (A - A_0)``, which does not cancel near the prior's mean, it is a sum of products of ``[r, r]``
    matrices; D itself is not formed.

    Args:
        lora_a, prior_a: A and A_0, ``[..., r, in]``; lora_b, prior_b: B and B_0, ``[..., out, r]``.
        subspace: V, ``[..., k, in]``, orthonormal (or zero) rows; None: nothing is free.
        scaling: ``[...]`` or one for all.

    Returns:
        ``[...]``, up to rounding not negative.
    """
    moved_a, moved_b = lora_a - prior_a, lora_b - prior_b
    inputs = [lora_a @ lora_a.mT, lora_a @ moved_a.mT, moved_a @ moved_a.mT]
    if subspace is not None:
        along, along_moved = lora_a @ subspace.mT, moved_a @ subspace.mT
        free = [along @ along.mT, along @ along_moved.mT, along_moved @ along_moved.mT]
        inputs = [product - part for product, part in zip(inputs, free, strict=True)]
    products = (moved_b.mT @ moved_b) * inputs[0]
    products = products + 2 * (moved_b.mT @ prior_b) * inputs[1]
    products = products + (prior_b.mT @ prior_b) * inputs[2]
    return products.sum((-2, -1)) * scaling**2
