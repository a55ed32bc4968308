"""One setting changed at a time, on validation folds: what the defaults rest on, and what was tried without gain."""

import contextlib
import copy
import dataclasses
import json
import math
import time
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np

from .. import results
from ..markdown import table
from ..methods import METHODS
from ..methods.uib import unlearn
from ..tasks import TASKS
from . import runs

RESEARCH = results.FOLDER / "research.jsonl"
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
HOSTING = ("digits-colour", "fashion-colour", "fashion-patch", "fashion-outdated", "fashion-backdoor")


@dataclass(frozen=True)
class Variant:
    """What is changed.

    Attributes:
        setting: of `UIBConfig`.
        label_information_kept: of the nats the checkpoint tells about the forget labels, under the default noise.
        strength: factor on the calibrated prior's default strength.
        noise_exponent: of ``1 - t/T`` in the scale of the noise; the first round's default was 1, today's is 1/2.
        label_noise: whether the prior tests for label noise, as today's default does.
        restarts: runs one after the other, each on the merged model of the one before, in as many steps together.
        same_subspace: the first one's V in all of them.
        fifth: in a fifth of the retraining's steps.
        calibration, retain: whether the set is given.
    """

    setting: dict = field(default_factory=dict)
    label_information_kept: float | None = None
    strength: float = 1.0
    noise_exponent: float = 1.0
    label_noise: bool = False
    restarts: int = 1
    same_subspace: bool = False
    fifth: bool = False
    calibration: bool = True
    retain: bool = True


def setting(**values) -> Variant:
    """One setting of `UIBConfig`, or several, of the first round's default."""
    return Variant(values)


def root(**values) -> Variant:
    """The same with the noise falling as the root of ``1 - t/T``."""
    return Variant(values, noise_exponent=0.5)


def now(**values) -> Variant:
    """The same of today's default."""
    return dataclasses.replace(root(**values), label_noise=True)


# About the default of then: noise falling as 1 - t/T, no test for label noise
FIRST: dict[str, Variant] = {
    "default": Variant(),
    "no noise (posterior map)": setting(posterior="map"),
    "no forget loss (prior none)": setting(prior="none"),
    "no noise, no forget loss": setting(prior="none", posterior="map"),
    "subspace: forget set alone": setting(prior_subspace="forget"),
    "subspace: random": setting(prior_subspace="random"),
    "A and B trained": setting(trainable_factors="both"),
    "k = 8": setting(subspace_rank=8),
    "k = 32": setting(subspace_rank=32),
    "label information kept: 80%": Variant(label_information_kept=0.8),
    "label information kept: 50%": Variant(label_information_kept=0.5),
    "gamma / 3": Variant(strength=1 / 3),
    "gamma x 3": Variant(strength=3.0),
    "forget loss for 20% of the steps": setting(prior_fraction=0.2),
    "forget loss for all steps": setting(prior_fraction=1.0),
    "beta = 0": setting(beta=0.0),
    "beta x 10": setting(beta=0.1),
    "V refreshed half-way (merged, started again)": Variant(restarts=2),
    "started again half-way, the same V": Variant(restarts=2, same_subspace=True),
    "k = 8 and beta x 10": setting(subspace_rank=8, beta=0.1),
    "learning rate / 2": setting(learning_rate=5e-4),
    "learning rate x 2": setting(learning_rate=2e-3),
    "a fixed level (c = 3)": setting(forget_target=3.0),
    "no calibration set": Variant(calibration=False),
    "128 rows of each set for V": setting(contrast_samples=128),
}
# What became the default, and what was tried beside it
SECOND: dict[str, Variant] = {
    "noise falls as the root of 1 - t/T": root(),
    "the root, and label noise: the default now": now(),
    "the root, and half the learning rate": root(learning_rate=5e-4),
    "the root, and k = 8": root(subspace_rank=8),
    "the root, and forget loss for all steps": root(prior_fraction=1.0),
}
# On top of the default now: fewer steps, no retained rows, and hosted methods with and without a level
NO_LEVEL = {"forget_target": -math.inf}
THIRD: dict[str, Variant] = {
    "the default now, a fifth of the retraining's steps": dataclasses.replace(now(), fifth=True),
    "no retained rows": dataclasses.replace(now(), retain=False),
    "ascent without a level, gamma 0.01": now(prior="ascent", prior_strength=0.01, **NO_LEVEL),
    **{f"ascent, gamma {g}": now(prior="ascent", prior_strength=g) for g in (0.3, 1.0)},
    "random label without a level, gamma 0.03": now(prior="random_label", prior_strength=0.03, **NO_LEVEL),
    **{f"random label, gamma {g}": now(prior="random_label", prior_strength=g) for g in (1.0, 3.0)},
}
VARIANTS = FIRST | SECOND | THIRD


@contextlib.contextmanager
def as_in(variant: Variant):
    """What no setting says, for the time of a run: the one place that reaches into the modules."""
    from hf_uib import posterior
    from hf_uib.measurements import Measurements
    from hf_uib.priors import CalibratedPrior, calibrated

    strength, contrast, first = CalibratedPrior.default_strength, Measurements.contrast, {}
    noise_z = calibrated.label_noise_z if variant.label_noise else (lambda forget, unseen: -math.inf)

    def measured(self, model, layers):
        found = contrast(self, model, layers)
        found = first.setdefault("found", found) if variant.same_subspace else found
        self.statistics["pattern_z"] = found.pattern_z
        return found

    with (
        patch.object(
            posterior, "noise_scale", lambda step, total: max(0.0, 1 - step / total) ** variant.noise_exponent
        ),
        patch.object(Measurements, "contrast", measured),
        patch.object(
            CalibratedPrior, "default_strength", lambda self, noised: variant.strength * strength(self, noised)
        ),
        patch.object(calibrated, "label_noise_z", noise_z),
    ):
        yield


def run_variant(variant: Variant, task, original, seed: int, folder: str) -> tuple:
    """The merged model of a variant, and the trainer's statistics."""
    task, model = copy.copy(task), copy.deepcopy(original)
    if not variant.retain:
        task.sets = task.sets | {"retain": None}
    budget = runs.budget_of(METHODS["uib"], task, seed, folder)
    steps = task.train_settings["retrain_steps"] // 5 if variant.fifth else budget.steps
    budget = dataclasses.replace(budget, steps=steps // variant.restarts)
    setting = dict(variant.setting)
    if variant.label_information_kept is not None:
        setting["channel_settings"] = {"label_information_kept": variant.label_information_kept}
    with as_in(variant):
        for _ in range(variant.restarts):
            adapted, info = unlearn(model, task, budget, calibration=variant.calibration, **setting)
            model = adapted.merge_and_unload()
    return model, info["statistics"]


def run_research(options) -> None:
    """Do what is missing in the results."""
    runs.quiet()
    done = {(line["task"], line["seed"], line["variant"]) for line in results.read(RESEARCH)}
    for name in (n for n in FOLDS if n in options.tasks):
        wanted = (FIRST if name in FIRST_TASKS else {"default": FIRST["default"]}) | SECOND
        wanted |= THIRD if name in HOSTING else {}
        for seed in FOLDS[name]:
            missing = {v: variant for v, variant in wanted.items() if (name, seed, v) not in done}
            if not missing:
                continue
            task = runs.build(name, seed, options)
            models = runs.checkpoints(task, name, seed, options)
            oracle = runs.validation_oracle(task, models, seed, options.cache)
            for title, variant in missing.items():
                start = time.perf_counter()
                model, statistics = run_variant(variant, task, models["original"], seed, options.cache)
                row = runs.measure(model, task, "validation")
                line = {"task": name, "seed": seed, "variant": title, "score": runs.score(row, oracle)} | row
                line |= {"seconds": time.perf_counter() - start, "statistics": statistics}
                results.append(RESEARCH, json.loads(json.dumps(line)))


# ---- Tables -----------------------------------------------------------------------------------------------------


def research_tables() -> list[str]:
    """Figures are means over the folds."""
    return [
        "Bias tasks: bias-conflicting accuracy / shortcut rate (tweets: flip rate); fashion-random: average gap to the retrained "
        "model, in points. Validation folds, mean over seeds; the default of the first round, where noise fell as 1 - t/T and "
        "there was no test for label noise, but for what is named.\n",
        *variant_table(FIRST, FIRST_TASKS),
        "What changed the default, and what was tried beside it:\n",
        *variant_table({"default": FIRST["default"]} | SECOND, FOLDS),
        "Fewer steps, no retained rows, and the methods UIB hosts, on the default now (the test for label noise included); "
        "accuracy as a third figure:\n",
        *variant_table({"the root, and label noise: the default now": now()} | THIRD, HOSTING, accuracy=True),
    ]


def variant_table(variants, tasks, accuracy: bool = False) -> list[str]:
    """Variants x tasks; a dash where not every fold was run."""
    of = {(line["task"], line["seed"], line["variant"]): line for line in results.read(RESEARCH)}

    def shown(variant: str, task: str) -> str:
        rows = [of[task, seed, variant] for seed in FOLDS[task] if (task, seed, variant) in of]
        if len(rows) < len(FOLDS[task]):
            return "-"
        if TASKS[task].kind == "removal":
            return f"{-np.mean([row['score'] for row in rows]):.2f}"
        shortcut = "flip_rate" if task == "tweets-airline" else "follow_rate"
        keys = ("conflicting_accuracy", shortcut, *(("accuracy",) if accuracy else ()))
        return " / ".join(f"{np.mean([row[k] for row in rows]):.3f}" for k in keys)

    header = ["", *(f"{task} (seeds {', '.join(map(str, FOLDS[task]))})" for task in tasks)]
    return table(header, [[variant, *(shown(variant, task) for task in tasks)] for variant in variants])
