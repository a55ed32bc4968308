"""Group DRO on the retained rows (Sagawa et al., arXiv 1911.08731)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_uib.data.labels import labels_of
from hf_uib.data.pairing import fetch
from hf_uib.inference import batcher

from ..registry import Budget, grid, register_method
from .training import train


@register_method(
    "dro", "Group DRO", group="debiasing", grid=grid(eta=[0.01, 0.1], rate=[0.5, 1]), needs_attribute=True
)
def group_dro(model: nn.Module, task, budget: Budget, eta: float = 0.01) -> nn.Module:
    """Groups of label and attribute, weighted by ``exp(eta loss)``, rows drawn group by group."""
    rows = task.sets["retain"]
    attributes = np.asarray(rows.with_format(None)[task.bias_column])
    codes = np.unique(np.stack([labels_of(rows), attributes], 1), axis=0, return_inverse=True)[1].reshape(-1)
    groups = [np.flatnonzero(codes == g) for g in range(codes.max() + 1)]
    weights = torch.full((len(groups),), 1 / len(groups))
    rng = np.random.default_rng(budget.seed)
    batch = batcher(model, task.processing_class)

    def loss(step: int) -> Tensor:
        drawn = rng.integers(len(groups), size=budget.batch_size)
        inputs, labels = batch(fetch(rows, [int(rng.choice(groups[g])) for g in drawn]))
        losses = F.cross_entropy(model(**inputs).logits, labels, reduction="none")
        there, index = np.unique(drawn, return_inverse=True)
        index = torch.as_tensor(index, device=losses.device)
        sums = losses.new_zeros(len(there)).index_add(0, index, losses) / torch.bincount(index)
        weights[there] *= torch.exp(eta * sums.detach().cpu())
        weights.div_(weights.sum())
        chosen = weights[there] / weights[there].sum()
        return (chosen.to(sums.device) * sums).sum()

    return train(model, loss, budget)
