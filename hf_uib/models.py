"""Loading a classifier, and what can be read off one."""

import hashlib
import inspect
import os
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import CONFIG_NAME, find_adapter_config_file


def load_classifier(name_or_path: str, **kwargs) -> Any:
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


def _load_classifier(name_or_path: str, **kwargs) -> Any:
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


def forward_columns(model: nn.Module) -> set[str]:
    """The columns that the model's forward takes, and the label names."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return set(inspect.signature(base.forward).parameters) | {"labels", "label"}


def fingerprint(model: PeftModel, of_the_adapter: bool = False) -> str:
    """Hash of every weight that is not the adapter's, or of those that are."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(model.get_base_model().state_dict().items()):
        if (".lora_" in name or ".modules_to_save." in name) == of_the_adapter:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
