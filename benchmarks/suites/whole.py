"""What a whole run costs beside plain LoRA fine-tuning: same checkpoint, same retained rows, same steps, everything included."""

import copy
import dataclasses
import time
from functools import partial

import numpy as np
import torch
from peft import get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_uib.cli.digits import Task, fit
from hf_uib.lora import default_peft_config

from .. import results
from ..markdown import table
from ..methods import METHODS, Budget
from ..methods.uib import uib_trainer
from . import runs

WHOLE = results.FOLDER / "cost_whole.jsonl"
STEPS, BATCH, REPEATS = 120, 16, 3
TASKS = {"ViT 192 x 6": "fashion-colour", "MiniLM": "tweets-airline", "DINOv2-small": "dino-colour"}


def vit_task(options) -> Task:
    """Pictures of fashion_mnist for a ViT of 192 x 6, 49 patches each, not trained on unbiased pictures first."""
    task = runs.build("fashion-colour", 0, options)
    names = task.new_model().config.id2label.values()
    config = ViTConfig(
        image_size=28, patch_size=4, hidden_size=192, num_hidden_layers=6, num_attention_heads=6, intermediate_size=768,
        num_labels=len(names),
    )  # fmt: skip
    sets = {name: rows for name, rows in task.sets.items() if name != "pretrain"}
    return dataclasses.replace(
        task, name="whole-fashion-colour", sets=sets, new_model=partial(ViTForImageClassification, config)
    )


def lora(model: nn.Module, task: Task, budget: Budget) -> None:
    """The benchmark's plain loop, which has no Trainer around it."""
    METHODS["lora"].train(model, task, budget)


def lora_with_trainer(model: nn.Module, task: Task, budget: Budget) -> None:
    """The same by PEFT and Transformers' Trainer."""
    task = dataclasses.replace(task, train_settings=task.train_settings | {"batch": BATCH})
    adapted = get_peft_model(model, default_peft_config(model, 16))
    fit(adapted, task.sets["retain"], task, STEPS, budget.output_dir, budget.seed, budget.learning_rate)


def run_whole(options) -> None:
    """`REPEATS` times each way from each task's checkpoint, in turn."""
    runs.quiet()
    for name, of in TASKS.items():
        task = vit_task(options) if name.startswith("ViT") else runs.build(of, 0, options)
        original = runs.checkpoints(task, task.name, 0, options)["original"]
        for repeat in range(REPEATS):
            budget = Budget(STEPS, BATCH, METHODS["lora"].learning_rate or 1e-3, repeat, options.cache)
            line = {"model": name, "task": of, "repeat": repeat, "threads": torch.get_num_threads()}
            for way in (lora, lora_with_trainer):
                start, model = time.perf_counter(), copy.deepcopy(original)
                way(model, task, budget)
                line[way.__name__] = time.perf_counter() - start
            start = time.perf_counter()
            trainer = uib_trainer(copy.deepcopy(original), task, budget)
            trainer.train()
            line["uib"] = time.perf_counter() - start
            measured = {"samples": trainer.measurements.samples, "measured": trainer.measured_examples}
            results.append(WHOLE, line | {"examples": STEPS * BATCH} | measured)


def whole_table() -> list[str]:
    """Seconds, their ratio, and where the rows go."""
    lines = results.read(WHOLE)
    if not lines:
        return []
    rows = []
    for name in dict.fromkeys(line["model"] for line in lines):
        mine = [line for line in lines if line["model"] == name]
        cells = [f"{np.median([line[way] for line in mine]):.1f}" for way in ("lora", "lora_with_trainer", "uib")]
        for way in ("lora", "lora_with_trainer"):
            ratios = [line["uib"] / line[way] for line in mine]
            cells.append(f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        rows.append([name, *cells])
    one = lines[-1]
    backward = 2 * one["samples"]  # rows of the contrast: forward and backward
    parts = [
        ["steps", one["examples"], one["examples"], f"{one['examples']:.0f}"],
        ["contrast", backward, backward, f"{backward:.0f}"],
        [
            "lengths, tokens' effect, label noise",
            one["measured"] - backward,
            0,
            f"{(one['measured'] - backward) / 3:.0f}",
        ],
    ]
    return [
        "## Whole runs against LoRA fine-tuning\n",
        f"{STEPS} steps of {BATCH} rows from a checkpoint of "
        + ", ".join(f"{task} ({name})" for name, task in TASKS.items())
        + f"; everything included (loading the trainer too), {one['threads']} threads; medians of {REPEATS} "
        "repeats, in turn. The plain loop is the benchmark's; with the Trainer it is what PEFT's users run.\n",
        *table(
            ["", "LoRA in a plain loop, seconds", "LoRA with Trainer", "UIB", "UIB / plain loop", "UIB / Trainer"],
            rows,
        ),
        f"Rows that pass through the model ({one['samples']} of each set in the statistics pass). A step's row counts as one "
        "unit, forward and backward; a forward alone as a third.\n",
        *table(["part", "forward", "backward", "units"], [[str(c) for c in row] for row in parts]),
    ]
