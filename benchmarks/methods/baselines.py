"""The methods that UIB is compared with, each re-derived from its paper's rule; all weights are trained unless said.

Every function changes ``model`` in place (the LoRA one returns a `PeftModel`) and takes the same `Rows` and `Budget`.
`scripts/benchmark.py` tunes them on a validation fold.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import get_scheduler

from hf_uib.data.pairing import endless_permutations, fetch, sample_indices
from hf_uib.data.reading import labels_of
from hf_uib.inference import batcher, head_of, observe
from hf_uib.lora import default_peft_config
from hf_uib.priors import InfluencePrior, PriorContext
from hf_uib.priors.hosted import gradients, largest

SAMPLE = 512  # rows of each set for importances and curvature


@dataclass
class Rows:
    """Encoded rows of both sets, and what turns them into a batch.

    Attributes:
        bias_column: the retained rows' attribute, for the methods that use groups.
    """

    forget: Any
    retain: Any
    processing_class: object = None
    bias_column: str | None = None


@dataclass
class Budget:
    """Optimizer steps with linear warm-up (5%) and decay, retained rows per step, peak learning rate, seed of every draw."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0


def batches(model: nn.Module, rows, processing_class, size: int, seed: int) -> Iterator[tuple[dict, Tensor]]:
    """Endless batches of inputs and labels; every row once before any comes again."""
    batch, order = batcher(model, processing_class), endless_permutations(len(rows), seed)
    while True:
        yield batch(fetch(rows, [next(order) for _ in range(size)]))


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


def _both(model: nn.Module, rows: Rows, budget: Budget):
    """A step's ``(logits, labels)`` of retained and of forget rows."""
    retain = batches(model, rows.retain, rows.processing_class, budget.batch_size, budget.seed)
    forget = batches(model, rows.forget, rows.processing_class, budget.batch_size, budget.seed + 1)

    def step():
        (kept, kept_labels), (gone, gone_labels) = next(retain), next(forget)
        return (model(**kept).logits, kept_labels), (model(**gone).logits, gone_labels)

    return step


def finetune(model: nn.Module, rows: Rows, budget: Budget) -> nn.Module:
    """Cross-entropy on the retained rows, all weights."""
    retain = batches(model, rows.retain, rows.processing_class, budget.batch_size, budget.seed)

    def loss(step: int) -> Tensor:
        inputs, labels = next(retain)
        return F.cross_entropy(model(**inputs).logits, labels)

    return train(model, loss, budget)


def finetune_lora(model: nn.Module, rows: Rows, budget: Budget, rank: int = 16) -> nn.Module:
    """Cross-entropy on the retained rows, LoRA on every linear layer."""
    return finetune(get_peft_model(model, default_peft_config(model, rank)), rows, budget)


def neggrad_plus(model: nn.Module, rows: Rows, budget: Budget, alpha: float = 0.99) -> nn.Module:
    """NegGrad+: ``alpha CE_retain - (1 - alpha) CE_forget`` (Kurmanji et al., arXiv 2302.09880)."""
    both = _both(model, rows, budget)

    def loss(step: int) -> Tensor:
        kept, gone = both()
        return alpha * F.cross_entropy(*kept) - (1 - alpha) * F.cross_entropy(*gone)

    return train(model, loss, budget)


def _other_labels(classes: int, seed: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(labels: Tensor) -> Tensor:
        offset = torch.randint(1, classes, labels.shape, generator=generator).to(labels.device)
        return (labels + offset) % classes

    return draw


def random_label(model: nn.Module, rows: Rows, budget: Budget, weight: float = 1.0, after_backward=None) -> nn.Module:
    """Cross-entropy on retained rows and, with a ``weight``, on forget rows under random other labels (Golatkar et al., arXiv
    1911.04933)."""
    both, other = _both(model, rows, budget), _other_labels(model.config.num_labels, budget.seed)

    def loss(step: int) -> Tensor:
        kept, (logits, labels) = both()
        return F.cross_entropy(*kept) + weight * F.cross_entropy(logits, other(labels))

    return train(model, loss, budget, after_backward)


def salun(model: nn.Module, rows: Rows, budget: Budget, weight: float = 1.0, share: float = 0.5) -> nn.Module:
    """SalUn: `random_label` on the ``share`` of all weights whose gradient of the forget loss is largest; the others do not
    move (Fan et al., arXiv 2310.12508)."""
    masks = saliency_masks(model, rows, budget, share)

    def mask(step: int) -> None:
        for p, m in masks:
            if p.grad is not None:
                p.grad.mul_(m)

    return random_label(model, rows, budget, weight, mask)


def saliency_masks(
    model: nn.Module, rows: Rows, budget: Budget, share: float = 0.5
) -> list[tuple[nn.Parameter, Tensor]]:
    """Each weight and which of its entries may move; one threshold over all layers."""
    model.eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    totals = [torch.zeros_like(p) for p in weights]
    for inputs, labels in _passes(model, rows.forget, rows.processing_class, budget.seed):
        loss = F.cross_entropy(model(**inputs).logits, labels, reduction="sum")
        for total, gradient in zip(totals, gradients(loss, weights), strict=True):
            total += gradient
    return list(zip(weights, largest(totals, share), strict=True))


def _passes(model: nn.Module, rows, processing_class, seed: int, size: int = 64) -> Iterator[tuple[dict, Tensor]]:
    """One pass over a sample of the rows."""
    chosen = sample_indices(len(rows), SAMPLE, seed)
    batch = batcher(model, processing_class)
    for start in range(0, len(chosen), size):
        yield batch(fetch(rows, chosen[start : start + size]))


def influence(model: nn.Module, rows: Rows, budget: Budget, damping: float = 1.0, scale: float = 1.0) -> nn.Module:
    """Influence unlearning: one damped Gauss-Newton step that undoes the forget rows, on all weights, and no training (Koh and
    Liang, arXiv 1703.04730; IU in SalUn's tables)."""

    def giver(part):
        passes = partial(_passes, model, part, rows.processing_class, budget.seed)
        return lambda: ({**inputs, "labels": labels} for inputs, labels in passes())

    prior = InfluencePrior(damping)
    prior.strength = scale
    sizes = (len(rows.forget), len(rows.retain))
    prior.prepare(PriorContext(model.eval(), giver(rows.forget), giver(rows.retain), sizes, lambda tensors: None))
    return model


def scrub(model: nn.Module, rows: Rows, budget: Budget, ascent: float = 0.25, alpha: float = 0.5) -> nn.Module:
    """SCRUB: the student leaves the teacher (the checkpoint) on forget rows and stays with it on retained ones (Kurmanji et
    al., arXiv 2302.09880). In the first ``ascent`` of the steps every other one is a max-step ``-KL_forget``; all others are
    min-steps ``alpha KL_retain + (1 - alpha) CE_retain``."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    retain = batches(model, rows.retain, rows.processing_class, budget.batch_size, budget.seed)
    forget = batches(model, rows.forget, rows.processing_class, budget.batch_size, budget.seed + 1)

    def divergence(inputs: dict, logits: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(**inputs).logits.log_softmax(-1)
        return F.kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)

    def loss(step: int) -> Tensor:
        if step < ascent * budget.steps and step % 2 == 0:
            inputs, _ = next(forget)
            return -divergence(inputs, model(**inputs).logits)
        inputs, labels = next(retain)
        logits = model(**inputs).logits
        return alpha * divergence(inputs, logits) + (1 - alpha) * F.cross_entropy(logits, labels)

    return train(model, loss, budget)


def importances(model: nn.Module, rows, processing_class, seed: int) -> list[Tensor]:
    """Diagonal of the empirical Fisher information of every weight, from single rows of a sample."""
    model.eval()
    weights = list(model.parameters())
    totals = [torch.zeros_like(p) for p in weights]
    count = 0
    for inputs, labels in _passes(model, rows, processing_class, seed, 1):
        loss = F.cross_entropy(model(**inputs).logits, labels)
        for total, gradient in zip(totals, gradients(loss, weights), strict=True):
            total += gradient.square()
        count += 1
    return [total / count for total in totals]


@torch.no_grad()
def ssd(model: nn.Module, rows: Rows, budget: Budget, alpha: float = 10.0, damping: float = 1.0) -> nn.Module:
    """Selective synaptic dampening: weights ``alpha`` times more important to the forget set than to all data are multiplied by
    ``min(damping I_D / I_forget, 1)``; no training (Foster et al., arXiv 2308.07707). I_D is taken over both sets by their
    sizes."""
    with torch.enable_grad():
        gone, kept = (
            importances(model, part, rows.processing_class, budget.seed) for part in (rows.forget, rows.retain)
        )
    share = len(rows.forget) / (len(rows.forget) + len(rows.retain))
    for weight, forget, retain in zip(model.parameters(), gone, kept, strict=True):
        everything = share * forget + (1 - share) * retain
        factor = (damping * everything / forget.clamp_min(1e-30)).clamp(max=1.0)
        weight.mul_(torch.where(forget > alpha * everything, factor, 1.0))
    return model.eval()


def l1_sparse(model: nn.Module, rows: Rows, budget: Budget, gamma: float = 1e-4) -> nn.Module:
    """Fine-tuning on retained rows with ``gamma |theta|_1`` in the loss, falling linearly to zero (Jia et al., arXiv 2304.04934).
    Published with SGD; under AdamW weights without another gradient (embeddings of absent tokens) shrink at the full rate."""
    retain = batches(model, rows.retain, rows.processing_class, budget.batch_size, budget.seed)
    weights = [p for p in model.parameters() if p.requires_grad]

    def loss(step: int) -> Tensor:
        inputs, labels = next(retain)
        size = torch.stack([p.abs().sum() for p in weights]).sum()
        return F.cross_entropy(model(**inputs).logits, labels) + gamma * (1 - step / budget.steps) * size

    return train(model, loss, budget)


def dfr(model: nn.Module, rows: Rows, budget: Budget, inverse: float = 1.0) -> nn.Module:
    """Deep feature reweighting: only the head is fitted anew, by logistic regression on retained features (Kirichenko et al.,
    arXiv 2204.02937; with an L2 penalty of inverse strength ``inverse``, where the paper has L1)."""
    from sklearn.linear_model import LogisticRegression

    seen = observe(model, rows.retain, rows.processing_class)
    x = seen.features["head"].astype(np.float64)
    mean, spread = x.mean(0), x.std(0) + 1e-8
    fitted = LogisticRegression(C=inverse, max_iter=1000).fit((x - mean) / spread, seen.labels)
    coefficients, intercept = fitted.coef_, fitted.intercept_
    if len(fitted.classes_) == 2:
        coefficients, intercept = np.concatenate([-coefficients, coefficients]) / 2, np.r_[-intercept, intercept] / 2
    head = head_of(model)
    weight, bias = torch.zeros_like(head.weight), torch.full_like(head.bias, -30.0)  # classes without rows
    weight[fitted.classes_] = torch.as_tensor(coefficients / spread).to(weight)
    bias[fitted.classes_] = torch.as_tensor(intercept - (coefficients / spread) @ mean).to(bias)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return model.eval()


def group_dro(model: nn.Module, rows: Rows, budget: Budget, eta: float = 0.01) -> nn.Module:
    """Group DRO on the retained rows: groups of label and attribute, weighted by ``exp(eta loss)``, rows drawn group by group
    (Sagawa et al., arXiv 1911.08731)."""
    attributes = np.asarray(rows.retain.with_format(None)[rows.bias_column])
    codes = np.unique(np.stack([labels_of(rows.retain), attributes], 1), axis=0, return_inverse=True)[1].reshape(-1)
    groups = [np.flatnonzero(codes == g) for g in range(codes.max() + 1)]
    weights = torch.full((len(groups),), 1 / len(groups))
    rng = np.random.default_rng(budget.seed)
    batch = batcher(model, rows.processing_class)

    def loss(step: int) -> Tensor:
        drawn = rng.integers(len(groups), size=budget.batch_size)
        inputs, labels = batch(fetch(rows.retain, [int(rng.choice(groups[g])) for g in drawn]))
        losses = F.cross_entropy(model(**inputs).logits, labels, reduction="none")
        there, index = np.unique(drawn, return_inverse=True)
        index = torch.as_tensor(index, device=losses.device)
        sums = losses.new_zeros(len(there)).index_add(0, index, losses) / torch.bincount(index)
        weights[there] *= torch.exp(eta * sums.detach().cpu())
        weights.div_(weights.sum())
        chosen = weights[there] / weights[there].sum()
        return (chosen.to(sums.device) * sums).sum()

    return train(model, loss, budget)
