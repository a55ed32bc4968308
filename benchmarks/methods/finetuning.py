"""Methods that see the retained rows alone: LoRA, all weights, and all weights under an L1 penalty."""

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

from hf_uib.lora import default_peft_config

from ..registry import Budget, grid, register_method
from .training import retain_batches, train


@register_method("lora", "fine-tuned LoRA", group="fine-tuning", grid=grid(rate=[0.5, 1, 2, 4]), learning_rate=1e-3)
def finetune_lora(model: nn.Module, task, budget: Budget, rank: int = 16) -> nn.Module:
    """Cross-entropy on the retained rows, LoRA on every linear layer; gives a `PeftModel`."""
    return finetune(get_peft_model(model, default_peft_config(model, rank)), task, budget)


register_method(
    "lora_same_rate", "LoRA at UIB's learning rate, not tuned", group="fine-tuning", learning_rate=2e-3, unranked=True
)(finetune_lora)


@register_method("full", "fine-tuned, all weights", group="fine-tuning", grid=grid(rate=[0.25, 0.5, 1, 2]))
def finetune(model: nn.Module, task, budget: Budget) -> nn.Module:
    """Cross-entropy on the retained rows, all weights."""
    retain = retain_batches(model, task, budget)

    def loss(step: int) -> Tensor:
        inputs, labels = next(retain)
        return F.cross_entropy(model(**inputs).logits, labels)

    return train(model, loss, budget)


@register_method("l1", "l1-sparse", group="fine-tuning", grid=grid(gamma=[1e-6, 1e-5, 5e-5, 1e-4]))
def l1_sparse(model: nn.Module, task, budget: Budget, gamma: float = 1e-4) -> nn.Module:
    """Fine-tuning with ``gamma |theta|_1`` in the loss, falling linearly to zero (Jia et al., arXiv 2304.04934).

    Published with SGD; under AdamW weights without another gradient (embeddings of absent tokens) shrink at the full rate.
    """
    retain = retain_batches(model, task, budget)
    weights = [p for p in model.parameters() if p.requires_grad]

    def loss(step: int) -> Tensor:
        inputs, labels = next(retain)
        size = torch.stack([p.abs().sum() for p in weights]).sum()
        return F.cross_entropy(model(**inputs).logits, labels) + gamma * (1 - step / budget.steps) * size

    return train(model, loss, budget)
