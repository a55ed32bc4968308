"""Cost of a step, against a plain LoRA step on the same number of examples, and of the statistics pass."""

import json
import os
import subprocess
import sys
import time

import numpy as np

from . import cells

COST, SCALING = os.path.join(cells.ROOT, "cost.jsonl"), os.path.join(cells.ROOT, "scaling.jsonl")
PROCESSES = os.path.join(cells.ROOT, "cost_processes.jsonl")
GPU_COST = os.path.join(cells.ROOT, "cost_gpu.jsonl")
SMALL, BASE = ("ViT 192x6", "minilm-size BERT"), ("ViT-B/16", "BERT-base")


def model_and_columns(name: str, rows: int, width: int | None = None, layers: int | None = None):
    """A randomly initialised classifier of some size, and random inputs for it."""
    from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

    

    rng = np.random.default_rng(0)
    if "BERT" in name:
        small = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        config, length = BertConfig(**({} if name == "BERT-base" else small)), 128 if name == "BERT-base" else 40
        columns = {
            "input_ids": rng.integers(5, 30000, (rows, length)).tolist(),
            "attention_mask": np.ones((rows, length), int).tolist(),
        }
        return BertForSequenceClassification(config), columns
    size = 224 if name == "ViT-B/16" else 28
    columns = {"pixel_values": rng.normal(size=(rows, 3, size, size)).astype("float32").tolist()}
    if name == "ViT-B/16":
        return ViTForImageClassification(ViTConfig(num_labels=2)), columns
    return digits.small_vit(28, 7, ["a", "b"], hidden=width or 192, layers=layers or 6), columns


def cost_cell(variant: str, model_name: str, retain: int, forget: int, options) -> None:
    """One process: median step time and peak memory of a variant; prints a JSON line."""
    import resource
    import statistics

    import datasets
    import torch
    from peft import get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from hf_uib import UIBConfig, UIBTrainer
    from hf_uib.lora import default_peft_config

    cells.quiet()
    rows, steps, gpu = 512 if model_name in SMALL else 128, 16, torch.cuda.is_available()
    labels = np.random.default_rng(0).integers(0, 2, rows).tolist()
    model, columns = model_and_columns(model_name, rows)

    def dataset(seed):
        return datasets.Dataset.from_dict(
            columns | {"labels": labels, "row": list(range(seed, seed + rows))}
        ).with_format("torch")

    class Clock(TrainerCallback):
        def __init__(self):
            self.starts, self.times = 0.0, []

        def on_step_begin(self, *args, **kwargs):
            self.starts = self.now()

        def on_step_end(self, *args, **kwargs):
            self.times.append(self.now() - self.starts)

        @staticmethod
        def now():
            if gpu:
                torch.cuda.synchronize()
            return time.perf_counter()

    clock, folder = Clock(), options.cache
    common = dict(
        max_steps=steps, save_strategy="no", disable_tqdm=True, logging_steps=1000, learning_rate=1e-4, bf16=gpu, use_cpu=not gpu,
    )  # fmt: skip
    if variant == "lora":
        args = TrainingArguments(folder, per_device_train_batch_size=retain + forget, label_names=["labels"], **common)
        trainer = Trainer(
            get_peft_model(model, default_peft_config(model, 16)),
            args,
            train_dataset=dataset(0).remove_columns("row"),
            callbacks=[clock],
        )
    else:
        args = UIBConfig(
            folder, per_device_train_batch_size=retain, forget_batch_size=max(forget, 1), noise_to_signal=0.5, prior_fraction=1.0,
            prior="calibrated" if forget else "none", prior_update_steps=1000, contrast_samples=64, **common,
        )  # fmt: skip
        trainer = UIBTrainer(model, args, dataset(rows), dataset(0), dataset(2 * rows), callbacks=[clock])
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cell = {"model": model_name, "variant": variant, "retain": retain, "forget": forget}
    cell |= {"step_seconds": statistics.median(clock.times[2:]), "peak_mb": peak / 2**20}
    cell |= {"processes": trainer.args.world_size}
    if trainer.is_world_process_zero():
        print(
            json.dumps(cell | {"device": torch.cuda.get_device_name() if gpu else "CPU", "torch": torch.__version__})
        )


def run_cost(options) -> None:
    """Every variant in a process of its own, interleaved, three times; nothing else may run beside it."""
    path, models = (GPU_COST, BASE) if options.suite == "gpu" else (COST, SMALL)
    if os.path.exists(path):
        os.remove(path)
    for repeat in range(3):
        for model in models:
            for variant, retain, forget in (("lora", 32, 0), ("uib", 32, 0), ("lora", 32, 32), ("uib", 32, 32)):
                cells.append(path, _apart(options, variant, model, retain, forget) | {"repeat": repeat})


def run_processes(options) -> None:
    """UIB's step under one and under two CPU processes, the same rows a process, three times; nothing else may run beside it."""
    if os.path.exists(PROCESSES):
        os.remove(PROCESSES)
    for repeat in range(3):
        for processes in (1, 2):
            for variant in ("lora", "uib"):
                cell = _apart(options, variant, SMALL[0], 32, 32, processes)
                cells.append(PROCESSES, cell | {"repeat": repeat})


def _apart(options, variant: str, model: str, retain: int, forget: int, processes: int = 1) -> dict:
    """A cell, in one or several processes of its own."""
    folder = os.path.join(os.path.dirname(__file__), "..")
    command = [sys.executable]
    if processes > 1:
        config = os.path.join(folder, "accelerate_configs", "cpu_two_processes.yaml")
        command += ["-m", "accelerate.commands.launch", "--config_file", config]
    command += [os.path.join(folder, "benchmark.py"), "--cost_cell", variant, model, str(retain), str(forget)]
    done = subprocess.run([*command, "--cache", options.cache], capture_output=True, text=True, check=True)
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"model"')))


BASELINE = {"samples": 256, "width": 96, "layers": 4}
VARIED = {"samples": [64, 128, 256, 512, 1024], "width": [48, 96, 192, 384], "layers": [2, 4, 8, 16]}


def run_scaling(options) -> None:
    """Seconds of the statistics pass (subspace and scales; no noise bisection) against rows, width and depth of a ViT."""
    import datasets

    from hf_uib import UIBConfig, UIBTrainer

    cells.quiet()
    if os.path.exists(SCALING):
        os.remove(SCALING)
    rows = max(VARIED["samples"])
    labels = np.random.default_rng(0).integers(0, 2, rows).tolist()
    for repeat in range(3):
        for what, values in VARIED.items():
            for value in values:
                point = BASELINE | {what: value}
                model, columns = model_and_columns("ViT", rows, point["width"], point["layers"])
                forget, retain = (
                    datasets.Dataset.from_dict(
                        columns | {"labels": labels, "row": list(range(start, start + rows))}
                    ).with_format("torch")
                    for start in (0, rows)
                )
                args = UIBConfig(options.cache, max_steps=1, contrast_samples=point["samples"], disable_tqdm=True)
                trainer = UIBTrainer(model, args, forget, retain, retain)
                start = time.perf_counter()
                trainer._measure_contrast()
                seconds = time.perf_counter() - start
                cells.append(SCALING, {"varied": what, "value": value, "repeat": repeat, "seconds": seconds})


def processes_table() -> list[str]:
    """Examples per second under one and two processes, and the ratio of each process's."""
    runs = cells.read(PROCESSES)
    if not runs:
        return []
    parts = [
        "### Throughput under one and two CPU processes\n",
        f"{runs[0]['model']}, 32 + 32 examples a step and process, one thread each, two cores; median of three repeats.\n",
        "| | examples per second, one process | two processes | each process, of one alone |",
        "|---|---|---|---|",
    ]
    for variant, title in (("lora", "plain LoRA step"), ("uib", "UIB")):
        one, two = (
            float(
                np.median([64 * n / c["step_seconds"] for c in runs if (c["variant"], c["processes"]) == (variant, n)])
            )
            for n in (1, 2)
        )
        parts.append(f"| {title} | {one:.0f} | {two:.0f} | {two / 2 / one:.2f} |")
    return [*parts, ""]


def tables() -> list[str]:
    """Ratios of step time and peak memory; exponents of the statistics pass."""
    parts = []
    for path, where in ((COST, "two CPU cores"), (GPU_COST, "GPU, bf16")):
        costs = cells.read(path)
        if not costs:
            continue
        parts += [
            f"### Target 4: cost of a step, as a ratio to a plain LoRA step on the same number of examples ({where})\n",
            f"{costs[0].get('device', 'CPU')}; median of three repeats, each variant in a process of its own.\n",
            "| model | retained + forget examples | step time | peak memory | LoRA step, ms |",
            "|---|---|---|---|---|",
        ]
        for model in dict.fromkeys(c["model"] for c in costs):
            for forget in (0, 32):
                ratios, plain_ms = {}, 0.0
                for key in ("step_seconds", "peak_mb"):
                    mine, plain = (
                        np.array(
                            [c[key] for c in costs if (c["model"], c["variant"], c["forget"]) == (model, v, forget)]
                        )
                        for v in ("uib", "lora")
                    )
                    ratios[key] = np.median(mine / plain)
                    plain_ms = 1000 * float(np.median(plain)) if key == "step_seconds" else plain_ms
                parts.append(
                    f"| {model} | 32 + {forget} | {ratios['step_seconds']:.2f} | {ratios['peak_mb']:.2f} | {plain_ms:.1f} |"
                )
        parts.append("")
    parts += processes_table()
    points = cells.read(SCALING)
    if points:
        parts += [
            "### How the statistics pass grows\n",
            "Seconds of the pass over both samples against one quantity at a time (ViT, two CPU cores, median of the repeats); "
            "exponent of a fitted power.\n",
            "| varied | values | seconds | exponent |",
            "|---|---|---|---|",
        ]
        for what in VARIED:
            values = sorted({p["value"] for p in points if p["varied"] == what})
            seconds = [
                float(np.median([p["seconds"] for p in points if (p["varied"], p["value"]) == (what, v)]))
                for v in values
            ]
            exponent = np.polyfit(np.log(values), np.log(seconds), 1)[0]
            name = {"samples": "rows of each set", "width": "hidden size", "layers": "layers"}[what]
            shown = ", ".join(f"{s:.2f}" for s in seconds)
            parts.append(f"| {name} | {', '.join(map(str, values))} | {shown} | {exponent:.2f} |")
        parts.append("")
    return parts
