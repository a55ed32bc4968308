"""What a cell of the benchmark is: one method on one task from one seed."""

import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

ROOT = os.path.join(os.path.dirname(__file__), "..", "..", "benchmarks")
RESULTS, TUNING = os.path.join(ROOT, "results.jsonl"), os.path.join(ROOT, "tuning.jsonl")
TUNING_SEED = 100
SEEDS = 3  # of a figure that is compared

REMOVAL = ("fashion-random", "fashion-class")
# The bias tasks of the targets
BIAS = (
    "digits-colour",
    "fashion-colour",
    "fashion-patch",
    "fashion-outdated",
    "fashion-backdoor",
    "tweets-airline",
)
REGIMES = {
    "fashion-colour, D_r 2%": {"retained": 0.02},
    "fashion-colour, D_r 50%": {"retained": 0.5},
    "fashion-colour, 90% telling": {"telling": 0.9},
    "fashion-colour, 99% telling": {"telling": 0.99},
}
TASKS = (*BIAS, *REMOVAL, *REGIMES)
# Tasks whose forget labels are wrong, or whose forget rows shall be gone: more of a method is better than under a bias
WRONG = ("fashion-outdated", "fashion-backdoor", *REMOVAL)
TUNED_ON = dict.fromkeys(("fashion-patch", *REGIMES), "fashion-colour")


@dataclass
class Method:
    """A row of the tables.

    Attributes:
        title: as it is printed.
        grid: settings to tune over, with a factor ``rate`` on the task's learning rate. One entry: not tuned.
        kind: ``baseline`` (of hf_uib.baselines), ``uib`` (through the trainer), or an ``oracle``.
        hosts: for UIB with another method inside, that method.
        needs_attribute: of the retained rows. shown_only: a variant, not ranked.
        wrong: another grid for the tasks where what is to go is wrong or a whole class (`WRONG`), so that more of it is better.
    """

    title: str
    kind: str = "baseline"
    grid: list[dict] = field(default_factory=lambda: [{}])
    wrong: list[dict] | None = None
    hosts: str | None = None
    needs_attribute: bool = False
    shown_only: bool = False


def _grid(**values: list) -> list[dict]:
    settings: list[dict] = [{}]
    for name, options in values.items():
        settings = [setting | {name: option} for setting in settings for option in options]
    return settings


LABELS, MORE = _grid(weight=[0.01, 0.1], rate=[0.5, 1]), _grid(weight=[0.1, 1], rate=[0.5, 1])
METHODS = {
    "original": Method("original", "oracle"),
    "lora": Method("fine-tuned LoRA", grid=_grid(rate=[0.5, 1, 2, 4])),
    "full": Method("fine-tuned, all weights", grid=_grid(rate=[0.25, 0.5, 1, 2])),
    "neggrad": Method(
        "NegGrad+", grid=_grid(alpha=[0.99, 0.999], rate=[0.5, 1]), wrong=_grid(alpha=[0.9, 0.99], rate=[0.5, 1])
    ),
    "random_label": Method("random label", grid=LABELS, wrong=MORE),
    "influence": Method("influence (IU)", grid=_grid(damping=[1, 10], scale=[0.003, 0.03])),
    "salun": Method("SalUn", grid=LABELS, wrong=MORE),
    "scrub": Method("SCRUB", grid=_grid(ascent=[0.1, 0.3], alpha=[0.01, 0.5])),
    "ssd": Method("SSD", grid=_grid(alpha=[1, 1.05], damping=[0.1, 1])),
    "l1": Method("l1-sparse", grid=_grid(gamma=[1e-6, 1e-5, 5e-5, 1e-4])),
    "dfr": Method("DFR (head alone)", grid=_grid(inverse=[0.01, 0.1, 1, 10])),
    "dro": Method("Group DRO", grid=_grid(eta=[0.01, 0.1], rate=[0.5, 1]), needs_attribute=True),
    "variational": Method(
        "variational LoRA, fixed prior", "uib", grid=_grid(beta=[1e-6, 1e-4], noise_to_signal=[0.1, 0.5])
    ),
    "uib": Method("**UIB**", "uib"),
    "uib_fifth": Method("UIB, a fifth of the retraining's steps", "uib", shown_only=True),
    "uib_fold": Method("UIB, no calibration data", "uib", shown_only=True),
    "uib_none": Method("UIB, no evidence", "uib", shown_only=True),
    "uib_ascent": Method("UIB + NegGrad+", "uib", hosts="neggrad"),
    "uib_random_label": Method("UIB + random label", "uib", hosts="random_label"),
    "uib_saliency": Method("UIB + SalUn", "uib", hosts="salun"),
    "uib_influence": Method("UIB + influence (UIB-IF)", "uib", hosts="influence"),
    "balanced": Method("trained on balanced data", "oracle", needs_attribute=True),
    "retrained": Method("retrained", "oracle"),
}
FUNCTIONS = {
    "lora": "finetune_lora", "full": "finetune", "neggrad": "neggrad_plus", "l1": "l1_sparse", "dro": "group_dro",
}  # fmt: skip


def build(name: str, seed: int, options):
    """The task by name."""
    

    if name == "digits-colour":
        return digits.digits_colour(seed)
    if name == "tweets-airline":
        return tasks.tweets_airline(options.airline_tweets, options.minilm, seed)
    if name in REGIMES:
        return tasks.fashion("colour", options.fashion_mnist, seed, **REGIMES[name])
    special = {f"fashion-{k}": getattr(tasks, f"fashion_{k}") for k in ("random", "class", "outdated", "backdoor")}
    if name in special:
        return special[name](options.fashion_mnist, seed)
    return tasks.fashion(name.removeprefix("fashion-"), options.fashion_mnist, seed)


def checkpoints(task, name: str, seed: int, options) -> dict:
    """``start`` and ``original`` of a task, from the cache or made now."""
    

    cache = os.path.join(options.cache, f"{name}-{seed}")
    if not os.path.isdir(os.path.join(cache, "original")):
        for key, model in digits.prepare_models(task, seed, options.cache).items():
            model.save_pretrained(os.path.join(cache, key))
    return {
        key: type(task.new_model()).from_pretrained(os.path.join(cache, key)).eval() for key in ("start", "original")
    }


def applies(method: str, task) -> bool:
    """Whether a method is run on a task: some need the attribute, and a forget set it is drawn for."""
    if method == "uib_fifth" and task.name in REMOVAL:  # it is UIB's budget there
        return False
    return not METHODS[method].needs_attribute or (task.bias_column is not None and "balanced" in task.sets)


def trained(task, models: dict, method: str, setting: dict, seed: int, folder: str) -> tuple[object, dict]:
    """The method's model, trained from the shared checkpoint, and what the cell says of the training."""
    from accelerate import PartialState

    from hf_uib import baselines
    from hf_uib.cli import digits

    settings = task.train_settings
    budget = partial(baselines.Budget, settings["unlearn_steps"], settings["batch"], seed=seed)
    full_rate = settings.get("full_lr", 1e-3)
    started = time.perf_counter()
    if METHODS[method].kind == "oracle":
        model = copy.deepcopy(models["original" if method == "original" else "start"])
        if method == "original":
            return model.eval(), {"steps": 0, "seconds": 0.0}
        steps, rows = settings["retrain_steps"], task.sets["retain" if method == "retrained" else "balanced"]
        digits.fit(model, rows, task, steps, folder, seed, full_rate)
        return model.eval(), {"steps": steps, "seconds": time.perf_counter() - started}
    model = copy.deepcopy(models["original"]).to(PartialState().device)
    if METHODS[method].kind == "uib":
        return unlearned(task, model, method, setting, seed, folder)
    setting = dict(setting)
    rate = setting.pop("rate", 1) * (1e-3 if method == "lora" else full_rate)
    rows = baselines.Rows(task.sets["forget"], task.sets["retain"], task.processing_class, task.bias_column)
    model = getattr(baselines, FUNCTIONS.get(method, method))(model, rows, budget(learning_rate=rate), **setting)
    steps = 0 if method in ("influence", "ssd", "dfr") else settings["unlearn_steps"]
    return model, {"steps": steps, "seconds": time.perf_counter() - started}


def unlearned(task, model, method: str, setting: dict, seed: int, folder: str) -> tuple[object, dict]:
    """UIB with its defaults, or with another prior inside."""
    started = time.perf_counter()
    trainer = uib_trainer(task, model, method, setting, seed, folder)
    loop = trainer.train().metrics["train_runtime"]
    seconds = time.perf_counter() - started
    info = {"steps": trainer.args.max_steps, "seconds": seconds, "statistics_seconds": seconds - loop}
    return trainer.model, info | {
        "statistics": trainer.statistics,
        "measured_examples": trainer.measured_examples,
    }


def uib_trainer(task, model, method: str, setting: dict, seed: int, folder: str):
    """The trainer of a cell, not yet trained."""
    from hf_uib import UIBConfig, UIBTrainer

    prior = method.removeprefix("uib_")
    if method in ("uib", "uib_fold", "uib_fifth"):
        prior = "calibrated"
    if method == "variational":
        prior = "none"
        setting = setting | {"prior_subspace": "random", "prior_update_steps": 10**6}
    args = UIBConfig(
        folder,
        max_steps=task.train_settings["retrain_steps"] // 5
        if method == "uib_fifth"
        else task.train_settings["unlearn_steps"],
        per_device_train_batch_size=task.train_settings["batch"],
        seed=seed,
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
        **({"prior": prior} | setting),
    )
    return UIBTrainer(
        model,
        args,
        forget_dataset=task.sets["forget"],
        retain_dataset=task.sets["retain"],
        calibration_dataset=None if method == "uib_fold" else task.sets["calibration"],
        processing_class=task.processing_class,
    )


def measure(model, task, part: str = "test") -> dict:
    """Every metric of a task on its test (or validation) set."""
    import numpy as np

    from hf_uib.audit import report

    logits, labels = report.predict(model, task.sets[part], task.processing_class, quiet=True)
    if task.bias_column is not None:
        attributes = np.asarray(task.sets[part].with_format(None)[task.bias_column])
        row = report.bias_row(logits, labels, attributes)
        if task.counterfactuals > 1:
            row["flip_rate"] = report.flip_rate(logits, task.counterfactuals)
        return row
    row, seen = {"test_accuracy": float((logits.argmax(-1) == labels).mean())}, {"test": (logits, labels)}
    for key, rows in (("forget", "forget"), ("retain", "retain"), ("removed", f"{part}_removed")):
        if rows in task.sets:
            seen[key] = report.predict(model, task.sets[rows], task.processing_class, quiet=True)
            row[f"{key}_accuracy"] = float((seen[key][0].argmax(-1) == seen[key][1]).mean())

    def attack(unseen: str) -> dict:
        return report.attack({k: seen[k] for k in ("forget", "retain")} | {"test": seen[unseen]}, n_bootstrap=0)

    # The AUC against unseen rows of the same classes; the published attack is fitted on the classes that stay
    auc = attack("removed" if "removed" in seen else "test")["auc"]
    return row | {"attack_auc": auc, "mia_efficacy": attack("test")["mia_efficacy"]}


GAPS = ("forget_accuracy", "retain_accuracy", "test_accuracy", "attack_auc")


def average_gap(row: dict, oracle: dict) -> float:
    """Mean absolute gap to the retrained model, in points: forget, retained and test accuracy, attack AUC."""
    return 100 * sum(abs(row[k] - oracle[k]) for k in GAPS) / len(GAPS)


def score(row: dict, oracle: dict | None) -> float:
    """What tuning maximises on the validation fold: conflicting accuracy minus follow rate, or minus the average gap."""
    return row["conflicting_accuracy"] - row["follow_rate"] if oracle is None else -average_gap(row, oracle)


def read(path: str) -> list[dict]:
    """The cells of a results file."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def append(path: str, cell: dict) -> None:
    """Add a line."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(cell) + "\n")
    print(json.dumps({k: v for k, v in cell.items() if k not in ("versions", "data", "checks", "deep")}), flush=True)


def quiet() -> None:
    """No bars and no chatter of the libraries."""
    import warnings

    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def tune(options) -> None:
    """Every setting of every grid on the validation fold of one more seed; settings that are there are skipped."""
    quiet()
    done = {(c["task"], c["method"], json.dumps(c["setting"])) for c in read(TUNING)}
    for name in (n for n in options.tasks if n not in TUNED_ON):
        grids = [(m, s) for m in options.methods for s in grid_of(name, m) if len(grid_of(name, m)) > 1]
        missing = [(m, s) for m, s in grids if (name, m, json.dumps(s)) not in done]
        if not missing:
            continue
        task = build(name, TUNING_SEED, options)
        models, oracle = checkpoints(task, name, TUNING_SEED, options), None
        if task.bias_column is None:
            oracle = measure(trained(task, models, "retrained", {}, TUNING_SEED, options.cache)[0], task, "validation")
        for method, setting in missing:
            if applies(method, task):
                model, _ = trained(task, models, method, setting, TUNING_SEED, options.cache)
                row = measure(model, task, "validation")
                cell = {"task": name, "method": method, "setting": setting, "score": score(row, oracle)}
                append(TUNING, cell | row)


def grid_of(task: str, method: str) -> list[dict]:
    """The settings to tune over."""
    described = METHODS[method]
    return described.wrong if described.wrong and task in WRONG else described.grid


def best_of(results: list[dict], task: str, method: str) -> dict | None:
    """The best setting of a grid, or None where not all of it was tried."""
    grid = grid_of(task, method)
    mine = [c for c in results if (c["task"], c["method"]) == (task, method)]
    tried = {json.dumps(c["setting"]): c for c in mine if c["setting"] in grid}
    return max(tried.values(), key=lambda c: c["score"])["setting"] if len(tried) == len(grid) else None


def chosen(name: str, method: str) -> dict:
    """The tuned setting of a method on a task, or on the nearest task that was (`TUNED_ON`, else fashion-colour).

    Raises:
        ValueError: it was not tuned yet.
    """
    results = read(TUNING)
    for task in (TUNED_ON.get(name, name), "fashion-colour"):
        grid = grid_of(task, method)
        if len(grid) == 1:
            return grid[0]
        if setting := best_of(results, task, method):
            return setting
    raise ValueError(f"{method} is not tuned; run --tune --tasks fashion-colour --methods {method} first.")


def run(options, setting_of: Callable[[str, str], dict] = chosen, results: str = RESULTS, steps: int | None = None):
    """Fill the missing cells.

    Args:
        setting_of: of task and method.
        steps: for the smoke suite: of every training, instead of the task's.
    """
    from importlib.metadata import version

    from hf_uib.data.fingerprints import fingerprint

    quiet()
    versions = {p: version(p) for p in ("torch", "transformers", "peft")}
    for name in options.tasks:
        for seed in options.seeds:
            done = {(c["task"], c["method"], c["seed"]) for c in read(results)}
            missing = [m for m in options.methods if (name, m, seed) not in done]
            if not missing:
                continue
            task = build(name, seed, options)
            if steps is not None:
                task.train_settings |= {k: steps for k in task.train_settings if k.endswith("steps")}
            models = checkpoints(task, name, seed, options)
            data = {part: fingerprint(task.sets[part]) for part in ("forget", "retain", "test")}
            for method in missing:
                if not applies(method, task):
                    continue
                setting = setting_of(name, method)

                model, info = trained(task, models, method, setting, seed, options.cache)
                cell = {"task": name, "method": method, "seed": seed, "setting": setting} | info | measure(model, task)
                append(results, cell | {"versions": versions, "data": data})
