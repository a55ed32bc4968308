"""UIB, and LoRA fine-tuning by the same trainer, from one checkpoint on the same rows: what other examples compare."""

import copy
from collections.abc import Callable

from torch import nn

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.metrics import text_table

# What is left of the method without its parts
LORA = {"prior": "none", "beta": 0.0, "posterior": "map", "trainable_factors": "both"}
SETTINGS: dict[str, dict] = {"UIB": {}, "LoRA": LORA}


def train_both(original: nn.Module, settings: dict, **given) -> dict[str, UIBTrainer]:
    """The trained trainers by the names of `SETTINGS`.

    Args:
        original: the checkpoint; it stays as it is.
        settings: of `UIBConfig`.
        given: further arguments of `UIBTrainer`: the sets, the processor.
    """
    trainers = {}
    for name, setting in SETTINGS.items():
        trainers[name] = UIBTrainer(copy.deepcopy(original), UIBConfig(**settings, **setting), **given)
        trainers[name].train()
    return trainers


def compare(
    original: nn.Module,
    retrained: nn.Module,
    row: Callable[[nn.Module], dict[str, float]],
    settings: dict,
    audit: dict,
    **given,
) -> tuple[dict[str, dict], str]:
    """Train both; prints and returns a row of each model, and the verdict of the audit of UIB's.

    Args:
        original: the checkpoint; it stays as it is.
        retrained: the same model, trained without the forget set.
        row: figures of a model on the test rows.
        settings: of `UIBConfig`.
        audit: arguments of `UIBTrainer.audit`.
        given: further arguments of `UIBTrainer`: the sets, the processor.
    """
    trainers = train_both(original, settings, **given)
    models = {
        "original": original,
        **{name: trainer.model for name, trainer in trainers.items()},
        "retrained": retrained,
    }
    rows = {name: row(model) for name, model in models.items()}
    report = trainers["UIB"].audit(retrained_model=retrained, **audit)
    of = f" of the label '{audit['label']}'" if "label" in audit else ""
    print(f"\n{text_table(rows)}\n\nAudit{of}: {report.verdict}")
    return rows, report.verdict
