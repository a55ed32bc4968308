"""`UIBTrainer`: fine-tuned models unlearn under the Unlearning Information Bottleneck.

Reads like the method's page (docs/method.md): `train` measures the contrast subspace V_l and the noise, sets the
adapter to it and starts Transformers' own loop; `compute_loss` is equation (3); `_refresh_prior` is section 3.
"""

import copy
import datetime
import json
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from datasets import IterableDataset
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import PushInProgress

from . import __version__, contrast
from .channel_kl import channel_kl, displacement, outside
from .checkpointing import atomic_directory
from .config import UIBConfig
from .data.checks import check_inputs, check_sets, removed_classes
from .data.pairing import PairedDataset, PairingSampler, UIBCollator, collator_for, fetch, sample_indices
from .data.reading import encode
from .hub.card import hub_id, results_of
from .hub.mixin import HubMixin
from .lora import adapter_name as name_of_adapter
from .lora import attach_adapter, freeze_factors, freeze_running_statistics, is_fresh, lora_layers
from .models import fingerprint as base_hash
from .models import forward_columns
from .objective import margin, other_classes_kl, rank_z
from .posterior import NoiseChannel
from .priors import PRIORS, CalibratedPrior, InfluencePrior, NoPrior, Prior, PriorContext
from .provenance import STATE_NAME, detached, next_base, requests_of, without_origin
from .schedule import anneal

LABEL_INFORMATION_KEPT = (
    0.65  # of the nats the checkpoint's predictions tell about the forget labels, under the default noise
)
PROBE_ROWS = 128  # shared between all draws of the noise
KAPPA_MAX = 4.0  # a capacity of 0.03 nats: closed
OVER_Z = -2.0  # under it the forget set is told from unseen rows by low margins
PATTERN_Z = 2.0  # under it the contrast is chance: a randomly drawn forget set has no pattern to close a channel for
UNIT = (
    0.0375  # A starts as V_l rms(W x) / rms(V x) / UNIT: B in units of the channel, one learning rate for all layers
)
MIN_RELATIVE_SCALE = 1e-3  # of the mean input's length, of the usual unit: nothing
TINY = 1e-6  # no division by zero
FLOOR = 0.05  # eps_l, as a noise-to-signal ratio
MERGED_ERROR = 0.01  # of the largest logit


class UIBTrainer(HubMixin):
    """Trainer that makes a fine-tuned image or text classifier unlearn the forget set.

    Args:
        model: Hub id or folder, `PreTrainedModel` or `PeftModel` with a trainable LoRA adapter.
        args: [`UIBConfig`]; by default ``UIBConfig("<model>-UIB")``.
        forget_dataset: the examples to forget, with their labels.
        retain_dataset: examples to keep. Without it, the rest of the model's predictions on the forget set is kept.
        calibration_dataset: a few hundred examples the checkpoint never saw (not the test set); sets how far to forget.
            Without it a fold of the retained data is used.
        eval_dataset, processing_class, data_collator, compute_metrics, callbacks, optimizers,
            preprocess_logits_for_metrics: as in [`~transformers.Trainer`]. Raw pictures and texts are encoded with
            ``processing_class``.
        peft_config: a `LoraConfig`; by default LoRA on every linear layer.
        prior: a [`~hf_uib.priors.Prior`] of your own, instead of ``args.prior``.

    Raises:
        ValueError: a set is empty, both share rows, a label is outside the model's classes, the model has no linear layer, or
            its adapter was loaded as not trainable.
    """

    _tag_names = ["unlearning", "uib", "hf_uib"]
    _name = "UIB"
    _paper = {
        "title": "Unlearning Information Bottleneck: Machine Unlearning of Systematic Patterns and Biases",
        "id": "2405.14020",
    }
    loss_is_scaled_for_ga = False

    args: UIBConfig
    model: PeftModel
    data_collator: UIBCollator
    train_dataset: PairedDataset
    push_in_progress: PushInProgress | None

    def __init__(
        self,
        model: str | nn.Module,
        args: UIBConfig | None = None,
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
        peft_config: LoraConfig | None = None,
        prior: Prior | None = None,
    ):
        # 1. Model and settings
        if isinstance(model, str):
            model = next_base(model)
        if args is None:
            name = (getattr(model.config, "_name_or_path", "") or "model").rstrip("/").split("/")[-1]
            args = UIBConfig(f"{name}-UIB")
        _refuse_what_cannot_hold(args)
        if getattr(model.config, "problem_type", None) in ("regression", "multi_label_classification"):
            raise ValueError(
                f"UIBTrainer unlearns single-label classifiers; the model's problem_type is {model.config.problem_type}."
            )

        self.base_name = hub_id(getattr(model.config, "_name_or_path", None))

        # 2. Data
        if forget_dataset is None:
            raise ValueError("UIBTrainer needs a forget_dataset: the examples that the model shall unlearn.")
        for name, dataset in (
            ("forget", forget_dataset),
            ("retain", retain_dataset),
            ("calibration", calibration_dataset),
        ):
            if isinstance(dataset, (torch.utils.data.IterableDataset, IterableDataset)):
                raise ValueError(
                    f"{name}_dataset is a stream; its rows are sampled and paired, so give a set with a length: "
                    "datasets.Dataset.from_generator writes one to disk and reads it from there, in flat memory."
                )
        labels, self.fingerprints = check_sets(
            forget_dataset, retain_dataset, model.config.num_labels, calibration_dataset
        )
        self.removed_classes = removed_classes(labels["forget_dataset"], labels.get("retain_dataset"))
        main_input = getattr(model, "main_input_name", "input_ids")
        prepare = partial(encode, processing_class=processing_class, main_input=main_input)
        self.forget_dataset, self.calibration_dataset = prepare(forget_dataset), prepare(calibration_dataset)
        self.retain_dataset = prepare(retain_dataset)
        for name in ("forget_dataset", "retain_dataset", "calibration_dataset"):
            check_inputs(name, getattr(self, name), main_input)
        self.raw_eval_dataset = eval_dataset
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(dataset) for name, dataset in eval_dataset.items()}
        else:
            eval_dataset = prepare(eval_dataset)

        # 3. Adapter: the mean of the posterior
        model = attach_adapter(model, peft_config, args.subspace_rank)
        fresh = is_fresh(lora_layers(model), name_of_adapter(model))
        # What a checkpoint that comes with a trained adapter had learned in it
        self._learned = None if fresh else copy.deepcopy(get_peft_model_state_dict(model))
        freeze_factors(model, args.trainable_factors)
        freeze_running_statistics(model)
        if hasattr(model, "add_model_tags"):
            model.add_model_tags(self._tag_names)
        if args.gradient_checkpointing:
            model.enable_input_require_grads()

        # 4. Prior
        self.prior = prior if prior is not None else self._build_prior(args)
        self._held_out = self._hold_out(args)
        if self._held_out and isinstance(
            self.prior, CalibratedPrior
        ):  # the checkpoint has fitted the rows of its level
            self.prior.calibration_seen_in_training = self.prior.track_decrease = not self.removed_classes
        if retain_dataset is None:
            if isinstance(self.prior, (InfluencePrior, NoPrior)):
                name = args.prior if prior is None else type(prior).__name__
                raise ValueError(
                    f"prior {name} forgets through the retained data alone; give a retain_dataset, or take another prior."
                )
            warnings.warn(
                "No retain_dataset: what the model knows is kept only through its own predictions on the forget set, and the "
                "level to forget to is a guess unless calibration_dataset or forget_target is given. Expect to lose accuracy.",
                stacklevel=2,
            )

        # 5. Trainer
        retained = self.forget_dataset if self.retain_dataset is None else self.retain_dataset
        uses_forget = self.prior.uses_forget_batches and self.retain_dataset is not None
        length = max(len(retained), len(self.forget_dataset)) if uses_forget else len(retained)
        self._hub = HfApi()  # one, so that its background uploads run one after the other
        self.push_in_progress = None  # Trainer sets it on the first process alone
        super().__init__(
            model=model,
            args=args,
            data_collator=collator_for(forward_columns(model), processing_class, data_collator),
            train_dataset=PairedDataset(retained, self.forget_dataset, length),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._metrics: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self._base_fingerprint: str | None = None
        self.request = "the examples of the forget set"  # in words, for the card
        self.dataset_name: str | None = None  # of all sets, if it is on the Hub
        self.card_settings: dict = {}
        self._last_step = -1
        self.results: dict[str, dict] = {}  # rows of the card's table, by model
        self.audit_report = None
        self.layers = lora_layers(self.model)
        self.adapter_name = name_of_adapter(self.model)
        self.noise: NoiseChannel | None = None
        self.statistics: dict[str, float] = {}
        self.measured_examples = 0  # forward passes of the statistics and refreshes, in examples

    # ---- Section 3: the dynamic prior -------------------------------------------------------------------------------

    def _build_prior(self, args: UIBConfig) -> Prior:
        kind = PRIORS[args.prior]
        if not issubclass(kind, CalibratedPrior):
            return kind()
        if kind is CalibratedPrior and args.forget_target is not None and not math.isfinite(args.forget_target):
            raise ValueError(
                "forget_target is a level in nats, a finite number, for the prior calibrated; leave it out to measure it."
            )
        return kind(target=args.forget_target)

    def _hold_out(self, args: UIBConfig) -> set[int]:
        """Rows of the retained data that stand in for a calibration set while the prior acts."""
        wanted = isinstance(self.prior, CalibratedPrior) and self.prior.target is None
        if not wanted or self.calibration_dataset is not None or self.retain_dataset is None:
            return set()
        count = int(len(self.retain_dataset) * args.calibration_fraction)
        if count < 2:
            return set()
        warnings.warn(
            f"No calibration_dataset: {count} retained examples are held out for it until the prior's last step. The checkpoint "
            "has fitted them, so a systematic pattern is forgotten, but random rows hardly: for those give data it never saw.",
            stacklevel=3,
        )
        return set(sample_indices(len(self.retain_dataset), count, args.seed))

    def _measure_contrast(self) -> dict[str, Tensor]:
        """V_l by one pass over samples of both sets; also measures each layer's unit (section 2)."""
        args, seed = self.args, self.args.seed
        bases = {name: layer.get_base_layer() for name, layer in self.layers.items()}
        stats = contrast.new_statistics(bases, args.subspace_rank, seed)
        sets = [(self.forget_dataset, 1.0)]
        if self.retain_dataset is not None and args.prior_subspace == "contrast":
            sets.append((self.retain_dataset, -1.0))
        training = self.model.training
        self.model.eval()
        moments = []
        for chunk in range(contrast.CHUNKS):
            moments.append(
                contrast.accumulate(self.model, self.layers, stats, self._contrast_batches(sets, chunk)).to(
                    args.device
                )
            )
            self._sum_over_processes([moments[-1], *(layer.chunk for layer in stats.values())])
            for layer in stats.values():
                layer.take_chunk()
        self._sum_over_processes([t for layer in stats.values() for t in (layer.inputs, layer.outputs, layer.tokens)])
        passes = 1
        if contrast.begin_second_pass(stats):
            contrast.accumulate(self.model, self.layers, stats, self._contrast_batches(sets))
            self._sum_over_processes([layer.range for layer in stats.values() if layer.range is not None])
            passes = 2
        self.model.zero_grad()
        self.measured_examples += passes * sum(min(len(s), args.contrast_samples) for s, _ in sets)
        self.statistics["pattern_z"] = contrast.pattern_z(torch.stack(moments[1:]).cpu()) if len(sets) == 2 else 0.0
        if not all(
            torch.isfinite(t).all() for layer in stats.values() for t in (layer.contrast, layer.inputs, layer.outputs)
        ):
            raise ValueError(
                "The contrast of forget and retained data is not finite; check the inputs for NaN or infinite values."
            )

        generator = torch.Generator().manual_seed(seed)
        subspaces = {}
        for name, layer in stats.items():
            if args.prior_subspace == "random":
                layer.contrast, layer.range = (
                    torch.randn(layer.contrast.shape, generator=generator).to(layer.contrast),
                    None,
                )
            subspaces[name] = contrast.subspace(layer, args.subspace_rank)
        self.mean_inputs = {name: layer.mean_input().float() for name, layer in stats.items()}
        self.contrast_norm = {name: contrast.contrast_norm(layer) for name, layer in stats.items()}
        along = self._pattern_rms(subspaces)
        # What one unit of V_l x has to be multiplied with to be as large as the layer's output; where hardly anything but the mean
        # comes in there is no channel to speak of, and the mean gives the unit; where nothing comes out, the other layers' do
        units = {}
        for name, layer in stats.items():
            mean = self.mean_inputs[name].norm()
            along[name] = torch.where(along[name] > MIN_RELATIVE_SCALE * mean, along[name], mean)
            units[name] = layer.signal().float() / along[name].clamp_min(TINY)
        usual = torch.stack(list(units.values())).median()
        self.output_scale = {
            name: torch.where(unit > MIN_RELATIVE_SCALE * usual, unit, usual) for name, unit in units.items()
        }
        self.model.train(training)
        return subspaces

    def _contrast_batches(self, sets, chunk: int | None = None):
        rank, world = self.args.process_index, self.args.world_size
        for dataset, sign in sets:
            indices = sample_indices(len(dataset), self.args.contrast_samples, self.args.seed)
            members = indices if chunk is None else indices[chunk :: contrast.CHUNKS]
            for inputs in self._batches(dataset, members[rank::world], "Contrast"):
                yield inputs, sign / len(indices)

    def _sum_over_processes(self, tensors: list[Tensor]) -> None:
        if self.args.world_size > 1:
            for tensor in tensors:
                tensor.copy_(self.accelerator.reduce(tensor, "sum"))

    def _batches(self, dataset, indices: list[int], description: str | None = None):
        """Encoded batches of some rows on the training device, without shuffling."""
        loader = DataLoader(
            _Rows(dataset, indices),
            batch_size=self.args.eval_batch_size * 4,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),  # leaves the global one, and so the dropout of the run, alone
        )
        hidden = self.args.disable_tqdm or not self.is_world_process_zero() or description is None or len(loader) < 8
        for batch in tqdm(loader, desc=description, disable=hidden, leave=False):
            yield self._prepare_inputs(batch)

    @torch.no_grad()
    def _pattern_rms(self, subspaces: dict[str, Tensor]) -> dict[str, Tensor]:
        """rms of |V_l x| over a part of the forget sample, by layer."""
        sums = {name: torch.zeros(2, device=self.args.device, dtype=torch.float64) for name in subspaces}

        def hook_of(name):
            def hook(module, inputs):
                z = F.linear(contrast.input_rows(module, inputs[0]).float(), subspaces[name])
                sums[name] += torch.stack([z.square().sum(), z.new_tensor(float(len(z)))])

            return hook

        handles = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in self.layers.items()]
        self._forward_all(self.forget_dataset, self._probe_indices())
        for handle in handles:
            handle.remove()
        sums = {name: self.accelerator.reduce(value, "sum") for name, value in sums.items()}
        return {name: (value[0] / value[1]).sqrt().float() for name, value in sums.items()}

    def _probe_indices(self) -> list[int]:
        return sample_indices(len(self.forget_dataset), min(256, self.args.contrast_samples), self.args.seed + 1)

    @torch.no_grad()
    def _forward_all(self, dataset, indices: list[int], description: str | None = None) -> tuple[Tensor, Tensor]:
        """Logits and labels of some rows, in eval mode, shared between the processes."""
        model = self.model
        training = model.training
        model.eval()
        logits, labels = [], []
        mine = indices[self.args.process_index :: self.args.world_size]
        for inputs in self._batches(dataset, mine, description):
            labels.append(inputs.pop("labels"))
            with self.compute_loss_context_manager():
                logits.append(model(**inputs).logits.float())
        self.measured_examples += len(indices)
        model.train(training)
        pair = (torch.cat(logits), torch.cat(labels))
        if self.args.world_size > 1:
            pair = self.accelerator.gather(self.accelerator.pad_across_processes(pair, dim=0, pad_index=-1))
            pair = (pair[0][pair[1] >= 0], pair[1][pair[1] >= 0])
        return pair

    def _margins(self, dataset, indices: list[int]) -> Tensor:
        return margin(*self._forward_all(dataset, indices))

    def _noise_to_signal(self) -> float:
        """kappa from the data: the noise under which the checkpoint still tells most of what it knows about the forget labels.

        What it tells is bounded by ``H(Y) - CE``, in nats (the fit term of the objective). A few forward passes and a
        bisection; no retained label is used.
        """
        if self.args.posterior == "map":
            return 0.0
        if self.args.noise_to_signal is not None:
            return self.args.noise_to_signal
        if self.removed_classes or self.statistics["pattern_z"] < PATTERN_Z:
            return 0.0
        indices = self._probe_indices()[:PROBE_ROWS]

        def told(kappa: float) -> float:
            self.noise.draw(kappa, self.args.seed, -1, self.args.device)
            logits, labels = self._forward_all(self.forget_dataset, indices)
            shares = labels.bincount() / len(labels)
            return (torch.special.entr(shares).sum() - F.cross_entropy(logits, labels)).item()

        low, high = 0.0, KAPPA_MAX
        with self.noise.in_eval_mode():
            enough = LABEL_INFORMATION_KEPT * told(0.0)
            if enough <= 0:
                return 0.0
            for _ in range(7):
                middle = (low + high) / 2
                low, high = (middle, high) if told(middle) >= enough else (low, middle)
        return low

    def _install(self, subspaces: dict[str, Tensor], shared: bool) -> None:
        """Put the channel along V_l into the model; ``shared`` says that A is V_l but for a factor."""
        if self.noise is not None:
            self.noise.remove()
        self.subspaces, self.a_spans_subspace = subspaces, shared
        self.gains = {name: self._gain(name).item() if shared else 1.0 for name in self.layers}
        # What each layer reads of the pattern before any adapter, W V' [d_out, k]
        self.base_projected_weight = {
            name: layer.get_base_layer().weight.detach().flatten(1).float() @ subspaces[name].T
            for name, layer in self.layers.items()
        }
        units = {name: layer.scaling[self.adapter_name] * self.gains[name] for name, layer in self.layers.items()}
        projected_weight = (
            {name: read / units[name] for name, read in self.base_projected_weight.items()} if shared else None
        )
        self.noise = NoiseChannel(self.layers, subspaces, self.adapter_name, projected_weight)
        self.ranks = torch.stack([v.square().sum().round() for v in subspaces.values()])
        self.floors = torch.stack([FLOOR * self.output_scale[name] for name in self.layers])

    def _gain(self, name: str) -> Tensor:
        return self.output_scale[name] / UNIT

    def _begin(self) -> None:
        """Everything that is measured before the first step."""
        subspaces = self._measure_contrast()
        shared = False
        if is_fresh(self.layers, self.adapter_name):
            for name, layer in self.layers.items():
                factor = layer.lora_A[self.adapter_name].weight
                if factor.flatten(1).shape == subspaces[name].shape:
                    factor.data.copy_((subspaces[name] * self._gain(name)).view_as(factor))
            shared = self.args.trainable_factors == "B" and all(
                layer.lora_A[self.adapter_name].weight.flatten(1).shape == subspaces[name].shape
                for name, layer in self.layers.items()
            )
        self._install(subspaces, shared)
        self.kappa = self._noise_to_signal()
        self.prior.pattern_detected = self.kappa > 0 and not self.removed_classes
        self.gamma = self.args.prior_strength
        if self.gamma is None:
            self.gamma = self.prior.strengths[self.kappa == 0]
        self._prepare_prior()
        self.statistics |= {"noise_to_signal": self.kappa, "prior_strength": self.gamma}
        self.prior_mean: dict[str, tuple[Tensor, Tensor]] = {}
        self.cumulative_kl = torch.zeros(len(self.layers), dtype=torch.float64)

    def _prepare_prior(self) -> None:
        """What the prior measures before the first step, on the samples of the contrast."""

        def batches_of(dataset):
            indices = sample_indices(len(dataset), self.args.contrast_samples, self.args.seed)
            for inputs in self._batches(dataset, indices[self.args.process_index :: self.args.world_size]):
                self.measured_examples += len(inputs["labels"]) * self.args.world_size
                yield inputs

        retain = None if self.retain_dataset is None else partial(batches_of, self.retain_dataset)
        sizes = (len(self.forget_dataset), len(self.train_dataset.retain))
        setting = PriorContext(
            self.model, partial(batches_of, self.forget_dataset), retain, sizes, self._sum_over_processes
        )
        training = self.model.training
        self.model.eval()
        self.prior.strength = self.gamma
        self.prior.prepare(setting)
        self.model.train(training)

    def _refresh_prior(self) -> None:
        """Q_k: the mean moves to the running mean, the level and the ranks are measured again."""
        if self.prior_mean:
            self.width = self.kappa * anneal(self.state.global_step - 1, self.state.max_steps)
            self.cumulative_kl += self._kl_per_layer().detach().cpu().double()
        self._set_prior_mean({name: tuple(w.detach().clone() for w in self._factors(name)) for name in self.layers})
        if self._prior_is_on(self.state.global_step):
            sample = sample_indices(len(self.forget_dataset), self.args.contrast_samples, self.args.seed + 2)
            self.prior.refresh(partial(self._margins, self.forget_dataset, sample), self._calibration_margins)

    def _calibration_margins(self) -> Tensor | None:
        if self.calibration_dataset is not None:
            dataset = self.calibration_dataset
            indices = sample_indices(len(dataset), self.args.contrast_samples, self.args.seed)
        elif self._held_out:
            dataset, indices = self.retain_dataset, sorted(self._held_out)[: self.args.contrast_samples]
        else:
            return None
        logits, labels = self._forward_all(dataset, indices)
        if self.removed_classes:  # no unseen example of theirs tells a level, but what the others get of them does
            removed = torch.tensor(self.removed_classes, device=labels.device)
            logits = logits[~torch.isin(labels, removed)]
            margins = torch.cat([margin(logits, label.expand(len(logits))) for label in removed])
        else:
            margins = margin(logits, labels)
        self.statistics["calibration_margin"] = margins.mean().item()
        return margins

    def _prior_is_on(self, step: int) -> bool:
        until = math.ceil(self.args.prior_fraction * self.state.max_steps)
        return self.prior.uses_forget_batches and (step < until or self.prior.keep_forget_batches)

    # ---- Equation (3): the loss -------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """CE_r(theta ~ q) + beta / n_r * sum_l KL(q_l || Q_l) + gamma * evidence, in nats per retained example."""
        if "inputs" not in inputs:
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

        self._begin_step()
        n, batch = inputs["n_retain"], dict(inputs["inputs"])
        labels = batch.pop("labels")
        self.noise.positions = inputs["positions"]
        outputs = model(**batch)
        logits = outputs.logits
        if self.retain_dataset is None:
            fit = self._fit_without_retained_data(model, batch, logits, labels)
            forget_logits, forget_labels = logits, labels
        else:
            fit = F.cross_entropy(logits[:n], labels[:n])
            forget_logits, forget_labels = logits[n:], labels[n:]
        loss = fit
        nats = None
        if self.args.beta > 0:
            nats = self._kl_per_layer().sum()
            loss = loss + self.args.beta / len(self.train_dataset.retain) * nats
        if len(forget_labels) and self._prior_is_on(self.state.global_step):
            loss = loss + self.gamma * self.prior.forget_loss(forget_logits, forget_labels)
            self._record(forget_margin=margin(forget_logits.detach(), forget_labels).mean())
        self._record(fit_nats=fit)
        if nats is not None:
            self._record(kl_nats=nats)
        if self.retain_dataset is not None:
            self._record(retain_margin=margin(logits[:n].detach(), labels[:n]).mean())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs) -> Tensor:
        """Trainer's; entries of weights that the prior's masks hold fixed then lose their gradient."""
        loss = super().training_step(*args, **kwargs)
        weights = dict(self.model.named_parameters()) if self.prior.masks else {}
        for name, mask in self.prior.masks.items():
            if weights[name].grad is not None:
                weights[name].grad.mul_(mask)
        return loss

    def _begin_step(self) -> None:
        """Once per optimizer step: refresh the prior when it is due, draw the noise."""
        step = self.state.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if step % self.args.prior_update_steps == 0:
            self._refresh_prior()
        self.width = self.kappa * anneal(step, self.state.max_steps)
        if self.width > 0:
            self.noise.draw(self.width, self.args.seed, step, self.args.device)
        else:
            self.noise.silence()

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A ``[r, d_in]`` and B ``[d_out, r]`` of a layer; a convolution's kernel counts as inputs."""
        layer = self.layers[name]
        return layer.lora_A[self.adapter_name].weight.flatten(1), layer.lora_B[self.adapter_name].weight.flatten(1)

    def _reads(self, factors: dict[str, tuple[Tensor, Tensor]]) -> list[Tensor]:
        """(W + s B A) V' of every layer, ``[d_out, k]``: how the layer reads the pattern."""
        projected_weight = []
        for name, layer in self.layers.items():
            (a, b), scaling = factors[name], layer.scaling[self.adapter_name]
            moved = b if self.a_spans_subspace else b @ (a @ self.subspaces[name].T)
            projected_weight.append(
                torch.add(self.base_projected_weight[name], moved, alpha=scaling * self.gains[name])
            )
        return projected_weight

    def _set_prior_mean(self, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.prior_mean = factors
        with self._in_full_precision():
            self.prior_projected_weight = self._reads(factors)

    def _kl_per_layer(self) -> Tensor:
        """R^(l) of section 3(a), ``[layers]``, in nats."""
        factors = {name: self._factors(name) for name in self.layers}
        width = self.width / self.args.subspace_rank**0.5
        with self._in_full_precision():
            nats = channel_kl(self._reads(factors), self.prior_projected_weight, self.ranks, width, self.floors)
            if self.a_spans_subspace:  # A is V_l but for a factor: nothing moves outside
                return nats
            beyond = [
                outside(
                    *displacement(*factors[name], *self.prior_mean[name], layer.scaling[self.adapter_name]),
                    self.subspaces[name],
                )
                for name, layer in self.layers.items()
            ]
            return nats + torch.stack(beyond) / (2 * self.floors**2)

    def _in_full_precision(self):
        return torch.autocast(self.args.device.type, enabled=False)

    def _fit_without_retained_data(self, model, batch, logits, labels) -> Tensor:
        adapted = self.accelerator.unwrap_model(model)
        adapted.eval()
        with torch.no_grad(), adapted.disable_adapter():
            reference = adapted(**batch).logits
        adapted.train()
        return other_classes_kl(logits, reference, labels)

    # ---- The loop ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As in Trainer. A fresh run measures the contrast and sets the adapter to it first."""
        self._last_step, self.width = -1, 0.0
        if self.is_deepspeed_enabled:  # which places the model itself, but later
            self.model.to(self.args.device)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str):
            self._take_up(resume_from_checkpoint)
        elif not resume_from_checkpoint:
            self._begin()
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self.noise is not None:
                self.noise.silence()
        self._settle()
        return output

    @property
    def compared(self) -> bool:
        """Whether forget and retained rows were compared, so that `pattern_z` is one."""
        return self.retain_dataset is not None and self.args.prior_subspace == "contrast"

    def _settle(self) -> None:
        """Randomly drawn rows that now stand out from unseen ones by *low* margins are known by that.

        The adapter then goes back on the straight way to the checkpoint, ``W + share * s B A``, until they do not: a bisection for
        the share at which the rank test of both sets' margins is zero.
        """
        drawn = self.compared and not self.removed_classes and self.statistics["pattern_z"] < PATTERN_Z
        if (
            self.calibration_dataset is None or not drawn or self.args.load_best_model_at_end
        ):  # that one was chosen as it is
            return
        sample = sample_indices(len(self.forget_dataset), self.args.contrast_samples, self.args.seed + 2)
        ends = {name: self._factors(name)[1].detach().clone() for name in self.layers}

        def z(share: float) -> float:
            for name, end in ends.items():
                self._factors(name)[1].data.copy_(share * end)
            return rank_z(self._margins(self.forget_dataset, sample), self._calibration_margins())

        over = z(1.0)
        if over >= OVER_Z:
            return
        seen = f"the forget set's margins are lower than unseen rows' (z = {over:.1f}), which gives it away as high ones do"
        if not self.a_spans_subspace or z(0.0) <= 0:  # the way did not begin at B = 0, or not above unseen rows
            z(1.0)
            warnings.warn(
                f"Over-unlearning: {seen}. Train again with a smaller prior_strength (a third, say).", stacklevel=3
            )
            return
        low, high = 0.0, 1.0
        for _ in range(6):
            middle = (low + high) / 2
            low, high = (middle, high) if z(middle) >= 0 else (low, middle)
        z(low)
        self.statistics["share_kept"] = low
        warnings.warn(
            f"Over-unlearning: {seen}. {low:.0%} of the change are kept, with which they are not told apart. A smaller "
            "prior_strength may forget them at less cost.",
            stacklevel=3,
        )

    def _get_train_sampler(self, train_dataset=None):
        paired = self.train_dataset
        args = self.args
        per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        whole = math.floor if args.dataloader_drop_last else math.ceil
        batches = max(1, whole(len(paired) / (args.train_batch_size * args.world_size)))
        steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
        with_forget = self.retain_dataset is not None

        def prior_is_on(epoch: int, position: int) -> bool:
            return with_forget and self._prior_is_on(epoch * steps_per_epoch + position // per_step)

        ratio = (args.forget_batch_size or args.per_device_train_batch_size) / args.per_device_train_batch_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return PairingSampler(
            paired, seed, ratio, self._held_out, prior_is_on, lambda: self.state.global_step // steps_per_epoch
        )

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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Adapter, statistics of prior and posterior, and the card; never the pickled arguments, which may hold a token."""
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        with atomic_directory(output_dir) as folder:
            super()._save(folder, state_dict)
            for name in (TRAINING_ARGS_NAME, "README.md"):  # PEFT's card: ours needs the run's figures beside it
                if os.path.isfile(os.path.join(folder, name)):
                    os.remove(os.path.join(folder, name))
            if self.noise is not None:
                tensors, metadata = self._uib_state()
                save_file(tensors, os.path.join(folder, STATE_NAME), metadata=metadata)
        self.create_model_card(folder=output_dir)

    def _uib_state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = {
            "kappa": torch.tensor(self.kappa),
            "gamma": torch.tensor(self.gamma),
            "shared": torch.tensor(self.a_spans_subspace),
            "cumulative_kl": self.cumulative_kl,
        }
        for name in self.layers:
            tensors[f"subspace.{name}"] = self.subspaces[name]
            tensors[f"output_scale.{name}"] = self.output_scale[name]
            tensors[f"contrast_norm.{name}"] = torch.tensor(self.contrast_norm[name])
            tensors[f"prior_mean_a.{name}"], tensors[f"prior_mean_b.{name}"] = self.prior_mean[name]
        tensors |= {
            f"statistics.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.statistics.items()
        }
        tensors |= {f"prior.{name}": value for name, value in self.prior.state_dict().items()}
        tensors |= {f"mask.{name}": mask for name, mask in self.prior.masks.items()}
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        described = {
            "forget": self.forget_fingerprint,
            "base": self.base_fingerprint,
            "settings": self._settings_that_matter(),
            "record": self.provenance[-1],
        }
        return tensors, {"uib": json.dumps(described)}  # one entry: safetensors writes several in any order

    def _settings_that_matter(self) -> dict:
        """What a resumed run has to share with the one it goes on with."""
        names = (
            "seed", "data_seed", "subspace_rank", "prior_subspace", "trainable_factors", "posterior", "noise_to_signal", "beta",
            "prior_strength", "prior_fraction", "prior_update_steps", "forget_target", "forget_batch_size",
            "calibration_fraction", "contrast_samples",
        )  # fmt: skip
        return {"prior": type(self.prior).__name__} | {name: getattr(self.args, name) for name in names}

    def _take_up(self, resume_from_checkpoint: str) -> None:
        """Prior and posterior where they were; Trainer (or DeepSpeed) then loads the adapter."""
        path = os.path.join(resume_from_checkpoint, STATE_NAME)
        if not os.path.isfile(path):
            raise ValueError(
                f"{resume_from_checkpoint} has no {STATE_NAME}; resume from a checkpoint that UIBTrainer wrote."
            )
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["uib"])
        for key, mine, what in (
            ("forget", self.forget_fingerprint, "forget set"),
            ("base", self.base_fingerprint, "model"),
        ):
            if metadata[key] != mine:
                raise ValueError(
                    f"{resume_from_checkpoint} belongs to another {what}; resume with the one it was started with."
                )
        settings = self._settings_that_matter()
        for name, was in metadata["settings"].items():
            if settings[name] != was:
                raise ValueError(
                    f"{resume_from_checkpoint} was made with {name} {was}, not {settings[name]}; resume with the settings it was "
                    "started with."
                )
        # Cloned: a mapped file's tensors lie where its header ends, and vector units round by where they lie
        state = {name: value.clone().to(self.args.device) for name, value in load_file(path).items()}

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        self.kappa, self.gamma, shared = state["kappa"].item(), state["gamma"].item(), bool(state["shared"])
        self.output_scale = part("output_scale.")
        self.contrast_norm = {name: value.item() for name, value in part("contrast_norm.").items()}
        self.cumulative_kl = state["cumulative_kl"].cpu()
        self.statistics = {name: value.item() for name, value in part("statistics.").items()}
        self.prior.load_state_dict(part("prior."))
        self.prior.masks = {name: mask.bool() for name, mask in part("mask.").items()}
        self.prior.strength = self.gamma
        subspaces = part("subspace.")
        self._install({name: subspaces[name] for name in self.layers}, shared)
        means_a, means_b = part("prior_mean_a."), part("prior_mean_b.")
        self._set_prior_mean({name: (means_a[name], means_b[name]) for name in self.layers})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        freeze_factors(self.model, self.args.trainable_factors)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        freeze_factors(self.model, self.args.trainable_factors)

    @property
    def forget_fingerprint(self) -> str:
        """Hash of the forget set's rows."""
        return self.fingerprints["forget_dataset"]

    @property
    def base_fingerprint(self) -> str:
        """Hash of the weights below the adapter."""
        if self._base_fingerprint is None:
            self._base_fingerprint = base_hash(self.model)
        return self._base_fingerprint

    # ---- Results ----------------------------------------------------------------------------------------------------

    @property
    def provenance(self) -> list[dict]:
        """Every unlearning request of the model, this run's last; kept in ``config.unlearning`` when merged, and in the card."""
        record = {
            "request": self.request,
            "method": "uib",
            "forget_examples": len(self.forget_dataset),
            "forget_fingerprint": self.forget_fingerprint,
            "base_fingerprint": self.base_fingerprint,
            "adapter_fingerprint": base_hash(self.accelerator.unwrap_model(self.model), of_the_adapter=True),
            "adapter_name": self.adapter_name,
            "from_zero": self._learned is None,
            "date": datetime.date.today().isoformat(),
            "hf_uib": __version__,
        }
        return [*requests_of(self.model), record]

    def detach(self) -> PreTrainedModel:
        """The model as it was before, to the bit (where it came with a trained adapter: with that merged). The trainer's stays."""
        adapted = self.accelerator.unwrap_model(self.model)
        if self._learned is None:
            return detached(adapted)
        before = copy.deepcopy(adapted)
        set_peft_model_state_dict(before, self._learned, adapter_name=self.adapter_name)
        return before.merge_and_unload()

    def merge_and_unload(self) -> PreTrainedModel:
        """A plain model with the adapter merged into its weights: the artefact for deletion duties. The trainer's stays.

        Warns where rounding makes its logits another model's (a base in 16 bits).
        """
        adapted = self.accelerator.unwrap_model(self.model)
        merged = copy.deepcopy(adapted).merge_and_unload()
        inputs = next(self._batches(self.forget_dataset, self._probe_indices()[:32]))
        inputs.pop("labels")
        with torch.no_grad():
            before, after = (model.eval()(**inputs).logits.float() for model in (adapted, merged))
        if (before - after).abs().max() > MERGED_ERROR * before.abs().max():
            warnings.warn(
                f"The merged model's logits differ from the adapted model's by up to {(before - after).abs().max():.2g}: the base "
                "weights are too coarse for the adapter. Load the base with dtype=torch.float32 before merging.",
                stacklevel=2,
            )
        return without_origin(merged, self.provenance if self.noise is not None else requests_of(merged))

    def layer_report(self) -> list[dict]:
        """Where the pattern lived, one entry per adapted layer.

        ``contrast`` is |C_l|, nats of margin per unit of weight; ``nats`` the divergence R^(l) summed over the refreshes of
        the prior, the layer's share of the bound (2).
        """
        nats = self.cumulative_kl.clone()
        if self.prior_mean:
            nats += self._kl_per_layer().detach().cpu().double()
        return [
            {"layer": name, "contrast": self.contrast_norm[name], "nats": value}
            for name, value in zip(self.layers, nats.tolist(), strict=True)
        ]

    def audit(self, test_dataset, bias_column: str | None = None, retrained_model=None, **settings):
        """Audit the trained model against the one it started from; see [`~hf_uib.audit_model`].

        Args:
            test_dataset: unbiased rows, raw or encoded, never trained on.
            bias_column: the attribute that gave the label away on the forget set.
            retrained_model: the oracle, or several.
            settings: further arguments of `audit_model`, as ``deep`` and ``example_column``.

        Returns:
            [`~hf_uib.AuditReport`]; the card takes its verdict up.
        """
        from .audit.report import audit_model

        settings.setdefault("processing_class", self.processing_class)
        settings.setdefault("reference_model", None if self._learned is None else self.detach())
        self.audit_report = audit_model(
            self.accelerator.unwrap_model(self.model),
            forget_dataset=self.forget_dataset,
            retain_dataset=self.retain_dataset,
            test_dataset=test_dataset,
            bias_column=bias_column,
            retrained_model=retrained_model,
            **settings,
        )
        self.raw_eval_dataset = test_dataset
        self.fingerprints.pop("eval_dataset", None)
        self.results = self.results or results_of(self.audit_report)
        return self.audit_report

    def floating_point_ops(self, inputs) -> int:
        """Not counted: a paired batch has no single main input."""
        return 0

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = sorted(self.data_collator.columns)


def _refuse_what_cannot_hold(args: UIBConfig) -> None:
    """Strategies under which a layer's weights are not whole on every process, or hooks do not fire."""
    if args.n_gpu > 1:
        raise ValueError("UIBTrainer does not run under DataParallel; start it with `accelerate launch` instead.")
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError(
            "UIBTrainer does not run under FSDP: prior and posterior need each layer's weight whole. Use data parallel training "
            "(`hf-uib unlearn --accelerate_config ddp`) or DeepSpeed ZeRO-2 (`zero2`)."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "UIBTrainer does not run with auto_find_batch_size: a second try would go on from weights the first one moved. Set "
            "per_device_train_batch_size (with gradient_accumulation_steps the trajectory is that of the larger batch)."
        )
    if args.accelerator_config.split_batches:
        raise ValueError(
            "UIBTrainer does not run with split_batches: set per_device_train_batch_size to a process's share instead."
        )
    if args.label_smoothing_factor:
        raise ValueError(
            "UIBTrainer has no label_smoothing_factor: the fit term of the bound is the cross-entropy; leave it out."
        )
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if deepspeed is not None and deepspeed.is_zero3():
        raise ValueError(
            "UIBTrainer does not run under DeepSpeed ZeRO-3: prior and posterior need each layer's weight whole. Use ZeRO-2."
        )


class _Rows(torch.utils.data.Dataset):
    def __init__(self, dataset, indices):
        self.dataset, self.indices = dataset, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return self.dataset[self.indices[i]]

    def __getitems__(self, positions):
        return fetch(self.dataset, [self.indices[i] for i in positions])
