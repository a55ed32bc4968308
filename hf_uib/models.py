"""Loading a classifier, and what can be read off one."""

import copy
import hashlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import HfApi, try_to_load_from_cache
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file

from .quantised import plain_tensors
from .state import identity_of

BASE = "base"  # folder beside an adapter, of a base that has no name
# Settings of `from_pretrained` that say where a file is, not how it is read
WHERE = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")
KINDS = {"pixel_values": "image", "input_values": "audio", "input_features": "audio"}  # by the name of a model's input
TASKS = (None, "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")  # PEFT's, of adapters that may be on a classifier
Name = str | os.PathLike


def name_of(given: Any) -> Any:
    """A folder or Hub id as a string; what is no path stays as it is."""
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def first_line(error: Exception) -> str:
    """What an exception says first."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def load_classifier(name_or_path: Name, *, trust_remote_code: bool = False, **kwargs) -> Any:
    """Load a checkpoint with the Auto class that its config asks for. Weights are read from safetensors alone.

    The base of a PEFT adapter may have another head or none; the adapter's then decides how many classes there are.

    Args:
        name_or_path: Hub id or folder, of a full checkpoint or of a PEFT adapter (then loaded as trainable).
        trust_remote_code: run code that comes with the checkpoint. Nobody is asked: without it such a checkpoint is refused.
        kwargs: passed to ``from_pretrained``.

    Raises:
        ValueError: there is no such checkpoint, it cannot be read, or it is no classifier.
    """
    name: str = name_of(name_or_path)
    with _in_one_line(name, kwargs):
        model = _load_classifier(name, kwargs | {"trust_remote_code": trust_remote_code})
    if not isinstance(model, PeftModel) and not os.path.isdir(name):
        cached = try_to_load_from_cache(name, CONFIG_NAME, revision=kwargs.get("revision"))
        if isinstance(cached, str):  # .../snapshots/<commit>/config.json
            model.config._commit_hash = os.path.basename(os.path.dirname(cached))
    return model


@contextmanager
def _in_one_line(name: str, settings: dict[str, Any]) -> Iterator[None]:
    """Whatever loading raises becomes one line that names the checkpoint."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"The weights (model.safetensors) of {name} cannot be read ({error}); save or download them again."
        ) from error
    except ImportError as error:
        raise ValueError(f"{name} needs a package that is not installed here. ({first_line(error)})") from error
    except OSError as error:
        if _is_pickled(name, settings):
            raise ValueError(
                f"{name} has pickled weights alone, which run code when they are read; convert them where you trust them: "
                "from_pretrained(..., use_safetensors=False), then save_pretrained."
            ) from error
        raise ValueError(f"No checkpoint {name} here or on the Hub; check the name. ({first_line(error)})") from error
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} cannot be loaded as a classifier. ({first_line(error)})") from error


def _where(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in WHERE if name in settings}


def _load_classifier(name: str, settings: dict[str, Any]) -> Any:
    named = identity_of(name).get("record", {}).get("adapter_name", "default")
    if named != "default":  # PEFT keeps it in a folder of that name
        settings = {"subfolder": named} | settings
    adapter = find_adapter_config_file(name, **_where(settings))
    if adapter is not None:
        return _load_adapter(name, PeftConfig.from_pretrained(os.path.dirname(adapter)), settings)
    if os.path.isdir(name):
        (folder := os.path.join(name, settings.get("subfolder") or ""))
        if not os.path.isfile(os.path.join(folder, CONFIG_NAME)):
            raise ValueError(f"{folder} has no config.json; give a folder that save_pretrained wrote.")
    config = _config_of(name, settings)
    kind = _class_of(config)
    if kind is None:
        architecture = (getattr(config, "architectures", None) or [""])[0]
        raise ValueError(
            f"{name} holds {architecture or 'no named architecture'}, which is no classifier of pictures, texts, sounds or videos; "
            "give a fine-tuned classification checkpoint."
        )
    return _with_all_weights(name, kind, settings)


def _with_all_weights(name: str, kind: Any, settings: dict[str, Any], brought: Collection[str] = ()) -> Any:
    """`from_pretrained`, where no weight is left to be drawn at random: each is in the file, or ``brought`` by an adapter.

    Raises:
        ValueError: with the first name.
    """
    model, info = kind.from_pretrained(name, use_safetensors=True, output_loading_info=True, **settings)
    drawn = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])} - set(brought)
    asked_for = {"num_labels", "ignore_mismatched_sizes", "config"} & set(settings)  # then a new head was wanted
    if drawn and (brought or not asked_for):
        raise ValueError(
            f"{name} lacks {len(drawn)} weights of {type(model).__name__} ({min(drawn)}), which would be drawn at random; give a "
            "checkpoint of a trained classifier."
        )
    return model


def _config_of(name: str, settings: dict[str, Any]) -> Any:
    """The config; code that comes with it is run only where that was asked for."""
    trusted = settings["trust_remote_code"]
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trusted, **_where(settings))
    except ValueError as error:
        if not trusted and "trust_remote_code" in str(error):
            raise ValueError(
                f"{name} comes with code of its own, which is not run; read it, and load it with trust_remote_code=True."
            ) from error
        raise ValueError(f"The config.json of {name} cannot be read. ({first_line(error)})") from error


def _class_of(config: Any) -> Any:
    """The class to load a full checkpoint with; None for what is no classifier."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    own_code = getattr(config, "auto_map", None) or {}
    for auto, names in (
        (AutoModelForImageClassification, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ):
        known = [one for entry in names.values() for one in (entry if isinstance(entry, tuple) else (entry,))]
        if architecture in known or auto.__name__ in own_code:
            return auto
        if config.model_type == "timm_wrapper" and "timm_wrapper" in names:  # its architectures are timm's
            return auto
    if architecture.endswith("Classification") and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    return None


# ---- Adapters ----


def _load_adapter(name: str, adapter: Any, settings: dict[str, Any]) -> PeftModel:
    """An adapter on its base, which gets the adapter's head and class names where it has others or none."""
    if adapter.task_type not in TASKS:
        raise ValueError(
            f"{name} is an adapter for {adapter.task_type}; UIB needs a classifier's (SEQ_CLS, TOKEN_CLS, or none)."
        )
    where = _where(settings)
    weights = adapter_weights(name, **where)
    base_settings = {key: value for key, value in settings.items() if key not in ("revision", "subfolder")}
    base, beside = _base_of(name, adapter, base_settings)
    with _in_one_line(base, base_settings):
        config = _config_of(base, base_settings)
    kind = _class_of(config)
    auto = kind or _classifier_for(config, adapter.task_type)
    if auto is None:
        raise ValueError(f"{base}, the base of {name}, is a {config.model_type}, of which there is no classifier.")
    saved = _saved_modules(weights)
    heads = _head_weights(auto, config, settings["trust_remote_code"]) if saved else set()
    head = {key: tensor for key, tensor in saved.items() if key in heads}
    if kind is None and not head:
        raise ValueError(
            f"{base}, the base of {name}, has no classification head, and the adapter brings none (modules_to_save); give the "
            "adapter of a classifier."
        )
    classes = {len(tensor) for tensor in head.values()}
    new_head = bool(head) and (kind is None or classes != {config.num_labels})
    if new_head:
        base_settings |= _class_names(name, config, max(classes), where) | {"ignore_mismatched_sizes": True}
    with _in_one_line(base, base_settings), _quiet_about_heads() if new_head else nullcontext():
        model = _with_all_weights(base, auto, base_settings, brought=saved)
    if new_head:
        # The adapter replaces this head, so it is no drawn one that lies below
        model.load_state_dict({key: saved[key] for key in model.state_dict() if key in saved}, strict=False)
    renamed = _renamed_layers(model, weights)
    if renamed:
        adapter.target_modules = set(renamed.values())
        where |= {"key_mapping": {rf"^{re.escape(old)}(?=\.lora_)": new for old, new in renamed.items()}}
    adapter.inference_mode = False
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model, name, is_trainable=True, config=adapter, **where)
    for warning in told:
        if "missing adapter keys" in str(warning.message):
            raise ValueError(f"The adapter {name} does not fit its base {base}: it lacks layers that it should have.")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if beside and "dtype" not in settings:
        expected = identity_of(name).get("base")
        if expected is not None and fingerprint(model) != expected:
            warnings.warn(
                f"{base} is not the base that the adapter in {name} was trained on: another run wrote it.",
                stacklevel=5,
            )
    return model


def _base_of(name: str, adapter: PeftConfig, settings: dict[str, Any]) -> tuple[str, bool]:
    """The base by name, or the folder beside the adapter (or beside its checkpoint's folder); and whether it is that folder."""
    folder = os.path.abspath(name)
    places = [os.path.join(place, BASE) for place in (folder, os.path.dirname(folder))] if os.path.isdir(name) else []
    beside = next((place for place in places if os.path.isfile(os.path.join(place, CONFIG_NAME))), None)
    base = adapter.base_model_name_or_path
    if base and (beside is None or is_here(base, settings)):
        return base, False
    if beside is not None:
        return beside, True
    wanted = f", or save that model to {os.path.join(name, BASE)}" if os.path.isdir(name) else ""
    raise ValueError(
        f"The adapter {name} names no base model and has none beside it; load it with PeftModel.from_pretrained on the model it "
        f"was trained on{wanted}."
    )


def adapter_weights(name: str, **where) -> str:
    """Path of an adapter's safetensors file.

    Raises:
        ValueError: there is none.
    """
    weights = _adapter_file(name, SAFETENSORS_WEIGHTS_NAME, where)
    if weights is None:
        raise ValueError(
            f"{name} has no {SAFETENSORS_WEIGHTS_NAME}: pickled weights run code when they are read; load the adapter where you "
            "trust it, and save_pretrained it again."
        )
    return weights


def is_here(name: str, settings: dict[str, Any] | None = None) -> bool:
    """Whether a checkpoint is in a folder or in the cache of the Hub; nothing is downloaded."""
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, CONFIG_NAME))
    try:
        return _adapter_file(name, CONFIG_NAME, _where(settings or {}) | {"local_files_only": True}) is not None
    except (OSError, ValueError):
        return False


def _adapter_file(name: str, file: str, where: dict[str, Any]) -> str | None:
    """Path of a file of a folder or a repository; None where it is not there."""
    return cached_file(
        name, file, **where, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )  # fmt: skip


def _classifier_for(config: Any, task_type: str | None) -> Any:
    """The Auto class that puts a head on a headless base."""
    if task_type == "TOKEN_CLS":
        known = config.model_type in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
        return AutoModelForTokenClassification if known else None
    image = config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    text = config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if text and (task_type == "SEQ_CLS" or not image):
        return AutoModelForSequenceClassification
    return AutoModelForImageClassification if image else None


def _saved_modules(weights: str) -> dict[str, torch.Tensor]:
    """What an adapter's file holds besides the factors (``modules_to_save``), under the base model's names."""
    with safe_open(weights, "pt") as file:
        return {
            key.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".modules_to_save", ""):
                file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118
            if key.startswith("base_model.model.") and ".lora_" not in key and ".original_module." not in key
        }  # fmt: skip


def _renamed_layers(model: Any, weights: str) -> dict[str, str]:
    """The adapter's layers with their present names, where Transformers has renamed some since it was saved (ViT's ``query``)."""
    there = {name for name, _ in model.named_modules()}
    with safe_open(weights, "pt") as file:
        keys = list(file.keys())
    layers = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in keys if ".lora_" in key}
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    now = {old: rename_source_key(f"{old}.weight", renamings, [])[0].removesuffix(".weight") for old in layers - there}
    now = {old: new for old, new in now.items() if new in there}
    return now | {name: name for name in layers & there} if now else {}


def _head_weights(auto: Any, config: Any, trust_remote_code: bool) -> set[str]:
    """Names of the weights that have one entry or row for each class: those whose size follows ``num_labels``."""
    classes = 7919  # a number that is no width
    probe = copy.deepcopy(config)
    probe.num_labels = classes
    with init_empty_weights():
        model = auto.from_config(probe, trust_remote_code=trust_remote_code)
    return {name for name, weight in model.named_parameters() if weight.ndim and len(weight) == classes}


def _class_names(name: str, config: Any, classes: int, where: dict[str, Any]) -> dict[str, Any]:
    """``id2label`` and ``label2id`` from a config beside the adapter, or from the base's, or numbered."""
    path = _adapter_file(name, CONFIG_NAME, where)
    names: dict[int, str] = {}
    if path is not None:
        with open(path, encoding="utf-8") as file:
            names = {int(i): str(label) for i, label in (json.load(file).get("id2label") or {}).items()}
    if sorted(names) != list(range(classes)):
        names = dict(config.id2label or {}) if config.num_labels == classes else {}
    if not names:
        return {"num_labels": classes}
    return {"id2label": names, "label2id": {label: i for i, label in names.items()}, "num_labels": classes}


class _quiet_about_heads:
    """Transformers says that a head is drawn anew; the adapter's takes its place."""

    def __enter__(self):
        self.level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()

    def __exit__(self, *error):
        transformers.logging.set_verbosity(self.level)


def _is_pickled(name: str, settings: dict[str, Any]) -> bool:
    """Whether a checkpoint has weights, but none in safetensors."""
    try:
        if os.path.isdir(name):
            names = os.listdir(os.path.join(name, settings.get("subfolder") or ""))
        else:
            names = HfApi().list_repo_files(name, revision=settings.get("revision"), token=settings.get("token"))
    except Exception:  # there is no such place; the error that brought us here says so
        return False
    endings = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
    found = [n for n in names if n.endswith(endings) and not n.startswith(("training_args", "optimizer", "scheduler"))]
    return bool(found) and not any(n.endswith(".safetensors") for n in names)


# ---- What can be read off a model ----


def num_labels_of(model: Any) -> int:
    """How many classes a model tells apart: its config's ``num_labels``, or as many as it names."""
    config = model.config
    return int(getattr(config, "num_labels", None) or len(getattr(config, "id2label", None) or ()))


def forward_columns(model: nn.Module) -> set[str]:
    """The columns that the model's forward takes, and the label names."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    named = getattr(base, "columns", None) or inspect.signature(base.forward).parameters  # those of an exported file
    return {*named, "labels", "label"}


def labels_tokens(model: Any) -> bool:
    """Whether a classifier labels each token, not whole rows."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return type(base).__name__.endswith("ForTokenClassification")


def input_kind(model: Any) -> str:
    """What a classifier takes: ``image``, ``video``, ``audio`` or ``text``."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if type(base).__name__.endswith("ForVideoClassification"):
        return "video"
    return KINDS.get(getattr(base, "main_input_name", "input_ids"), "text")


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of the encoder, first to last: the items of the longest list of modules (empty if there is none). A list of
    lists is one of all their items."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if not lists:
        return {}
    _, longest = max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))
    blocks = [module for item in longest for module in (item if isinstance(item, nn.ModuleList) else [item])]
    return {f"block {i + 1}": block for i, block in enumerate(blocks)}


def is_adapters(name: str) -> bool:
    """Whether a weight of that name is the adapter's: a factor, or in a module that ``modules_to_save`` put in another's place."""
    return ".lora_" in name or ".modules_to_save." in name


def fingerprint(model: PeftModel, of_the_adapter: bool = False) -> str:
    """Hash of every weight that is not the adapter's, or of those that are.

    A module that ``modules_to_save`` replaced is the adapter's; what was there before is in neither (often just drawn).
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(model.get_base_model().state_dict().items()):
        if ".original_module." in name:
            continue
        if is_adapters(name) == of_the_adapter:
            digest.update(name.encode())
            for part in plain_tensors(weight):
                digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def base_is_named(model: PeftModel, name: str | None) -> bool | None:
    """Whether the weights below an adapter are those of a checkpoint; None where that is not here to be compared.

    A model that was fine-tuned after it was loaded still has the name of what it was loaded from.
    """
    if not name or not is_here(name):
        return None
    base: Any = model.get_base_model()
    replaced = [n for n, m in base.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    config, settings = copy.deepcopy(base.config), {}
    if (method := getattr(config, "quantization_config", None)) is not None:
        if saved_quantised(name):
            config.quantization_config = method.to_dict()
        else:
            del config.quantization_config
            settings["quantization_config"] = method
    try:
        with torch.random.fork_rng(devices=[]), _quiet_about_heads():
            named = type(base).from_pretrained(
                name, config=config, dtype=base.dtype, ignore_mismatched_sizes=True, local_files_only=True,
                use_safetensors=True, **settings,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError, TypeError, AttributeError, SafetensorError):
        return False
    theirs = named.state_dict()
    for key, weight in base.state_dict().items():
        plain = key.replace(".base_layer.", ".")
        if ".lora_" in key or any(key.startswith(f"{module}.") for module in replaced):
            continue
        if plain not in theirs or not _same(theirs[plain], weight):
            return False
    return True


def saved_quantised(name: str) -> bool:
    """Whether a checkpoint that is here holds codes."""
    return "quantization_config" in PretrainedConfig.get_config_dict(name, local_files_only=True)[0]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    pairs = zip(plain_tensors(one), plain_tensors(other), strict=False)
    return type(one) is type(other) and all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
