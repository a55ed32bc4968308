"""`UIBConfig`: TrainingArguments plus the settings of the bound."""

import copy
import json
import math
import warnings
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from typing import Any

from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import TrainingArguments

from .priors import prior_class
from .settings import ChannelSettings, InfluenceSettings
from .sharding import fsdp_plugin


@dataclass
class UIBConfig(TrainingArguments):
    r"""Settings of [`UIBTrainer`].

    Every field of [`~transformers.TrainingArguments`] is there too. These defaults differ from it:

    - `learning_rate` is 2e-3 and `per_device_train_batch_size` 32: adapters are trained, from zero;
    - `weight_decay` stays 0: decay is a second prior that the bound would not account for;
    - `logging_steps` is 10;
    - `remove_unused_columns` is False: the trainer drops the columns that the model does not take by itself, and keeps
      them for the audit;
    - `ddp_find_unused_parameters` is False: an adapter leaves no parameter without gradient.
    """

    learning_rate: float = field(default=2e-3, metadata={"help": "Initial learning rate of AdamW, for the adapter."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Retained examples per device and step."})
    logging_steps: float = field(default=10, metadata={"help": "Log the parts of the bound every so many steps."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Left to the trainer, which needs further columns for the audit."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Passed to DistributedDataParallel; every adapter weight gets a gradient."}
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "channel_settings", "influence_settings"]

    beta: float = field(
        default=0.01,
        metadata={
            "help": "Weight of the bound: nats of the per-layer KL are divided by the number of retained examples."
        },
    )
    prior: str = field(
        default="calibrated",
        metadata={
            "help": "The dynamic prior R^(l): `calibrated` divides what the forget set taught out, down to the level of data the "
            "checkpoint never saw; `influence` starts at the Laplace estimate of the retrained weights (UIB-IF); `ascent` "
            "(NegGrad+), `random_label` and `saliency` (SalUn) host those methods; `none` is plain variational LoRA. In "
            "Python also the name of a prior of your own (`hf_uib.register_prior`).",
        },
    )
    prior_strength: float | None = field(
        default=None,
        metadata={
            "help": "gamma: nats of loss per nat of forget loss. By default the prior's own: for `calibrated` 0.3 where "
            "the forget set is a random draw, 0.1 under a pattern, where it acts only if the forget labels turn out to be noise."
        },
    )
    prior_update_steps: int = field(
        default=20, metadata={"help": "Steps between two refreshes of the prior's mean and of the level."}
    )
    prior_fraction: float = field(
        default=0.4,
        metadata={"help": "Fraction of the steps, from the start, that see forget batches, where there are any."},
    )
    prior_subspace: str = field(
        default="contrast",
        metadata={
            "help": "Where the prior is wide: `contrast` (forget minus retain), `forget` (forget alone) or `random`.",
            "choices": ["contrast", "forget", "random"],
        },
    )
    subspace_rank: int = field(
        default=16, metadata={"help": "k: directions of the subspace per layer; also LoRA's r."}
    )
    trainable_factors: str | None = field(
        default=None,
        metadata={
            "help": "`both`: A and B are trained, from where PEFT starts them. `B`: A is frozen to the subspace, B is trained. By "
            "default `both` where the forget set carries a pattern, `B` where it is a random draw or a whole class.",
            "choices": ["B", "both"],
        },
    )
    posterior: str = field(
        default="gaussian",
        metadata={
            "help": "`gaussian`: channel noise along the subspace, annealed to zero. `map`: the mean only, and no swapped tokens.",
            "choices": ["gaussian", "map"],
        },
    )
    noise_to_signal: float | None = field(
        default=None,
        metadata={
            "help": "kappa: noise over signal in the channel along the pattern. By default 0.5 (0.25 where "
            "tokens are labelled); 0 where no pattern is found."
        },
    )
    swap_fraction: float = field(
        default=0.5,
        metadata={
            "help": "Fraction of the retained examples of a step in which the pattern's tokens are those of a forget example, "
            "whatever the label; 0 where no pattern is found."
        },
    )
    calibration_fraction: float = field(
        default=0.2,
        metadata={
            "help": "Without a calibration_dataset: fraction of the retained data held out while the prior acts."
        },
    )
    forget_target: float | None = field(
        default=None,
        metadata={
            "help": "A fixed level for the forget margins, in nats. By default it is measured. -inf, for a hosted method: no level."
        },
    )
    forget_batch_size: int | None = field(
        default=None, metadata={"help": "Forget examples per device and step. Default: per_device_train_batch_size."}
    )
    contrast_samples: int = field(
        default=512,
        metadata={
            "help": "Examples of each set in the statistics passes (subspace, scales, levels), at most; a short run takes fewer."
        },
    )
    channel_settings: dict | str | None = field(
        default=None,
        metadata={"help": "Settings of the noise channel that are rarely changed, as JSON: see `ChannelSettings`."},
    )
    influence_settings: dict | str | None = field(
        default=None,
        metadata={"help": "Settings of `prior=influence` that are rarely changed, as JSON: see `InfluenceSettings`."},
    )
    hub_artifact: str = field(
        default="adapter",
        metadata={
            "help": "What push_to_hub publishes: the `adapter`; the `merged` model, for deletion duties (nothing is pushed while "
            "training); or `both`, the merged model in a repository of its own, <hub_model_id>-merged.",
            "choices": ["adapter", "merged", "both"],
        },
    )

    def __post_init__(self):
        for name in ("channel_settings", "influence_settings"):
            given = getattr(self, name)
            if isinstance(given, (ChannelSettings, InfluenceSettings)):
                setattr(self, name, asdict(given))
            elif isinstance(given, str):
                setattr(self, name, _from_json(name, given))
        super().__post_init__()
        self.remove_unused_columns = False  # the collator leaves out what the model does not take
        for name, low, high in (
            ("beta", 0, None),
            ("prior_strength", 0, None),
            ("prior_update_steps", 1, None),
            ("prior_fraction", 0, 1),
            ("subspace_rank", 1, None),
            ("noise_to_signal", 0, None),
            ("swap_fraction", 0, 1),
            ("calibration_fraction", 0, 0.9),
            ("forget_batch_size", 1, None),
            ("per_device_train_batch_size", 1, None),
            ("gradient_accumulation_steps", 1, None),
            ("contrast_samples", 2, None),
        ):
            value = getattr(self, name)
            if value is not None and not (value >= low and (high is None or value <= high)):
                limits = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ValueError(f"{name} is {value}; it must be {limits}.")
        prior_class(self.prior)
        self.channel  # noqa: B018
        self.influence  # noqa: B018
        for name in ("prior_subspace", "trainable_factors", "posterior", "hub_artifact"):
            choices = self.__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices and getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")
        if self.hub_artifact == "merged" and self.hub_strategy in ("checkpoint", "all_checkpoints"):
            raise ValueError(
                f"hub_strategy {self.hub_strategy.value} pushes checkpoints, which are adapters; with it hub_artifact has to be "
                "adapter or both."
            )

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> "UIBConfig":
        """The settings that were changed in a `TrainingArguments`; the others have the defaults of this class."""
        changed = {}
        for setting in fields(TrainingArguments):
            default = setting.default if setting.default_factory is MISSING else setting.default_factory()
            value = getattr(args, setting.name)
            if setting.init and value != default and value != getattr(_plain_arguments(), setting.name):
                changed[setting.name] = value
        own = cls(**{"output_dir": args.output_dir} | changed)
        taken = [
            f"{name} {getattr(own, name)}"
            for name in ("learning_rate", "per_device_train_batch_size")
            if getattr(own, name) != getattr(args, name)
        ]
        if taken:
            warnings.warn(
                f"What TrainingArguments leave at their defaults is that of UIBConfig: {', '.join(taken)}. Give a UIBConfig to set "
                "it.",
                stacklevel=3,
            )
        return own

    @property
    def channel(self) -> ChannelSettings:
        """`channel_settings`, with the defaults of what is not given."""
        return _settings(ChannelSettings, "channel_settings", self.channel_settings)

    @property
    def influence(self) -> InfluenceSettings:
        """`influence_settings`, with the defaults of what is not given."""
        return _settings(InfluenceSettings, "influence_settings", self.influence_settings)


def _from_json(name: str, text: str) -> dict:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{name} is {text!r}; write it as JSON, " + '{"NAME": NUMBER}.')
    return found


@cache
def _plain_arguments() -> TrainingArguments:
    """With every default, as Transformers fills them in."""
    return TrainingArguments()


def _settings(kind: type, name: str, given: Any):
    if isinstance(given, kind):
        return given
    if not isinstance(given, (dict, type(None))):
        raise ValueError(f"{name} is {given!r}; give a dictionary, or JSON.")
    known = [f.name for f in fields(kind)]
    unknown = [key for key in given or {} if key not in known]
    if unknown:
        raise ValueError(f"{name} has no {unknown[0]!r}; it has {', '.join(known)}.")
    try:
        return kind(**(given or {}))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def refuse_unsupported(args: UIBConfig) -> None:
    """Refuse strategies under which a layer's weights are not whole on every process, or hooks do not fire.

    Raises:
        ValueError: with one line that says what to set instead.
    """
    if args.n_gpu > 1:
        raise ValueError("UIBTrainer does not run under DataParallel; start it with `accelerate launch` instead.")
    if (plugin := fsdp_plugin(args)) is not None:
        _refuse_unsupported_fsdp(plugin)
    if args.auto_find_batch_size:
        raise ValueError(
            "UIBTrainer does not run with auto_find_batch_size: a second try would go on from weights the first one moved. Set "
            "per_device_train_batch_size (with gradient_accumulation_steps the trajectory is that of the larger batch)."
        )
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"UIBTrainer does not run with train_sampling_strategy '{args.train_sampling_strategy}': retained and forget rows are "
            "paired at random; leave it out."
        )
    if getattr(args.accelerator_config, "split_batches", False):
        raise ValueError(
            "UIBTrainer does not run with split_batches: set per_device_train_batch_size to a process's share instead."
        )
    for half in ("bf16", "fp16"):
        if getattr(args, f"{half}_full_eval"):
            raise ValueError(
                f"UIBTrainer does not run with {half}_full_eval, which turns base and adapter to {half} for good; set {half}=True."
            )
    if args.label_smoothing_factor:
        raise ValueError(
            "UIBTrainer has no label_smoothing_factor: the fit term of the bound is the cross-entropy; leave it out."
        )
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if deepspeed is not None and deepspeed.is_zero3():
        raise ValueError(
            "UIBTrainer does not run under DeepSpeed ZeRO-3, which takes the adapter's weights apart too. Use FSDP2, which shards "
            "the base alone (`--accelerate_config fsdp2`), or ZeRO-2."
        )


def _refuse_unsupported_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    if plugin.fsdp_version != 2:
        raise ValueError(
            "UIBTrainer runs under FSDP2, not FSDP1; set fsdp_version: 2 (`hf-uib unlearn --accelerate_config fsdp2`)."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "UIBTrainer under FSDP looks at the whole base before it is sharded; set fsdp_cpu_ram_efficient_loading: false, so "
            "that every process loads it."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "UIBTrainer under FSDP keeps its part of the base on the device; leave fsdp_offload_params out."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "UIBTrainer shards the base itself; set gradient_checkpointing, not fsdp_activation_checkpointing."
        )


MIN_STEPS = 100  # of a run whose length nobody set
USUAL_EPOCHS = 3.0  # Transformers' default


def with_default_steps(args: UIBConfig, rows: int) -> UIBConfig:
    """Settings that give a run whose length nobody set at least `MIN_STEPS` steps; warns where epochs that were set make too few to
    forget. The user's own, which may serve another run, stay as they are.

    Args:
        rows: of an epoch.
    """
    per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    if args.dataloader_drop_last and rows < args.train_batch_size * args.world_size:
        raise ValueError(
            f"{rows} rows make no whole batch of {args.train_batch_size * args.world_size}, and dataloader_drop_last leaves out "
            "the rest; lower per_device_train_batch_size, or leave dataloader_drop_last out."
        )
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * math.ceil(rows / per_step))
    if args.max_steps <= 0 and args.num_train_epochs == USUAL_EPOCHS and steps < MIN_STEPS:
        args = copy.copy(args)
        args.max_steps = MIN_STEPS
        said = f"{rows} rows make {steps} steps in {USUAL_EPOCHS:.0f} epochs, too few to forget; {MIN_STEPS} steps are taken."
    elif steps < args.prior_update_steps and args.max_steps <= 0:
        said = f"{steps} steps are too few to forget anything; set max_steps to {MIN_STEPS} or more."
    else:
        return args
    warnings.warn(said, stacklevel=3)
    return args
