"""The terms of the UIB objective, as pure functions of tensors (equation numbers: docs/method.md).

    loss = CE_r(theta ~ q)  +  beta / n_r * sum_l KL(q_l || Q_l)  +  gamma * evidence            (3), (5)

Everything is in nats. Nothing here knows about a Trainer, a model or an adapter library.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-odds margin ``m(x, y) = log p(y|x) - log(1 - p(y|x))``, in nats.

    Its gradient does not vanish where the cross-entropy has been fitted to zero.

    Args:
        logits: ``[n, classes]`` with ``classes >= 2``.
        labels: ``[n]`` integer labels.

    Returns:
        ``[n]`` margins.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    own = logits.gather(-1, labels[..., None]).squeeze(-1)
    others = logits.scatter(-1, labels[..., None], -torch.inf)
    return own - torch.logsumexp(others, dim=-1)


def other_classes_kl(logits: Tensor, reference_logits: Tensor, labels: Tensor) -> Tensor:
    """Fit term without retained data: KL(reference || model) over the classes other than ``labels``.

    What the reference says about the example's own class is the evidence to forget, so that class is taken out of both
    distributions and the rest is renormalised.

    Returns:
        Scalar, mean over ``[n, classes]`` examples, in nats. Zero with two classes, where nothing else is left.
    """
    own = F.one_hot(labels, logits.shape[-1]).bool()
    log_q = torch.log_softmax(logits.masked_fill(own, -torch.inf), dim=-1).masked_fill(own, 0.0)
    log_p = torch.log_softmax(reference_logits.masked_fill(own, -torch.inf), dim=-1).masked_fill(own, 0.0)
    weights = log_p.exp().masked_fill(own, 0.0)
    return (weights * (log_p - log_q)).sum(-1).mean()


def displacement(
    lora_a: Tensor, lora_b: Tensor, prior_a: Tensor, prior_b: Tensor, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Thin factors ``left [out, 2r] @ right [2r, in] = scaling * (B A - B_0 A_0)``.

    Written as ``(B - B_0) A + B_0 (A - A_0)``, which does not cancel when the adapter is near the prior's mean.
    """
    left = torch.cat([lora_b - prior_b, prior_b], dim=1) * scaling
    right = torch.cat([lora_a, lora_a - prior_a], dim=0)
    return left, right


def outside(left: Tensor, right: Tensor, subspace: Tensor) -> Tensor:
    """``|D|^2 - |D V'|^2`` of ``D = left @ right``: what a layer moved outside the subspace.

    Only thin products are formed, and the difference is taken on ``right``, so it cannot turn negative.

    Args:
        left: ``[out, q]``; right: ``[q, in]``; subspace: V, ``[k, in]``, orthonormal (or zero) rows.

    Returns:
        Scalar.
    """
    rest = right - (right @ subspace.T) @ subspace
    return ((left.T @ left) * (rest @ rest.T)).sum()


def channel_kl(
    reads: list[Tensor], prior_reads: list[Tensor], ranks: Tensor, width: Tensor | float, floors: Tensor
) -> Tensor:
    r"""R^(l) of section 3(a) along the subspace: KL between two Gaussians over dW V', one value per layer.

    A layer reads the pattern with ``M = (W + dW) V' [out, k]``, and its channel noise is ``width * M G``, ``G [k, k]``
    standard normal. So ``dW V'`` has k independent columns, each with covariance ``S(M) = width^2 M M' + floor^2 I`` around its
    mean; the prior has the same channel at its own mean ``M_0``:

        KL = k/2 (tr S_0^-1 S - out + log det S_0 - log det S) + tr (M - M_0)' S_0^-1 (M - M_0) / 2

    Only thin products of ``M_0`` and ``D = M - M_0`` are formed (Woodbury's identity), so that no digits are lost near the mean;
    what is left is ``[k, k]``, all layers at once, in float64 where the device has it.

    Args:
        reads, prior_reads: M and M_0 of each layer; differentiable in M alone.
        ranks: ``[layers]``, how many rows of V are not zero.
        width: per direction of the subspace; floors: ``[layers]``, positive.

    Returns:
        ``[layers]``, in nats.
    """
    return _ChannelKL.apply(width, ranks, floors, *prior_reads, *reads)


class _ChannelKL(torch.autograd.Function):
    """`channel_kl` with its gradient in closed form, thin as well: autograd would walk through a dozen small matrices a layer,
    which is felt in every step of a small model."""

    @staticmethod
    def forward(ctx, width: float, ranks: Tensor, floors: Tensor, *matrices: Tensor) -> Tensor:
        """``[layers]``; ``matrices`` are all M_0, then all M."""
        layers, k, device = len(matrices) // 2, matrices[0].shape[1], matrices[0].device
        wide = torch.float32 if device.type == "mps" else torch.float64
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
        ratio, eye = width**2 / squares[:, None, None], torch.eye(k, dtype=wide, device=device)
        trace = lambda m: m.diagonal(dim1=1, dim2=2).sum(1)  # noqa: E731

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
        # The gradient, ranks width^2 (S_0^-1 - S^-1) M + S_0^-1 D, is M_0 and D times these
        ranked, inner = ranks[:, None, None] * ratio, 1 / squares[:, None, None]
        of_prior = ranked * (inverse - ratio * shrunk - own_inverse) - ratio * inner * shrunk
        ctx.alike, ctx.coefficients = alike, torch.cat([of_prior, ranked * (eye - own_inverse) + inner * eye], 1)
        ctx.save_for_backward(*factors)
        return (ranks / 2 * (excess + log_det - own_log_det) + squared / squares / 2).to(matrices[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        """In M alone."""
        layers = len(grad)
        gradients: list[Tensor | None] = [None] * (3 + 2 * layers)
        coefficients = (ctx.coefficients * grad[:, None, None]).to(grad.dtype)
        for members, both in zip(ctx.alike.values(), ctx.saved_tensors, strict=True):
            for i, part in zip(members, both @ coefficients[members], strict=True):
                gradients[3 + layers + i] = part
        return tuple(gradients)


def capacity(noise_to_signal: float) -> float:
    """Capacity of the channel along the pattern, ``log(1 + 1 / kappa^2) / 2``, in nats per direction."""
    return math.inf if noise_to_signal == 0 else 0.5 * math.log1p(noise_to_signal**-2)


def anneal(step: int, total: int) -> float:
    """Width of the channel noise at optimizer step ``step`` of ``total``, relative to its first: the root of ``1 - t / T``,
    so that its variance falls in a straight line."""
    return math.sqrt(max(0.0, 1.0 - step / max(total, 1)))


def rank_z(first: Tensor, second: Tensor) -> float:
    """z-value of Mann and Whitney's count of pairs in which ``first [n]`` exceeds ``second [m]``; negative where it lies lower."""
    n, m = len(first), len(second)
    above = (first[:, None] > second).double() + 0.5 * (first[:, None] == second).double()
    return ((above.mean() - 0.5) / ((n + m + 1) / (12 * n * m)) ** 0.5).item()
