"""One setting changed at a time, on validation folds: what the defaults rest on, and what was tried without gain."""

import contextlib
import copy
import json
import os
import time

import numpy as np

from . import cells

RESEARCH = os.path.join(cells.ROOT, "research.jsonl")
FOLDS = {
    "digits-colour": (100, 101, 102),
    "fashion-colour": (100, 101),
    "fashion-patch": (100,),
    "fashion-outdated": (100, 101),
    "fashion-backdoor": (100, 101, 102),
    "tweets-airline": (100, 101),
    "fashion-random": (100,),
}
FIRST_TASKS = ("digits-colour", "fashion-colour")
# What is changed: settings of UIBConfig, or of the trainer's module (in capitals), or a way to run it. The first round was about
# the default of then: noise falling as 1 - t/T, labels never disputed.
FIRST: dict[str, dict] = {
    "default": {},
    "no noise (posterior map)": {"posterior": "map"},
    "no evidence (prior none)": {"prior": "none"},
    "no noise, no evidence": {"prior": "none", "posterior": "map"},
    "subspace: forget set alone": {"prior_subspace": "forget"},
    "subspace: random": {"prior_subspace": "random"},
    "A and B trained": {"trainable_factors": "both"},
    "k = 8": {"subspace_rank": 8},
    "k = 32": {"subspace_rank": 32},
    "noise leaves 80% of the nats": {"LABEL_INFORMATION_KEPT": 0.8},
    "noise leaves 50% of the nats": {"LABEL_INFORMATION_KEPT": 0.5},
    "gamma / 3": {"STRENGTH": 1 / 3},
    "gamma x 3": {"STRENGTH": 3.0},
    "evidence for 20% of the steps": {"prior_fraction": 0.2},
    "evidence for all steps": {"prior_fraction": 1.0},
    "beta = 0": {"beta": 0.0},
    "beta x 10": {"beta": 0.1},
    "V refreshed half-way (merged, started again)": {"RESTARTS": 2},
    "started again half-way, the same V": {"RESTARTS": 2, "SAME_V": True},
    "k = 8 and beta x 10": {"subspace_rank": 8, "beta": 0.1},
    "learning rate / 2": {"learning_rate": 5e-4},
    "learning rate x 2": {"learning_rate": 2e-3},
    "a fixed level (c = 3)": {"forget_target": 3.0},
    "no calibration set": {"CALIBRATION": False},
    "128 rows of each set for V": {"contrast_samples": 128},
}
# The second round: what became the default, and what was tried beside it
SECOND: dict[str, dict] = {
    "noise falls as the root of 1 - t/T": {"ANNEAL": 0.5},
    "the root, and disputed labels: the default now": {"ANNEAL": 0.5, "DISPUTED": True},
    "the root, and half the learning rate": {"ANNEAL": 0.5, "learning_rate": 5e-4},
    "the root, and k = 8": {"ANNEAL": 0.5, "subspace_rank": 8},
    "the root, and evidence for all steps": {"ANNEAL": 0.5, "prior_fraction": 1.0},
}
NOW = {"ANNEAL": 0.5, "DISPUTED": True}
# The third round, on top of the default now: fewer steps, no retained rows, and hosted methods with and without a level
NO_LEVEL = {"forget_target": float("-inf")}
THIRD: dict[str, dict] = {
    "the default now, a fifth of the retraining's steps": NOW | {"FIFTH": True},
    "no retained rows": NOW | {"RETAIN": False},
    "ascent without a level, gamma 0.01": NOW | NO_LEVEL | {"prior": "ascent", "prior_strength": 0.01},
    **{f"ascent, gamma {g}": NOW | {"prior": "ascent", "prior_strength": g} for g in (0.3, 1.0)},
    "random label without a level, gamma 0.03": NOW | NO_LEVEL | {"prior": "random_label", "prior_strength": 0.03},
    **{f"random label, gamma {g}": NOW | {"prior": "random_label", "prior_strength": g} for g in (1.0, 3.0)},
}
HOSTING = ("digits-colour", "fashion-colour", "fashion-patch", "fashion-outdated", "fashion-backdoor")
VARIANTS = FIRST | SECOND | THIRD


@contextlib.contextmanager
def _changed(variant: dict):
    """The trainer's constants, for the time of a run."""
    from unittest.mock import patch

    from hf_uib import bound, trainer
    from hf_uib.priors import CalibratedPrior, calibrated

    strengths = tuple(s * variant.get("STRENGTH", 1.0) for s in CalibratedPrior.strengths)
    measure, first = trainer.UIBTrainer._measure_contrast, {}
    exponent = variant.get("ANNEAL", 1.0)
    disputed = calibrated.LABEL_NOISE_Z if variant.get("DISPUTED") else float("inf")

    def contrast(self):
        found = measure(self)
        if not first:
            first.update(subspaces=found, output_scale=self.output_scale, pattern_z=self.statistics["pattern_z"])
        if variant.get("SAME_V"):
            self.output_scale, self.statistics["pattern_z"] = first["output_scale"], first["pattern_z"]
            return first["subspaces"]
        return found

    with (
        patch.object(trainer, "LABEL_INFORMATION_KEPT", variant.get("LABEL_INFORMATION_KEPT", trainer.LABEL_INFORMATION_KEPT)),
        patch.object(CalibratedPrior, "strengths", strengths),
        patch.object(bound, "anneal", lambda step, total: max(0.0, 1 - step / total) ** exponent),
        patch.object(calibrated, "LABEL_NOISE_Z", disputed),
        patch.object(trainer.UIBTrainer, "_measure_contrast", contrast),
    ):
        yield


def run_research(options) -> None:
    """Fill the missing cells."""
    cells.quiet()
    done = {(c["task"], c["seed"], c["variant"]) for c in cells.read(RESEARCH)}
    for name in (n for n in FOLDS if n in options.tasks):
        for seed in FOLDS[name]:
            wanted = (FIRST if name in FIRST_TASKS else {"default": {}}) | SECOND | (THIRD if name in HOSTING else {})
            missing = [v for v in wanted if (name, seed, v) not in done]
            if not missing:
                continue
            task = cells.build(name, seed, options)
            models, oracle = cells.checkpoints(task, name, seed, options), None
            if task.bias_column is None:
                oracle = cells.trained(task, models, "retrained", {}, seed, options.cache)[0]
                oracle = cells.measure(oracle, task, "validation")
            for variant in missing:
                changed, model = VARIANTS[variant], copy.deepcopy(models["original"])
                setting = {k: v for k, v in changed.items() if not k.isupper()}
                sets, steps = task.sets, task.train_settings["unlearn_steps"]
                restarts = changed.get("RESTARTS", 1)
                budget = task.train_settings["retrain_steps"] // 5 if changed.get("FIFTH") else steps
                task.train_settings["unlearn_steps"] = budget // restarts
                if not changed.get("CALIBRATION", True):
                    task.sets = sets | {"calibration": None}
                if not changed.get("RETAIN", True):
                    task.sets = sets | {"retain": None}
                start = time.perf_counter()
                with _changed(changed):
                    for _ in range(restarts):
                        trained, info = cells.unlearned(task, model, "uib", setting, seed, options.cache)
                        model = trained.merge_and_unload()
                task.sets, task.train_settings["unlearn_steps"] = sets, steps
                row = cells.measure(model, task, "validation")
                cell = {"task": name, "seed": seed, "variant": variant, "score": cells.score(row, oracle)} | row
                cell |= {"seconds": time.perf_counter() - start, "statistics": info["statistics"]}
                cells.append(RESEARCH, json.loads(json.dumps(cell)))


def table() -> list[str]:
    """Figures are means over the folds."""
    return [
        "Bias tasks: bias-conflicting accuracy / follow rate (tweets: flip rate); fashion-random: average gap to the retrained "
        "model, in points. Validation folds, mean over seeds; the default of the first round, where noise fell as 1 - t/T and "
        "labels were not disputed, but for what is named.\n",
        *_rows(FIRST, FIRST_TASKS),
        "What changed the default, and what was tried beside it:\n",
        *_rows({"default": {}} | SECOND, FOLDS),
        "Fewer steps, no retained rows, and the methods UIB hosts, on the default now (disputed labels included); accuracy as a "
        "third figure:\n",
        *_rows({"the root, and disputed labels: the default now": {}} | THIRD, HOSTING, accuracy=True),
    ]  # fmt: skip


def _rows(variants, tasks, accuracy: bool = False) -> list[str]:
    of = {(c["task"], c["seed"], c["variant"]): c for c in cells.read(RESEARCH)}
    lines = [
        "| | " + " | ".join(f"{t} (seeds {', '.join(map(str, FOLDS[t]))})" for t in tasks) + " |",
        "|---" * (len(tasks) + 1) + "|",
    ]
    for variant in variants:
        shown = []
        for t in tasks:
            rows = [of[t, s, variant] for s in FOLDS[t] if (t, s, variant) in of]
            if len(rows) < len(FOLDS[t]):
                shown.append("not run")
            elif t in cells.REMOVAL:
                shown.append(f"{-np.mean([r['score'] for r in rows]):.2f}")
            else:
                follow = "flip_rate" if t == "tweets-airline" else "follow_rate"
                keys = ("conflicting_accuracy", follow, *(("accuracy",) if accuracy else ()))
                shown.append(" / ".join(f"{np.mean([r[k] for r in rows]):.3f}" for k in keys))
        lines.append(f"| {variant} | " + " | ".join(shown) + " |")
    return [*lines, ""]
