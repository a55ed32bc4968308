"""Which layers are adapted, with what, and the noise channel along the subspace."""

import hashlib
import inspect
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import CONFIG_NAME, find_adapter_config_file


def load_classifier(name_or_path: str, **kwargs) -> nn.Module:
    """Load a checkpoint with the Auto class that its config asks for.

    Args:
        name_or_path: Hub id or folder, of a full checkpoint or of a PEFT adapter (then loaded as trainable).
        kwargs: passed to ``from_pretrained``.

    Raises:
        ValueError: there is no such checkpoint, it cannot be read, or it is no image or sequence classifier.
    """
    try:
        model = _load_classifier(name_or_path, **kwargs)
    except SafetensorError as error:
        raise ValueError(
            f"The weights (model.safetensors) of {name_or_path} cannot be read ({error}); save or download them again."
        ) from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"No checkpoint {name_or_path} here or on the Hub; check the name. ({reason})") from error
    if not isinstance(model, PeftModel) and not os.path.isdir(name_or_path):
        cached = try_to_load_from_cache(name_or_path, CONFIG_NAME, revision=kwargs.get("revision"))
        if isinstance(cached, str):  # .../snapshots/<commit>/config.json
            model.config._commit_hash = os.path.basename(os.path.dirname(cached))
    return model


def _load_classifier(name_or_path: str, **kwargs) -> nn.Module:
    revision = {name: value for name, value in kwargs.items() if name == "revision"}
    adapter = find_adapter_config_file(name_or_path, **revision)
    if adapter is not None:
        base = PeftConfig.from_pretrained(os.path.dirname(adapter)).base_model_name_or_path
        settings = {name: value for name, value in kwargs.items() if name != "revision"}  # that is the adapter's
        return PeftModel.from_pretrained(
            load_classifier(base, **settings), name_or_path, is_trainable=True, **revision
        )
    if os.path.isdir(name_or_path) and not os.path.isfile(os.path.join(name_or_path, "config.json")):
        raise ValueError(f"{name_or_path} has no config.json; give a folder that save_pretrained wrote.")
    config = AutoConfig.from_pretrained(name_or_path, **revision)
    architecture = (config.architectures or [""])[0]
    if architecture in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values():
        return AutoModelForImageClassification.from_pretrained(name_or_path, **kwargs)
    if architecture in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return AutoModelForSequenceClassification.from_pretrained(name_or_path, **kwargs)
    if architecture.endswith("Classification") and hasattr(transformers, architecture):
        return getattr(transformers, architecture).from_pretrained(name_or_path, **kwargs)
    raise ValueError(
        f"{name_or_path} holds {architecture or 'no named architecture'}, which is no image or sequence classifier; "
        "give a fine-tuned classification checkpoint."
    )


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


def is_fresh(layers: dict[str, nn.Module], adapter: str) -> bool:
    """Whether the adapter has not been trained yet (B = 0), so that its A may be set to the subspace."""
    return all(not layer.lora_B[adapter].weight.any() for layer in layers.values())


def forward_columns(model: nn.Module) -> set[str]:
    """The columns that the model's forward takes, and the label names."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return set(inspect.signature(base.forward).parameters) | {"labels", "label"}


def adapter_name(model: PeftModel) -> str:
    """The adapter being trained."""
    active = model.active_adapter
    return active if isinstance(active, str) else active[0]


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
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


def fingerprint(model: PeftModel, of_the_adapter: bool = False) -> str:
    """Hash of every weight that is not the adapter's, or of those that are."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(model.get_base_model().state_dict().items()):
        if (".lora_" in name or ".modules_to_save." in name) == of_the_adapter:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class NoiseChannel:
    """The channel noise: what a layer reads of the pattern is mixed at random, ``x -> x + kappa V' G V x``.

    ``G [k, k]`` has independent entries of variance 1/k, so that kappa is the noise-to-signal ratio of the channel. In weights
    it is ``(W + dW) V' kappa G V``: noise as large as what the layer makes of the pattern, and none where it ignores it.

    A step has `DRAWS` draws for each layer, a function of (seed, step, layer) alone, the same on every process; the row at
    position i of an epoch takes draw ``i mod DRAWS``. Only training forwards are disturbed: in eval mode, when saving and
    when merging, the mean is used.

    Args:
        layers: adapted layers, by name.
        subspaces: V_l ``[k, d_in]``, by name.
        adapter: the adapter's name.
        reads: where ``lora_A`` is V_l but for a factor: what the base layer makes of its output, in LoRA's units ``[d_out, k]``, by
            name. The noise then goes through LoRA's own factors, at one thin product a layer; otherwise it is added to the
            layer's input, at two.
    """

    DRAWS = 16

    def __init__(
        self,
        layers: dict[str, nn.Module],
        subspaces: dict[str, Tensor],
        adapter: str,
        reads: dict[str, Tensor] | None = None,
    ):
        self.subspaces, self.reads = subspaces, reads
        self.probing = False
        self.noise: dict[str, Tensor] = {}
        self.positions: Tensor | None = None  # of the rows of the next forward, [n]; None: one after the other
        self.mixed: dict[str, Tensor] = {}
        self.on_patches = {name: isinstance(layer.get_base_layer(), nn.Conv2d) for name, layer in layers.items()}
        self.handles = []
        for name, layer in layers.items():
            if reads is None:
                self.handles.append(layer.register_forward_pre_hook(self._on_input(name)))
            else:
                self.handles.append(layer.lora_A[adapter].register_forward_hook(self._on_code(name)))
                self.handles.append(layer.lora_B[adapter].register_forward_hook(self._on_output(name)))

    def _off(self, module: nn.Module) -> bool:
        return not self.noise or not (module.training or self.probing)

    def _on_code(self, name: str):
        def hook(module, inputs, code):
            if self._off(module):
                return None
            self.mixed[name] = self._mix(name, code)
            return code + self.mixed[name]

        return hook

    def _on_output(self, name: str):
        def hook(module, inputs, output):
            if self._off(module):
                return None
            mixed = self.mixed.pop(name)
            read = self.reads[name].to(mixed.dtype)
            if self.on_patches[name]:
                return output + F.conv2d(mixed, read[:, :, None, None])
            if mixed.ndim == 3:  # in place: an output is a large thing to copy
                return output.baddbmm_(mixed, read.T.expand(len(mixed), *read.T.shape))
            return torch.addmm(output.flatten(0, -2), mixed.flatten(0, -2), read.T).view(output.shape)

        return hook

    def _on_input(self, name: str):
        def hook(module, inputs):
            if self._off(module):
                return None
            (x, *rest), base = inputs, module.get_base_layer()
            subspace = self.subspaces[name].to(x.dtype)
            if not self.on_patches[name]:
                return x + self._mix(name, F.linear(x, subspace)) @ subspace, *rest
            kernel = subspace.view(len(subspace), *base.weight.shape[1:])
            mixed = self._mix(name, F.conv2d(x, kernel, None, base.stride, 0, base.dilation))
            back = F.conv_transpose2d(mixed, kernel, None, base.stride, 0, 0, 1, base.dilation)
            return x + F.pad(back, (0, x.shape[-1] - back.shape[-1], 0, x.shape[-2] - back.shape[-2])), *rest

        return hook

    def _mix(self, name: str, code: Tensor) -> Tensor:
        """``kappa G`` of each row's draw applied to its codes, ``[n, ..., k]`` or, on patches, ``[n, k, h, w]``."""
        noise = self.noise[name][self._draws(code)].to(code.dtype)
        if self.on_patches[name]:
            return torch.bmm(code.flatten(2).mT, noise).mT.reshape(code.shape)
        return torch.bmm(code.reshape(len(code), -1, code.shape[-1]), noise).view(code.shape)

    def _draws(self, x: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device) if self.positions is None else self.positions
        if len(x) % len(rows):  # no examples, but something all of them share: a table of relative positions
            rows = torch.arange(len(x), device=x.device)
        elif len(rows) != len(x):  # windows of a picture, one after the other
            rows = rows.repeat_interleave(len(x) // len(rows))
        return rows % self.DRAWS

    @contextmanager
    def in_eval_mode(self):
        """Disturb forwards in eval mode too, to measure what the noise does; none is left afterwards."""
        self.probing = True
        try:
            yield
        finally:
            self.probing = False
            self.silence()

    def draw(self, kappa: float, seed: int, step: int, device: torch.device) -> None:
        """Draw ``kappa G`` of a step."""
        generator = torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)
        k = len(next(iter(self.subspaces.values())))
        shape = (len(self.subspaces), self.DRAWS, k, k)
        draws = torch.randn(shape, generator=generator, device=device) * (kappa / k**0.5)
        self.noise = dict(zip(self.subspaces, draws.unbind(), strict=True))

    def silence(self) -> None:
        """No noise until the next draw."""
        self.noise, self.positions, self.mixed = {}, None, {}

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.silence()
        for handle in self.handles:
            handle.remove()
