"""Is it gone? Every method's model under the deep audit's tests: probes, a new head, relearning, rounded weights."""

import os
import time

import numpy as np

from . import cells

TRUTH = os.path.join(cells.ROOT, "truth.jsonl")
TASKS = ("digits-colour", "fashion-colour")
COLUMNS = {
    "bias": "follow rate",
    "linear": "attribute by a linear probe",
    "mlp": "by an MLP",
    "refit": "follow rate, new head on 2% of the forget set",
    "retain": "after 64 steps on retained rows",
    "forget": "after 64 steps with 1% of the forget set",
    "int8": "int8",
    "4-bit": "4-bit",
}


def methods() -> list[str]:
    """What is examined: the ranked methods and the oracles."""
    return [m for m, how in cells.METHODS.items() if not how.hosts and not how.shown_only]


def run_truth(options) -> None:
    """Fill the missing cells: a method's model is trained anew, with the setting of its benchmark cell."""
    from peft import PeftModel

    from hf_uib.audit import core, deep

    cells.quiet()
    for name in (n for n in TASKS if n in options.tasks):
        for seed in options.seeds:
            done = {c["method"] for c in cells.read(TRUTH) if (c["task"], c["seed"]) == (name, seed)}
            missing = [m for m in methods() if m in options.methods and m not in done]
            task = cells.build(name, seed, options)
            models = cells.checkpoints(task, name, seed, options)
            given = {part: task.sets[part] for part in ("forget", "retain", "test")}
            for method in (m for m in missing if cells.applies(m, task)):
                model = cells.trained(task, models, method, cells.chosen(name, method), seed, options.cache)[0].eval()
                model = model.merge_and_unload() if isinstance(model, PeftModel) else model
                start = time.perf_counter()
                sets, evidence = core.gather(
                    {"model": model, "reference": model}, [], given, processing_class=task.processing_class,
                    bias_column=task.bias_column, example_column="example" if task.counterfactuals > 1 else None, deep=True,
                    seed=seed,
                )  # fmt: skip
                bias = lambda m, s=sets, e=evidence, t=task: deep.bias_of(m, s["test"], e, t.processing_class)["bias"]  # noqa: E731
                curve = lambda kind, m=model, s=sets, e=evidence, t=task, i=seed: deep.relearning_curve(  # noqa: E731
                    m, kind, s, e, t.processing_class, i
                )
                cell = {"task": name, "method": method, "seed": seed, "bias": bias(model)}
                cell["probes"] = deep.probe_every_block(evidence, ["model"])["model"]
                cell["refit"] = evidence.refit()["model"].value
                cell["relearning"] = {kind: curve(kind) for kind in ("retain", "forget")}
                cell["compression"] = {kind: bias(deep.compress(model, kind)) for kind in ("int8", "4-bit")}
                cells.append(TRUTH, cell | {"seconds": time.perf_counter() - start})


def figures(cell: dict) -> dict[str, float]:
    """A row of the table."""
    last = list(cell["probes"].values())[-1]
    found = {"bias": cell["bias"], "linear": last["linear"], "mlp": last["mlp"], "refit": cell["refit"]}
    found |= {kind: curve[-1] for kind, curve in cell["relearning"].items()}
    return found | cell["compression"]


def truth_table() -> list[str]:
    """Means over seeds."""
    runs = cells.read(TRUTH)
    parts = []
    for task in TASKS:
        rows = {m: [figures(c) for c in runs if (c["task"], c["method"]) == (task, m)] for m in methods()}
        rows = {m: mine for m, mine in rows.items() if len(mine) >= 3}
        if not rows:
            continue
        chance = np.mean([list(c["probes"].values())[-1]["chance"] for c in runs if c["task"] == task])
        parts += [
            f"### Is it gone? {task}\n",
            "Means over three seeds. The attribute is read off the last block by probes, with what the label says about it taken "
            f"out (chance {chance:.2f}); all other columns are follow rates on the test set. Whoever holds the model can do all "
            "this; the retrained model's row is the target.\n",
            "| | " + " | ".join(COLUMNS.values()) + " |",
            "|---" * (len(COLUMNS) + 1) + "|",
        ]
        for method, mine in rows.items():
            shown = [f"{np.mean([r[k] for r in mine]):.3f}" for k in COLUMNS]
            parts.append(f"| {cells.METHODS[method].title} | " + " | ".join(shown) + " |")
        parts.append("")
    return parts
