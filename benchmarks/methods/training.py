"""What the methods share: batches, one optimizer loop, one pass over a sample."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from hf_uib.data.pairing import endless_permutations, fetch, sample_indices
from hf_uib.inference import batcher

from ..registry import Budget

SAMPLE = 512  # rows of each set for importances and curvature


def batches(model: nn.Module, rows, processing_class, size: int, seed: int) -> Iterator[tuple[dict, Tensor]]:
    """Endless batches of inputs and labels; every row once before any comes again."""
    batch, order = batcher(model, processing_class), endless_permutations(len(rows), seed)
    while True:
        yield batch(fetch(rows, [next(order) for _ in range(size)]))


def retain_batches(model: nn.Module, task, budget: Budget) -> Iterator[tuple[dict, Tensor]]:
    """Of retained rows."""
    return batches(model, task.sets["retain"], task.processing_class, budget.batch_size, budget.seed)


def forget_batches(model: nn.Module, task, budget: Budget) -> Iterator[tuple[dict, Tensor]]:
    """Of forget rows."""
    return batches(model, task.sets["forget"], task.processing_class, budget.batch_size, budget.seed + 1)


def both_logits(model: nn.Module, task, budget: Budget) -> Callable:
    """A function that gives a step's ``(logits, labels)`` of retained and of forget rows."""
    retain, forget = retain_batches(model, task, budget), forget_batches(model, task, budget)

    def step():
        (kept, kept_labels), (gone, gone_labels) = next(retain), next(forget)
        return (model(**kept).logits, kept_labels), (model(**gone).logits, gone_labels)

    return step


def train(model: nn.Module, loss_of: Callable[[int], Tensor], budget: Budget, after_backward=None) -> nn.Module:
    """AdamW without decay on what is trainable; ``loss_of(step)``, and ``after_backward(step)`` where gradients are changed."""
    torch.manual_seed(budget.seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=budget.learning_rate, weight_decay=0.0
    )
    schedule = get_scheduler("linear", optimizer, budget.steps // 20, budget.steps)
    model.train()
    for step in range(budget.steps):
        loss_of(step).backward()
        if after_backward is not None:
            after_backward(step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def one_pass(model: nn.Module, rows, processing_class, seed: int, size: int = 64) -> Iterator[tuple[dict, Tensor]]:
    """Batches of a sample of the rows, each row once."""
    chosen = sample_indices(len(rows), SAMPLE, seed)
    batch = batcher(model, processing_class)
    for start in range(0, len(chosen), size):
        yield batch(fetch(rows, chosen[start : start + size]))


def gradients(loss: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a scalar in each weight; zeros where it has none."""
    return torch.autograd.grad(loss, weights, materialize_grads=True, allow_unused=True)
