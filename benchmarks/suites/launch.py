"""Starting a part of a suite in processes of its own."""

import json
from pathlib import Path

import hf_uib.cli

ROOT = Path(__file__).parent.parent.parent


def accelerate_config(name: str) -> str:
    """Path of one of the package's accelerate configs."""
    return str(Path(hf_uib.cli.__file__).parent / "accelerate_configs" / f"{name}.yaml")


def last_json_line(output: str) -> dict:
    """What a process printed last as one line of JSON."""
    return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))
