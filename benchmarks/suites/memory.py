"""Private memory against rows, on disk and as streams: a table of docs/scale.md."""

import itertools
import json
import os
import sys
import threading

import datasets
import numpy as np
from transformers import BertConfig, BertForSequenceClassification

from hf_uib import UIBConfig, UIBTrainer

from .. import results
from ..markdown import table
from . import runs
from .launch import json_of

MEMORY = results.FOLDER / "memory.jsonl"
ROWS = (50_000, 200_000, 1_000_000)  # of each set
KINDS = {"on disk": False, "streams": True}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def run_memory(options) -> None:
    """Everything anew, each line in a process of its own. Linux: memory is read off /proc."""
    cases = itertools.product(["rows"], KINDS, map(str, ROWS))
    results.replace(MEMORY, [apart(*case, os.path.abspath(options.cache)) for case in cases])


def apart(*arguments: str) -> dict:
    """What a process of its own prints."""
    command = [sys.executable, "-m", __name__, *arguments]
    return json_of(command)


def status(name: str) -> float:
    """An entry of this process's memory in MB."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))


def private_memory() -> float:
    """MB that are the process's own; mapped files, which the system can drop, are not."""
    return status("RssAnon")


class Highest:
    """The highest private memory inside a ``with`` block, looked at 50 times a second."""

    def __enter__(self) -> "Highest":
        self.megabytes, self.done = private_memory(), threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.02):
            self.megabytes = max(self.megabytes, private_memory())

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()
        self.megabytes = max(self.megabytes, private_memory())


def token_rows(rows: int, seed: int, folder: str, stream: bool = False):
    """Random rows of ten tokens: on disk and memory-mapped, or a stream that makes them as it goes."""

    def chunks():
        rng = np.random.default_rng(seed)
        for _ in range(0, rows, 10_000):
            tokens = rng.integers(5, 30_000, (10_000, 10)).tolist()
            for row, label in zip(tokens, rng.integers(0, 2, 10_000).tolist(), strict=True):
                yield {"input_ids": row, "labels": label}

    if stream:
        return datasets.IterableDataset.from_generator(chunks).take(rows).with_format("torch")
    made = datasets.Dataset.from_generator(chunks, cache_dir=folder, fingerprint=f"{rows}-{seed}")
    return made.with_format("torch")


def measure_rows(kind: str, rows: int, folder: str) -> dict:
    """In a process of its own: unlearn with as many forget and as many retained rows."""
    forget, retain = (token_rows(rows, seed, os.path.join(folder, "rows"), KINDS[kind]) for seed in (1, 2))
    calibration = token_rows(10_000, 3, os.path.join(folder, "rows")).select(range(512))
    model = BertForSequenceClassification(BertConfig(**SMALL))
    args = UIBConfig(folder, max_steps=20, disable_tqdm=True, use_cpu=True, save_strategy="no", report_to="none")
    before = private_memory()
    with Highest() as highest:
        trainer = UIBTrainer(model, args, forget, retain, calibration_dataset=calibration)
        checked = private_memory()
        trainer.train()
        trained = private_memory()
    line = {"kind": "rows", "sets": kind, "rows": rows, "before": before, "checked": checked, "trained": trained}
    return line | {"highest": highest.megabytes}


# ---- Tables -----------------------------------------------------------------------------------------------------


def memory_tables() -> list[str]:
    """For docs/scale.md."""
    lines = [line for line in results.read(MEMORY) if line["kind"] == "rows"]
    if not lines:
        return []
    rows = [
        [line["sets"], f"{line['rows']:,}", *(f"{line[k]:.0f}" for k in ("before", "checked", "trained", "highest"))]
        for line in lines
    ]
    return [
        "Of this version: private memory in MB, "
        "against rows (ten tokens each). On disk: memory-mapped. Streams: made as they are read, written to "
        "disk by the trainer:\n",
        *table(
            [
                "forget and retained set",
                "rows of each",
                "before",
                "after the checks (writing, overlap, labels, fingerprints)",
                "after training",
                "highest",
            ],
            rows,
        ),
    ]


if __name__ == "__main__":
    runs.quiet()
    print(json.dumps(measure_rows(sys.argv[2], int(sys.argv[3]), sys.argv[4])))
