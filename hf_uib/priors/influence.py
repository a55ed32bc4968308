"""UIB-IF: the Laplace estimate of the retrain posterior as the prior (method, section 3c)."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .base import Prior, PriorContext

EXACT = 512  # weights, up to which the curvature is formed and factorised
ITERATIONS = 20  # of conjugate gradients, each one pass over the retained sample
RISE = 0.05  # nats of the retained loss that the step may add
HALVINGS = 8
TOLERANCE = 1e-10  # of the squared residual, relative


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One vector ``[P]``."""
    return torch.cat([t.reshape(-1) for t in tensors])


def gauss_newton_product(outputs: Tensor, weights: list[Tensor], vector: Tensor, curvature: Callable) -> Tensor:
    """``J' H J v`` of one batch, ``[P]``; J is the Jacobian of ``outputs [n, classes]`` in ``weights``, never formed.

    Two reverse passes give ``J v`` (the second through the first one, which is linear in its seed), a third ``J' (H J v)``.

    Args:
        curvature: ``(outputs, t) -> H t``, the Hessian of the summed loss in its outputs, applied to ``t [n, classes]``.
    """
    seed = torch.zeros_like(outputs, requires_grad=True)
    back = torch.autograd.grad(outputs, weights, seed, create_graph=True, materialize_grads=True)
    forward = torch.autograd.grad(flat(back), seed, vector, retain_graph=True, materialize_grads=True)[0]
    return flat(torch.autograd.grad(outputs, weights, curvature(outputs.detach(), forward), materialize_grads=True))


def solve(product: Callable[[Tensor], Tensor], right: Tensor, damping: float) -> Tensor:
    """``(H + damping I)^-1 right``, ``[P]``: exact for up to `EXACT` weights, by conjugate gradients above.

    Args:
        product: ``v -> H v`` of a positive semi-definite H.
    """
    damped = lambda v: product(v) + damping * v  # noqa: E731
    if len(right) <= EXACT:
        matrix = torch.stack([damped(column) for column in torch.eye(len(right)).to(right)], dim=1)
        return torch.linalg.solve((matrix + matrix.T) / 2, right)
    x, residual = torch.zeros_like(right), right.clone()
    direction, squared = residual.clone(), residual @ residual
    start = squared.clone()
    for _ in range(ITERATIONS):
        if squared <= TOLERANCE * start:
            break
        moved = damped(direction)
        length = squared / (direction @ moved)
        x, residual = x + length * direction, residual - length * moved
        following = residual @ residual
        direction, squared = residual + following / squared * direction, following
    return x


def softmax_curvature(logits: Tensor, tangent: Tensor) -> Tensor:
    """Hessian of the cross-entropy in its logits, ``diag(p) - p p'``, applied row by row."""
    p = logits.softmax(-1)
    return p * (tangent - (p * tangent).sum(-1, keepdim=True))


class InfluencePrior(Prior):
    r"""Where the retrained model's weights would be to second order, on the adapter:

        mean = mu + gamma * Lambda^-1 * sum_forget grad loss_i(mu),    Lambda = Lambda_0 + sum_retain H_i

    with H the generalised Gauss-Newton matrix at the checkpoint. Deletion is ``gamma = 1`` (for a linear-Gaussian model the mean
    is then the retrain posterior's, tested). In a deep network that step leaves the region where the second
    order holds, so the default goes a hundredth of the way, and the step is halved while it raises the loss on the retained sample
    by more than `RISE`: the retrained model's would be no higher. The sums are estimated on samples. The prior's mean, and with
    it the adapter, starts there; no forget batches are needed.

    Args:
        damping: Lambda_0, relative to the mean of the sum's diagonal (estimated with one random probe).
        precision: Lambda_0 itself, where it is known, instead.
    """

    uses_forget_batches = False
    strengths = (0.01, 0.01)

    def __init__(self, damping: float = 1.0, precision: float | None = None):
        self.damping, self.precision = damping, precision

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Summed over the batch, in nats."""
        return F.cross_entropy(outputs, labels, reduction="sum")

    curvature = staticmethod(softmax_curvature)

    def forget_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Zero: everything is in the mean."""
        return logits.new_zeros(())

    def prepare(self, setting: PriorContext) -> None:
        """Move the adapter to the prior's mean."""
        weights = list(setting.trainable().values())
        with torch.no_grad():
            at_start, limit = [weight.clone() for weight in weights], self.retained(setting) + RISE
            shift = self.strength * self.shift(setting, weights)
            parts = [
                part.view_as(w) for w, part in zip(weights, shift.split([w.numel() for w in weights]), strict=True)
            ]
            for share in (*(0.5**i for i in range(HALVINGS)), 0.0):
                for weight, start, part in zip(weights, at_start, parts, strict=True):
                    weight.copy_(start + share * part)
                if self.retained(setting) <= limit:
                    break

    def retained(self, setting: PriorContext) -> Tensor:
        """Mean loss on the retained sample, in nats (scalar)."""
        sums = torch.zeros(2, device=next(setting.model.parameters()).device, dtype=torch.float64)
        for inputs in setting.retain():
            labels = inputs.pop("labels")
            sums += torch.stack(
                [self.loss(setting.model(**inputs).logits, labels).double(), sums.new_tensor(len(labels))]
            )
        setting.reduce([sums])
        return sums[0] / sums[1]

    @torch.enable_grad()
    def shift(self, setting: PriorContext, weights: list[nn.Parameter]) -> Tensor:
        """``Lambda^-1 sum_forget grad loss``, ``[P]``."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            device = weights[0].device
            gradient, count = torch.zeros_like(flat(weights)), torch.zeros((), device=device)
            for inputs in setting.forget():
                labels = inputs.pop("labels")
                loss = self.loss(setting.model(**inputs).logits, labels)
                gradient += flat(torch.autograd.grad(loss, weights, materialize_grads=True))
                count += len(labels)
            setting.reduce([gradient, count])
            gradient *= setting.sizes[0] / count

            def product(vector: Tensor) -> Tensor:
                total, rows = torch.zeros_like(vector), torch.zeros((), device=device)
                for inputs in setting.retain():
                    labels = inputs.pop("labels")
                    outputs = setting.model(**inputs).logits
                    total += gauss_newton_product(outputs, weights, vector, self.curvature)
                    rows += len(labels)
                setting.reduce([total, rows])
                return total * (setting.sizes[1] / rows)

            precision = self.precision
            if precision is None:
                signs = torch.randint(0, 2, gradient.shape, generator=torch.Generator().manual_seed(0))
                probe = signs.to(gradient) * 2 - 1
                precision = self.damping * (probe @ product(probe) / len(probe)).item()
            return solve(product, gradient.detach(), precision).detach()
