"""Cost of a step, against a plain LoRA step on the same number of examples, and of the statistics pass."""

import gc
import json
import os
import resource
import statistics
import sys
import time

import datasets
import numpy as np
import torch
from accelerate import PartialState
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.cli.digits import small_vit
from hf_uib.lora import default_peft_config

from .. import results
from ..markdown import table
from . import runs
from .launch import accelerate_config, json_of

COST = results.FOLDER / "cost.jsonl"
PROCESSES, SCALING = results.FOLDER / "cost_processes.jsonl", results.FOLDER / "scaling.jsonl"
SMALL = ("ViT 192x6", "minilm-size BERT")
SMALL_BERT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
SCALING_POINT = {"samples": 256, "width": 96, "layers": 4}
VARIED = {"samples": [64, 128, 256, 512, 1024], "width": [48, 96, 192, 384], "layers": [2, 4, 8, 16]}
VARIED_TITLES = {"samples": "rows of each set", "width": "hidden size", "layers": "layers"}


def model_and_columns(name: str, rows: int, width: int = 192, layers: int = 6) -> tuple:
    """A randomly initialised classifier of some size, and random inputs for it."""
    rng = np.random.default_rng(0)
    if "BERT" in name:
        config, length = BertConfig(**SMALL_BERT), 40
        columns = {
            "input_ids": rng.integers(5, 30000, (rows, length)).tolist(),
            "attention_mask": np.ones((rows, length), int).tolist(),
        }
        return BertForSequenceClassification(config), columns
    columns = {"pixel_values": rng.normal(size=(rows, 3, 28, 28)).astype("float32").tolist()}
    return small_vit(28, 7, ["a", "b"], hidden=width, layers=layers), columns


def dataset_of(columns: dict, rows: int, seed: int) -> datasets.Dataset:
    """The inputs with random labels, and row numbers that make sets with different ``seed`` differ."""
    labels = np.random.default_rng(0).integers(0, 2, rows).tolist()
    return datasets.Dataset.from_dict(columns | {"labels": labels, "row": list(range(seed, seed + rows))}).with_format(
        "torch"
    )


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self):
        self.start, self.times = 0.0, []

    def on_step_begin(self, *args, **kwargs):
        """Start."""
        self.start = self.now()

    def on_step_end(self, *args, **kwargs):
        """Stop."""
        self.times.append(self.now() - self.start)

    @staticmethod
    def now() -> float:
        """Seconds, once the device is idle."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def timed_trainer(variant: str, model_name: str, retain: int, forget: int, folder: str, clock: Clock) -> Trainer:
    """A trainer of 16 steps: plain LoRA on all rows of a step, or UIB as under a pattern, with noise and without forget rows, or as
    without one, with the forget loss in every step."""
    rows, gpu = 512, torch.cuda.is_available()
    model, columns = model_and_columns(model_name, rows)
    common = dict(
        max_steps=16, save_strategy="no", disable_tqdm=True, logging_steps=1000, learning_rate=1e-4, bf16=gpu, use_cpu=not gpu,
    )  # fmt: skip
    if variant == "lora":
        args = TrainingArguments(folder, per_device_train_batch_size=retain + forget, label_names=["labels"], **common)
        adapted = get_peft_model(model, default_peft_config(model, 16))
        return Trainer(
            adapted, args, train_dataset=dataset_of(columns, rows, 0).remove_columns("row"), callbacks=[clock]
        )
    args = UIBConfig(
        folder, per_device_train_batch_size=retain, forget_batch_size=max(forget, 1), prior_fraction=1.0,
        noise_to_signal=0.0 if forget else 0.5, prior="calibrated" if forget else "none",
        prior_update_steps=1000, contrast_samples=64, **common,
    )  # fmt: skip
    gone, kept, unseen = (dataset_of(columns, rows, seed) for seed in (rows, 0, 2 * rows))
    return UIBTrainer(model, args, gone, kept, unseen, callbacks=[clock])


def measure_step(variant: str, model: str, retain: int, forget: int, folder: str) -> None:
    """In a process of its own: median step time and peak memory of a variant; prints a JSON line."""
    runs.quiet()
    clock, gpu = Clock(), torch.cuda.is_available()
    trainer = timed_trainer(variant, model, retain, forget, folder, clock)
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = {"model": model, "variant": variant, "retain": retain, "forget": forget}
    line |= {"step_seconds": statistics.median(clock.times[2:]), "peak_mb": peak / 2**20}
    line |= {"processes": trainer.args.world_size, "device": torch.cuda.get_device_name() if gpu else "CPU"}
    if trainer.is_world_process_zero():
        print(json.dumps(line | {"torch": torch.__version__}))


def apart(options, variant: str, model: str, retain: int, forget: int, processes: int = 1) -> dict:
    """`measure_step` in one or several processes of its own."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", accelerate_config("cpu_two_processes")]
    command += ["-m", __name__, variant, model, str(retain), str(forget), os.path.abspath(options.cache)]
    return json_of(command)


def run_cost(options) -> None:
    """Every variant in a process of its own, interleaved, three times; nothing else may run beside it."""
    found = []
    for repeat in range(3):
        for model in SMALL:
            for variant, retain, forget in (("lora", 32, 0), ("uib", 32, 0), ("lora", 32, 32), ("uib", 32, 32)):
                found.append(apart(options, variant, model, retain, forget) | {"repeat": repeat})
    results.replace(COST, found)


def run_processes(options) -> None:
    """UIB's step under one and under two CPU processes, the same rows a process, three times; nothing else may run beside it."""
    found = []
    for repeat in range(3):
        for processes in (1, 2):
            found += [apart(options, v, SMALL[0], 32, 32, processes) | {"repeat": repeat} for v in ("lora", "uib")]
    results.replace(PROCESSES, found)


def run_scaling(options) -> None:
    """Seconds of what is measured before the first step against rows, width and depth of a ViT."""
    runs.quiet()
    rows, found = max(VARIED["samples"]), []
    for repeat in range(3):
        for what, value in ((what, value) for what, values in VARIED.items() for value in values):
            point = SCALING_POINT | {what: value}
            model, columns = model_and_columns("ViT", rows, point["width"], point["layers"])
            sets = (dataset_of(columns, rows, seed) for seed in (0, rows, 2 * rows))
            args = UIBConfig(
                options.cache, max_steps=1, contrast_samples=point["samples"], noise_to_signal=0.5, prior="none",
                save_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            trainer = UIBTrainer(model, args, *sets)
            start = time.perf_counter()
            loop = trainer.train().metrics["train_runtime"]
            seconds = time.perf_counter() - start - loop
            found.append({"varied": what, "value": value, "repeat": repeat, "seconds": seconds})
    results.replace(SCALING, found)


# ---- Tables -----------------------------------------------------------------------------------------------------


def step_table(lines: list[dict], where: str) -> list[str]:
    """Ratios of step time and peak memory."""
    rows = []
    for model in dict.fromkeys(line["model"] for line in lines):
        for forget in (0, 32):
            mine, plain = (
                {
                    key: np.array(
                        [x[key] for x in lines if (x["model"], x["variant"], x["forget"]) == (model, v, forget)]
                    )
                    for key in ("step_seconds", "peak_mb")
                }
                for v in ("uib", "lora")
            )
            ratios = [f"{np.median(mine[key] / plain[key]):.2f}" for key in mine]
            rows.append([model, f"32 + {forget}", *ratios, f"{1000 * np.median(plain['step_seconds']):.1f}"])
    return [
        f"## A step, as a ratio to a plain LoRA step on the same number of examples ({where})\n",
        f"{lines[0].get('device', 'CPU')}; median of three repeats, each variant in a process of its own. The target is 1.15 in "
        "time and 1.10 in memory.\n",
        *table(["model", "retained + forget examples", "step time", "peak memory", "LoRA step, ms"], rows),
    ]


def processes_table(lines: list[dict]) -> list[str]:
    """Examples per second under one and two processes, and the ratio of each process's."""

    def rate(variant: str, n: int) -> float:
        mine = [x["step_seconds"] for x in lines if (x["variant"], x["processes"]) == (variant, n)]
        return 64 * n / float(np.median(mine))

    rows = []
    for variant, title in (("lora", "plain LoRA step"), ("uib", "UIB")):
        one, two = rate(variant, 1), rate(variant, 2)
        rows.append([title, f"{one:.0f}", f"{two:.0f}", f"{two / 2 / one:.2f}"])
    return [
        "## Throughput under one and two CPU processes\n",
        f"{lines[0]['model']}, 32 + 32 examples a step and process, one thread each, two cores; median of three repeats.\n",
        *table(["", "examples per second, one process", "two processes", "each process, of one alone"], rows),
    ]


def scaling_table(points: list[dict]) -> list[str]:
    """Seconds and exponents of the statistics pass."""
    rows = []
    for what, title in VARIED_TITLES.items():
        of: dict[int, list[float]] = {}
        for point in (p for p in points if p["varied"] == what):
            of.setdefault(point["value"], []).append(point["seconds"])
        seconds = {value: float(np.median(of[value])) for value in sorted(of)}
        exponent = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0]
        shown = ", ".join(f"{s:.2f}" for s in seconds.values())
        rows.append([title, ", ".join(map(str, seconds)), shown, f"{exponent:.2f}"])
    return [
        "## How the measuring before the first step grows\n",
        "Seconds of all that is measured before the first step, the pass over both samples among it, against one quantity at a "
        "time (ViT, two CPU cores, median of the repeats); exponent of a fitted power.\n",
        *table(["varied", "values", "seconds", "exponent"], rows),
    ]


def cost_tables() -> list[str]:
    """Everything that was measured."""
    parts = []
    parts += step_table(lines, "two CPU cores") if (lines := results.read(COST)) else []
    parts += processes_table(lines) if (lines := results.read(PROCESSES)) else []
    parts += scaling_table(points) if (points := results.read(SCALING)) else []
    given = (
        "Random inputs and untrained models, so no token is swapped and no short text is read. 32 + 0 has the noise and trains "
        "both factors, as under a pattern; 32 + 32 has the forget loss and trains B alone, as without one.\n"
    )
    return ["## Steps and processes\n", given, *parts] if parts else []


if __name__ == "__main__":
    measure_step(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    gc.collect()  # the trainer goes before its process group
    PartialState().destroy_process_group()
