"""Every method for ten steps, to a scratch file: whether the suite runs at all."""

import os
import tempfile

from .. import results, tables
from ..methods import METHODS
from . import runs


def first_setting(task: str, method: str) -> dict:
    """Of its grid: nothing is tuned here."""
    return METHODS[method].grid[0]


def smoke(options) -> None:
    """The methods on digits-colour, seed 0, ten steps each; prints the table."""
    options.tasks, options.seeds = ["digits-colour"], [0]
    with tempfile.TemporaryDirectory() as folder:
        options.cache = folder
        path = os.path.join(folder, "results.jsonl")
        runs.run(options, first_setting, path, steps=10)
        print("\n".join(tables.task_table("digits-colour", results.read(path))))
