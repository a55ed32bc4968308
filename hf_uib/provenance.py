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
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from transformers import PreTrainedModel

from . import __version__
from .lora import adapter_name, copy_without_hooks, lora_layers, require_additive, require_plain_weights
from .models import Name, adapter_weights, load_classifier, name_of
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


def merged(model: PeftModel, inputs: dict[str, torch.Tensor], requests: list[dict]) -> PreTrainedModel:
    """A plain copy of the model with the adapter merged into its weights.

    Warns where rounding makes its logits another model's (a base in 16 bits).

    Args:
        inputs: of some rows, to compare the logits on.
        requests: all that the merged model has unlearned.
    """
    plain: Any = copy_without_hooks(model).eval()
    inputs = {name: value.to(next(plain.parameters()).device) for name, value in inputs.items()}
    with torch.no_grad():
        before = plain(**inputs).logits.float()
        plain = plain.merge_and_unload()
        after = plain(**inputs).logits.float()
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
    require_plain_weights(merged)
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
    return without_origin(_adapted(detached(model), name, record).merge_and_unload(), [*done, record])


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
