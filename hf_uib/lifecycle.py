"""What becomes of an unlearned model: detached, merged, asked again, and one request taken back."""

import copy
import json
import os

from huggingface_hub import hf_hub_download
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from .adapters import adapter_name, load_classifier, lora_layers

STATE_NAME = "uib_state.safetensors"
SAME = ("forget_fingerprint", "base_fingerprint")  # what tells one request from another


def detached(model: PeftModel) -> PreTrainedModel:
    """A copy of the model below the adapter, to the bit. (PEFT's `unload` alone leaves trained ``modules_to_save`` in.)"""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name in module.modules_to_save:
                module.modules_to_save[name] = module.original_module
    return model.unload()


def requests_of(model: nn.Module) -> list[dict]:
    """The unlearning requests that are merged into a model, the first one first."""
    return list(getattr(model.config, "unlearning", None) or [])


def undo(model: str | PreTrainedModel, adapter: str) -> PreTrainedModel:
    """A copy of a merged model without one of its requests: W - s B A, the weights before it to rounding.

    Requests that came after it stay, as they were trained on top of it. What was forgotten is there again.

    Args:
        model: from `UIBTrainer.merge_and_unload`, as object, folder or Hub id.
        adapter: folder or Hub id of the request's adapter, as `UIBTrainer.save_model` wrote it.

    Raises:
        ValueError: the adapter is none of the requests that are merged into the model, or it trained more than LoRA's factors.
    """
    merged = load_classifier(model) if isinstance(model, str) else copy.deepcopy(model)
    path = os.path.join(adapter, STATE_NAME)
    try:
        with safe_open(path if os.path.isdir(adapter) else hf_hub_download(adapter, STATE_NAME), "pt") as file:
            record = json.loads(file.metadata()["uib"])["record"]
    except OSError as error:
        raise ValueError(
            f"{adapter} has no {STATE_NAME}; give the adapter that UIBTrainer.save_model wrote."
        ) from error
    done = requests_of(merged)
    kept = [other for other in done if any(other[key] != record[key] for key in SAME)]
    if len(kept) == len(done):
        raise ValueError(f"The request of {adapter} is none of the {len(done)} that are merged into the model.")
    adapted = PeftModel.from_pretrained(merged, adapter)
    if getattr(adapted.peft_config[adapter_name(adapted)], "modules_to_save", None):
        raise ValueError(
            f"{adapter} replaced whole modules (modules_to_save); go back to the model before it instead."
        )
    for layer in lora_layers(adapted).values():
        layer.scaling[adapter_name(adapted)] *= -1
    before = adapted.merge_and_unload()
    before.config.unlearning = kept
    return before
