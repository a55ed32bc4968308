"""UIB-IF: the Laplace estimate of the retrain posterior as the prior (method, section 3c)."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..objective import wide_dtype
from ..settings import InfluenceSettings
from ..sharding import is_sharded
from .base import Prior, PriorContext, register_prior, single_label_only


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One vector ``[P]``."""
    return torch.cat([t.reshape(-1) for t in tensors])


def gauss_newton_product(outputs: Tensor, weights: Sequence[Tensor], vector: Tensor, curvature: Callable) -> Tensor:
    """``J' H J v`` of one batch, ``[P]``; J is the Jacobian of ``outputs [n, classes]`` in ``weights``, never formed.

    Two reverse passes give ``J v`` (the second through the first one, which is linear in its seed), a third ``J' (H J v)``.

    Args:
        curvature: ``(outputs, t) -> H t``, the Hessian of the summed loss in its outputs, applied to ``t [n, classes]``.
    """
    seed = torch.zeros_like(outputs, requires_grad=True)
    back = torch.autograd.grad(outputs, weights, seed, create_graph=True, materialize_grads=True)
    forward = torch.autograd.grad(flat(back), seed, vector, retain_graph=True, materialize_grads=True)[0]
    return flat(torch.autograd.grad(outputs, weights, curvature(outputs.detach(), forward), materialize_grads=True))


def solve(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    damping: float,
    settings: InfluenceSettings,
) -> Tensor:
    """``(H + damping I)^-1 right``, ``[P]``: exact for up to ``settings.exact`` weights, by conjugate gradients above.

    Args:
        product: ``v -> H v`` of a positive semi-definite H.
    """
    damped = lambda v: product(v) + damping * v
    if len(right) <= settings.exact:
        matrix = torch.stack([damped(column) for column in torch.eye(len(right)).to(right)], dim=1)
        return torch.linalg.solve((matrix + matrix.T) / 2, right)
    x, residual = torch.zeros_like(right), right.clone()
    direction, squared = residual.clone(), residual @ residual
    start = squared.clone()
    for _ in range(settings.iterations):
        if squared <= settings.tolerance * start:
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


@register_prior("influence")
class InfluencePrior(Prior):
    r"""Where the retrained model's weights would be to second order, on the adapter:

        mean = mu + gamma * Lambda^-1 * sum_forget grad loss_i(mu),    Lambda = Lambda_0 + sum_retain H_i

    with H the generalised Gauss-Newton matrix at the checkpoint. Deletion is ``gamma = 1`` (for a linear-Gaussian model the mean
    is then the retrain posterior's, tested). In a deep network that step leaves the region where the second
    order holds, so the default goes a hundredth of the way, and the step is halved while it raises the loss on the retained sample
    by more than ``max_increase``: the retrained model's would be no higher. The sums are estimated on samples. The prior's mean,
    and with it the adapter, starts there; no forget batches are needed.

    Args:
        settings: of the solution.
        precision: Lambda_0 itself, where it is known; else it is relative to the mean of the sum's diagonal (estimated with one
            random probe).
    """

    needs_forget_batches = False
    needs_retained_data = True

    def __init__(self, settings: InfluenceSettings | None = None, precision: float | None = None):
        self.settings, self.precision = settings or InfluenceSettings(), precision

    @classmethod
    def from_config(cls, args) -> "InfluencePrior":
        """Takes ``influence_settings``."""
        return cls(args.influence)

    def default_strength(self, noised: bool) -> float:
        """0.01."""
        return 0.01

    def attach(self, context: PriorContext) -> None:
        """As in `Prior`.

        Raises:
            ValueError: the task is not single-label classification, or the base is sharded.
        """
        single_label_only(self, context)
        if is_sharded(context.model):
            raise ValueError(
                "prior=influence takes second derivatives, for which FSDP has freed the weights too early; take another prior, or "
                "data parallel training (`--accelerate_config ddp`)."
            )
        super().attach(context)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Summed over the batch, in nats."""
        return F.cross_entropy(outputs, labels, reduction="sum")

    curvature = staticmethod(softmax_curvature)

    def forget_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Zero: everything is in the mean."""
        return logits.new_zeros(())

    def prepare(self, context: PriorContext) -> None:
        """Move the adapter to the prior's mean."""
        # A changes nothing while B is zero: the curvature is B's
        weights = [weight for name, weight in context.trainable().items() if ".lora_A." not in name]
        with torch.no_grad():
            at_start, limit = (
                [weight.clone() for weight in weights],
                self.retained(context) + self.settings.max_increase,
            )
            shift = self.strength * self.shift(context, weights)
            parts = [
                part.view_as(w) for w, part in zip(weights, shift.split([w.numel() for w in weights]), strict=True)
            ]
            for share in (*(0.5**i for i in range(self.settings.halvings)), 0.0):
                for weight, start, part in zip(weights, at_start, parts, strict=True):
                    weight.copy_(start + share * part)
                if self.retained(context) <= limit:
                    break

    def retained(self, context: PriorContext) -> Tensor:
        """Mean loss on the retained sample, in nats (scalar)."""
        device = next(context.model.parameters()).device
        sums = torch.zeros(2, device=device, dtype=wide_dtype(device))
        for inputs in context.retained_batches():
            labels = inputs.pop("labels")
            sums += torch.stack(
                [self.loss(context.model(**inputs).logits, labels).to(sums), sums.new_tensor(len(labels))]
            )
        context.reduce([sums])
        return sums[0] / sums[1]

    @torch.enable_grad()
    def shift(self, context: PriorContext, weights: list[nn.Parameter]) -> Tensor:
        """``Lambda^-1 sum_forget grad loss``, ``[P]``."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            device = weights[0].device
            gradient, count = torch.zeros_like(flat(weights)), torch.zeros((), device=device)
            for inputs in context.forget():
                labels = inputs.pop("labels")
                loss = self.loss(context.model(**inputs).logits, labels)
                gradient += flat(torch.autograd.grad(loss, weights, materialize_grads=True))
                count += len(labels)
            context.reduce([gradient, count])
            gradient *= context.sizes[0] / count

            def product(vector: Tensor) -> Tensor:
                total, rows = torch.zeros_like(vector), torch.zeros((), device=device)
                for inputs in context.retained_batches():
                    labels = inputs.pop("labels")
                    outputs = context.model(**inputs).logits
                    total += gauss_newton_product(outputs, weights, vector, self.curvature)
                    rows += len(labels)
                context.reduce([total, rows])
                return total * (context.sizes[1] / rows)

            precision = self.precision
            if precision is None:
                signs = torch.randint(0, 2, gradient.shape, generator=torch.Generator().manual_seed(0))
                probe = signs.to(gradient) * 2 - 1
                precision = self.settings.damping * (probe @ product(probe) / len(probe)).item()
            return solve(product, gradient.detach(), precision, self.settings).detach()
