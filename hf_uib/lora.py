"""Which layers are adapted, and with what."""

import copy
import dataclasses
import warnings
from collections.abc import Collection
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .models import blocks_of
from .quantised import dense_weight, holds_codes, is_quantised, prepare_codes, quantisation_of
from .sharding import copy_of, whole

AdaptedLayer = Any  # PEFT's LoRA layer around a linear one: an nn.Module and a LoraLayer
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Fields of LoraConfig under which the adapted weight is W + s B A. Whatever else differs from its default is refused, so that what
# a later PEFT adds is too.
ADDITIVE_FIELDS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "modules_to_save",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "runtime_config",
}  # fmt: skip
SERVING = "serving"  # as peft_config
SERVED_HEADS = ("classifier", "score")  # heads that vLLM takes from modules_to_save
FROZEN = "frozen_before_the_adapter"  # attribute of a PeftModel: names of weights
ADDITIVE_INITS = (True, False, "gaussian", "orthogonal")  # these leave W as it is


def base_of(module: Any) -> Any:
    """The layer below an adapter, or the layer itself."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def is_linear(module: nn.Module) -> bool:
    """A linear layer (GPT-2's too), or a convolution on patches that do not overlap, as in a ViT's embedding."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == module.stride and module.groups == 1 and module.padding == (0, 0)
    return isinstance(module, (nn.Linear, Conv1D))


def weight_matrix(module: Any) -> Tensor:
    """The weight of a linear layer, or of the one below an adapter, as ``[d_out, d_in]``: a view of it, or de-quantised, or
    gathered."""
    base = base_of(module)
    return whole(base.weight).T if isinstance(base, Conv1D) else whole(dense_weight(base)).flatten(1)


def matrix_shape(module: Any) -> tuple[int, int]:
    """``(d_out, d_in)`` of `weight_matrix`."""
    base = base_of(module)
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features
    d_out, d_in = weight_matrix(base).shape
    return d_out, d_in


def require_known_weights(model: nn.Module) -> None:
    """Refuse weights that are neither floating-point numbers to compute with nor codes that can be read (`quantised`).

    Raises:
        ValueError: with the layer's name, and what to do.
    """
    method = getattr(getattr(model, "config", None), "quantization_config", None)
    quantizer = getattr(model, "hf_quantizer", None)
    kind = getattr(method, "quant_method", None) or (method.get("quant_method") if isinstance(method, dict) else None)
    kind = str(getattr(kind, "value", kind) or "quantised")
    found = None
    if (method or getattr(model, "is_quantized", False)) and not is_quantised(model):
        found = "the model"
    elif quantizer is not None and not quantizer.is_trainable:
        found, kind = "the model", f"{quantisation_of(model)}, under which Transformers trains no adapter"
    for name, module in model.named_modules():
        if found is not None or not is_linear(module) or holds_codes(module):
            continue
        weight = module._parameters.get("weight")
        if weight is not None and weight.is_meta:
            raise ValueError(
                f"{name} holds no weight yet (it is on `meta`): load the whole model, without offloading."
            )
        if type(weight) is not nn.Parameter or weight.dtype not in PLAIN:
            found, kind = name, "computed" if weight is None else f"{type(weight).__name__} of {weight.dtype}"
    if found is not None:
        raise ValueError(
            f"The weights of {found} are {kind}: load the checkpoint with bitsandbytes (4 or 8 bits), torchao (8 bits) or "
            "unquantised (say, dtype=torch.bfloat16), unlearn, merge, and quantise the merged model."
        )


def require_one_device(model: nn.Module) -> None:
    """Refuse models whose parts are on several devices or on disk (``device_map``).

    Raises:
        ValueError: with what to do.
    """
    places = getattr(model, "hf_device_map", None) or {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            where = next((f" ({at})" for part, at in places.items() if name.startswith(part)), "")
            raise ValueError(
                f"{name} holds no weight (it is on `meta`): this part of the model is offloaded{where} or was never loaded. Load "
                'the whole model on one device (device_map={"": 0}), in bfloat16 if it is too large.'
            )
    devices = sorted(set(map(str, places.values())) or {str(weight.device) for weight in model.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"The model's layers are on several devices ({', '.join(devices)}): the noise and the divergence of all layers are "
            'computed on one. Load it on one device (device_map={"": 0}), in bfloat16 if it is too large; several GPUs share the '
            "rows under `accelerate launch`."
        )


def default_peft_config(model: nn.Module, rank: int) -> LoraConfig:
    """LoRA on every linear layer, head and patch embedding included: both can unlearn, and detaching stays exact.

    The names are read off the model (architectures name their layers differently, and rename them between versions) and
    shortened to their last parts where those name linear layers only.

    Raises:
        ValueError: the model has no linear layer.
    """
    linear: dict[str, list[str]] = {}
    other = set()
    for name, module in model.named_modules():
        if is_linear(module):
            linear.setdefault(name.rpartition(".")[2], []).append(name)
        else:
            other.add(name.rpartition(".")[2])
    if not linear:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to adapt; UIB needs a model with nn.Linear layers."
        )
    targets = _short_names(linear, other)
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, lora_dropout=0.0, bias="none")


def serving_peft_config(model: nn.Module, rank: int) -> LoraConfig:
    """LoRA of one rank on every linear layer inside the blocks, and the head as a whole: what servers of adapters load.

    The head is in ``modules_to_save``: it is trained by the same loss, outside the bound and without noise, and `undo` refuses the
    adapter. Detaching brings the head from before back, to the bit.

    Raises:
        ValueError: the model has no head that servers know, or no linear layer inside its blocks.
    """
    heads = [name for name, _ in model.named_modules() if name.endswith(SERVED_HEADS)]  # as PEFT reads modules_to_save
    if len(heads) != 1 or heads[0] not in SERVED_HEADS:
        raise ValueError(
            f"{type(model).__name__} has no head that is all in one module called {' or '.join(SERVED_HEADS)}, as servers want it; "
            "leave peft_config out, and serve the merged model."
        )
    inside = {id(m) for block in blocks_of(model).values() for m in block.modules()}
    wanted: dict[str, list[str]] = {}
    other = set()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D)):
            wanted.setdefault(last, []).append(name)
        else:
            other.add(last)
    if not wanted:
        raise ValueError(
            f"{type(model).__name__} has no linear layer inside its blocks; leave peft_config out, and serve the merged model."
        )
    targets = _short_names(wanted, other)
    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules=targets, modules_to_save=heads, lora_dropout=0.0, bias="none"
    )


def _short_names(wanted: dict[str, list[str]], other: Collection[str]) -> list[str]:
    """Names of layers as ``target_modules``: their last part where no ``other`` module has it.

    Args:
        wanted: full names, by their last part.
    """
    return sorted(t for last, names in wanted.items() for t in ([last] if last not in other else names))


def attach_adapter(
    model: nn.Module, peft_config: LoraConfig | Literal["serving"] | None, rank: int, seed: int = 0
) -> PeftModel:
    """Give the model the adapter that will be trained.

    Three cases: a plain model gets a new adapter; a PeftModel with a fresh adapter (B = 0) is taken as it is, and so is one
    with a trained adapter, whose weights are then the prior's first mean. The A of a new one is drawn from ``seed``.

    Raises:
        ValueError: the weights are quantised in a way that is not known; the model has an adapter that cannot be trained, is more
            than a product or is not on linear layers inside its blocks; or ``peft_config`` was given for a PeftModel.
    """
    require_known_weights(model)
    configs = model.peft_config.values() if isinstance(model, PeftModel) else [peft_config]
    prepare_codes(model, [name for one in configs for name in getattr(one, "modules_to_save", None) or ()])
    if not isinstance(model, PeftModel) and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "The model has the layers of an adapter in it already: PEFT, and so UIBTrainer, changes the model that it is given. "
            "Load the model anew, or give the PeftModel."
        )
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError(
                "model is a PeftModel already; leave peft_config out, or give the model without its adapter."
            )
        layers = lora_layers(model)
        if not layers:
            raise ValueError(
                "The PeftModel's active adapter is not LoRA; merge it (merge_and_unload) and pass the result."
            )
        active = model.active_adapters
        if len(active) > 1:
            raise ValueError(
                f"{len(active)} adapters are active ({', '.join(active)}); merge them, or set_adapter one."
            )
        require_base_below(model)
        _only_linear(model)
        _in_the_blocks(model)
        _answer_for_layers(model)
        name = adapter_name(model)
        if not any(p.requires_grad for layer in layers.values() for p in layer.lora_B[name].parameters()):
            raise ValueError(
                f"Adapter '{name}' was loaded as not trainable; load it with PeftModel.from_pretrained(..., "
                "is_trainable=True), or merge it into the model (merge_and_unload) and pass the result."
            )
        return model
    if isinstance(peft_config, str):
        if peft_config != SERVING:
            raise ValueError(f"peft_config is '{peft_config}'; give '{SERVING}', a LoraConfig or nothing.")
        peft_config = serving_peft_config(model, rank)
    if not isinstance(peft_config, (PeftConfig, type(None))):
        raise ValueError(f"peft_config is a {type(peft_config).__name__}; give a LoraConfig, '{SERVING}', or nothing.")
    # A copy: PEFT writes to the one it is given
    settings = copy.deepcopy(peft_config) if peft_config else default_peft_config(model, rank)
    require_additive(settings)
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.filterwarnings("ignore", ".*fan_in_fan_out.*")  # PEFT sets it right for each layer, and says so
        torch.manual_seed(seed)
        model = get_peft_model(model, settings)
    model.__dict__[FROZEN] = frozen
    _only_linear(model)
    _in_the_blocks(model)
    _answer_for_layers(model)
    return model


def require_additive(config: PeftConfig) -> None:
    """Refuse kinds of LoRA that are more than W + s B A: the base would not come back, and the bound not account for them.

    Raises:
        ValueError: with the field's name.
    """
    if config.peft_type != PeftType.LORA:
        raise ValueError(
            f"The adapter is {config.peft_type}, not LoRA; give a LoraConfig, or a model with a LoRA adapter."
        )
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name == "init_lora_weights":
            default = value if value in ADDITIVE_INITS else default
        # PEFT sets an empty set for a mixture of experts
        unset = default is None and isinstance(value, (set, list, dict)) and not value
        if field.name not in ADDITIVE_FIELDS and value != default and not unset:
            raise ValueError(
                f"The adapter has {field.name}={value!r}, which changes more than W + s B A; leave it at its default, "
                "or merge the adapter (merge_and_unload) and pass the result."
            )


def require_base_below(model: PeftModel) -> None:
    """Refuse adapters that cannot be taken off: more than a product, or merged in place.

    Raises:
        ValueError: with what to do.
    """
    for name in model.active_adapters:
        require_additive(model.peft_config[name])
    if any(layer.merged for layer in lora_layers(model).values()):
        raise ValueError("The adapter is merged in place; call unmerge_adapter() first, or merge_and_unload().")


def _answer_for_layers(model: PeftModel) -> None:
    """Give adapted layers the settings of those they stand for: some models ask for them (MobileNet pads by a stride)."""
    for layer in lora_layers(model).values():
        settings = {k: v for k, v in vars(base_of(layer)).items() if k[0] != "_" and isinstance(v, (int, str, tuple))}
        layer.__dict__ |= {name: value for name, value in settings.items() if not hasattr(layer, name)}


def _in_the_blocks(model: PeftModel) -> None:
    """Refuse adapters on the head alone: the blocks would still know what was to be forgotten, and the model not show it."""
    blocks = blocks_of(model.get_base_model())
    layers = [module for block in blocks.values() for module in block.modules()]
    if not blocks or any(isinstance(module, LoraLayer) for module in layers):
        return
    kinds = {type(m).__name__ for m in layers if m._parameters and not any(True for _ in m.children())}
    linear = (
        "and they hold linear layers: name those" if any(map(is_linear, layers)) else "and they hold no linear layer"
    )
    raise ValueError(
        f"No layer inside the model's {len(blocks)} blocks has an adapter, only {', '.join(lora_layers(model))}; UIB needs some "
        f"there, {linear} ({', '.join(sorted(kinds))})."
    )


def _only_linear(model: PeftModel) -> None:
    owners: dict[int, int] = {}
    for module in model.modules():
        for weight in module._parameters.values():
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not is_linear(module.get_base_layer()):
            name, kind = name.removeprefix("base_model.model."), type(module.get_base_layer()).__name__
            raise ValueError(
                f"The adapter is on {name}, a {kind}; UIB adapts linear layers (and convolutions whose windows do not overlap): "
                "take it out of target_modules."
            )
        if isinstance(module, LoraLayer) and owners[id(module.get_base_layer().weight)] > 1:
            name = name.removeprefix("base_model.model.")
            raise ValueError(
                f"{name} shares its weight with another layer, which would change too; leave it out of target_modules."
            )


def is_fresh(layers: dict[str, AdaptedLayer], adapter: str) -> bool:
    """Whether the adapter has not been trained yet (B = 0), so that its A may be set to the subspace."""
    return all(not layer.lora_B[adapter].weight.any() for layer in layers.values())


def adapter_name(model: PeftModel) -> str:
    """The adapter being trained."""
    active = model.active_adapter
    return active if isinstance(active, str) else active[0]


def lora_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted linear layers by name, without PEFT's prefix, in the model's order."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def freeze_factors(model: PeftModel, trainable_factors: str, unreached: Collection[str] = ()) -> None:
    """Train B alone, or A and B. Loading an adapter as trainable sets both free, so this is called after every load.

    Args:
        unreached: layers without gradient (never called, or their output is not used): left untrained, as processes would wait for
            their gradients.
    """
    adapter = adapter_name(model)
    for name, layer in lora_layers(model).items():
        layer.lora_A[adapter].weight.requires_grad_(trainable_factors == "both" and name not in unreached)
        layer.lora_B[adapter].weight.requires_grad_(name not in unreached)


def check_optimizers(model: PeftModel, optimizer: Any = None, scheduler: Any = None) -> None:
    """Refuse an optimizer that was made before the model had its adapter, and a scheduler of another optimizer.

    Raises:
        ValueError: none of the optimizer's weights is trained.
    """
    if optimizer is not None:
        trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
        if not any(id(weight) in trained for group in optimizer.param_groups for weight in group["params"]):
            raise ValueError(
                "The optimizer holds none of the weights that are trained: it was made before the model had its adapter. Leave "
                "optimizers out, or make it from a PeftModel's parameters and give that model."
            )
    other = getattr(scheduler, "optimizer", None)
    if other is not None and getattr(optimizer, "optimizer", optimizer) is not getattr(other, "optimizer", other):
        raise ValueError(
            "The scheduler is of another optimizer than the one in optimizers; give both, or leave both out."
        )


# ---- Hooks, which leave with the adapter ----


def freeze_running_statistics(model: PeftModel) -> None:
    """Keep the base's layers with running statistics in eval mode, so that training leaves their buffers alone.

    The hook is on the PeftModel, not on the layers: a merged or detached model has none.
    """

    def running(module: nn.Module) -> list[nn.Module]:
        return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]

    def stay_in_eval_mode(module, inputs):
        for layer in running(module):
            layer.eval()

    if running(model):
        model.register_forward_pre_hook(stay_in_eval_mode)


def let_gradients_in(model: PeftModel) -> None:
    """Make what the embeddings give require grad: re-entrant gradient checkpointing sees gradients through its inputs alone.

    Transformers' `enable_input_require_grads`, for embeddings that give several things too, and models without any.
    """
    found = []
    for module in list[Any](model.get_base_model().modules()):
        try:
            embeddings = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
        except NotImplementedError:
            continue
        if isinstance(embeddings, nn.Module) and embeddings not in found:
            found.append(embeddings)
    for embeddings in found:
        embeddings.register_forward_hook(require_gradients)
    if not found:
        model.register_forward_pre_hook(require_input_gradients, with_kwargs=True)


def _floating(values: Any) -> list[Tensor]:
    if isinstance(values, dict):
        values = list(values.values())
    values = values if isinstance(values, (list, tuple)) else [values]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def require_gradients(module: nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook."""
    if torch.is_grad_enabled():
        for tensor in _floating(output):
            tensor.requires_grad_(True)


def require_input_gradients(module: nn.Module, inputs: tuple, named: dict) -> None:
    """Forward pre-hook."""
    if torch.is_grad_enabled():
        for tensor in [*_floating(inputs), *_floating(named)]:
            tensor.requires_grad_(True)


def copy_without_hooks(model: PeftModel) -> PeftModel:
    """A copy of the model for merging or detaching: our hooks stay behind, gradient checkpointing is off, and the weights may be
    trained that could be before the adapter came (of a PeftModel: all)."""
    model = copy_of(model)
    for module in list[Any](model.modules()):
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    for name, weight in model.get_base_model().named_parameters():
        plain = name.replace(".base_layer.", ".")
        if type(weight) is nn.Parameter:  # no codes
            weight.requires_grad_(weight.is_floating_point() and plain not in model.__dict__.get(FROZEN, ()))
    return model


def _is_ours(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").partition(".")[0] == __package__
