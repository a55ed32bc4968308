"""One setting changed at a time, on validation folds: what the defaults rest on, and what was tried without gain."""

import json
import time

import numpy as np

from .. import results
from ..markdown import table
from ..tasks import TASKS
from . import runs

RESEARCH = results.FOLDER / "research.jsonl"
FOLDS = {
    "digits-colour": (100, 101, 102),
    "fashion-colour": (100, 101),
    "fashion-backdoor": (100,),
    "dino-shade": (100, 101),
    "hate-identity": (100,),
}
EARLIER_FOLDS = {
    "digits-colour": (100, 101, 102),
    "fashion-colour": (100, 101),
    "fashion-patch": (100,),
    "fashion-outdated": (100, 101),
    "fashion-backdoor": (100, 101, 102),
    "tweets-airline": (100, 101),
    "fashion-random": (100,),
}
LORA = "fine-tuned LoRA"  # as it is tuned; a row beside the variants
# Settings of `UIBConfig` on today's default
VARIANTS: dict[str, dict] = {
    "the default": {},
    "no tokens swapped": {"swap_fraction": 0.0},
    "no noise": {"noise_to_signal": 0.0},
    "neither: the forget loss alone, as for random rows": {"swap_fraction": 0.0, "noise_to_signal": 0.0},
    "B alone": {"trainable_factors": "B"},
    "learning rate / 2": {"learning_rate": 1e-3},
    "learning rate x 2": {"learning_rate": 4e-3},
}
# Runs of the editions before, whose defaults are gone: git has the code, the results file the figures
FIRST = (
    "default", "no noise (posterior map)", "no forget loss (prior none)", "no noise, no forget loss", "subspace: forget set alone",
    "subspace: random", "A and B trained", "k = 8", "k = 32", "label information kept: 80%", "label information kept: 50%",
    "gamma / 3", "gamma x 3", "forget loss for 20% of the steps", "forget loss for all steps", "beta = 0", "beta x 10",
    "V refreshed half-way (merged, started again)", "started again half-way, the same V", "k = 8 and beta x 10",
    "learning rate / 2", "learning rate x 2", "a fixed level (c = 3)", "no calibration set", "128 rows of each set for V",
)  # fmt: skip
SECOND = (
    "default", "noise falls as the root of 1 - t/T", "the root, and label noise: the default now",
    "the root, and half the learning rate", "the root, and k = 8", "the root, and forget loss for all steps",
)  # fmt: skip
THIRD = (
    "the root, and label noise: the default now", "the default now, a fifth of the retraining's steps", "no retained rows",
    "ascent without a level, gamma 0.01", "ascent, gamma 0.3", "ascent, gamma 1.0",
    "random label without a level, gamma 0.03", "random label, gamma 1.0", "random label, gamma 3.0",
)  # fmt: skip
FIRST_TASKS = ("digits-colour", "fashion-colour")
HOSTING = ("digits-colour", "fashion-colour", "fashion-patch", "fashion-outdated", "fashion-backdoor")
EDITION = 6  # of the default that today's variants are about


def run_research(options) -> None:
    """Do what is missing in the results."""
    runs.quiet()
    done = {
        (line["task"], line["seed"], line["variant"])
        for line in results.read(RESEARCH)
        if line.get("edition") == EDITION
    }
    for name in (n for n in FOLDS if n in options.tasks):
        for seed in FOLDS[name]:
            missing = [v for v in (*VARIANTS, LORA) if (name, seed, v) not in done]
            if not missing:
                continue
            task = runs.build(name, seed, options)
            models = runs.checkpoints(task, name, seed, options)
            oracle = runs.validation_oracle(task, models, seed, options.cache)
            for title in missing:
                start = time.perf_counter()
                method, setting = (
                    ("uib", VARIANTS[title]) if title in VARIANTS else ("lora", runs.tuned_setting(name, "lora"))
                )
                model, info = runs.trained(task, models, method, setting, seed, options.cache)
                row = runs.measure(model, task, "validation")
                line = {"task": name, "seed": seed, "variant": title, "score": runs.score(name, row, oracle)} | row
                line |= {
                    "seconds": time.perf_counter() - start,
                    "statistics": info.get("statistics"),
                    "edition": EDITION,
                }
                results.append(RESEARCH, json.loads(json.dumps(line)))


# ---- Tables -----------------------------------------------------------------------------------------------------


def research_tables() -> list[str]:
    """Figures are means over the folds."""
    return [
        "Bias tasks: bias-conflicting accuracy / shortcut rate / accuracy; hate-identity: false alarms about the group / BPSN AUC "
        "/ AUC on tweets. Validation folds, mean over seeds.\n",
        *variant_table((*VARIANTS, LORA), FOLDS, accuracy=True, edition=EDITION),
        "The first edition: noise along the contrast alone, A frozen to its subspace. Bias-conflicting accuracy / shortcut rate "
        "(tweets: flip rate). In the first rows the noise fell as 1 - t/T and there was no test for label noise, but for what is "
        "named.\n",
        *variant_table(FIRST, earlier(FIRST_TASKS)),
        "What changed that default, and what was tried beside it:\n",
        *variant_table(SECOND, EARLIER_FOLDS),
        "Fewer steps, no retained rows, and the methods UIB hosts, on the first edition's last default; accuracy as a third "
        "figure:\n",
        *variant_table(THIRD, earlier(HOSTING), accuracy=True),
    ]


def earlier(tasks: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The folds of some tasks of the editions before."""
    return {task: EARLIER_FOLDS[task] for task in tasks}


def variant_table(
    variants, folds: dict[str, tuple[int, ...]], accuracy: bool = False, edition: int | None = None
) -> list[str]:
    """Variants x tasks; a dash where not every fold was run."""
    mine = [line for line in results.read(RESEARCH) if line.get("edition") == edition]
    of = {(line["task"], line["seed"], line["variant"]): line for line in mine}

    def shown(variant: str, task: str) -> str:
        rows = [of[task, seed, variant] for seed in folds[task] if (task, seed, variant) in of]
        if len(rows) < len(folds[task]):
            return "-"
        if TASKS[task].kind == "removal":
            return f"{-np.mean([row['score'] for row in rows]):.2f}"
        keys = list(TASKS[task].ranked_by)
        if task == "tweets-airline":
            keys[1] = "flip_rate"
        return " / ".join(f"{np.mean([row[k] for row in rows]):.3f}" for k in keys[: 3 if accuracy else 2])

    header = ["", *(f"{task} (seeds {', '.join(map(str, folds[task]))})" for task in folds)]
    return table(header, [[variant, *(shown(variant, task) for task in folds)] for variant in variants])
