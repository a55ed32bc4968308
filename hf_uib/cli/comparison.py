"""One classifier before and after unlearning, loaded from what a run leaves or from two checkpoints."""

import json
import os
import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open

from ..data.labels import several_labels
from ..data.sources import PROCESSORS, load_processor
from ..hub.push import MERGED
from ..inference import reader_of
from ..models import fingerprint, forward_columns, input_kind, labels_tokens, load_classifier
from ..provenance import STATE_NAME, requests_of, undo
from .digits import digits_colour
from .parser import in_one_line

FOLDER = "unlearned"  # what `hf-uib demo` writes to
HUES = 10


@dataclass
class AppArguments:
    """Which models to show."""

    adapter: str | None = field(
        default=None, metadata={"help": f"Adapter that UIBTrainer saved: folder or Hub id. Default: ./{FOLDER}."}
    )
    base: str | None = field(
        default=None,
        metadata={
            "help": "Base of the adapter, where it names none. By default it is made from the folder's merged/."
        },
    )
    model: str | None = field(
        default=None, metadata={"help": "Instead of an adapter: the model after unlearning, folder or Hub id."}
    )
    reference: str | None = field(default=None, metadata={"help": "With --model: the model before."})
    share: bool = field(default=False, metadata={"help": "Also make a public link, through gradio's servers."})
    server_port: int | None = field(default=None, metadata={"help": "Port; gradio's 7860 or the next free one."})


@dataclass
class Comparison:
    """One classifier before and after unlearning.

    Attributes:
        model: after; a `PeftModel` whose base is the model before, if there is no reference.
        reference: before.
        processor: image processor or tokenizer.
        request: what was to be forgotten, in words.
        digits: pictures and hues to start with, for the model of the digits demo.
    """

    model: Any
    reference: Any
    processor: Any
    request: str | None
    digits: list[list] | None = None

    def __post_init__(self):
        self.lock = threading.Lock()  # an adapter is switched off for all threads
        self.names = [str(self.model.config.id2label[i]) for i in range(self.model.config.num_labels)]

    @property
    def takes_images(self) -> bool:
        """Else texts."""
        return input_kind(self.model) == "image"

    def probabilities(self, rows: list) -> tuple[np.ndarray, np.ndarray]:
        """Of the classes, before and after: two arrays ``[n, classes]`` for n pictures or texts."""
        # a picture of any size is welcome, also where training needed no resizing
        settings = {"do_resize": True} if self.takes_images else {"truncation": True, "padding": True}
        encoded = self.processor(rows, return_tensors="pt", **settings)
        inputs = {name: value for name, value in encoded.items() if name in forward_columns(self.model)}
        with self.lock, torch.no_grad():
            after = self.model(**inputs).logits
            with self.model.disable_adapter() if self.reference is None else nullcontext():
                before = (self.reference or self.model)(**inputs).logits
        return before.softmax(-1).numpy(), after.softmax(-1).numpy()


def load(job: AppArguments) -> Comparison:
    """The models that the command line names.

    Raises:
        ValueError: a model is missing or does not fit the other one.
    """
    if job.model is None and job.reference is None:
        return _load_adapter(job)
    if job.model is None or job.reference is None or job.adapter or job.base:
        raise ValueError("--model and --reference go together, without --adapter and --base.")
    model: Any = load_classifier(job.model, dtype=torch.float32)
    reference: Any = load_classifier(job.reference, dtype=torch.float32)
    kinds = [(m.main_input_name, m.config.num_labels) for m in (model, reference)]
    if kinds[0] != kinds[1]:
        what = " and ".join(f"{classes} classes from {taken}" for taken, classes in kinds)
        raise ValueError(f"--model and --reference tell {what}; give two checkpoints of one task.")
    requests = requests_of(model)
    processor = _processor(model, job.model, job.reference)
    return Comparison(model.eval(), reference.eval(), processor, requests[-1]["request"] if requests else None)


def _load_adapter(job: AppArguments) -> Comparison:
    adapter = job.adapter or FOLDER
    if job.adapter is None and not os.path.isdir(FOLDER):
        raise ValueError(
            f"there is no ./{FOLDER} yet; run `hf-uib demo` first, or give --adapter, or --model and --reference."
        )
    recorded = _recorded(adapter)
    base = job.base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    merged = os.path.join(adapter, MERGED)
    if base:
        model = _attach(load_classifier(base), adapter, base)
        if recorded and fingerprint(model) != recorded["base"]:
            raise ValueError(
                f"{base} is not, to the bit, what {adapter} was trained on; give that as --base, or any two checkpoints as "
                "--model and --reference."
            )
        model = model.float()
    elif os.path.isdir(merged):
        whole: Any = load_classifier(merged, dtype=torch.float32)
        model = PeftModel.from_pretrained(undo(whole, adapter), adapter)
    else:
        raise ValueError(f"{adapter} does not name its base, and has no {MERGED}/; give --base.")
    request = recorded["record"]["request"] if recorded else None
    processor = _processor(model, adapter, base or merged)
    return Comparison(model.eval(), None, processor, request, _digits(adapter))


def _attach(model, adapter: str, base: str) -> PeftModel:
    try:
        return PeftModel.from_pretrained(model, adapter)
    except Exception as error:  # other sizes, no such layers, or settings that this PEFT does not know
        reason = in_one_line(error)
        raise ValueError(f"{adapter} does not fit {base}; give the base it was trained on. ({reason})") from error


def _recorded(adapter: str) -> dict:
    """What the trainer wrote beside the adapter; nothing if hf_uib did not train it."""
    path = os.path.join(adapter, STATE_NAME)
    try:
        with safe_open(path if os.path.isdir(adapter) else hf_hub_download(adapter, STATE_NAME), "pt") as file:
            return json.loads(file.metadata()["uib"])
    except OSError:
        return {}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{STATE_NAME} of {adapter} cannot be read ({in_one_line(error)}); save it again.") from error


def _processor(model, *names: str):
    """Image processor or tokenizer of the first checkpoint that has one."""
    own = input_kind(model)
    if own not in ("image", "text") or several_labels(model.config) or labels_tokens(model):
        raise ValueError(
            f"The app shows classifiers of pictures and texts with one label; this is a {type(model).__name__}."
        )
    reasons = []
    for name in names:
        try:
            processor = load_processor(name, kind=own)
        except Exception as error:  # whatever a library says of its files
            reasons.append(in_one_line(error))
            continue
        if own == "text" and (longest := reader_of(model, processor).longest()) is not None:
            processor.model_max_length = longest  # as texts were cut in training and audit
        return processor
    kind = PROCESSORS[own]
    raise ValueError(f"{' and '.join(names)} have no {kind}; save it there with save_pretrained. ({reasons[-1]})")


def _digits(adapter: str) -> list[list] | None:
    """The first ten test digits, each in another hue, if the adapter is that of the digits demo."""
    try:
        with open(os.path.join(adapter, "report.json"), encoding="utf-8") as file:
            report = json.load(file)
    except (OSError, ValueError):  # none, or somebody else's
        return None
    if not isinstance(report, dict) or report.get("task") != "digits-colour":
        return None
    test = digits_colour(int(report.get("seed", 0))).sets["test"].with_format(None)
    return [[test[i * HUES + i]["image"], i] for i in range(HUES)]
