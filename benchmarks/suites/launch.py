"""Starting a part of a suite in processes of its own."""

import json
import subprocess
from pathlib import Path

import hf_uib.cli

ROOT = Path(__file__).parent.parent.parent


def accelerate_config(name: str) -> str:
    """Path of one of the package's accelerate configs."""
    return str(Path(hf_uib.cli.__file__).parent / "accelerate_configs" / f"{name}.yaml")


def json_of(command: list[str], environment: dict[str, str] | None = None) -> dict:
    """What a command, run at the root of the repository, prints last as one line of JSON.

    Raises:
        RuntimeError: it failed; with the end of what it wrote to stderr.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
