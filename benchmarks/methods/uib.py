"""UIB through its trainer: with the defaults, with another method inside, and plain variational LoRA."""

import dataclasses
import time
from functools import partial

from torch import nn

from hf_uib import UIBConfig, UIBTrainer

from ..registry import Budget, grid, register_method


def uib_trainer(model: nn.Module, task, budget: Budget, calibration: bool = True, **setting) -> UIBTrainer:
    """The trainer of a run, not yet trained.

    Args:
        calibration: whether the task's calibration set is given.
        setting: of `UIBConfig`.
    """
    args = UIBConfig(
        budget.output_dir,
        max_steps=budget.steps,
        per_device_train_batch_size=budget.batch_size,
        seed=budget.seed,
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
        **setting,
    )
    return UIBTrainer(
        model,
        args,
        forget_dataset=task.sets["forget"],
        retain_dataset=task.sets["retain"],
        calibration_dataset=task.sets["calibration"] if calibration else None,
        processing_class=task.processing_class,
    )


@register_method("uib", "**UIB**", group="uib")
def unlearn(model: nn.Module, task, budget: Budget, **setting) -> tuple[nn.Module, dict]:
    """The adapted model, and what the trainer measured; the setting is `uib_trainer`'s."""
    started = time.perf_counter()
    trainer = uib_trainer(model, task, budget, **setting)
    loop = trainer.train().metrics["train_runtime"]
    measured = {"statistics": trainer.statistics, "measured_examples": trainer.measured_examples}
    measured |= {"steps": trainer.args.max_steps, "statistics_seconds": time.perf_counter() - started - loop}
    return trainer.model, measured


@register_method(
    "uib_fifth", "UIB, a fifth of the retraining's steps", group="uib", kinds=("bias",), unranked=True
)  # of a removal task it is UIB's budget
def a_fifth(model: nn.Module, task, budget: Budget) -> tuple[nn.Module, dict]:
    """UIB in fewer steps."""
    return unlearn(model, task, dataclasses.replace(budget, steps=task.train_settings["retrain_steps"] // 5))


register_method("uib_fold", "UIB, no calibration data", group="uib", unranked=True)(
    partial(unlearn, calibration=False)
)
register_method("uib_none", "UIB, no forget loss", group="uib", unranked=True)(partial(unlearn, prior="none"))
register_method(
    "variational",
    "variational LoRA, fixed prior",
    group="fine-tuning",
    grid=grid(beta=[1e-6, 1e-4], noise_to_signal=[0.1, 0.5]),
)(partial(unlearn, prior="none", prior_subspace="random", trainable_factors="B", prior_update_steps=10**6))

for prior, hosted, title in (
    ("ascent", "neggrad", "UIB + NegGrad+"),
    ("random_label", "random_label", "UIB + random label"),
    ("saliency", "salun", "UIB + SalUn"),
    ("influence", "influence", "UIB + influence (UIB-IF)"),
):
    register_method(f"uib_{prior}", title, group="uib", hosts=hosted)(partial(unlearn, prior=prior))
