"""Is it gone? Every method's model under the deep audit's tests: probes, a new head, relearning, rounded weights."""

import os
import time

import numpy as np

from . import cells

TRUTH = os.path.join(cells.ROOT, "truth.jsonl")
TASKS = ("digits-colour", "fashion-colour")
COLUMNS = {
    "bias": "follow rate",
    "linear": "attribute by a linear probe, last block",
    "head": "at the head",
    "mlp": "by an MLP, last block",
    "refit": "follow rate, new head on a few forget rows",
    "retain": "after 64 steps on retained rows",
    "forget": "after 64 steps with a few forget rows besides",
    "int8": "int8",
    "4-bit": "4-bit",
}


def methods() -> list[str]:
    """What is examined: the ranked methods and the oracles."""
    return [m for m, how in cells.METHODS.items() if not how.hosts and not how.shown_only]


def run_truth(options) -> None:
    """Fill the missing cells: a method's model is trained anew, with the setting of its benchmark cell."""
    from peft import PeftModel

    from hf_uib.audit import deep
    from hf_uib.audit.gather import gather

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
                context = gather(
                    {"model": model, "reference": model}, [], given, processing_class=task.processing_class,
                    bias_column=task.bias_column, example_column="example" if task.counterfactuals > 1 else None, deep=True,
                    seed=seed,
                )  # fmt: skip
                curve = lambda kind, m=model, c=context, i=seed: deep.relearning_curve(m, kind, c, i)  # noqa: E731
                cell = {"task": name, "method": method, "seed": seed}
                cell["probes"] = deep.probe_every_block(context, ["model"])["model"]
                cell["refit"] = context.refit()["model"].value
                cell["relearning"] = {kind: curve(kind) for kind in ("retain", "forget")}
                cell["bias"] = cell["relearning"]["retain"][0]
                cell["compression"] = {
                    kind: deep.bias_of(deep.compress(model, kind), context)["bias"] for kind in ("int8", "4-bit")
                }
                cells.append(TRUTH, cell | {"seconds": time.perf_counter() - start})


def figures(cell: dict) -> dict[str, float]:
    """A row of the table."""
    blocks = [name for name in cell["probes"] if name.startswith("block")]
    last, head = cell["probes"][blocks[-1]], cell["probes"]["head"]
    found = {
        "bias": cell["bias"],
        "linear": last["linear"],
        "head": head["linear"],
        "mlp": last["mlp"],
        "refit": cell["refit"],
    }
    found |= {kind: curve[-1] for kind, curve in cell["relearning"].items()}
    return found | cell["compression"]


def truth_table() -> list[str]:
    """Means over seeds."""
    runs = cells.read(TRUTH)
    parts = []
    for task in TASKS:
        mine = {m: [figures(c) for c in runs if (c["task"], c["method"]) == (task, m)] for m in methods()}
        if not any(len(found) >= cells.SEEDS for found in mine.values()):
            continue
        chance = np.mean([c["probes"]["head"]["chance"] for c in runs if c["task"] == task])
        parts += [
            f"### Is it gone? {task}\n",
            f"Means over {cells.SEEDS} seeds. Probes read the attribute off the features, with what the label says about it taken "
            f"out (chance {chance:.2f}); the rest are follow rates on the test set. A few forget rows are 2%, at least 50, "
            "for the new head and 1%, at least 16, for the steps. Whoever holds the model can do all this; the retrained model's "
            "row is the target.\n",
            "| | " + " | ".join(COLUMNS.values()) + " |",
            "|---" * (len(COLUMNS) + 1) + "|",
        ]
        for method, found in mine.items():
            shown = [f"{np.mean([r[k] for r in found]):.3f}" for k in COLUMNS]
            if len(found) < cells.SEEDS:
                shown = ["not run", *[""] * (len(COLUMNS) - 1)]
            parts.append(f"| {cells.METHODS[method].title} | " + " | ".join(shown) + " |")
        parts.append("")
    return parts
