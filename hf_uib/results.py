"""What a trained `UIBTrainer` gives: plain models, the record of the request, the layer report, the audit."""

import copy
import math
import warnings
from collections.abc import Sequence
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from .checkpointing import AtomicCheckpoints
from .data.reading import Reader
from .data.streams import StreamFolder
from .hub.card import results_of
from .lora import AdaptedLayer, copy_without_hooks, is_fresh
from .measurements import Measurements
from .models import fingerprint, num_labels_of
from .posterior import ChannelPosterior
from .priors import Prior
from .priors.calibrated import quantiles
from .provenance import RequestRecord, detached, full_precision_base, merged, merged_copy, requests_of
from .quantised import dequantised, is_quantised
from .unlearning_task import UnlearningTask

if TYPE_CHECKING:
    from .audit.report import AuditReport


# What `evaluate` returns besides metrics
NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
EFFECT_LEFT = 1.0  # nats that the pattern's tokens may still move unseen rows' margins after a run,
EFFECT_FRACTION = 0.25  # or this share of what they moved before it
ASTRAY = 2.0  # times the nats of equal chances, and of the first steps
LEVEL_REACHED = 0.5  # nats that the forget margins may lie above their level, on average, at the end of a run


class ResultsMixin(AtomicCheckpoints):
    """Results of a `UIBTrainer`, which sets the attributes."""

    model: PeftModel
    adapter_name: str
    adapter_before: dict[str, Tensor] | None
    prior: Prior
    forget_dataset: Any
    retain_dataset: Any
    fingerprints: dict[str, str]
    request: str
    layers: dict[str, AdaptedLayer]
    task: UnlearningTask
    measurements: Measurements
    _posterior: ChannelPosterior | None
    contrast_norms: dict[str, float]
    raw_eval_dataset: Any
    streams: StreamFolder
    reader: Reader
    results: dict[str, dict]
    audit_report: "AuditReport | None"
    results_from_audit: bool
    _base_fingerprint: str | None = None  # not computed yet
    _merged_into: str | None = None  # what an adapter of a quantised base was merged into

    @property
    def posterior(self) -> ChannelPosterior:
        """Mean, noise and divergence of the adapter.

        Raises:
            ValueError: it is built by `train` (or by `run_statistics_pass`).
        """
        if self._posterior is None:
            raise ValueError(
                "Nothing was measured yet: call trainer.train() first (or trainer.run_statistics_pass())."
            )
        return self._posterior

    @property
    def compared(self) -> bool:
        """Whether forget and retained rows are compared, so that `pattern_z` is one."""
        return self.measurements.compared

    @property
    def statistics(self) -> dict[str, float]:
        """What was measured so far, by name; see `Measurements`."""
        return self.measurements.statistics

    @property
    def forget_fingerprint(self) -> str:
        """Hash of the forget set's rows."""
        return self.fingerprints["forget_dataset"]

    @property
    def base_fingerprint(self) -> str:
        """Hash of the weights below the adapter."""
        if self._base_fingerprint is None:
            self._base_fingerprint = fingerprint(self.model)
        return self._base_fingerprint

    @property
    def adapted_model(self) -> PeftModel:
        """The model with its adapter, without what Accelerate wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def unlearned_nothing(self) -> bool:
        """Whether the adapter is where it began: B is zero in every layer, or as the checkpoint's own adapter had it."""
        if self.adapter_before is None:
            return is_fresh(self.layers, self.adapter_name)
        now = get_peft_model_state_dict(self.adapted_model, adapter_name=self.adapter_name)
        factors = [name for name in now if ".lora_" in name]
        return all(torch.equal(now[name].cpu(), self.adapter_before[name].cpu()) for name in factors)

    @property
    def measured_examples(self) -> int:
        """Forward passes of the statistics and the refreshes so far, in examples."""
        return self.measurements.inference.examples

    @property
    def provenance(self) -> list[dict]:
        """Every unlearning request of the model, this run's last; kept in ``config.unlearning`` when merged, and in the card."""
        record = RequestRecord(
            request=self.request,
            forget_examples=len(self.forget_dataset),
            forget_fingerprint=self.forget_fingerprint,
            base_fingerprint=self.base_fingerprint,
            adapter_fingerprint=fingerprint(self.adapted_model, of_the_adapter=True),
            adapter_name=self.adapter_name,
            from_zero=self.adapter_before is None,
        )
        return [*requests_of(self.model), record.to_dict()]

    # ---- What was measured ------------------------------------------------------------------------------------------

    @cached_property
    def evaluated(self) -> dict[str, dict[str, float]]:
        """What `evaluate` returned last of the trained model, by set and metric, without timings; the card takes it up."""
        return {}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As in Trainer; the card's model-index carries what it returned after training."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(given, dict) and not self.is_in_train:  # of several sets, each one comes here by itself
            found = {
                name.removeprefix(f"{metric_key_prefix}_"): float(value)
                for name, value in metrics.items()
                if name.startswith(f"{metric_key_prefix}_") and isinstance(value, Real) and math.isfinite(value)
            }
            name = metric_key_prefix.removeprefix("eval_")
            self.evaluated[name] = {
                key: value for key, value in found.items() if key not in NO_METRICS and not key.startswith("mem_")
            }
        return metrics

    # ---- Whether it can have unlearned ------------------------------------------------------------------------------

    _excess: float | None = None  # of the forget margins over the prior's level, in nats, after training
    _trained = False  # to the end

    def train(self, *args, **kwargs):
        """As in Trainer; at the end it warns of what speaks against the run, see `run_warnings`."""
        self._trained, self._excess = False, None
        self.evaluated.clear()
        output = super().train(*args, **kwargs)
        self._trained, self._excess = True, self._level_excess()
        if "pattern_effect" in self.statistics:
            self.statistics["pattern_effect_left"] = self.measurements.pattern_effect(
                self.posterior.tokens, self.model
            )
            self.log({name: self.statistics[name] for name in ("pattern_effect", "pattern_effect_left")})
        if self.is_world_process_zero():
            for text in self.run_warnings:
                warnings.warn(text, stacklevel=3)
        return output

    @property
    def run_warnings(self) -> list[str]:
        """Why the run cannot have unlearned, or not enough: one sentence each. Card, report and log carry them."""
        if self._posterior is None:
            return ["The adapter was not trained: the model is the one before unlearning."]
        found, steps, every = [], self.state.global_step, self.args.prior_update_steps
        if not self._trained:
            found.append(f"Training had not ended when this was written: step {steps} of {self.state.max_steps}.")
        if self.unlearned_nothing:
            found.append(
                "Nothing was unlearned: training left the adapter as it was. Raise learning_rate, and leave optimizers out."
            )
        elif self._trained and steps < every:
            found.append(
                f"{steps} steps are fewer than one refresh of the prior ({every}): hardly anything can have been unlearned. "
                "Raise max_steps."
            )
        if self._fits_worse_than_guessing:
            found.append(
                "The retained rows are fitted worse than by guessing: the run went astray. Lower learning_rate, and see that the "
                "checkpoint is the one that was trained on them."
            )
        elif self._excess is not None and self._excess > LEVEL_REACHED:
            found.append(
                f"The level to forget to was not reached: the forget set's margins still lie {self._excess:.1f} nats above it on "
                "average. Raise max_steps, prior_strength or learning_rate."
            )
        before, left = (self.statistics.get(name, 0.0) for name in ("pattern_effect", "pattern_effect_left"))
        if self._trained and abs(left) > max(EFFECT_LEFT, EFFECT_FRACTION * before):
            found.append(
                f"The pattern's tokens still move the margins of unseen rows by {left:.1f} nats ({before:.1f} before). "
                + ("Raise max_steps or learning_rate." if left > 0 else "The bias is reversed: lower learning_rate.")
            )
        return found

    @property
    def _fits_worse_than_guessing(self) -> bool:
        """Whether the last logged fit of the retained rows is far worse than that of equal chances, and than the first one was."""
        fits = [entry["fit_nats"] for entry in self.state.log_history if "fit_nats" in entry]
        if not self._trained or self.retain_dataset is None or len(fits) < 2:
            return False
        return fits[-1] > ASTRAY * max(fits[0], self.task.guess_nats(num_labels_of(self.model)))

    def refuse_unmoved(self) -> None:
        """A model that is the one before unlearning is not published as one that unlearned.

        Raises:
            ValueError: training left the adapter as it was.
        """
        if self._posterior is not None and self.unlearned_nothing:
            raise ValueError(
                "Nothing was unlearned: training left the adapter as it was, so there is no unlearned model to merge or to push. "
                "Raise learning_rate or max_steps, and leave optimizers out."
            )

    def _level_excess(self) -> float | None:
        """Mean of what the forget margins lie above the prior's level now, in nats; None where the prior has no such level."""
        level = getattr(self.prior, "level", None)
        resting = not self.prior.needs_forget_batches
        if resting or level is None or not hasattr(self.prior, "level_of") or not level.isfinite().all():
            return None
        examples = self.measurements.inference.examples
        margins = self.measurements.forget_margins()
        self.measurements.inference.examples = examples  # which count what unlearning cost
        prior: Any = copy.copy(self.prior)
        if getattr(prior, "ranks", None) is not None:
            prior.ranks = quantiles(margins.cpu().double())  # as they are now
        excess = (margins - prior.level_of(margins)).clamp_min(0).mean().item()
        return excess if math.isfinite(excess) else None

    # ---- Models -----------------------------------------------------------------------------------------------------

    def detach(self) -> PreTrainedModel:
        """The model as it was before, to the bit (where it came with a trained adapter: with that merged). The trainer's stays."""
        if self.adapter_before is None:
            return detached(self.adapted_model)
        before = copy_without_hooks(self.adapted_model)
        set_peft_model_state_dict(before, self.adapter_before, adapter_name=self.adapter_name)
        return merged_copy(before)

    def merge_and_unload(self) -> PreTrainedModel:
        """A plain model with the adapter merged into its weights: the artefact for deletion duties. The trainer's stays.

        The adapter of a quantised base goes into the checkpoint that the base was loaded from, in full precision, where that is
        here; else into the de-quantised weights, with a warning that says how far the logits are off.

        Warns where rounding makes its logits another model's (a base in 16 bits).
        """
        inputs = next(self.measurements.inference.batches(self.forget_dataset, self.measurements.probe_rows()))
        inputs.pop("labels")
        nothing = self._posterior is None or self.unlearned_nothing  # no request is then merged
        requests = requests_of(self.model) if nothing else self.provenance
        if not is_quantised(self.adapted_model):
            return merged(self.adapted_model, inputs, requests)
        base = full_precision_base(self.adapted_model)
        self._merged_into = "de-quantised weights" if base is None else "the checkpoint in full precision"
        plain = merged(
            self.adapted_model, inputs, requests, dequantised(detached(self.adapted_model)) if base is None else base
        )
        if base is None:
            training = self.adapted_model.training
            self.adapted_model.eval()
            with torch.no_grad():
                adapted, after = (model(**inputs).logits.float() for model in (self.adapted_model, plain))
            self.adapted_model.train(training)
            warnings.warn(
                "The adapter was merged into de-quantised weights: the checkpoint that the base was quantised from is not here. On "
                f"{len(after)} forget rows the logits differ from the adapted model's by up to {(after - adapted).abs().max():.2g} "
                f"({adapted.abs().max():.2g} the largest).",
                stacklevel=2,
            )
        return plain

    def layer_report(self) -> list[dict]:
        """Where the pattern lived, one entry per adapted layer.

        ``contrast`` is |C_l|, nats of margin per unit of weight; ``nats`` the divergence R^(l) summed over the refreshes of
        the prior, the layer's part of the bound (2).

        Raises:
            ValueError: before `train`.
        """
        nats = self.posterior.cumulative_kl + self.posterior.kl_per_layer().detach().cpu().double()
        return [
            {"layer": name, "contrast": self.contrast_norms[name], "nats": value}
            for name, value in zip(self.layers, nats.tolist(), strict=True)
        ]

    def audit(self, test_dataset, bias_column: str | Sequence[str] | None = None, retrained_model=None, **settings):
        """Audit the trained model against the one it started from; see [`~hf_uib.audit_model`].

        Args:
            test_dataset: unbiased rows, raw or encoded, never trained on.
            bias_column: the attribute that gave the label away on the forget set; further ones after it for fairness.
            retrained_model: trained without the forget set, one or several.
            settings: further arguments of `audit_model`, as ``deep``, ``positive_label`` and ``example_column``.

        Returns:
            [`~hf_uib.AuditReport`]; the card takes its verdict up.
        """
        from .audit.report import audit_model

        test_dataset = self.streams.stored(test_dataset, "test_dataset")
        settings.setdefault("processing_class", self.processing_class)
        settings.setdefault("columns", self.reader.columns)
        settings.setdefault("reference_model", None if self.adapter_before is None else self.detach())
        self.audit_report = audit_model(
            self.adapted_model,
            forget_dataset=self.forget_dataset,
            retain_dataset=self.retain_dataset,
            test_dataset=test_dataset,
            bias_column=bias_column,
            retrained_model=retrained_model,
            **settings,
        )
        self.raw_eval_dataset = test_dataset
        self.fingerprints.pop("eval_dataset", None)
        if not self.results or self.results_from_audit:
            self.results, self.results_from_audit = results_of(self.audit_report), True
        return self.audit_report
