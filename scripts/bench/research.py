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
    "fashion-random": (100,),
    "tweets-airline": (100,),
}
# What is changed: settings of UIBConfig, or of the trainer's module (in capitals), or a way to run it.
VARIANTS: dict[str, dict] = {
    "default": {},
    "no noise (posterior map)": {"posterior": "map"},
    "no evidence (prior none)": {"prior": "none"},
    "no noise, no evidence": {"prior": "none", "posterior": "map"},
    "subspace: forget set alone": {"prior_subspace": "forget"},
    "subspace: random": {"prior_subspace": "random"},
    "A and B trained": {"trainable_factors": "both"},
    "k = 8": {"subspace_rank": 8},
    "k = 32": {"subspace_rank": 32},
    "noise leaves 80% of the nats": {"NOISED_SHARE": 0.8},
    "noise leaves 50% of the nats": {"NOISED_SHARE": 0.5},
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
    "noise falls as the root of 1 - t/T": {"ANNEAL": 0.5},
    "a fixed level (c = 3)": {"forget_target": 3.0},
    "no calibration set": {"CALIBRATION": False},
    "128 rows of each set for V": {"contrast_samples": 128},
}


@contextlib.contextmanager
def _changed(variant: dict):
    """The trainer's constants, for the time of a run."""
    from unittest.mock import patch

    from hf_uib import bound, trainer
    from hf_uib.priors import CalibratedPrior

    strengths = tuple(s * variant.get("STRENGTH", 1.0) for s in CalibratedPrior.strengths)
    anneal, measure, first = bound.anneal, trainer.UIBTrainer._measure_contrast, {}

    def contrast(self):
        found = measure(self)
        if not first:
            first.update(subspaces=found, unit_width=self.unit_width, pattern_z=self.statistics["pattern_z"])
        if variant.get("SAME_V"):
            self.unit_width, self.statistics["pattern_z"] = first["unit_width"], first["pattern_z"]
            return first["subspaces"]
        return found

    with (
        patch.object(trainer, "NOISED_SHARE", variant.get("NOISED_SHARE", trainer.NOISED_SHARE)),
        patch.object(CalibratedPrior, "strengths", strengths),
        patch.object(bound, "anneal", lambda step, total: anneal(step, total) ** variant.get("ANNEAL", 1.0)),
        patch.object(trainer.UIBTrainer, "_measure_contrast", contrast),
    ):
        yield


def run_research(options) -> None:
    """Fill the missing cells."""
    cells.quiet()
    done = {(c["task"], c["seed"], c["variant"]) for c in cells.read(RESEARCH)}
    for name in (n for n in FOLDS if n in options.tasks):
        for seed in FOLDS[name]:
            missing = [v for v in VARIANTS if (name, seed, v) not in done]
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
                task.train_settings["unlearn_steps"] = steps // restarts
                if not changed.get("CALIBRATION", True):
                    task.sets = sets | {"calibration": None}
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
    """Differences to the default, by task; figures are means over the folds."""
    made = cells.read(RESEARCH)
    tasks = [t for t in FOLDS if any(c["task"] == t for c in made)]
    of = {(c["task"], c["seed"], c["variant"]): c for c in made}
    lines = [
        "Bias tasks: bias-conflicting accuracy / follow rate (tweets: flip rate); fashion-random: average gap to the retrained "
        "model, in points. Validation folds, mean over seeds; default settings but for the one named.\n",
        "| | " + " | ".join(f"{t} (seeds {', '.join(map(str, FOLDS[t]))})" for t in tasks) + " |",
        "|---" * (len(tasks) + 1) + "|",
    ]  # fmt: skip
    for variant in VARIANTS:
        shown = []
        for t in tasks:
            rows = [of[t, s, variant] for s in FOLDS[t] if (t, s, variant) in of]
            if not rows:
                shown.append("not run")
            elif t in cells.REMOVAL:
                shown.append(f"{-np.mean([r['score'] for r in rows]):.2f}")
            else:
                follow = "flip_rate" if t == "tweets-airline" else "follow_rate"
                shown.append(
                    " / ".join(f"{np.mean([r[k] for r in rows]):.3f}" for k in ("conflicting_accuracy", follow))
                )
        lines.append(f"| {variant} | " + " | ".join(shown) + " |")
    return [*lines, ""]
