"""On a GPU, in bf16: a step and a whole run beside plain LoRA at ViT-B/16 and BERT-base size, and what the device changes."""

import copy
import json
import os
import statistics
import sys

import datasets
import numpy as np
import torch
from accelerate import PartialState
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.cli import digits
from hf_uib.inference import predict
from hf_uib.lora import default_peft_config
from hf_uib.metrics import bias_row

from .. import results
from ..markdown import table
from ..methods import METHODS, Budget
from ..methods.uib import uib_trainer
from . import runs
from .cost import Clock
from .launch import json_of
from .whole import REPEATS, STEPS

GPU = results.FOLDER / "cost_gpu.jsonl"
MODELS = ("ViT-B/16", "BERT-base")
ROWS, BATCH, COMPILED_STEPS = 512, 32, 40
# The channel is closed whatever the contrast of a model that has learned nothing yet: that is the dear case
PATTERN = {"channel_settings": {"pattern_z": -1e9, "pattern_effect": -1e9}}


def model_and_sets(name: str, rows: int = ROWS) -> tuple:
    """A randomly initialised classifier of that size, and three sets of random inputs: forget, retain, calibration."""
    rng = np.random.default_rng(0)
    if name == "BERT-base":
        model, shape = BertForSequenceClassification(BertConfig()), (128,)
    else:
        model, shape = ViTForImageClassification(ViTConfig(num_labels=2)), (3, 224, 224)

    def rows_of(seed: int) -> datasets.Dataset:
        labels = {"labels": rng.integers(0, 2, rows).tolist()}
        if len(shape) == 1:
            columns = {
                "input_ids": rng.integers(5, 30000, (rows, *shape)),
                "attention_mask": np.ones((rows, *shape), int),
            }
            return datasets.Dataset.from_dict(columns | labels).with_format("torch")
        features = datasets.Features(
            pixel_values=datasets.Array3D(shape, "float32"), labels=datasets.Value("int64")
        )  # a flat buffer: nested lists of pixels would be what is timed
        pixels = rng.normal(size=(rows, *shape)).astype("float32")
        return datasets.Dataset.from_dict({"pixel_values": pixels} | labels, features).with_format("torch")

    return model, [rows_of(seed) for seed in range(3)]


def timed(variant: str, model, sets, steps: int, folder: str, compiled: bool) -> dict:
    """One run: seconds of all of it, median seconds of a step, peak memory of the device in MB."""
    clock, on_gpu = Clock(), torch.cuda.is_available()
    common = {
        "max_steps": steps, "per_device_train_batch_size": BATCH, "save_strategy": "no", "disable_tqdm": True, "bf16": on_gpu,
        "logging_steps": 10**6, "learning_rate": 1e-4, "torch_compile": compiled, "report_to": "none", "use_cpu": not on_gpu,
    }  # fmt: skip
    model = copy.deepcopy(model)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = clock.now()
    if variant == "LoRA":
        adapted = get_peft_model(model, default_peft_config(model, 16))
        args = TrainingArguments(folder, label_names=["labels"], **common)
        Trainer(adapted, args, train_dataset=sets[1], callbacks=[clock]).train()
    else:
        UIBTrainer(model, UIBConfig(folder, **common, **PATTERN), *sets, callbacks=[clock]).train()
    return {
        "variant": variant,
        "compiled": compiled,
        "seconds": clock.now() - start,
        "step_seconds": statistics.median(clock.times[-(steps // 2) :]),
        "peak_mb": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0,
    }


def run_gpu(options) -> None:
    """Cost in pairs, then the digits in float32 and bf16, and the statistics beside those of a CPU."""
    runs.quiet()
    results.replace(GPU, [])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"device": device, "torch": torch.__version__}
    for name in MODELS:
        model, sets = model_and_sets(name)
        timed("LoRA", model, sets, 5, options.cache, False)  # the first kernels of a process are slow
        for repeat in range(REPEATS):
            for variant in ("LoRA", "UIB"):
                line = timed(variant, model, sets, STEPS, options.cache, False)
                results.append(GPU, about | {"kind": "cost", "model": name, "repeat": repeat} | line)
    for seed in options.seeds:
        for line in digits_lines(seed, options.cache):
            results.append(GPU, about | {"kind": "digits", "seed": seed} | line)
    results.append(GPU, about | {"kind": "statistics", "difference": statistics_difference(options.cache)})
    for variant in ("LoRA", "UIB"):
        line = timed(variant, *model_and_sets(MODELS[1]), COMPILED_STEPS, options.cache, True)
        results.append(GPU, about | {"kind": "compiled", "model": MODELS[1]} | line)


def digits_lines(seed: int, cache: str) -> list[dict]:
    """Bias-conflicting accuracy of digits-colour on this device: the checkpoint, LoRA, UIB in float32 and in bf16."""
    task = digits.digits_colour(seed)
    original = digits.prepare_models(task, seed, cache)["original"].to(PartialState().device)
    budget = Budget(
        task.train_settings["unlearn_steps"],
        task.train_settings["batch"],
        METHODS["lora"].learning_rate or 1e-3,
        seed,
        cache,
    )

    def uib(**setting):
        trainer = uib_trainer(copy.deepcopy(original), task, budget, **setting)
        trainer.train()
        return trainer.model

    models = {"original": original, "LoRA": METHODS["lora"].train(copy.deepcopy(original), task, budget)}
    models |= {"UIB": uib(), "UIB, bf16": uib(bf16=torch.cuda.is_available())}
    attributes = np.asarray(task.sets["test"].with_format(None)[task.bias_column])
    lines = []
    for name, model in models.items():
        logits, labels = predict(model.eval(), task.sets["test"], task.processing_class, quiet=True)
        lines.append({"variant": name} | bias_row(logits, labels, attributes))
    return lines


def measure_statistics(path: str, cache: str, on_cpu: bool) -> None:
    """In a process of its own: subspaces and figures of the statistics pass on the digits, written to a file."""
    task = digits.digits_colour(0)
    torch.manual_seed(0)
    model = task.new_model()
    args = UIBConfig(
        cache, max_steps=1, use_cpu=on_cpu, save_strategy="no", disable_tqdm=True, report_to="none", **PATTERN
    )
    trainer = UIBTrainer(
        model, args, task.sets["forget"], task.sets["retain"], task.sets["calibration"], processing_class=task.processing_class,
    )  # fmt: skip
    trainer.train()
    subspaces = {name: v.cpu() for name, v in trainer.posterior.subspaces.items()}
    numbers = {k: v for k, v in trainer.statistics.items() if isinstance(v, float)}
    torch.save({"subspaces": subspaces, "numbers": numbers}, path)
    print(json.dumps(numbers))


def statistics_difference(cache: str) -> dict[str, float]:
    """Between device and CPU: largest share of a subspace that the other lacks, and relative difference of each figure."""
    found = []
    for where in ("cpu", "device"):
        path = os.path.join(cache, f"statistics-{where}.pt")
        json_of([sys.executable, "-m", __name__, path, cache, where])
        found.append(torch.load(path, weights_only=True))
    here, there = found
    missing = []
    for name, v in here["subspaces"].items():  # [k, d_in], orthonormal or zero rows
        common = (
            torch.linalg.matrix_norm(v.double() @ there["subspaces"][name].double().T) ** 2 / v.double().square().sum()
        )
        missing.append(float(1 - common))
    differences = {"subspaces": max(missing)}
    for key, value in here["numbers"].items():
        differences[key] = abs(value - there["numbers"][key]) / max(1.0, abs(value))
    return differences


def gpu_tables() -> list[str]:
    """What was measured on a GPU; nothing where there is no file."""
    lines = results.read(GPU)
    if not lines:
        return []
    cost = [line for line in lines if line["kind"] == "cost"]
    rows = []
    for name in dict.fromkeys(line["model"] for line in cost):
        lora, uib = ([x for x in cost if (x["model"], x["variant"]) == (name, v)] for v in ("LoRA", "UIB"))
        row = [name]
        for key in ("step_seconds", "seconds", "peak_mb"):
            ratios = [u[key] / p[key] for u, p in zip(uib, lora, strict=True)]
            row.append(f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        row += [
            f"{1000 * np.median([x['step_seconds'] for x in lora]):.1f}",
            f"{np.median([x['seconds'] for x in lora]):.1f}",
        ]
        rows.append([*row, f"{np.median([x['peak_mb'] for x in lora]):.0f}"])
    compiled = {x["variant"]: x["step_seconds"] for x in lines if x["kind"] == "compiled"}
    parts = [
        "## On a GPU, in bf16\n",
        f"{cost[0]['device']}, PyTorch {cost[0]['torch']}. {STEPS} steps of {BATCH} rows under a pattern, as ratios to plain LoRA; "
        f"medians and ranges of {REPEATS} pairs in one process, LoRA and UIB in turn. Taken before the prior became flat along the "
        "subspace (method, section 3a).\n",
        *table(
            ["model", "step", "whole run", "peak memory", "LoRA: step, ms", "LoRA: run, seconds", "LoRA: peak, MB"],
            rows,
        ),
    ]
    if len(compiled) == 2:
        milliseconds = [f"{1000 * compiled[name]:.1f} ms" for name in ("LoRA", "UIB")]
        parts.append(
            f"With `torch_compile`, a step of {MODELS[1]}: LoRA {milliseconds[0]}, UIB {milliseconds[1]} (one run each).\n"
        )
    found = [line for line in lines if line["kind"] == "digits"]
    if found:
        names = list(dict.fromkeys(line["variant"] for line in found))
        parts += [
            f"digits-colour on that device, bias-conflicting accuracy, {len({x['seed'] for x in found})} seeds:\n",
            *table(names, [[spread([x["conflicting_accuracy"] for x in found if x["variant"] == n]) for n in names]]),
        ]
    for line in (x for x in lines if x["kind"] == "statistics"):
        parts += [
            "The statistics pass on that device and on a CPU, float32: the largest share of a subspace that is "
            "not in the other, and relative differences of its figures.\n",
            *table(list(line["difference"]), [[f"{v:.0e}" for v in line["difference"].values()]]),
        ]
    return parts


def spread(values: list[float]) -> str:
    """Mean, and the values it is of."""
    return f"{np.mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})"


if __name__ == "__main__":
    measure_statistics(sys.argv[1], sys.argv[2], sys.argv[3] == "cpu")
