"""The results files: one JSON line a run."""

import json
import os
from pathlib import Path

FOLDER = Path(__file__).parent / "results"
RUNS, TUNING = FOLDER / "results.jsonl", FOLDER / "tuning.jsonl"

# Values of earlier versions, and what they are called now
RENAMED = {
    "fashion-colour, 90% telling": "fashion-colour, 90% bias-aligned",
    "fashion-colour, 99% telling": "fashion-colour, 99% bias-aligned",
    "no evidence (prior none)": "no forget loss (prior none)",
    "no noise, no evidence": "no noise, no forget loss",
    "evidence for 20% of the steps": "forget loss for 20% of the steps",
    "evidence for all steps": "forget loss for all steps",
    "noise leaves 80% of the nats": "label information kept: 80%",
    "noise leaves 50% of the nats": "label information kept: 50%",
    "the root, and disputed labels: the default now": "the root, and label noise: the default now",
    "the root, and evidence for all steps": "the root, and forget loss for all steps",
}
RENAMED_QUANTITIES = {"unit_width": "output_scale"}


def read(path) -> list[dict]:
    """The lines of a results file under today's names; none where there is no file."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.strip()]
    for line in lines:
        line |= {key: RENAMED.get(line[key], line[key]) for key in ("task", "variant") if key in line}
        if "differences" in line:
            line["differences"] = {RENAMED_QUANTITIES.get(k, k): v for k, v in line["differences"].items()}
    return lines


def append(path, line: dict) -> None:
    """Add a line, and print it without its longest parts."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps({k: v for k, v in line.items() if k not in ("versions", "data", "checks", "deep")}), flush=True)


def replace(path, lines: list[dict]) -> None:
    """Write a file anew."""
    if os.path.exists(path):
        os.remove(path)
    for line in lines:
        append(path, line)
