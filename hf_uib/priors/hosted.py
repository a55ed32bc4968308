"""Other unlearning methods as R^(l), stopped at the calibrated level: ascent (NegGrad+), random labels, SalUn's saliency mask."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import PriorContext, register_prior, single_label_only
from .calibrated import RESOLUTION, CalibratedPrior


class HostedPrior(CalibratedPrior):
    """Another method's forget loss, on the forget examples that are still above their level.

    The method says which way, [`CalibratedPrior`]'s level how far: an example at its level is let go. With ``target=-math.inf`` (as
    a setting, ``forget_target``) there is no level, and what is left is the method itself.
    """

    rests_under_a_pattern = False  # the method was asked for

    def attach(self, context: PriorContext) -> None:
        """As in `Prior`.

        Raises:
            ValueError: the task is not single-label classification.
        """
        single_label_only(self, context)
        super().attach(context)

    @classmethod
    def from_config(cls, args) -> "HostedPrior":
        """Takes ``forget_target``, ``-inf`` included."""
        return cls(target=args.forget_target)

    def forget_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of the examples above their level, in nats per forget example (scalar)."""
        above = self.excess(logits.detach(), labels) > RESOLUTION
        return torch.where(above, self.forget_loss_per_example(logits, labels), 0.0).mean()

    def forget_loss_per_example(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What the method minimises on each forget example, ``[n]`` in nats."""
        raise NotImplementedError


@register_prior("ascent")
class AscentPrior(HostedPrior):
    """Divides out the forget set's likelihood: the forget loss is ``log p(y | x)`` itself.

    Gradient ascent on the forget set (NegGrad+ of Kurmanji et al., arXiv 2302.09880). Without a level, without retained data, with
    two classes and a fixed mean it is EUBO of Nguyen et al., arXiv 2010.12883, which over-unlearns if it goes on for long.
    """

    def default_strength(self, noised: bool) -> float:
        """0.3 under noise, 1 without."""
        return 0.3 if noised else 1.0

    def forget_loss_per_example(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Log-likelihoods, at most 0."""
        return -F.cross_entropy(logits, labels, reduction="none")


@register_prior("random_label")
class RandomLabelPrior(HostedPrior):
    """The forget examples are to look as if their labels were drawn from the other classes.

    The random label's expectation is taken instead of a draw: ``KL(uniform over the other classes || p(. | x))``, of which one
    random label per step gives an unbiased gradient (Golatkar et al., arXiv 1911.04933; Graves et al., arXiv 2010.10981).
    """

    def default_strength(self, noised: bool) -> float:
        """3."""
        return 3.0

    def forget_loss_per_example(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Divergences; 0 where the other classes are equally likely and p(y) is 0."""
        others = logits.shape[-1] - 1
        log_p = torch.log_softmax(logits, dim=-1)
        own = log_p.gather(-1, labels[:, None]).squeeze(-1)
        return -(log_p.sum(-1) - own) / others - math.log(others)


def gradients(loss: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a scalar in each weight; zeros where it has none."""
    return torch.autograd.grad(loss, weights, materialize_grads=True, allow_unused=True)


def largest(totals: list[Tensor], share: float) -> list[Tensor]:
    """Which entries are among the ``share`` of all, over all tensors, that are largest in absolute value."""
    sizes = torch.cat([total.abs().flatten() for total in totals])
    least = sizes.kthvalue(max(1, round((1 - share) * len(sizes)))).values
    return [total.abs() > least for total in totals]


@register_prior("saliency")
class SaliencyPrior(RandomLabelPrior):
    """SalUn (arXiv 2310.12508) over the adapter: random labels, and only the weights move that the forget loss is sensitive to.

    The mask keeps the half of the trainable adapter weights whose gradient of the forget loss is largest, measured once, over all
    layers (A has none while B is zero, and then moves freely). As a prior it is infinitely narrow elsewhere. The margin's
    gradient stands in for the cross-entropy's, which vanishes on examples that have been fitted.
    """

    share = 0.5

    def prepare(self, context: PriorContext) -> None:
        """Measure the mask."""
        super().prepare(context)
        weights = context.trainable()
        totals = [torch.zeros_like(p) for p in weights.values()]
        for inputs in context.forget():
            labels = inputs.pop("labels")
            loss = self.task.margin(context.model(**inputs).logits, labels).sum()
            for total, gradient in zip(totals, gradients(loss, list(weights.values())), strict=True):
                total += gradient
        context.reduce(totals)
        felt = {name: total for name, total in zip(weights, totals, strict=True) if total.any()}
        self.masks = dict(zip(felt, largest(list(felt.values()), self.share), strict=True))
