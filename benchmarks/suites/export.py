"""Served as it was measured: UIB's merged model in PyTorch, as ONNX, and as ONNX with int8 weights, on the same test rows."""

import os
import sys
import tempfile
from functools import partial
from importlib import import_module

import numpy as np
from peft import PeftModel

from hf_uib.cli import digits
from hf_uib.exported import INT8, MODEL, ExportedClassifier, export_onnx

from .. import results
from ..markdown import table
from ..tables import TITLES
from . import runs
from .reach import EXAMPLES

EXPORT = results.FOLDER / "export.jsonl"
BRANDS = "reviews-brand"  # the task of examples/bert_brand_bias.py
BIAS = ("accuracy", "conflicting_accuracy", "follow_rate", "cramers_v")
SERVED = {  # and the figures that are shown
    "digits-colour": BIAS,
    BRANDS: BIAS,
    "tweets-airline": BIAS,
    "hate-identity": ("false_alarms", "false_alarms_others", "found", "tweets_accuracy"),
}
FILES = {"ONNX": MODEL, "ONNX, int8": INT8}


def brands(seed: int) -> digits.Task:
    """Reviews from a small grammar, whose brand gives the sentiment away in the forget set; a BERT of two layers."""
    sys.path.insert(0, str(EXAMPLES))
    example = import_module("bert_brand_bias")
    tokenizer = example.word_tokenizer()
    settings = {"pretrain_steps": 100, "steps": 200, "unlearn_steps": 150, "batch": 32}
    return digits.Task(
        BRANDS, example.reviews(tokenizer, seed), partial(example.tiny_bert, tokenizer), tokenizer, "brand",
        len(example.BRANDS), settings,
    )  # fmt: skip


def run_export(options) -> None:
    """A line for each task and seed; runs that are there are skipped."""
    runs.quiet()
    done = {(line["task"], line["seed"]) for line in results.read(EXPORT)}
    for name in (n for n in SERVED if n in options.tasks or n == BRANDS):
        for seed in (s for s in options.seeds if (name, s) not in done):
            task = brands(seed) if name == BRANDS else runs.build(name, seed, options)
            model, _ = runs.trained(task, runs.checkpoints(task, name, seed, options), "uib", {}, seed, options.cache)
            model = model.merge_and_unload() if isinstance(model, PeftModel) else model
            with tempfile.TemporaryDirectory() as folder:
                target = os.path.join(folder, "onnx")
                report = export_onnx(model, task.processing_class, target, rows=task.sets["test"], int8=True)
                models = {"PyTorch": model}
                models |= {title: ExportedClassifier(os.path.join(target, file)) for title, file in FILES.items()}
                rows = {title: runs.measure(one, task) for title, one in models.items()}
            line = {"task": name, "seed": seed, "rows": rows}
            results.append(
                EXPORT, line | {key: report[key] for key in ("differences", "bytes", "torch", "onnxruntime")}
            )


def export_tables() -> list[str]:
    """A table a task: figures on its test set (mean and standard deviation over seeds), and what differs from PyTorch."""
    lines, parts = results.read(EXPORT), []
    for name, keys in SERVED.items():
        mine = [line for line in lines if line["task"] == name]
        if not mine:
            continue
        cells = []
        for title in mine[0]["rows"]:
            values = [[line["rows"][title][key] for line in mine] for key in keys]
            row = [title, *(f"{np.mean(v):.3f} ± {np.std(v, ddof=min(1, len(v) - 1)):.3f}" for v in values)]
            cells.append(row + (_differences(mine, FILES[title]) if title in FILES else ["-"] * 3))
        seeds = ", ".join(str(line["seed"]) for line in mine)
        head = ["", *(TITLES[key] for key in keys), "largest difference of a logit", "predictions that differ", "MB"]
        parts += [f"## {name}\n", f"Seeds {seeds}.\n", *table(head, cells)]
    return parts


def _differences(lines: list[dict], file: str) -> list[str]:
    """Of a file over all seeds, on the task's test rows; and its size."""
    seen = [line["differences"][file]["rows"] for line in lines]
    worst = max(one["largest_difference"] for one in seen)
    differ, rows = (sum(one[key] for one in seen) for key in ("predictions_that_differ", "rows"))
    return [f"{worst:.1e}", f"{differ} of {rows}", f"{lines[0]['bytes'][file] / 1e6:.1f}"]
