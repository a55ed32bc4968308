"""The divergence R^(l) in closed form (method, section 3a): pure functions of tensors."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it (MPS has not)."""
    return torch.float32 if device.type == "mps" else torch.float64


def outside(
    lora_a: Tensor, lora_b: Tensor, prior_a: Tensor, prior_b: Tensor, subspace: Tensor, scaling: Tensor | float = 1.0
) -> Tensor:
    """``|D|^2 - |D V'|^2`` of ``D = scaling * (B A - B_0 A_0)``: what layers moved outside their subspace.

    With ``D = (B - B_0) A + B_0 (A - A_0)``, which does not cancel near the prior's mean, it is a sum of products of ``[r, r]``
    matrices; D itself is not formed.

    Args:
        lora_a, prior_a: A and A_0, ``[..., r, in]``; lora_b, prior_b: B and B_0, ``[..., out, r]``.
        subspace: V, ``[..., k, in]``, orthonormal (or zero) rows.
        scaling: ``[...]`` or one for all.

    Returns:
        ``[...]``, up to rounding not negative.
    """
    moved_a, moved_b = lora_a - prior_a, lora_b - prior_b
    along_a, along_moved = lora_a @ subspace.mT, moved_a @ subspace.mT
    products = (moved_b.mT @ moved_b) * (lora_a @ lora_a.mT - along_a @ along_a.mT)
    products = products + 2 * (moved_b.mT @ prior_b) * (lora_a @ moved_a.mT - along_a @ along_moved.mT)
    products = products + (prior_b.mT @ prior_b) * (moved_a @ moved_a.mT - along_moved @ along_moved.mT)
    return products.sum((-2, -1)) * scaling**2


def channel_kl(
    projected: list[Tensor],
    prior_projected: list[Tensor],
    ranks: Tensor,
    scale: Tensor | float,
    floors: Tensor,
) -> Tensor:
    r"""R^(l) of section 3(a) along the subspace: KL between two Gaussians over dW V', one value per layer.

    A layer projects the pattern with ``M = (W + dW) V' [out, k]``, and its channel noise is ``scale * M G``, ``G [k, k]``
    standard normal. So ``dW V'`` has k independent columns, each with covariance ``S(M) = scale^2 M M' + floor^2 I`` around its
    mean; the prior has the same channel at its own mean ``M_0``:

        KL = k/2 (tr S_0^-1 S - out + log det S_0 - log det S) + tr (M - M_0)' S_0^-1 (M - M_0) / 2

    Only thin products of ``M_0`` and ``D = M - M_0`` are formed (Woodbury's identity), so that no digits are lost near the mean;
    what is left is ``[k, k]``, all layers at once, in float64 where the device has it.

    Args:
        projected, prior_projected: M and M_0 of each layer; differentiable in M alone.
        ranks: ``[layers]``, how many rows of V are not zero.
        scale: of the noise, per direction of the subspace, ``[layers]`` or one for all; floors: ``[layers]``, positive.

    Returns:
        ``[layers]``, in nats.
    """
    return _ChannelKL.apply(scale, ranks, floors, *prior_projected, *projected)


class _ChannelKL(torch.autograd.Function):
    """`channel_kl` with its gradient in closed form, thin as well: autograd would walk through a dozen small matrices a layer,
    which is felt in every step of a small model."""

    @staticmethod
    def forward(ctx, scale: Tensor | float, ranks: Tensor, floors: Tensor, *matrices: Tensor) -> Tensor:
        """``[layers]``; ``matrices`` are all M_0, then all M."""
        layers, k, device = len(matrices) // 2, matrices[0].shape[1], matrices[0].device
        wide = wide_dtype(device)
        alike: dict[torch.Size, list[int]] = {}  # layers of one shape are multiplied together
        for i, m in enumerate(matrices[layers:]):
            alike.setdefault(m.shape, []).append(i)
        products, factors = torch.empty(layers, 2 * k, 2 * k, dtype=wide, device=device), []
        for members in alike.values():
            prior = torch.stack([matrices[i] for i in members])
            both = torch.cat([prior, torch.stack([matrices[layers + i] for i in members]) - prior], 2)  # M_0, D
            products[members] = (both.mT @ both).to(wide)
            factors.append(both)
        gram, along, moved = products[:, :k, :k], products[:, :k, k:], products[:, k:, k:]  # M_0'M_0, M_0'D, D'D
        ranks, squares = ranks.to(wide), floors.to(wide) ** 2
        ratio, eye = (scale**2 / squares)[:, None, None], torch.eye(k, dtype=wide, device=device)
        trace = lambda m: m.diagonal(dim1=1, dim2=2).sum(1)

        def root(g: Tensor) -> Tensor:
            found, failed = torch.linalg.cholesky_ex(
                eye + ratio * g
            )  # fails where noise drowns the floor, by rounding
            rounding = 32 * torch.finfo(matrices[0].dtype).eps * trace(g)[:, None, None] * eye
            return torch.where(
                failed[:, None, None] == 0, found, torch.linalg.cholesky_ex(eye + ratio * (g + rounding)).L
            )

        roots = [root(g) for g in (gram, gram + along + along.mT + moved)]
        inverse, own_inverse = map(torch.cholesky_inverse, roots)
        shrunk = inverse @ along  # S_0^-1 D = (D - ratio M_0 shrunk) / floor^2
        log_det, own_log_det = (2 * root.diagonal(dim1=1, dim2=2).log().sum(1) for root in roots)
        squared = trace(moved - ratio * along.mT @ shrunk)
        excess = ratio[:, 0, 0] * (2 * trace(shrunk) + squared)
        # The gradient, ranks scale^2 (S_0^-1 - S^-1) M + S_0^-1 D, is M_0 and D times these
        ranked, inner = ranks[:, None, None] * ratio, 1 / squares[:, None, None]
        of_prior = ranked * (inverse - ratio * shrunk - own_inverse) - ratio * inner * shrunk
        ctx.alike, ctx.coefficients = alike, torch.cat([of_prior, ranked * (eye - own_inverse) + inner * eye], 1)
        ctx.save_for_backward(*factors)
        return (ranks / 2 * (excess + log_det - own_log_det) + squared / squares / 2).to(matrices[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """In M alone."""
        layers = len(grad)
        gradients: list[Tensor | None] = [None] * (3 + 2 * layers)
        coefficients = (ctx.coefficients * grad[:, None, None]).to(grad.dtype)
        for members, both in zip(ctx.alike.values(), ctx.saved_tensors, strict=True):
            for i, part in zip(members, both @ coefficients[members], strict=True):
                gradients[3 + layers + i] = part
        return tuple(gradients)
