"""The unlearning model card: written after `save_pretrained`, so that nothing overwrites it."""

import dataclasses
import math
import os
import re
from importlib import metadata, resources

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainingArguments

from .. import __version__
from ..audit.columns import COLUMNS
from ..config import UIBConfig


def hub_id(name: str | None) -> str | None:
    """``name`` if it can be a Hub id; a path on this machine is nobody else's business."""
    if name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not os.path.exists(name):
        return name
    return None


def results_table(results: dict[str, dict]) -> str:
    """A Markdown table of models x metrics, with the direction of each."""
    names = [key for key in COLUMNS if any(key in row for row in results.values())]
    if not names:
        return ""
    lines = [
        "| | " + " | ".join(f"{COLUMNS[n][0]} ({COLUMNS[n][1]})" for n in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for model, row in results.items():
        lines.append(f"| {model} | " + " | ".join(_number(row.get(n), n) for n in names) + " |")
    return "\n".join(lines)


def _number(value, name: str) -> str:
    if value is None and name == "seconds":
        return ""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "not measured"
    return f"{value:.1f}" if name == "seconds" else f"{value:.3f}"


def own_settings(args) -> dict[str, object]:
    """Settings of the bound, and those of the optimizer that matter."""
    own = [f for f in dataclasses.fields(type(args)) if f.name in _OWN]
    return {f.name: getattr(args, f.name) for f in own}


_OWN = {
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    *(
        f.name
        for f in dataclasses.fields(UIBConfig)
        if f.name not in {g.name for g in dataclasses.fields(TrainingArguments)}
    ),
}


def write_card(trainer, folder: str) -> None:
    """Write ``README.md`` to ``folder``: what was asked to be forgotten, how, what was measured, and what is left.

    Data sets are named by fingerprint and size; no example of any set is shown.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = hub_id(getattr(model.config, "_name_or_path", None))
    picture = getattr(model, "main_input_name", "") == "pixel_values"
    sets = {
        "forget": trainer.forget_dataset,
        "retain": trainer.retain_dataset,
        "calibration": trainer.calibration_dataset,
    }
    sizes = {name: len(dataset) for name, dataset in sets.items() if dataset is not None}
    settings = own_settings(trainer.args)
    measured = {name: trainer.statistics.get(name) for name in ("noise_to_signal", "prior_strength")}
    settings |= {name: round(value, 4) for name, value in measured.items() if value is not None}
    card_data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="image-classification" if picture else "text-classification",
        tags=[*trainer._tag_names, "peft", "lora"],
        **({"base_model_relation": "adapter"} if base else {}),
        unlearning={
            "method": "uib",
            "forget_examples": sizes["forget"],
            "forget_fingerprint": trainer.forget_fingerprint,
            "retain_examples": sizes.get("retain", 0),
            "prior": type(trainer.prior).__name__,
        },
    )
    versions = {name: metadata.version(name) for name in ("transformers", "peft", "torch", "datasets", "accelerate")}
    card = ModelCard.from_template(
        card_data,
        template_str=resources.files(__package__).joinpath("templates/card.md").read_text(encoding="utf-8"),
        title=os.path.basename(os.path.abspath(folder)),
        base=base or "a checkpoint that is not on the Hub",
        request=trainer.request,
        sizes=sizes,
        fingerprint=trainer.forget_fingerprint,
        steps=trainer.state.global_step,
        settings=settings,
        pattern_z=trainer.statistics.get("pattern_z"),
        table=results_table(trainer.results),
        has_oracle="retrained" in trainer.results,
        figures=[
            name for name in ("bias.png", "layers.png", "audit.png") if os.path.isfile(os.path.join(folder, name))
        ],
        verdict=trainer.audit_report.verdict if trainer.audit_report else "",
        checks=trainer.audit_report.checks if trainer.audit_report else [],
        auto_class="AutoModelForImageClassification" if picture else "AutoModelForSequenceClassification",
        paper=trainer._paper,
        versions={"hf_uib": __version__, **versions},
    )
    card.save(os.path.join(folder, "README.md"))
