"""Residual-information probes: every method's model under the deep audit's tests.

Probes, a new head, relearning, rounded weights.
"""

import time

import numpy as np
from peft import PeftModel
from torch import nn

from hf_uib.audit import deep
from hf_uib.audit.gather import gather

from .. import results
from ..markdown import table
from ..methods import METHODS
from . import runs

TRUTH = results.FOLDER / "truth.jsonl"
PROBED = ("digits-colour", "fashion-colour")
COLUMNS = {
    "bias": "shortcut rate",
    "linear": "attribute by a linear probe, last block",
    "head": "at the head",
    "mlp": "by an MLP, last block",
    "refit": "shortcut rate, new head on a few forget rows",
    "retain": "after 64 steps on retained rows",
    "forget": "after 64 steps with a few forget rows besides",
    "int8": "int8",
    "4-bit": "4-bit",
}


def probed_methods() -> list[str]:
    """The ranked methods, the original and the oracles."""
    return [m for m, spec in METHODS.items() if not spec.hosts and not spec.unranked]


def probe(model: nn.Module, task, seed: int) -> dict:
    """What the deep audit finds in one plain model."""
    given = {part: task.sets[part] for part in ("forget", "retain", "test")}
    context = gather(
        {"model": model, "reference": model}, [], given, processing_class=task.processing_class,
        bias_column=task.bias_column, example_column="example" if task.counterfactuals > 1 else None, deep=True, seed=seed,
    )  # fmt: skip
    found = {
        "probes": deep.probe_every_block(context, ["model"])["model"],
        "refit": context.refit()["model"].value,
        "relearning": {kind: deep.relearning_curve(model, kind, context, seed) for kind in ("retain", "forget")},
    }
    rounded = {kind: deep.compress(model, kind) for kind in ("int8", "4-bit")}
    return found | {
        "bias": found["relearning"]["retain"][0],
        "compression": {kind: deep.bias_of(made, context)["bias"] for kind, made in rounded.items()},
    }


def run_truth(options) -> None:
    """Do what is missing in the results: a method's model is trained anew, with the setting of its benchmark run."""
    runs.quiet()
    for name in (n for n in PROBED if n in options.tasks):
        for seed in options.seeds:
            done = {x["method"] for x in results.read(TRUTH) if (x["task"], x["seed"]) == (name, seed)}
            missing = [m for m in probed_methods() if m in options.methods and m not in done]
            if not missing:
                continue
            task = runs.build(name, seed, options)
            models = runs.checkpoints(task, name, seed, options)
            for method in (m for m in missing if runs.applies(METHODS[m], name, task)):
                setting = runs.tuned_setting(name, method)
                model = runs.trained(task, models, method, setting, seed, options.cache)[0].eval()
                model = model.merge_and_unload() if isinstance(model, PeftModel) else model
                start = time.perf_counter()
                line = {"task": name, "method": method, "seed": seed} | probe(model, task, seed)
                results.append(TRUTH, line | {"seconds": time.perf_counter() - start})


def truth_row(line: dict) -> dict[str, float]:
    """A row of the table."""
    blocks = [name for name in line["probes"] if name.startswith("block")]
    last, head = line["probes"][blocks[-1]], line["probes"]["head"]
    row = {"bias": line["bias"], "linear": last["linear"], "head": head["linear"], "mlp": last["mlp"]}
    row |= {"refit": line["refit"]} | {kind: curve[-1] for kind, curve in line["relearning"].items()}
    return row | line["compression"]


def truth_table(task: str) -> list[str]:
    """Means over seeds of the methods that were probed from enough of them."""
    lines = [line for line in results.read(TRUTH) if line["task"] == task]
    found = {m: [truth_row(line) for line in lines if line["method"] == m] for m in probed_methods()}
    found = {m: rows for m, rows in found.items() if len(rows) >= runs.SEEDS}
    if not found:
        return []
    chance = np.mean([line["probes"]["head"]["chance"] for line in lines])
    rows = [
        [METHODS[m].title, *(f"{np.mean([r[k] for r in mine]):.3f}" for k in COLUMNS)] for m, mine in found.items()
    ]
    return [
        "## Residual-information probes\n",
        f"Means over {runs.SEEDS} seeds. Probes read the attribute off the features, with what the label says about it taken out "
        f"(chance {chance:.2f}); the rest are shortcut rates on the test set. A few forget rows are 2%, at least 50, for the new "
        "head and 1%, at least 16, for the steps. Whoever holds the model can do all this; the retrained model's row is the "
        "target.\n",
        *table(["", *COLUMNS.values()], rows),
    ]
