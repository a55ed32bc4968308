"""What the others are held against: the checkpoint, and models that never saw the forget set as it is."""

from torch import nn

from hf_uib.cli import digits

from ..registry import Budget, register_method


@register_method("original", "original", group="original", one_shot=True)
def original(model: nn.Module, task, budget: Budget) -> nn.Module:
    """The checkpoint as it is."""
    return model.eval()


def trained_on(part: str, model: nn.Module, task, budget: Budget) -> nn.Module:
    """Plain training on one of the task's sets."""
    digits.fit(model, task.sets[part], task, budget.steps, budget.output_dir, budget.seed, budget.learning_rate)
    return model.eval()


@register_method("balanced", "trained on balanced data", group="oracle", needs_attribute=True, starts_from="start")
def balanced(model: nn.Module, task, budget: Budget) -> nn.Module:
    """Trained on as many rows as both sets have together, with the attribute at random: the oracle of bias removal."""
    return trained_on("balanced", model, task, budget)


@register_method("retrained", "retrained", group="oracle", starts_from="start")
def retrained(model: nn.Module, task, budget: Budget) -> nn.Module:
    """Trained on the retained rows alone."""
    return trained_on("retain", model, task, budget)
