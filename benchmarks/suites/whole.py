"""What a whole run costs beside plain LoRA fine-tuning: same rows, same steps, everything included."""

import copy
import time
from functools import partial

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification, set_seed

from hf_uib.cli.digits import Task, biased_pictures, paint

from .. import results
from ..markdown import table
from ..methods import METHODS, Budget
from ..methods.uib import uib_trainer
from ..tasks.fashion import fashion_processor
from . import runs

WHOLE = results.FOLDER / "cost_whole.jsonl"
STEPS, BATCH, REPEATS = 120, 16, 3
# The channel is closed whatever the contrast of a model that has learned nothing yet: that is the dear case
PATTERN = {"channel_settings": {"pattern_z": -1e9, "pattern_effect": -1e9}}


def vit_task(seed: int) -> Task:
    """Random pictures of 28 x 28 for a ViT of 192 x 6, 49 patches each; only the seconds count."""
    rng, names = np.random.default_rng(seed), [str(i) for i in range(10)]
    pool = rng.random((1400, 28, 28)), rng.integers(0, 10, 1400)
    config = ViTConfig(
        image_size=28, patch_size=4, hidden_size=192, num_hidden_layers=6, num_attention_heads=6, intermediate_size=768,
        num_labels=10,
    )  # fmt: skip
    sizes = {"forget": 900, "retain": 300, "calibration": 100, "validation": 100}
    return biased_pictures(
        "vit-192x6", pool, (pool[0][:10], pool[1][:10]), sizes, "colour", paint, names, fashion_processor(),
        partial(ViTForImageClassification, config), rng, {},
    )  # fmt: skip


def tasks(options) -> dict[str, Task]:
    """By the model's name."""
    return {
        "ViT 192 x 6": vit_task(0),
        "MiniLM": runs.build("tweets-airline", 0, options),
        "DINOv2-small": runs.build("dino-shade", 0, options),
    }


def run_whole(options) -> None:
    """`REPEATS` pairs of runs of each model, LoRA and UIB in turn."""
    runs.quiet()
    for name, task in tasks(options).items():
        set_seed(0)
        model = task.new_model()
        for repeat in range(REPEATS):
            budget = Budget(STEPS, BATCH, METHODS["lora"].learning_rate or 1e-3, repeat, options.cache)
            start = time.perf_counter()
            METHODS["lora"].train(copy.deepcopy(model), task, budget)
            lora = time.perf_counter() - start
            start = time.perf_counter()
            trainer = uib_trainer(copy.deepcopy(model), task, budget, **PATTERN)
            trainer.train()
            uib = time.perf_counter() - start
            line = {"model": name, "repeat": repeat, "lora": lora, "uib": uib, "threads": torch.get_num_threads()}
            measured = trainer.measured_examples
            results.append(
                WHOLE,
                line | {"examples": STEPS * BATCH, "samples": trainer.measurements.samples, "measured": measured},
            )


def whole_table() -> list[str]:
    """Seconds, their ratio, and where the rows go."""
    lines = results.read(WHOLE)
    if not lines:
        return []
    rows = []
    for name in dict.fromkeys(line["model"] for line in lines):
        mine = [line for line in lines if line["model"] == name]
        ratios = [line["uib"] / line["lora"] for line in mine]
        seconds = [f"{np.median([line[k] for line in mine]):.1f}" for k in ("lora", "uib")]
        rows.append([name, *seconds, f"{np.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"])
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
        f"{STEPS} steps of {BATCH} rows under a pattern, everything included (loading the trainer too), {one['threads']} threads; "
        f"medians of {REPEATS} pairs, LoRA and UIB in turn. The models have learned nothing yet. Where the test for label noise "
        "fires by chance, forget rows come too, and a run takes half as much time again.\n",
        *table(["", "LoRA, seconds", "UIB, seconds", "ratio", "range"], rows),
        f"Rows that pass through the model ({one['samples']} of each set in the statistics pass). A step's row counts as one "
        "unit, forward and backward; a forward alone as a third.\n",
        *table(["part", "forward", "backward", "units"], [[str(c) for c in row] for row in parts]),
    ]
