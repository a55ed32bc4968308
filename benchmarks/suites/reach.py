"""Other kinds of input and label: the examples' tasks from three seeds, beside LoRA fine-tuning and a retrained model."""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from .. import results
from ..markdown import table
from . import runs

REACH = results.FOLDER / "reach.jsonl"
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TITLES = {
    "multi_label": "Several labels a row (digits that are even, large or closed; ViT)",
    "token_labels": "Labels of tokens (persons, places and firms in sentences; BERT)",
    "decoder_bias": "A decoder (messages to shops; Qwen 3 with a `score` head)",
    "voice_bias": "Sounds (synthetic vowels; audio spectrogram transformer)",
}
COLUMNS = {"accuracy": "accuracy", "conflicting_accuracy": "bias-conflicting accuracy", "follow_rate": "shortcut rate"}


def run_reach(options) -> None:
    """Every example under every seed; runs that are there are skipped."""
    runs.quiet()
    sys.path.insert(0, str(EXAMPLES))
    done = {(line["example"], line["seed"]) for line in results.read(REACH)}
    for name in TITLES:
        for seed in options.seeds:
            if (name, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                rows, verdict = __import__(name).main(seed=seed, output_dir=os.path.join(folder, "out"))
            results.append(
                REACH, {"example": name, "seed": seed, "rows": rows, "verdict": verdict.partition(" This is")[0]}
            )


def reach_tables() -> list[str]:
    """A table an example: mean and standard deviation over seeds, and the audits' verdicts."""
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
        parts += [
            f"## {title}\n",
            f"[examples/{name}.py](../../examples/{name}.py), seeds {', '.join(str(line['seed']) for line in mine)}.\n",
        ]
        parts += table(["", *COLUMNS.values()], cells)
        parts += ["\nAudit, by seed:\n", *(f"- {line['seed']}: {line['verdict']}" for line in mine), ""]
    return parts
