"""What becomes of an unlearned model: detached, merged, asked again, and one request taken back."""

import copy
import dataclasses
import datetime
import json
import os
import warnings
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from transformers import PreTrainedModel

from . import __version__
from .lora import adapter_name, copy_without_hooks, lora_layers, require_additive, require_known_weights
from .models import Name, adapter_weights, base_is_named, load_classifier, name_of, saved_quantised
from .quantised import dequantised, is_quantised
from .state import STATE_NAME

MERGED_ERROR = 0.01  # of the largest logit
SAME = ("forget_fingerprint", "base_fingerprint", "adapter_fingerprint")  # what tells one request from another


@dataclasses.dataclass(frozen=True)
class RequestRecord:
    """One unlearning request, as it is kept in ``config.unlearning``, in the card and beside the adapter.

    Attributes:
        request: what was to be forgotten, in words.
        forget_examples: how many rows.
        forget_fingerprint, base_fingerprint, adapter_fingerprint: hashes of the forget rows, the weights below the adapter, and the
            adapter.
        adapter_name: of the adapter in PEFT.
        from_zero: whether the adapter held nothing before; else the checkpoint's own adapter was trained further.
    """

    request: str
    forget_examples: int
    forget_fingerprint: str
    base_fingerprint: str
    adapter_fingerprint: str
    adapter_name: str
    from_zero: bool
    method: str = "uib"
    date: str = dataclasses.field(default_factory=lambda: datetime.date.today().isoformat())
    hf_uib: str = __version__

    def to_dict(self) -> dict:
        """Ready for JSON."""
        return dataclasses.asdict(self)


def detached(model: PeftModel) -> PreTrainedModel:
    """A copy of the model below the adapter, to the bit. (PEFT's `unload` alone leaves trained ``modules_to_save`` in.)"""
    model = copy_without_hooks(model)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name in module.modules_to_save:
                module.modules_to_save[name] = module.original_module
    return model.unload()


def merged_copy(model: PeftModel) -> PreTrainedModel:
    """A plain copy with the adapter merged into its weights, which are de-quantised first where they are codes: it computes what
    the adapted model does, to rounding."""
    if is_quantised(model):
        return on_base(model, dequantised(detached(model))).merge_and_unload()
    return copy_without_hooks(model).merge_and_unload()


def on_base(model: PeftModel, base: PreTrainedModel) -> PeftModel:
    """The model's adapter on another base, which is changed in place."""
    name = adapter_name(model)
    state = get_peft_model_state_dict(model, adapter_name=name)
    other = get_peft_model(base, copy.deepcopy(model.peft_config[name]), adapter_name=name)
    base.requires_grad_(True)  # as after `from_pretrained`
    set_peft_model_state_dict(other, state, adapter_name=name)
    return other.eval()


def full_precision_base(model: PeftModel) -> PreTrainedModel | None:
    """The checkpoint that a quantised base was loaded from, without quantisation; None where its name leads to no such weights
    here. Nothing is downloaded."""
    base: Any = model.get_base_model()
    name = base.config._name_or_path
    if not base_is_named(model, name) or saved_quantised(name):
        return None
    config = copy.deepcopy(base.config)
    del config.quantization_config
    found = type(base).from_pretrained(
        name, config=config, dtype="auto", ignore_mismatched_sizes=True, local_files_only=True, use_safetensors=True
    )  # fmt: skip
    return found.to(base.device)


def merged(
    model: PeftModel, inputs: dict[str, torch.Tensor], requests: list[dict], base: PreTrainedModel | None = None
) -> PreTrainedModel:
    """A plain copy of the model with the adapter merged into its weights.

    Warns where rounding makes its logits another model's (a base in 16 bits).

    Args:
        inputs: of some rows, to compare the logits on.
        requests: all that the merged model has unlearned.
        base: to merge into, instead of the model's own; changed in place.
    """
    adapted: Any = copy_without_hooks(model) if base is None else on_base(model, base)
    inputs = {name: value.to(next(adapted.parameters()).device) for name, value in inputs.items()}
    with torch.no_grad():
        before = adapted.eval()(**inputs).logits.float()
        plain = adapted.merge_and_unload()
        after = plain.eval()(**inputs).logits.float()
    difference = (before - after).abs().max()
    if difference > MERGED_ERROR * before.abs().max():
        warnings.warn(
            f"The merged model's logits differ from the adapted model's by up to {difference:.2g}: the base weights are too coarse "
            "for the adapter. Load the base with dtype=torch.float32 before merging.",
            stacklevel=3,
        )
    return without_origin(plain, requests)


def requests_of(model: Any) -> list[dict]:
    """The unlearning requests that are merged into a model, the first one first."""
    return list(getattr(model.config, "unlearning", None) or [])


def undo(model: Name | PreTrainedModel, adapter: Name, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A copy of a merged model without one of its requests: W - s B A, the weights before it to rounding.

    Requests that came after it stay, as they were trained on top of it. What was forgotten is there again.

    Args:
        model: from `UIBTrainer.merge_and_unload`, as object, folder or Hub id.
        adapter: folder or Hub id of the request's adapter, as `UIBTrainer.save_model` wrote it.
        trust_remote_code: see `load_classifier`.

    Raises:
        ValueError: the adapter is none of the requests that are merged into the model, or it trained more than LoRA's factors, or
            the model's weights are quantised.
    """
    given, adapter = name_of(model), str(name_of(adapter))
    named = isinstance(given, str)
    merged: Any = load_classifier(given, trust_remote_code=trust_remote_code) if named else copy.deepcopy(given)
    require_known_weights(merged)
    if is_quantised(merged):
        raise ValueError("The merged model is quantised, and W - s B A would be rounded: load it unquantised.")
    record = _state_of(adapter)["record"]
    if not record["from_zero"]:
        raise ValueError(
            f"{adapter} held what the checkpoint had learned too; go back to the checkpoint it began with instead."
        )
    done = requests_of(merged)
    kept = [other for other in done if any(other[key] != record[key] for key in SAME)]
    if len(kept) == len(done):
        raise ValueError(f"The request of {adapter} is none of the {len(done)} that are merged into the model.")
    adapted = _adapted(merged, adapter, record)
    require_additive(adapted.peft_config[adapter_name(adapted)])
    if getattr(adapted.peft_config[adapter_name(adapted)], "modules_to_save", None):
        raise ValueError(
            f"{adapter} replaced whole modules (modules_to_save); go back to the model before it instead."
        )
    for layer in lora_layers(adapted).values():
        layer.scaling[adapter_name(adapted)] *= -1
    before = adapted.merge_and_unload()
    return without_origin(before, kept)


def next_base(name: Name, *, trust_remote_code: bool = False) -> Any:
    """What the next request is trained on: a checkpoint, or the merged model of an earlier request's adapter; folder or Hub id."""
    name = str(name_of(name))
    model = load_classifier(name, trust_remote_code=trust_remote_code)
    if not isinstance(model, PeftModel):
        return model
    try:
        record = _state_of(name)["record"]
    except ValueError:  # somebody's fine-tuning, to be trained further
        return model
    done = requests_of(model)
    return without_origin(merged_copy(_adapted(detached(model), name, record)), [*done, record])


def without_origin(model: PreTrainedModel, requests: list[dict]) -> PreTrainedModel:
    """The model is no longer the checkpoint its config names."""
    model.name_or_path = model.config._name_or_path = ""
    model.config._commit_hash = None
    model.config.unlearning = requests
    return model


def _state_of(adapter: str) -> dict:
    """What the adapter's state says of the run."""
    try:
        path = os.path.join(adapter, STATE_NAME) if os.path.isdir(adapter) else hf_hub_download(adapter, STATE_NAME)
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["uib"])
    except OSError as error:
        raise ValueError(
            f"{adapter} has no {STATE_NAME}; give the adapter that UIBTrainer.save_model wrote."
        ) from error


def _adapted(model: PreTrainedModel, adapter: str, record: dict) -> PeftModel:
    """PEFT saves an adapter of another name than ``default`` in a folder of that name."""
    where = {"subfolder": record["adapter_name"]} if record["adapter_name"] != "default" else {}
    adapter_weights(adapter, **where)
    return PeftModel.from_pretrained(model, adapter, **where)
