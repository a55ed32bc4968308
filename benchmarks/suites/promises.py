"""What holds for each kind of input and label: detaching, merging and resuming, and what the audit measures.

Runs of a few steps of the tasks of `reach`.
"""

import copy
import os
import sys
import tempfile
from importlib import import_module
from unittest.mock import patch

import torch
from torch import Tensor, nn

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.models import is_adapters

from .. import results
from ..markdown import table
from . import reach, runs

PROMISES = results.FOLDER / "promises.jsonl"
STEPS = {"steps": 6, "train_steps": 20}
ROWS = 16  # retained rows whose logits are compared


def run_promises(options) -> None:
    """Every task once; those that are there are skipped."""
    runs.quiet()
    sys.path.insert(0, str(reach.EXAMPLES))
    done = {line["example"] for line in results.read(PROMISES)}
    for name in (name for name in reach.TITLES if name not in done):
        with tempfile.TemporaryDirectory() as folder:
            results.append(PROMISES, {"example": name} | promises(name, options, folder))


def promises(name: str, options, folder: str) -> dict:
    """The largest differences, and the checks of the audit by whether they were measured."""
    found: dict = {}
    trainers: dict[str, UIBTrainer] = {}

    def train_both(original: nn.Module, settings: dict, **given) -> dict[str, UIBTrainer]:
        settings = settings | {"save_strategy": "steps", "save_steps": STEPS["steps"] // 2, "output_dir": folder}

        def new() -> UIBTrainer:
            return UIBTrainer(copy.deepcopy(original), UIBConfig(**settings), **given)

        trainer, resumed = new(), new()
        trainer.train()
        checkpoint = os.path.join(folder, f"checkpoint-{settings['save_steps']}")
        resumed.train(resume_from_checkpoint=checkpoint)
        found["resumed"] = largest(adapter_of(trainer), adapter_of(resumed))
        found["detached"] = largest(original.state_dict(), trainer.detach().state_dict())
        trainer.save_merged(os.path.join(folder, "merged"))
        merged = type(original).from_pretrained(os.path.join(folder, "merged"))
        found["merged"] = largest(logits_of(trainer, trainer.model), logits_of(trainer, merged))
        trainers["UIB"] = trainer
        return trainers

    with patch.object(import_module("beside_lora"), "train_both", train_both):
        reach.run(name, 0, options, folder, STEPS)
    report = trainers["UIB"].audit_report
    return found | {
        "measured": [check.name for check in report.checks if check.fired is not None],
        "not_measured": [check.name for check in report.checks if check.fired is None],
    }


def adapter_of(trainer: UIBTrainer) -> dict[str, Tensor]:
    """The adapter's weights, by name."""
    return {name: weight for name, weight in trainer.model.state_dict().items() if is_adapters(name)}


def largest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference of two states with the same names."""
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


@torch.no_grad()
def logits_of(trainer: UIBTrainer, model: nn.Module) -> dict[str, Tensor]:
    """Of the first retained rows."""
    batch = trainer.data_collator.collate([trainer.retain_dataset[i] for i in range(ROWS)])
    features = {name: values.to(trainer.args.device) for name, values in batch.items() if name != "labels"}
    return {"logits": model.to(trainer.args.device).eval()(**features).logits}


def promises_table() -> list[str]:
    """One line a kind."""
    lines = {line["example"]: line for line in results.read(PROMISES)}
    if not lines:
        return []
    rows = [
        [
            title,
            *(f"{lines[name][key]:.2g}" for key in ("detached", "merged", "resumed")),
            str(len(lines[name]["measured"])),
            ", ".join(lines[name]["not_measured"]) or "none",
        ]
        for name, title in reach.TITLES.items()
        if name in lines
    ]
    return [
        "## What holds for every kind\n",
        f"After {STEPS['steps']} steps, seed 0. The largest difference of a base weight after detaching; of a logit after "
        "the merged model was saved and loaded; of an adapter's weight between a run and one resumed half-way. And the "
        "audit's checks; a run so short has learned too little for some (`bias_remains`, `head_refit`).\n",
        *table(["", "detached", "merged", "resumed", "checks measured", "checks not measured"], rows),
    ]
