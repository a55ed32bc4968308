"""Which layers are adapted, and with what."""

from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

AdaptedLayer = Any  # PEFT's LoRA layer around a linear one: an nn.Module and a LoraLayer


def is_linear(module: nn.Module) -> bool:
    """A linear layer, or a convolution that is one on patches: its windows do not overlap (a ViT's patch embedding)."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == module.stride and module.groups == 1 and module.padding == (0, 0)
    return isinstance(module, nn.Linear)


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
    targets = sorted(t for last, names in linear.items() for t in ([last] if last not in other else names))
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, lora_dropout=0.0, bias="none")


def attach_adapter(model: nn.Module, peft_config: LoraConfig | None, rank: int) -> PeftModel:
    """Give the model the adapter that will be trained.

    Three cases: a plain model gets a new adapter; a PeftModel with a fresh adapter (B = 0) is taken as it is, and so is one
    with a trained adapter, whose weights are then the prior's first mean.

    Raises:
        ValueError: the model has an adapter that cannot be trained or is not on linear layers, or ``peft_config`` was given for
            a PeftModel.
    """
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
        _only_linear(model)
        name = adapter_name(model)
        _additive(model.peft_config[name])
        if not any(p.requires_grad for layer in layers.values() for p in layer.lora_B[name].parameters()):
            raise ValueError(
                f"Adapter '{name}' was loaded as not trainable; load it with PeftModel.from_pretrained(..., "
                "is_trainable=True), or merge it into the model (merge_and_unload) and pass the result."
            )
        return model
    peft_config = peft_config or default_peft_config(model, rank)
    _additive(peft_config)
    model = get_peft_model(model, peft_config)
    _only_linear(model)
    return model


def _additive(config: PeftConfig) -> None:
    """Refuse kinds of LoRA that are more than W + s B A: the base would not come back, and the bound not account for them."""
    found = {
        "bias": getattr(config, "bias", "none") != "none",
        "use_dora": getattr(config, "use_dora", False),
        "init_lora_weights": str(getattr(config, "init_lora_weights", True))
        .lower()
        .startswith(("pissa", "olora", "corda", "loftq")),
    }
    for name, there in found.items():
        if there:
            raise ValueError(
                f"The adapter has {name}={getattr(config, name)!r}, which changes more than W + s B A; leave it at its default, "
                "or merge the adapter (merge_and_unload) and pass the result."
            )


def _only_linear(model: PeftModel) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not is_linear(module.get_base_layer()):
            name, kind = name.removeprefix("base_model.model."), type(module.get_base_layer()).__name__
            raise ValueError(
                f"The adapter is on {name}, a {kind}; UIB adapts linear layers (and convolutions whose windows do not overlap): "
                "take it out of target_modules."
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


def freeze_factors(model: PeftModel, trainable_factors: str) -> None:
    """Train B alone, or A and B. Loading an adapter as trainable sets both free, so this is called after every load."""
    name = adapter_name(model)
    for layer in lora_layers(model).values():
        layer.lora_A[name].weight.requires_grad_(trainable_factors == "both")
        layer.lora_B[name].weight.requires_grad_(True)


def freeze_running_statistics(model: nn.Module) -> None:
    """Keep batch-norm layers of the base model in eval mode, so that training leaves their buffers alone."""

    def stay_in_eval_mode(module, inputs):
        module.eval()

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(stay_in_eval_mode)
