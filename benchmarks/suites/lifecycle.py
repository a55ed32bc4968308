"""Three unlearning requests, one after the other, each on the merged model of the one before; then the second is taken back."""

import copy
import os
from functools import partial, reduce

import numpy as np
from sklearn.datasets import load_digits
from torch import nn
from transformers import ViTImageProcessorPil

from hf_uib import audit_model, undo
from hf_uib.cli import digits
from hf_uib.data.reading import encode
from hf_uib.inference import predict
from hf_uib.metrics import attack, bias_row

from .. import results
from ..markdown import table
from ..methods import Budget
from ..methods.uib import uib_trainer
from . import runs

LIFECYCLE = results.FOLDER / "lifecycle.jsonl"
SWAPPED = {3: 8, 8: 3}
REQUESTS = {
    "hue": "the hue as a hint to the digit",
    "scheme": "an old scheme that swaps 3 and 8",
    "rows": "90 random rows",
}
COLUMNS = {
    "accuracy": "accuracy",
    "hue": "shortcut rate of the hue",
    "scheme": "3 and 8 read by the old scheme",
    "rows": "attack AUC on the 90 rows",
}
SETTINGS = {"pretrain_steps": 500, "steps": 400, "unlearn_steps": 200, "retrain_steps": 400, "batch": 64}


def parts_of(y: np.ndarray, rng) -> dict[str, np.ndarray]:
    """Row numbers of each part of the digits."""
    swappable = np.flatnonzero(np.isin(y[950:1497], list(SWAPPED))) + 950
    scheme = rng.permutation(swappable)[: len(swappable) * 3 // 4]
    clean = np.setdiff1d(np.arange(950, 1497), scheme)
    return {
        "pretrain": np.arange(350), "calibration": np.arange(350, 450), "hue": np.arange(450, 950), "scheme": scheme,
        "rows": clean[:90], "rest": clean[90:], "test": np.repeat(np.arange(1497, len(y)), 10),
    }  # fmt: skip


def three_requests(seed: int) -> digits.Task:
    """scikit-learn's digits: a part whose hue gives the label away, one of 3s and 8s under swapped labels, and clean rows, of which
    some have to go; a task whose ``sets`` has them by name, and ``rest``."""
    loaded, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(loaded.target))
    x, y = loaded.images[order] / 16.0, loaded.target[order]
    names = [str(i) for i in range(10)]
    processor = ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8})
    sets = {}
    for part, chosen in parts_of(y, rng).items():
        labels, given = y[chosen], rng.integers(0, 10, len(chosen))
        if part == "hue":
            given = labels
        if part == "scheme":
            labels = np.array([SWAPPED[label] for label in labels])
        if part == "test":
            given = np.tile(np.arange(10), len(chosen) // 10)
        painted = digits.paint(x[chosen], given, saturation=1.0)
        sets[part] = encode(digits.picture_dataset(painted, labels, given, "colour", names), processor, "pixel_values")
    sets["forget"], sets["retain"] = joined(sets, REQUESTS), sets["rest"]
    new_model = partial(digits.small_vit, 8, 2, names, hidden=48, layers=3)
    return digits.Task("three-requests", sets, new_model, processor, "colour", 10, train_settings=SETTINGS)


def joined(sets: dict, parts):
    """The rows of several parts."""
    return reduce(digits.merged, [sets[part] for part in parts])


def left_over(model: nn.Module, task: digits.Task) -> dict[str, float]:
    """How much of each request is left in a model, on test rows and on the rows to delete."""
    seen = {part: predict(model, task.sets[part], task.processing_class, quiet=True) for part in ("test", "rows")}
    logits, labels = seen["test"]
    row = bias_row(logits, labels, np.asarray(task.sets["test"].with_format(None)["colour"]))
    old = np.array([SWAPPED.get(label, -1) for label in labels])
    found = attack({"forget": seen["rows"], "test": seen["test"]}, n_bootstrap=0)
    return {
        "accuracy": row["accuracy"],
        "hue": row["follow_rate"],
        "scheme": float((logits.argmax(-1) == old)[old >= 0].mean()),
        "rows": found["auc"],
    }


def answer(model: nn.Module, task: digits.Task, part: str, seed: int, folder: str) -> nn.Module:
    """Unlearn one request from a copy; the adapter stays in ``folder``, the merged model is given."""
    budget = Budget(SETTINGS["unlearn_steps"], SETTINGS["batch"], 1e-3, seed, folder)
    trainer = uib_trainer(copy.deepcopy(model), task, budget)
    trainer.request = REQUESTS[part]
    trainer.train()
    trainer.save_model()
    return trainer.merge_and_unload()


def flags_of(model: nn.Module, original: nn.Module, oracle: nn.Module, task: digits.Task, part: str) -> list[str]:
    """Checks of the audit that fire for a request."""
    report = audit_model(
        model,
        reference_model=original,
        forget_dataset=task.sets[part],
        retain_dataset=task.sets["retain"],
        test_dataset=task.sets["test"],
        bias_column="colour" if part == "hue" else None,
        retrained_model=oracle,
        processing_class=task.processing_class,
    )
    return report.flags


def run_lifecycle(options) -> None:
    """A line for each seed and model: original, after each request, each request's retrained model, the second request undone."""
    runs.quiet()
    done = {line["seed"] for line in results.read(LIFECYCLE)}
    for seed in (s for s in options.seeds if s not in done):
        task = three_requests(seed)
        models = digits.prepare_models(task, seed, options.cache)
        model, kept, subjects = models["original"], [*REQUESTS, "rest"], [("original", models["original"], {})]
        for i, part in enumerate(REQUESTS):
            kept.remove(part)
            task.sets |= {"forget": task.sets[part], "retain": joined(task.sets, kept)}
            model = answer(model, task, part, seed, os.path.join(options.cache, f"request-{i + 1}"))
            oracle = copy.deepcopy(models["start"])
            digits.fit(oracle, task.sets["retain"], task, SETTINGS["retrain_steps"], options.cache, seed, 1e-3)
            earlier = list(REQUESTS)[: i + 1]
            flags = {name: flags_of(model, models["original"], oracle, task, name) for name in earlier}
            subjects += [(f"after request {i + 1}", model, flags), (f"retrained, request {i + 1}", oracle, {})]
        subjects.append(("request 2 undone", undo(model, os.path.join(options.cache, "request-2")), {}))
        for name, subject, flags in subjects:
            line = {"seed": seed, "model": name, "flags": flags}
            results.append(LIFECYCLE, line | left_over(subject.eval(), task))


def lifecycle_table() -> list[str]:
    """Models x what is left of each request; and which checks of the audit fired."""
    lines = results.read(LIFECYCLE)
    if not lines:
        return []
    rows = []
    for name in dict.fromkeys(line["model"] for line in lines):
        mine = [line for line in lines if line["model"] == name]
        values = [[line[key] for line in mine] for key in COLUMNS]
        audits = []
        for part in mine[0]["flags"]:
            fired = sorted({flag for line in mine for flag in line["flags"][part]})
            counted = [f"{flag} in {sum(flag in line['flags'][part] for line in mine)}" for flag in fired]
            audits.append(f"{part}: {', '.join(counted) or 'none'}")
        rows.append([name, *(f"{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}" for v in values), "; ".join(audits)])
    seeds = ", ".join(str(seed) for seed in sorted({line["seed"] for line in lines}))
    return [
        f"Seeds {seeds}; mean ± standard deviation. Audits: requests so far, each against the model retrained without all of "
        "them.\n",
        *table(["", *COLUMNS.values(), "checks that fired, by request"], rows),
    ]
