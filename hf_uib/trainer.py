"""`UIBTrainer`: fine-tuned models unlearn under the Unlearning Information Bottleneck.

Reads like the method's page (docs/method.md): `run_statistics_pass` measures the contrast and builds the posterior (section 2),
`compute_loss` is equation (3), `refresh_prior` is section 3. What is computed is in `objective`, `divergence`, `contrast`,
`posterior` and `priors`.
"""

import copy
import inspect
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import align_special_tokens, get_last_checkpoint
from transformers.training_args import ParallelMode

from .callbacks import NoiseDraw, OverUnlearningCorrection, PriorRefresh
from .config import UIBConfig, refuse_unsupported, with_default_steps
from .data.columns import Columns
from .data.pairing import PairedDataset, PairingSampler, UIBCollator, UnlearningBatch
from .data.sets import UnlearningSets
from .data.streams import StreamFolder
from .hub.card import hub_id
from .hub.mixin import HubMixin
from .inference import SharedInference, collator_of, reader_of
from .lora import (
    adapter_name,
    attach_adapter,
    check_optimizers,
    freeze_factors,
    freeze_running_statistics,
    is_fresh,
    let_gradients_in,
    lora_layers,
    require_one_device,
)
from .measurements import Measurements
from .models import blocks_of, fingerprint, is_adapters, name_of
from .pattern_tokens import PatternTokens
from .posterior import ChannelPosterior
from .priors import Prior, PriorContext, build_prior
from .provenance import next_base
from .quantised import is_quantised
from .results import ResultsMixin
from .schedule import prior_acts, sample_size
from .sharding import average_gradients, fsdp_plugin, is_sharded, shard
from .short_texts import EVERY, STEPS
from .state import SHARED_SETTINGS, UIBState
from .unlearning_task import SingleLabel, task_of


class UIBTrainer(ResultsMixin, HubMixin):
    """Trainer that makes a fine-tuned classifier (images, videos, texts, sounds, tokens) unlearn the forget set.

    Args:
        model: Hub id or folder, `PreTrainedModel` or `PeftModel` with a trainable LoRA adapter.
        args: [`UIBConfig`]; by default ``UIBConfig("<model>-UIB")``. What was changed in plain `TrainingArguments` is taken over.
        forget_dataset: the examples to forget, with their labels.
        retain_dataset: examples to keep. Without it, the rest of the model's predictions on the forget set is kept.
        calibration_dataset: a few hundred examples the checkpoint never saw (not the test set); sets how far to forget.
            Without it a fold of the retained data is used.
        eval_dataset, processing_class, data_collator, compute_metrics, callbacks, optimizers,
            preprocess_logits_for_metrics: as in [`~transformers.Trainer`]. Raw pictures and texts are encoded with
            ``processing_class``. Streams (`IterableDataset`) are written to disk first.
        peft_config: a `LoraConfig`; by default LoRA on every linear layer. ``"serving"``: LoRA on the linear layers of the blocks
            and the whole head, which vLLM and other servers of adapters load ([`serving_peft_config`]).
        prior: a [`~hf_uib.priors.Prior`] of your own, instead of ``args.prior``.
        columns: [`~hf_uib.data.columns.Columns`]: names of text, picture, label and bias columns that are not the usual ones.

    Raises:
        ValueError: a set is empty, both share rows, a label is outside the model's classes, the model has no linear layer, or
            its adapter was loaded as not trainable, or the model is not whole on one device.
    """

    _tag_names: ClassVar = ["unlearning", "uib", "hf_uib"]
    _paper: ClassVar = {
        "title": "Unlearning Information Bottleneck: Machine Unlearning of Systematic Patterns and Biases",
        "id": "2405.14020",
    }
    loss_is_scaled_for_ga = False

    args: UIBConfig
    model: PeftModel
    data_collator: UIBCollator
    train_dataset: PairedDataset

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        forget_dataset=None,
        retain_dataset=None,
        calibration_dataset=None,
        eval_dataset=None,
        processing_class=None,
        data_collator: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: LoraConfig | Literal["serving"] | None = None,
        prior: Prior | None = None,
        columns: Columns = Columns(),  # noqa: B008
    ):
        # 1. Model and settings
        model = name_of(model)
        by_name: bool = isinstance(model, str)
        if by_name:
            model = next_base(model)
        if args is None:
            name = (getattr(model.config, "_name_or_path", "") or "model").rstrip("/").split("/")[-1]
            args = UIBConfig(f"{name}-UIB")
        elif not isinstance(args, UIBConfig):
            args = UIBConfig.from_training_arguments(args)
        refuse_unsupported(args)
        require_one_device(model)
        if fsdp_plugin(args) is not None and is_quantised(model):
            raise ValueError(
                "The base is quantised, and FSDP would take its codes apart: leave FSDP out (`--accelerate_config ddp`), or load "
                "the base unquantised."
            )
        self.task = task_of(model)
        self.base_name = hub_id(getattr(model.config, "_name_or_path", None))
        if by_name and not isinstance(model, PeftModel) and model.config._name_or_path:
            self._base_is_named = True

        # 2. Data
        reader = reader_of(model, processing_class, columns)
        with StreamFolder() as streams:
            eval_dataset = streams.stored(eval_dataset, "eval_dataset")
            sets = UnlearningSets.prepare(
                forget_dataset,
                retain_dataset,
                calibration_dataset,
                eval_dataset,
                read=reader,
                check_labels=partial(self.task.check_labels, model=model),
                streams=streams,
            )
        self.streams = streams  # on disk as long as the trainer is there
        self.sets, self.fingerprints, self.raw_eval_dataset = sets, sets.fingerprints, eval_dataset
        self.reader = sets.reader
        self.forget_dataset, self.retain_dataset = sets.forget, sets.retain
        self.calibration_dataset = sets.calibration

        # 3. Adapter: the mean of the posterior
        model = attach_adapter(model, peft_config, args.subspace_rank, args.seed)
        self.layers, self.adapter_name = lora_layers(model), adapter_name(model)
        # What a checkpoint that comes with a trained adapter had learned in it
        self.adapter_before = None
        if not is_fresh(self.layers, self.adapter_name):
            self.adapter_before = copy.deepcopy(get_peft_model_state_dict(model, adapter_name=self.adapter_name))
        freeze_factors(model, args.trainable_factors or "both")
        freeze_running_statistics(model)
        if hasattr(model, "add_model_tags"):
            model.add_model_tags(self._tag_names)
        if args.gradient_checkpointing:
            if not getattr(model.get_base_model(), "supports_gradient_checkpointing", True):
                raise ValueError(
                    f"{type(model.get_base_model()).__name__} has no gradient checkpointing; leave gradient_checkpointing out."
                )
            let_gradients_in(model)
        check_optimizers(model, *optimizers)
        self._makes_optimizer = optimizers[0] is None

        # 4. Prior and posterior
        self.prior = build_prior(prior, args, retained=sets.retain is not None)
        self.untouched_prior, self.prior_identity = copy.deepcopy(self.prior), self.prior.identity()
        wanted = self.prior.needs_calibration_margins and sets.calibration is None
        self.held_out = sets.hold_out(args.calibration_fraction, args.seed) if wanted else set()
        self.contrast_norms: dict[str, float] = {}  # |C_l| by layer
        self._posterior: ChannelPosterior | None = None

        # 5. Trainer
        retained = self.forget_dataset if self.retain_dataset is None else self.retain_dataset
        needs_forget = self.prior.needs_forget_batches and self.retain_dataset is not None
        length = max(len(retained), len(self.forget_dataset)) if needs_forget else len(retained)
        args = with_default_steps(args, length)
        self._hub = HfApi()  # one, so that its background uploads run one after the other
        self.push_in_progress = None  # Trainer sets it on the first process alone
        super().__init__(
            model=model,
            args=args,
            data_collator=collator_of(model, processing_class, data_collator),
            train_dataset=PairedDataset(retained, self.forget_dataset, length),
            eval_dataset=sets.evaluation,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=[PriorRefresh(self), NoiseDraw(self), OverUnlearningCorrection(self), *(callbacks or [])],
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        plugin = fsdp_plugin(args)
        if plugin is not None and args.parallel_mode == ParallelMode.DISTRIBUTED:
            self._shard_base(plugin)
        # DeiT with its teacher takes none: Trainer then looks for none, and the loss is ours
        takes = "labels" in inspect.signature(self.model.get_base_model().forward).parameters
        self._takes_labels = takes and isinstance(self.task, SingleLabel)
        self.label_names = self.label_names or ["labels"]
        # Gradients of the statistics pass are in float32: under bf16 and fp16 its rows take twice a step's memory
        at_once = args.train_batch_size // (2 if args.bf16 or args.fp16 else 1)
        self.inference = SharedInference(
            self.model,
            self.data_collator,
            self._prepare_inputs,
            self.accelerator,
            max(1, min(args.eval_batch_size * 4, at_once)),
            args.dataloader_num_workers,
            self.compute_loss_context_manager,
            bool(args.disable_tqdm),
        )
        per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        rows = args.max_steps * per_step if args.max_steps > 0 else math.ceil(args.num_train_epochs * length)
        samples = sample_size(args.contrast_samples, rows)
        self.measurements = Measurements(sets, self.held_out, self.task, self.inference, args, samples)

        # 6. Logs, results and what the card says
        self._metrics: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self._rows_of_step: Tensor | None = None  # retained ones, of all processes
        self.request = "the examples of the forget set"  # in words, for the card
        self.dataset_name: str | None = None  # of all sets, if it is on the Hub
        self.card_settings: dict = {}
        self.results: dict[str, dict] = {}  # rows of the card's table, by model
        self.results_from_audit = False
        self.audit_report = None

    def _shard_base(self, plugin: FullyShardedDataParallelPlugin) -> None:
        """FSDP: each process keeps its part of the base. What reads all of it on one process alone comes before."""
        self._base_fingerprint = fingerprint(self.model)
        self.check_base_name()
        adapter = {weight for name, weight in self.model.named_parameters() if is_adapters(name)}
        shard(self.model, blocks_of(self.model).values(), adapter, self.accelerator, plugin)
        self.is_fsdp_enabled = (
            False  # Trainer then saves and loads the adapter and its optimizer, which are whole, as ever
        )

    # ---- Before the first step --------------------------------------------------------------------------------------

    def run_statistics_pass(self) -> None:
        """Everything that is measured before the first step: V_l, the scales, the noise, and what the prior asks for.

        Starts afresh: nothing of an earlier run stays but the adapter.
        """
        args = self.args
        if self._posterior is not None:
            self._posterior.remove()
            self.prior = copy.deepcopy(self.untouched_prior)
        self._posterior = None
        self.measurements.statistics, self.results, self.audit_report = {}, {}, None
        self.set_trainable()
        tokens = PatternTokens(self.adapted_model)
        contrast = self.measurements.contrast(self.model, self.layers, tokens)
        self.contrast_norms = contrast.norms
        self._set_channels(tokens)
        posterior = self._posterior = ChannelPosterior.from_contrast(
            self.layers, self.adapter_name, contrast, self._factors() == "both", args.channel, args.seed, tokens
        )
        self._read_short_texts()
        self.set_trainable()
        posterior.noise_to_signal.fill_(self.statistics["noise_to_signal"])
        posterior.swap_fraction.fill_(self.statistics["swap_fraction"])
        usual = self.prior.default_strength(bool(self._closed_channels))
        self.statistics["prior_strength"] = usual if args.prior_strength is None else args.prior_strength
        context = self._prior_context()
        self.prior.attach(context)
        training = self.model.training
        self.model.eval()
        self.prior.prepare(context)
        self.model.train(training)
        posterior.set_prior_mean()

    def _set_channels(self, tokens: PatternTokens) -> None:
        """Noise and share of swapped rows: none where no pattern is found, nor where whole classes go. Where tokens alone tell of
        one that goes with one label, swapping them is enough: noise would close what the margins' gradients do not tell from
        chance. What mean tokens tell of is in no token that could be swapped, so there noise is drawn."""
        args, kappa = self.args, self.args.noise_to_signal
        if tokens.tokens_per_row > 0:
            self.statistics["pattern_effect"] = self.measurements.pattern_effect(tokens, self.model)
        swap = args.swap_fraction if self.measurements.tokens_found else 0.0
        if not self.measurements.pattern_found:
            self.measurements.compare_means(tokens, self.model)
        alone = swap and self.sets.one_label and not self.measurements.contrast_found
        if kappa is None and self._pattern_to_unlearn and not alone:
            kappa = args.channel.noise_to_signal * self.task.noise_share
        if args.posterior == "map":
            kappa = swap = 0.0
        self.statistics.update(noise_to_signal=kappa or 0.0, swap_fraction=swap, pattern_tokens=tokens.tokens_per_row)

    @property
    def _pattern_to_unlearn(self) -> bool:
        """Whether the forget set differs from the retained one by more than chance, and no whole classes go."""
        return not self.sets.removed_classes and self.measurements.pattern_found

    def _read_short_texts(self) -> None:
        """Where tokens of the pattern are swapped and each row has labels of its own."""
        texts = self.posterior.short_texts
        if texts is None or not self.task.compares_rows or self.statistics.get("swap_fraction", 0) == 0:
            return
        # BigBird gives that up for good at the first short text
        if getattr(self.model.config, "attention_type", None) == "block_sparse":
            return
        left = getattr(self.processing_class, "padding_side", "right") == "left"
        with self._as_checkpoint():
            self.measurements.read_short_texts(texts, cast(PatternTokens, self.posterior.tokens), self.model, left)

    def _prior_context(self) -> PriorContext:
        measured, sets = self.measurements, self.sets
        return PriorContext(
            model=self.model,
            forget=partial(measured.batches, sets.forget),
            retain=None if sets.retain is None else partial(measured.batches, sets.retain),
            sizes=(len(sets.forget), len(self.train_dataset.retain)),
            reduce=self.inference.sum,
            task=self.task,
            strength=self.statistics["prior_strength"],
            pattern_detected=bool(self._closed_channels) and not sets.removed_classes,
            calibration_seen_in_training=bool(self.held_out) and not sets.removed_classes,
            one_label=sets.one_label,
        )

    # ---- Section 3: the dynamic prior -------------------------------------------------------------------------------

    def refresh_prior(self) -> None:
        """Q_k: the prior's mean moves to the running mean, and the prior measures what it needs again."""
        step = self.state.global_step
        if step > 0:
            self.posterior.move_prior()
        if self._prior_acts(step) or self.prior.watches:
            self.prior.refresh(self.measurements.forget_margins, self.measurements.calibration_margins)

    def _prior_acts(self, step: int) -> bool:
        last = self.prior.keep_forget_batches
        return self.prior.needs_forget_batches and prior_acts(
            step, self.state.max_steps, self.args.prior_fraction, last
        )

    # ---- Equation (3): the loss -------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """CE_r(theta ~ q) + beta / n_r * sum_l KL(q_l || Q_l) + gamma * forget loss, in nats per retained example."""
        if not isinstance(inputs, UnlearningBatch):  # evaluation
            labels = inputs.get("labels")
            if labels is not None and not self._takes_labels:  # DeiT with its teacher; labels that are not given
                outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
                loss = self.task.fit_loss(outputs.logits, labels)
            else:
                outputs = model(**inputs)
                loss = outputs.loss
            return (loss, outputs) if return_outputs else loss

        n, features = inputs.retained, dict(inputs.features)
        labels = features.pop("labels")
        self.posterior.set_batch(inputs.positions, n, features.get("attention_mask"))
        # First, since an adapter that the checkpoint came with is put in its place for it
        before = self._checkpoint_logits(model, features) if self.retain_dataset is None else None
        outputs = model(**features)
        logits = outputs.logits
        labels = self.task.without_replaced(labels, self.posterior.replaced)
        if self.retain_dataset is None:
            fit = self.task.fit_without_retained_data(logits, cast(Tensor, before), labels)
            forget_logits, forget_labels = logits, labels
        else:
            fit = self.task.fit_loss(logits[:n], labels[:n])
            forget_logits, forget_labels = logits[n:], labels[n:]
            self._record(retain_margin=self.task.margin(logits[:n].detach(), labels[:n]).mean())
        share = self._share_of_step(self._labels_given(labels[:n]), num_items_in_batch)
        loss = fit = fit * share
        self._record(fit_nats=fit)
        if (short := self._short_texts_loss(model, inputs.positions[:n])) is not None:
            loss = loss + self.args.channel.short_texts * STEPS * self._share_of_step(n, self._rows_of_step) * short
            self._record(short_texts=short)
        if self.args.beta > 0:
            nats = self.posterior.kl_per_layer().sum()
            loss = loss + self.args.beta / len(self.train_dataset.retain) * nats
            self._record(kl_nats=nats)
        if len(forget_labels) and self._prior_acts(self.state.global_step):
            loss = loss + self.prior.strength * self.prior.forget_loss(forget_logits, forget_labels)
            self._record(forget_margin=self.task.margin(forget_logits.detach(), forget_labels).mean())
        return (loss, outputs) if return_outputs else loss

    def _short_texts_loss(self, model, positions: Tensor) -> Tensor | None:
        """Mean over the short texts of a batch of the divergence of the model's labels from those before the first step. Neither
        noise nor dropout is drawn. None: there are no short texts."""
        made = None if self.posterior.short_texts is None else self.posterior.short_texts.of(positions)
        if made is None:
            return None
        features, wanted, counts = made
        adapted = self.accelerator.unwrap_model(model)
        adapted.eval()
        nats = self.task.divergence(adapted(**features).logits, wanted)
        adapted.train()
        return (counts * nats).sum() / (len(positions) / EVERY)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in Trainer; the step's retained rows and their labels are counted."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [self._labels_given(batch.features["labels"][: batch.retained]) for batch in batches]
        if not counts:
            return batches, None
        labels = torch.stack(counts).sum().to(device)
        rows = torch.full_like(labels, sum(batch.retained for batch in batches))
        labels, self._rows_of_step = self.accelerator.gather(torch.stack([labels, rows])[None]).sum(0)
        return batches, labels

    def _share_of_step(self, mine: Tensor | int, of_step: Tensor | None) -> Tensor | float:
        """What the mean over a batch's labels or rows is weighted with, so that a step's sum is divided by all of them on all
        processes; of tokens those that were swapped out count there too, whatever the split."""
        if of_step is None:
            return 1.0
        batches = self.args.world_size * self.current_gradient_accumulation_steps
        return mine * batches / of_step.clamp_min(1e-9)

    def _labels_given(self, labels: Tensor) -> Tensor:
        return self.task.labels_given(labels, retained=self.retain_dataset is not None)

    def _checkpoint_logits(self, model, features: dict) -> Tensor:
        adapted = self.accelerator.unwrap_model(model)
        adapted.eval()
        with torch.no_grad(), self._as_checkpoint():
            logits = adapted(**features).logits
        adapted.train()
        return logits

    @contextmanager
    def _as_checkpoint(self):
        """The model inside is the checkpoint: without the adapter, or with the one it came with as that was."""
        model = self.adapted_model
        if self.adapter_before is None:
            with model.disable_adapter():
                yield
            return
        now = copy.deepcopy(get_peft_model_state_dict(model, adapter_name=self.adapter_name))
        set_peft_model_state_dict(model, self.adapter_before, adapter_name=self.adapter_name)
        try:
            yield
        finally:
            set_peft_model_state_dict(model, now, adapter_name=self.adapter_name)

    def training_step(self, *args, **kwargs) -> Tensor:
        """Trainer's; under FSDP the gradients are then averaged. Entries that the prior's masks hold fixed lose theirs."""
        loss = super().training_step(*args, **kwargs)
        if is_sharded(self.model) and self.accelerator.sync_gradients:
            average_gradients(self.model.parameters(), self.accelerator)
        weights = dict(self.model.named_parameters()) if self.prior.masks else {}
        for name, mask in self.prior.masks.items():
            if (gradient := weights[name].grad) is not None:
                gradient.mul_(mask)
        return loss

    # ---- The loop ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As in Trainer. A fresh run measures the contrast first."""
        if self.is_deepspeed_enabled:  # which places the model itself, but later
            self.model.to(self.args.device)
        if isinstance(self.processing_class, PreTrainedTokenizerBase):  # Trainer does so too, but later
            align_special_tokens(self.model, self.processing_class)
        resume_from_checkpoint = name_of(resume_from_checkpoint)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str):
            self.load_state(resume_from_checkpoint)
        elif not resume_from_checkpoint:
            if self._makes_optimizer:  # a run before this one had its own
                self.optimizer = None
            self.run_statistics_pass()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._posterior is not None:
                self._posterior.silence()

    def set_trainable(self) -> None:
        """B alone or A and B, of the layers that gradients reach; called after whatever sets all weights of an adapter free."""
        unreached = () if self._posterior is None else self._posterior.unreached
        freeze_factors(self.model, self._factors(), unreached)

    def _factors(self) -> str:
        """Which factors are trained: as it is set, or A and B under a pattern, and B along the contrast without one."""
        return self.args.trainable_factors or ("both" if self._closed_channels or self._pattern_to_unlearn else "B")

    def get_eval_dataloader(self, eval_dataset=None):
        """As in Trainer; raw sets are encoded."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.reader(self.streams.stored(eval_dataset, "eval_dataset"), "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As in Trainer; raw sets are encoded."""
        return super().get_test_dataloader(
            self.reader(self.streams.stored(test_dataset, "test_dataset"), "test_dataset")
        )

    def _get_train_sampler(self, train_dataset=None) -> PairingSampler:
        args, paired = self.args, self.train_dataset
        per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        rounded = math.floor if args.dataloader_drop_last else math.ceil
        batches = max(1, rounded(len(paired) / (args.train_batch_size * args.world_size)))
        steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
        with_forget = self.retain_dataset is not None

        def acts(epoch: int, position: int) -> bool:
            return with_forget and self._prior_acts(epoch * steps_per_epoch + position // per_step)

        ratio = (args.forget_batch_size or args.per_device_train_batch_size) / args.per_device_train_batch_size
        seed = args.seed if args.data_seed is None else args.data_seed
        epoch_of = lambda: self.state.global_step // steps_per_epoch
        return PairingSampler(paired, seed, ratio, self.held_out, acts, epoch_of)

    def _record(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._metrics[name] = self._metrics.get(name, 0.0) + value.detach()
            self._counts[name] += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the bound, averaged since the last log."""
        if self.model.training and self._metrics:
            means = torch.stack([self._metrics[name].float() / self._counts[name] for name in self._metrics])
            means = self.accelerator.reduce(means, "mean").tolist()
            logs = {**logs, **dict(zip(self._metrics, means, strict=True))}
            if not all(math.isfinite(value) for value in means):
                raise ValueError(
                    f"The loss is not finite at step {self.state.global_step}; lower the learning rate (or leave fp16) and "
                    "resume from the last checkpoint."
                )
            if "calibration_margin" in self.statistics:
                logs["calibration_margin"] = self.statistics["calibration_margin"]
            self._metrics.clear()
            self._counts.clear()
        super().log(logs, start_time)

    # ---- Saving and resuming ----------------------------------------------------------------------------------------

    def state_to_save(self) -> UIBState | None:
        """Prior and posterior as they are now; None before the first run."""
        if self._posterior is None:
            return None
        return UIBState(
            self.posterior.state_dict(),
            self.prior.state_dict(),
            dict(self.prior.masks),
            self.statistics,
            self.contrast_norms,
            self._identity() | {"record": self.provenance[-1]},
        )

    def load_state(self, checkpoint: str) -> None:
        """Prior and posterior where a checkpoint left them; Trainer (or DeepSpeed) then loads the adapter.

        Raises:
            ValueError: the checkpoint is of another model, forget set or setting.
        """
        state = UIBState.load(checkpoint, self.args.device)
        state.check(checkpoint, self._identity())
        if self._posterior is not None:
            self._posterior.remove()
        tokens = PatternTokens(self.adapted_model)
        self._posterior = ChannelPosterior.from_state(
            self.layers, self.adapter_name, state.posterior, self.args.channel, self.args.seed, tokens
        )
        self.measurements.statistics, self.contrast_norms = state.statistics, state.contrast_norms
        self.measurements.fill(tokens, self.model)
        self._read_short_texts()
        self.prior.attach(self._prior_context())
        self.prior.masks = state.masks
        self.prior.load_state_dict(state.prior)

    def _identity(self) -> dict:
        """What a resumed run has to share with the one it goes on with."""
        settings = {"prior": type(self.prior).__name__} | {name: getattr(self.args, name) for name in SHARED_SETTINGS}
        settings |= self.prior_identity
        return {"forget": self.forget_fingerprint, "base": self.base_fingerprint, "settings": settings}

    def floating_point_ops(self, inputs) -> int:
        """Not counted: a paired batch has no single main input."""
        return 0

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = sorted(self.data_collator.columns)  # type: ignore[assignment]
