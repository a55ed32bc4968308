"""Three unlearning requests, one after the other, each on the merged model of the one before; then the second is taken back."""

import copy
import os
from functools import partial

import numpy as np

from . import cells

LIFECYCLE = os.path.join(cells.ROOT, "lifecycle.jsonl")
SWAPPED = {3: 8, 8: 3}
REQUESTS = {
    "hue": "the hue as a hint to the digit",
    "scheme": "an old scheme that swaps 3 and 8",
    "rows": "90 random rows",
}
COLUMNS = {
    "accuracy": "accuracy",
    "hue": "follow the hue",
    "scheme": "3 and 8 read by the old scheme",
    "rows": "attack AUC on the 90 rows",
}


def three_requests(seed: int):
    """scikit-learn's digits: a part whose hue gives the label away, one of 3s and 8s under swapped labels, and clean rows, of which
    some have to go; a task whose ``sets`` has them by name, and ``rest``."""
    from sklearn.datasets import load_digits
    from transformers import ViTImageProcessorPil

    from hf_uib.cli import digits
    from hf_uib.data.reading import encode

    digits, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    x, y = digits.images[order] / 16.0, digits.target[order]
    names = [str(i) for i in range(10)]
    processor = ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8})
    swappable = np.flatnonzero(np.isin(y[950:1497], list(SWAPPED))) + 950
    scheme = rng.permutation(swappable)[: len(swappable) * 3 // 4]
    clean = np.setdiff1d(np.arange(950, 1497), scheme)
    index = {
        "pretrain": np.arange(350), "calibration": np.arange(350, 450), "hue": np.arange(450, 950), "scheme": scheme,
        "rows": clean[:90], "rest": clean[90:], "test": np.repeat(np.arange(1497, len(y)), 10),
    }  # fmt: skip
    sets = {}
    for part, chosen in index.items():
        labels, given = y[chosen], rng.integers(0, 10, len(chosen))
        if part == "hue":
            given = labels
        if part == "scheme":
            labels = np.array([SWAPPED[label] for label in labels])
        if part == "test":
            given = np.tile(np.arange(10), len(chosen) // 10)
        rows = digits.picture_dataset(digits.paint(x[chosen], given, saturation=1.0), labels, given, "colour", names)
        sets[part] = encode(rows, processor, "pixel_values")
    sets["forget"], sets["retain"] = joined(sets, REQUESTS), sets["rest"]
    settings = {"pretrain_steps": 500, "steps": 400, "unlearn_steps": 200, "retrain_steps": 400, "batch": 64}
    build = partial(digits.small_vit, 8, 2, names, hidden=48, layers=3)
    return digits.Task("three-requests", sets, build, processor, "colour", 10, train_settings=settings)


def joined(sets: dict, parts):
    """The rows of several parts."""
    from functools import reduce

    

    return reduce(digits.merged, [sets[part] for part in parts])


def figures(model, task) -> dict[str, float]:
    """How much of each request is left in a model, on test rows and on the rows to delete."""
    from hf_uib.audit import report

    seen = {
        part: report.predict(model, task.sets[part], task.processing_class, quiet=True) for part in ("test", "rows")
    }
    logits, labels = seen["test"]
    row = report.bias_row(logits, labels, np.asarray(task.sets["test"].with_format(None)["colour"]))
    swappable = np.isin(labels, list(SWAPPED))
    old = np.array([SWAPPED.get(label, -1) for label in labels])
    found = report.attack({"forget": seen["rows"], "test": seen["test"]}, n_bootstrap=0)
    return {
        "accuracy": row["accuracy"],
        "hue": row["follow_rate"],
        "scheme": float((logits.argmax(-1) == old)[swappable].mean()),
        "rows": found["auc"],
    }


def run_lifecycle(options) -> None:
    """A line for each seed and model: original, after each request, each request's retrained model, the second request undone."""
    from hf_uib import audit_model, undo

    cells.quiet()
    done = {cell["seed"] for cell in cells.read(LIFECYCLE)}
    for seed in (s for s in options.seeds if s not in done):
        task = three_requests(seed)
        models = digits.prepare_models(task, seed, options.cache)
        model, kept, lines = models["original"], [*REQUESTS, "rest"], [("original", models["original"], {})]
        for i, part in enumerate(REQUESTS):
            kept.remove(part)
            task.sets |= {"forget": task.sets[part], "retain": joined(task.sets, kept)}
            folder = os.path.join(options.cache, f"request-{i + 1}")
            trainer = cells.uib_trainer(task, copy.deepcopy(model), "uib", {}, seed, folder)
            trainer.request = REQUESTS[part]
            trainer.train()
            trainer.save_model()
            model, oracle = trainer.merge_and_unload(), copy.deepcopy(models["start"])
            digits.fit(
                oracle, task.sets["retain"], task, task.train_settings["retrain_steps"], options.cache, seed, 1e-3
            )
            flags = {}
            for earlier in list(REQUESTS)[: i + 1]:
                audited = audit_model(
                    model,
                    reference_model=models["original"],
                    forget_dataset=task.sets[earlier],
                    retain_dataset=task.sets["retain"],
                    test_dataset=task.sets["test"],
                    bias_column="colour" if earlier == "hue" else None,
                    retrained_model=oracle,
                    processing_class=task.processing_class,
                )
                flags[earlier] = audited.flags
            lines += [(f"after request {i + 1}", model, flags), (f"retrained, request {i + 1}", oracle, {})]
        back = undo(model, os.path.join(options.cache, "request-2"))
        for name, subject, flags in [*lines, ("request 2 undone", back, {})]:
            cells.append(LIFECYCLE, {"seed": seed, "model": name, "flags": flags} | figures(subject.eval(), task))


def lifecycle_table() -> list[str]:
    """Models x what is left of each request; and which checks of the audit fired."""
    runs = cells.read(LIFECYCLE)
    if not runs:
        return []
    seeds = sorted({cell["seed"] for cell in runs})
    lines = [
        f"Seeds {', '.join(map(str, seeds))}; mean ± standard deviation. Audits: requests so far, each against the model retrained "
        "without all of them.\n",
        "| | " + " | ".join(COLUMNS.values()) + " | checks that fired, by request |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]  # fmt: skip
    for name in dict.fromkeys(cell["model"] for cell in runs):
        rows = [cell for cell in runs if cell["model"] == name]
        shown = [
            f"{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}" for v in ([row[key] for row in rows] for key in COLUMNS)
        ]
        audits = []
        for part in rows[0]["flags"]:
            fired = sorted({flag for row in rows for flag in row["flags"][part]})
            counted = [f"{flag} in {sum(flag in row['flags'][part] for row in rows)}" for flag in fired]
            audits.append(f"{part}: {', '.join(counted) or 'none'}")
        lines.append(f"| {name} | " + " | ".join(shown) + f" | {'; '.join(audits)} |")
    return lines
