"""The terms of the UIB objective, as pure functions of tensors (equation numbers: docs/method.md).

    loss = CE_r(theta ~ q)  +  beta / n_r * sum_l KL(q_l || Q_l)  +  gamma * evidence            (3), (5)

Everything is in nats. Nothing here knows about a Trainer, a model or an adapter library.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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


def layer_kl(left: Tensor, right: Tensor, subspace: Tensor, width: Tensor | float, floor: Tensor | float) -> Tensor:
    r"""R^(l) of section 3(a): KL between two Gaussians over dW that share ``I_out (x) (s^2 V'V + eps^2 I)``.

    With ``D = left @ right`` the distance of the means,
    ``R = |D V'|^2 / 2 (s^2 + eps^2) + (|D|^2 - |D V'|^2) / 2 eps^2``: moving along the pattern is cheap, moving elsewhere
    costs. Only thin products are formed, never the dense ``[out, in]`` matrix, and the second numerator is computed from
    the part of ``right`` outside the subspace, so it cannot turn negative.

    Args:
        left: ``[out, q]``.
        right: ``[q, in]``.
        subspace: V, ``[k, in]``, orthonormal (or zero) rows.
        width: s, the standard deviation of the channel noise along V.
        floor: eps > 0, the standard deviation elsewhere.

    Returns:
        Scalar, in nats.
    """
    inside = right @ subspace.T
    outside = right - inside @ subspace
    gram = left.T @ left
    along = (gram * (inside @ inside.T)).sum()
    across = (gram * (outside @ outside.T)).sum()
    return along / (2 * (width**2 + floor**2)) + across / (2 * floor**2)


def capacity(noise_to_signal: float) -> float:
    """Capacity of the channel along the pattern, ``log(1 + 1 / kappa^2) / 2``, in nats per output."""
    return math.inf if noise_to_signal == 0 else 0.5 * math.log1p(noise_to_signal**-2)


def anneal(step: int, total: int) -> float:
    """Width of the channel noise at optimizer step ``step`` of ``total``, relative to its first width: ``1 - t / T``."""
    return max(0.0, 1.0 - step / max(total, 1))
