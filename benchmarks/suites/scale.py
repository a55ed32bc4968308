"""One process and two, kills and resumes, memory against rows: the figures of docs/scale.md."""

import json
import os
import random
import subprocess
import sys
import tempfile

import datasets
import numpy as np
from transformers import BertConfig, BertForSequenceClassification

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.checkpointing import STAGING

from .. import results
from ..markdown import table
from . import runs
from .launch import ROOT, last_json_line

SCALE = results.FOLDER / "scale.jsonl"
RUNS = {1: 5, 2: 3}  # by processes; each is killed three times
ROWS = (50_000, 200_000, 1_000_000)  # of each set
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TITLES = {
    "subspaces": "subspaces V_l",
    "output_scale": "output scale of each layer",
    "pattern_z": "z of a pattern",
    "level": "level c",
    "losses": "losses and parts of the bound, each step",
    "evaluation": "accuracy of `evaluate`",
}


def run_scale(options) -> None:
    """All three, anew. Linux: memory is read off /proc."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_processes

    found = [{"kind": "equality", "prior": p, "differences": d} for p, d in test_processes.compared().items()]
    found += [line for processes, count in RUNS.items() for line in kills(processes, count)]
    for rows in ROWS:
        command = [sys.executable, "-m", __name__, str(rows), os.path.abspath(options.cache)]
        found.append(
            last_json_line(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
        )
    results.replace(SCALE, found)


def kills(processes: int, count: int) -> list[dict]:
    """``count`` runs, each killed at three random moments, resumed, and held against one that was left alone."""
    import test_killed

    random.seed(2026 + processes)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        alone = test_killed.finished(os.path.join(folder, "alone"), processes)
        for run in range(count):
            target, step, saving = os.path.join(folder, f"killed {run}"), 0, 0
            for _ in range(3):
                step = random.randint(step + 1, min(step + 4, 11))
                test_killed.killed(target, processes, step, random.uniform(0, 0.08))
                saving += os.path.isdir(os.path.join(target, STAGING))
            test_killed.assert_same(alone, test_killed.finished(target, processes))
            lines.append({"kind": "kills", "processes": processes, "kills": 3, "while_saving": saving})
    return lines


def private_memory() -> float:
    """MB that are the process's own; mapped files, which the system can drop, are not."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))


def token_rows(rows: int, seed: int, folder: str) -> datasets.Dataset:
    """Random rows of ten tokens, written to disk and memory-mapped."""

    def chunks():
        rng = np.random.default_rng(seed)
        for _ in range(0, rows, 10_000):
            tokens = rng.integers(5, 30_000, (10_000, 10)).tolist()
            for row, label in zip(tokens, rng.integers(0, 2, 10_000).tolist(), strict=True):
                yield {"input_ids": row, "labels": label}

    made = datasets.Dataset.from_generator(chunks, cache_dir=folder, fingerprint=f"{rows}-{seed}")
    return made.with_format("torch")


def measure_memory(rows: int, folder: str) -> None:
    """In a process of its own: unlearn with as many forget and as many retained rows; prints a JSON line."""
    runs.quiet()
    forget, retain, unseen = (token_rows(rows, seed, os.path.join(folder, "rows")) for seed in (1, 2, 3))
    calibration = unseen.select(range(512))
    model = BertForSequenceClassification(BertConfig(**SMALL))
    args = UIBConfig(folder, max_steps=20, disable_tqdm=True, use_cpu=True, save_strategy="no", report_to="none")
    before = private_memory()
    trainer = UIBTrainer(model, args, forget, retain, calibration_dataset=calibration)
    checked = private_memory()
    trainer.train()
    line = {"kind": "memory", "rows": rows, "before": before, "checked": checked, "trained": private_memory()}
    print(json.dumps(line))


# ---- Tables -----------------------------------------------------------------------------------------------------


def scale_tables() -> list[str]:
    """For docs/scale.md."""
    lines = results.read(SCALE)
    if not lines:
        return []
    equality = {x["prior"]: x["differences"] for x in lines if x["kind"] == "equality"}
    names = dict.fromkeys(name for found in equality.values() for name in found)
    differences = [
        [TITLES.get(name, name), *(f"{found[name]:.0e}" if name in found else "-" for found in equality.values())]
        for name in names
    ]
    killed = []
    for processes in RUNS:
        mine = [x for x in lines if x["kind"] == "kills" and x["processes"] == processes]
        counts = [len(mine), *(sum(x[k] for x in mine) for k in ("kills", "while_saving")), len(mine)]
        killed.append([str(processes), *map(str, counts)])
    memory = [
        [f"{x['rows']:,}", *(f"{x[k]:.0f}" for k in ("before", "checked", "trained"))]
        for x in lines
        if x["kind"] == "memory"
    ]
    return [
        results.FIRST_EDITION,
        "Largest difference between one process and two, relative where values are larger than 1 (uneven forget and "
        "calibration sets, six steps, world size asserted; other seed: the control):\n",
        *table(["", *equality], differences),
        "Killed (SIGKILL) at random steps, three times a run, resumed, and compared with a run that was left alone:\n",
        *table(
            ["processes", "runs", "kills", "while a checkpoint was being written", "runs equal to the bit"], killed
        ),
        "Private memory in MB, against rows (ten tokens each, on disk and memory-mapped):\n",
        *table(
            [
                "rows to forget, and to retain",
                "before",
                "after the checks (overlap, labels, fingerprints)",
                "after training",
            ],
            memory,
        ),
    ]


if __name__ == "__main__":
    measure_memory(int(sys.argv[1]), sys.argv[2])
