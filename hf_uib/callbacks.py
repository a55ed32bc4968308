"""What happens around the optimizer steps."""

import warnings
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from .objective import rank_z
from .schedule import refresh_is_due

if TYPE_CHECKING:
    from .trainer import UIBTrainer


class PriorRefresh(TrainerCallback):
    """Before an optimizer step: refresh the prior when it is due."""

    def __init__(self, trainer: "UIBTrainer"):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        """Once per optimizer step, whatever the accumulation."""
        if refresh_is_due(state.global_step, args.prior_update_steps):
            self.trainer.refresh_prior()


class NoiseDraw(TrainerCallback):
    """Before an optimizer step: draw its noise, swapped tokens and short texts, of which each row of the step takes one draw."""

    def __init__(self, trainer: "UIBTrainer"):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        """Once per optimizer step, whatever the accumulation."""
        self.trainer.posterior.draw(state.global_step, state.max_steps)


class OverUnlearningCorrection(TrainerCallback):
    """After the last step: randomly drawn rows that now stand out from unseen ones by *low* margins are known by that.

    The adapter then goes back on the straight line to the checkpoint, ``W + fraction * s B A``, until they do not: a bisection for
    the fraction at which the rank test of both sets' margins is zero (docs/method.md, "Correction of over-unlearning").
    """

    def __init__(self, trainer: "UIBTrainer"):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        """A model that was chosen by ``load_best_model_at_end`` stays as it is."""
        trainer, posterior = self.trainer, self.trainer.posterior
        posterior.silence()
        measured = trainer.measurements
        drawn = measured.seeks_pattern and not measured.pattern_found
        if trainer.calibration_dataset is None or not drawn or args.load_best_model_at_end:
            return
        ends = {name: posterior.factors(name)[1].detach().clone() for name in trainer.layers}

        def z(fraction: float) -> float:
            for name, end in ends.items():
                posterior.factors(name)[1].data.copy_(fraction * end)
            return rank_z(measured.forget_margins(), measured.calibration_margins())

        over = z(1.0)
        if over >= args.channel.over_unlearning_z:
            return
        seen = f"the forget set's margins are lower than unseen rows' (z = {over:.1f}), which gives it away as high ones do"
        # The line did not begin at B = 0, or not above unseen rows
        if trainer.adapter_before is not None or z(0.0) <= 0:
            z(1.0)
            warnings.warn(
                f"Over-unlearning: {seen}. Train again with a smaller prior_strength (a third, say).", stacklevel=2
            )
            return
        low, high = 0.0, 1.0
        for _ in range(6):
            middle = (low + high) / 2
            low, high = (middle, high) if z(middle) >= 0 else (low, middle)
        z(low)
        measured.statistics["kept_fraction"] = low
        warnings.warn(
            f"Over-unlearning: {seen}. {low:.0%} of the change are kept, with which the two sets look alike. A smaller "
            "prior_strength may forget them at less cost.",
            stacklevel=2,
        )
