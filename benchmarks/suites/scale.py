"""One process and two, kills and resumes: figures of docs/scale.md."""

import os
import random
import sys
import tempfile

from hf_uib.checkpointing import STAGING

from .. import results
from ..markdown import table
from .launch import ROOT

SCALE = results.FOLDER / "scale.jsonl"
RUNS = {1: 5, 2: 3}  # by processes; each is killed three times
TITLES = {
    "subspaces": "subspaces V_l",
    "output_scale": "output scale of each layer",
    "pattern_z": "z of a pattern",
    "level": "level c",
    "losses": "losses and parts of the bound, each step",
    "evaluation": "accuracy of `evaluate`",
}


def run_scale(options) -> None:
    """Both, anew."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_processes

    found = [{"kind": "equality", "prior": p, "differences": d} for p, d in test_processes.compared().items()]
    found += [line for processes, count in RUNS.items() for line in kills(processes, count)]
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
    return [
        "Largest difference between one process and two, relative where values are larger than 1 (uneven forget and "
        "calibration sets, six steps, world size asserted; other seed: the control):\n",
        *table(["", *equality], differences),
        "Killed (SIGKILL) at random steps, three times a run, resumed, and compared with a run that was left alone:\n",
        *table(
            ["processes", "runs", "kills", "while a checkpoint was being written", "runs equal to the bit"], killed
        ),
    ]
