"""Nothing to forget but by the retained data: variational LoRA on the retained data."""

from torch import Tensor

from .base import Prior, register_prior


@register_prior("none")
class NoPrior(Prior):
    """Only the Gaussian part of the prior. With beta = 0, no noise and no swapped tokens this is fine-tuning."""

    needs_forget_batches = False
    needs_retained_data = True

    def forget_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Zero."""
        return logits.new_zeros(())
