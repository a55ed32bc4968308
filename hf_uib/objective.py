"""The terms of the objective that are functions of logits and labels, in nats (method, sections 1 and 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it (MPS has not)."""
    return torch.float32 if device.type == "mps" else torch.float64


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

    What the reference says about the example's own class is what is to be forgotten, so that class is taken out of both
    distributions and the rest is renormalised.

    Returns:
        Scalar, mean over ``[n, classes]`` examples, in nats. Zero with two classes, where nothing else is left.
    """
    own = F.one_hot(labels, logits.shape[-1]).bool()
    log_q = torch.log_softmax(logits.masked_fill(own, -torch.inf), dim=-1).masked_fill(own, 0.0)
    log_p = torch.log_softmax(reference_logits.masked_fill(own, -torch.inf), dim=-1).masked_fill(own, 0.0)
    weights = log_p.exp().masked_fill(own, 0.0)
    return (weights * (log_p - log_q)).sum(-1).mean()


def rank_z(first: Tensor, second: Tensor) -> float:
    """z-value of Mann and Whitney's count of pairs in which ``first [n]`` exceeds ``second [m]``; negative where it lies lower."""
    n, m = len(first), len(second)
    first, second = first.cpu(), second.cpu()  # where every device has float64
    above = (first[:, None] > second).double() + 0.5 * (first[:, None] == second).double()
    return ((above.mean() - 0.5) / ((n + m + 1) / (12 * n * m)) ** 0.5).item()
