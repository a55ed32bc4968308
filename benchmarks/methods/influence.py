"""Influence unlearning (Koh and Liang, arXiv 1703.04730; IU in SalUn's tables)."""

from functools import partial

from torch import nn

from hf_uib.priors import InfluencePrior, PriorContext
from hf_uib.settings import InfluenceSettings

from ..registry import Budget, grid, register_method
from .training import one_pass


@register_method("influence", "influence (IU)", grid=grid(damping=[1, 10], scale=[0.003, 0.03]), one_shot=True)
def influence(model: nn.Module, task, budget: Budget, damping: float = 1.0, scale: float = 1.0) -> nn.Module:
    """One damped Gauss-Newton step that undoes the forget rows, on all weights, and no training."""

    def giver(rows):
        passes = partial(one_pass, model, rows, task.processing_class, budget.seed)
        return lambda: ({**inputs, "labels": labels} for inputs, labels in passes())

    forget, retain = task.sets["forget"], task.sets["retain"]
    prior = InfluencePrior(InfluenceSettings(damping=damping))
    sizes = (len(forget), len(retain))
    context = PriorContext(model.eval(), giver(forget), giver(retain), sizes, lambda tensors: None, strength=scale)
    prior.attach(context)
    prior.prepare(context)
    return model
