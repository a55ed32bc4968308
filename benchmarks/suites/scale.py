"""One process and two, kills and resumes, memory against rows: the figures of docs/scale.md."""

import json
import os
import random
import subprocess
import sys
import tempfile

from . import cells

SCALE = os.path.join(cells.ROOT, "scale.jsonl")
TESTS = os.path.join(cells.ROOT, "..", "tests")
RUNS = {1: 5, 2: 3}  # by processes; each is killed three times
ROWS = (50_000, 200_000, 1_000_000)  # of each set
WORDS = {
    "subspaces": "subspaces V_l",
    "output_scale": "unit of each layer",
    "pattern_z": "evidence of a pattern z",
    "level": "level c",
    "losses": "losses and parts of the bound, each step",
    "evaluation": "accuracy of `evaluate`",
}


def run_scale(options) -> None:
    """All three, anew. Linux: memory is read off /proc."""
    sys.path.insert(0, TESTS)
    import test_killed
    import test_processes

    found = [{"kind": "equality", "prior": p, "differences": d} for p, d in test_processes.compared().items()]
    random.seed(2026)
    for processes, runs in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            whole = test_killed.finished(os.path.join(folder, "whole"), processes)
            for run in range(runs):
                target, step, saving = os.path.join(folder, f"killed {run}"), 0, 0
                for _ in range(3):
                    step = random.randint(step + 1, min(step + 4, 11))
                    test_killed.killed(target, processes, step, random.uniform(0, 0.08))
                    saving += os.path.isdir(os.path.join(target, "_unfinished"))
                test_killed.assert_same(whole, test_killed.finished(target, processes))
                found.append({"kind": "kills", "processes": processes, "kills": 3, "while_saving": saving})
    for rows in ROWS:
        command = [
            sys.executable,
            os.path.join(cells.ROOT, "..", "scripts", "benchmark.py"),
            "--memory_cell",
            str(rows),
        ]
        done = subprocess.run([*command, "--cache", options.cache], capture_output=True, text=True, check=True)
        found.append(json.loads(next(line for line in reversed(done.stdout.splitlines()) if "{" in line)))
    if os.path.exists(SCALE):
        os.remove(SCALE)
    for cell in found:
        cells.append(SCALE, cell)


def memory_cell(rows: int, options) -> None:
    """A process of its own: unlearn with as many forget and as many retained rows of ten tokens, memory-mapped; prints a line."""
    import datasets
    import numpy as np
    from transformers import BertConfig, BertForSequenceClassification

    from hf_uib import UIBConfig, UIBTrainer

    cells.quiet()

    def private() -> float:
        """MB that are the process's own; mapped files, which the system can drop, are not."""
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))

    def table(seed: int):
        def chunks():
            rng = np.random.default_rng(seed)
            for _ in range(0, rows, 10_000):
                tokens = rng.integers(5, 30_000, (10_000, 10)).tolist()
                for row, label in zip(tokens, rng.integers(0, 2, 10_000).tolist(), strict=True):
                    yield {"input_ids": row, "labels": label}

        folder = os.path.join(options.cache, "rows")
        return datasets.Dataset.from_generator(chunks, cache_dir=folder, fingerprint=f"{rows}-{seed}").with_format(
            "torch"
        )

    sets = [table(seed) for seed in (1, 2)]
    calibration = table(3).select(range(512))
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(**small))
    args = UIBConfig(
        options.cache, max_steps=20, disable_tqdm=True, use_cpu=True, save_strategy="no", report_to="none"
    )
    before = private()
    trainer = UIBTrainer(model, args, *sets, calibration_dataset=calibration)
    checked = private()
    trainer.train()
    print(json.dumps({"kind": "memory", "rows": rows, "before": before, "checked": checked, "trained": private()}))


def scale_tables() -> list[str]:
    """For docs/scale.md."""
    runs = cells.read(SCALE)
    equality = {c["prior"]: c["differences"] for c in runs if c["kind"] == "equality"}
    if not equality:
        return []
    parts = [
        "Largest difference between one process and two, relative where values are larger than 1 (uneven forget and "
        "calibration sets, six steps, world size asserted; other seed: the control):\n",
        "| | " + " | ".join(equality) + " |",
        "|---" * (len(equality) + 1) + "|",
    ]
    names = dict.fromkeys(name for found in equality.values() for name in found)
    for name in names:
        shown = [f"{found[name]:.0e}" if name in found else "-" for found in equality.values()]
        parts.append(f"| {WORDS.get(name, name)} | " + " | ".join(shown) + " |")
    parts += [
        "\nKilled (SIGKILL) at random steps, three times a run, resumed, and compared with a run that was left alone:\n",
        "| processes | runs | kills | while a checkpoint was being written | runs equal to the bit |",
        "|---|---|---|---|---|",
    ]
    for processes in RUNS:
        mine = [c for c in runs if c["kind"] == "kills" and c["processes"] == processes]
        kills, saving = (sum(c[k] for c in mine) for k in ("kills", "while_saving"))
        parts.append(f"| {processes} | {len(mine)} | {kills} | {saving} | {len(mine)} |")
    parts += [
        "\nPrivate memory in MB, against rows (ten tokens each, on disk and memory-mapped):\n",
        "| rows to forget, and to retain | before | after the checks (overlap, labels, fingerprints) | after training |",
        "|---|---|---|---|",
    ]
    for c in (c for c in runs if c["kind"] == "memory"):
        parts.append(f"| {c['rows']:,} | {c['before']:.0f} | {c['checked']:.0f} | {c['trained']:.0f} |")
    return parts
