"""Other kinds of input and label from three seeds, beside LoRA fine-tuning and a retrained model: the tasks of `benchmarks.kinds`
on real text and speech, and the examples'.
"""

import dataclasses
import inspect
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import numpy as np
from transformers import set_seed

from .. import results
from ..kinds import compare, labels_of_tweets, names_in_tweets, spoken_digits
from ..markdown import table
from . import runs

REACH = results.FOLDER / "reach.jsonl"
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
KINDS = {module.__name__.rpartition(".")[2]: module for module in (labels_of_tweets, names_in_tweets, spoken_digits)}
TITLES = {name: module.TITLE for name, module in KINDS.items()} | {
    "multi_label": "Several labels a row (digits that are even, large or closed; ViT)",
    "token_labels": "Labels of tokens (persons, places and firms in sentences; BERT)",
    "decoder_bias": "A decoder (messages to shops; Qwen 3 with a `score` head)",
    "voice_bias": "Sounds (synthetic vowels; audio spectrogram transformer)",
    "video_bias": "Videos (digits that move; VideoMAE)",
    "siglip2": "An image tower with a head: SigLIP 2 (digits)",
    "clip": "An image tower with a head: CLIP (digits)",
    "dinov3": "An image tower with a head of one's own: DINOv3 (digits)",
}
TOWERS = ("siglip2", "clip", "dinov3")  # of examples/image_towers.py
COLUMNS = {"accuracy": "accuracy", "conflicting_accuracy": "bias-conflicting accuracy", "follow_rate": "shortcut rate"}


def run_reach(options) -> None:
    """Every task under every seed; runs that are there are skipped."""
    runs.quiet()
    sys.path.insert(0, str(EXAMPLES))
    done = {(line["example"], line["seed"]) for line in results.read(REACH)}
    for name in TITLES:
        for seed in options.seeds:
            if (name, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                rows, verdict = run(name, seed, options, os.path.join(folder, "out"))
            results.append(
                REACH, {"example": name, "seed": seed, "rows": rows, "verdict": verdict.partition(" This is")[0]}
            )


def run(
    name: str, seed: int, options, output_dir: str, steps: dict[str, int] | None = None
) -> tuple[dict[str, dict], str]:
    """A row of each model, and the audit's verdict.

    Args:
        steps: ``steps`` and ``train_steps``, instead of the task's.
    """
    steps = steps or {}
    if name in TOWERS:
        return import_module("image_towers").main(seed=seed, output_dir=output_dir, tower=name, **steps)
    if name not in KINDS:
        return import_module(name).main(seed=seed, output_dir=output_dir, **steps)
    set_seed(seed)  # of new weights, too
    paths = {option: getattr(options, option) for option in KINDS[name].DATA}
    kind = dataclasses.replace(KINDS[name].make(seed, **paths), **steps)
    return compare(kind, import_module("beside_lora"), seed, output_dir)


def reach_tables() -> list[str]:
    """A table a task: mean and standard deviation over seeds, and the audits' verdicts."""
    lines, parts = results.read(REACH), []
    for name, title in TITLES.items():
        mine = [line for line in lines if line["example"] == name]
        if not mine:
            continue
        cells = []
        for model in mine[0]["rows"]:
            figures = {key: [line["rows"][model][key] for line in mine] for key in COLUMNS}
            cells.append(
                [model, *(f"{np.mean(v):.3f} ± {np.std(v, ddof=min(1, len(v) - 1)):.3f}" for v in figures.values())]
            )
        example = "image_towers" if name in TOWERS else name
        path = f"benchmarks/kinds/{name}.py" if name in KINDS else f"examples/{example}.py"
        about = [f"{inspect.getdoc(KINDS[name].make)}\n"] if name in KINDS else []
        seeds = f"[{path}](../../{path}), seeds {', '.join(str(line['seed']) for line in mine)}.\n"
        parts += [f"## {title}\n", *about, seeds]
        parts += table(["", *COLUMNS.values()], cells)
        parts += [
            "\nAudit, by seed:\n",
            *(f"- {line['seed']}: {line['verdict'].partition(' Figures')[0]}" for line in mine),
            "",
        ]
    return parts
