"""Methods x tasks x seeds, one JSON line a run; runs that are there are skipped. Tables and figures come from the lines alone.

    python -m benchmarks smoke                          # a minute: every method on digits for ten steps, to a scratch file
    python -m benchmarks tune --fashion_mnist FOLDER    # the methods' grids, on a validation fold
    python -m benchmarks run --fashion_mnist FOLDER     # hours on two cores
    python -m benchmarks run --tasks waterbirds         # a standard set of the field, from the Hub; for a GPU
    python -m benchmarks report                         # the tables and figures of the documentation

From the root of the repository; `python scripts/benchmark.py` is the same from anywhere.
"""

import argparse
import sys

from .methods import METHODS
from .registry import suite
from .report import write_report
from .suites import (
    audits,
    cost,
    discover,
    export,
    fairness,
    gpu,
    lifecycle,
    memory,
    promises,
    quantised,
    reach,
    research,
    runs,
    scale,
    shape,
    smoke,
    truth,
    whole,
)
from .tasks import TASKS

COMMANDS = {
    "run": (runs.run, "methods x tasks x seeds"),
    "smoke": (smoke.smoke, "every method on digits-colour for ten steps, to a scratch file"),
    "tune": (runs.tune, "the methods' grids, on validation folds of further seeds"),
    "cost": (cost.run_cost, "step time and memory, on two CPU cores"),
    "gpu": (gpu.run_gpu, "steps and whole runs at ViT-B and BERT-base size in bf16, and the digits, on a GPU"),
    "whole": (whole.run_whole, "whole runs against LoRA fine-tuning, in pairs"),
    "processes": (cost.run_processes, "throughput under one and two processes"),
    "scaling": (cost.run_scaling, "how the statistics pass grows"),
    "scale": (scale.run_scale, "one process against two, kills and resumes"),
    "memory": (memory.run_memory, "memory of a million rows, on disk and as streams"),
    "shape": (shape.run_shape, "memory of a classifier of a thousand million weights, by its shape"),
    "audit": (audits.run_audits, "planted fakes and retrained models through the audit"),
    "quantised": (
        quantised.run_quantised,
        "quantised bases against full precision: subspaces, merging, quantising again",
    ),
    "promises": (
        promises.run_promises,
        "detaching, merging, resuming and the audit's checks, for every kind of input and label",
    ),
    "reach": (reach.run_reach, "other kinds of input and label: real tweets, speech, and the examples' tasks"),
    "fairness": (fairness.run_fairness, "false alarms and misses by group of a picture model, before and after"),
    "research": (research.run_research, "one setting varied at a time, on validation folds"),
    "truth": (truth.run_truth, "probes, a new head, relearning and rounded weights of every method"),
    "lifecycle": (lifecycle.run_lifecycle, "three requests one after the other, an audit after each, one undone"),
    "export": (export.run_export, "UIB's merged model in PyTorch, as ONNX and as ONNX with int8 weights"),
    "discover": (discover.run_discover, "rows that teach a shortcut, found without attribute labels"),
    "report": (write_report, "write the tables and figures"),
}
EARLIER = {f"--{name}": name for name in COMMANDS} | {"cpu": "run", "gpu-cost": "gpu"}


def build_parser() -> argparse.ArgumentParser:
    """A command, and what it is to be run on; the data's paths are those that the tasks name."""
    listed = "\n".join(f"  {name:10} {words}" for name, (_, words) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=f"{__doc__}\ncommands:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those above")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(suite()),
        choices=TASKS,
        metavar="T",
        help=", ".join(TASKS).replace("%", "%%"),
    )
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="M", help=", ".join(METHODS)
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of split, attribute and training"
    )
    parser.add_argument("--cache", default=".bench", help="folder for checkpoints")
    for name, default in {k: v for spec in TASKS.values() for k, v in spec.data.items()}.items():
        parser.add_argument(f"--{name}", default=default, help=f"folder or Hub id ({default})")
    return parser


def main(arguments: list[str]) -> None:
    """Run a command. The flags of earlier versions (``--suite smoke``, ``--report``) still name theirs."""
    translated = [EARLIER.get(word, word) for word in arguments if word != "--suite"]
    options = build_parser().parse_args(translated)
    COMMANDS[options.command][0](options)


if __name__ == "__main__":
    main(sys.argv[1:])
