"""A run of the benchmark: one method on one task from one seed; and the tuning before it."""

import copy
import json
import os
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version

import datasets
import numpy as np
import transformers
from accelerate import PartialState
from torch import nn

from hf_uib.cli import digits
from hf_uib.data.fingerprints import fingerprint
from hf_uib.inference import predict
from hf_uib.metrics import attack, bias_row, flip_rate

from .. import results
from ..methods import METHODS, Budget, MethodSpec
from ..tasks import TASKS

SEEDS = 3  # of a figure that is compared
GAPS = ("forget_accuracy", "retain_accuracy", "test_accuracy", "attack_auc")


def build(name: str, seed: int, options) -> digits.Task:
    """The task by name, from the data that the command line names."""
    spec = TASKS[name]
    return spec.make(seed=seed, **{option: getattr(options, option) for option in spec.data})


def checkpoints(task: digits.Task, name: str, seed: int, options) -> dict[str, nn.Module]:
    """``start`` and ``original`` of a task, from the cache or made now."""
    cache = os.path.join(options.cache, f"{name}-{seed}")
    if not os.path.isdir(os.path.join(cache, "original")):
        for key, model in digits.prepare_models(task, seed, options.cache).items():
            model.save_pretrained(os.path.join(cache, key))
    kind = type(task.new_model())
    return {key: kind.from_pretrained(os.path.join(cache, key)).eval() for key in ("start", "original")}


def applies(method: MethodSpec, name: str, task: digits.Task) -> bool:
    """Whether a method is run on a task: some need the attribute, and a forget set it is drawn for."""
    if TASKS[name].kind not in method.kinds:
        return False
    return not method.needs_attribute or (task.bias_column is not None and "balanced" in task.sets)


def budget_of(method: MethodSpec, task: digits.Task, seed: int, folder: str, rate: float = 1.0) -> Budget:
    """What a method may spend on a task; ``rate`` is a factor on the learning rate."""
    settings = task.train_settings
    steps = settings["retrain_steps" if method.starts_from == "start" else "unlearn_steps"]
    peak = method.learning_rate or settings.get("full_lr", 1e-3)
    return Budget(steps, settings["batch"], rate * peak, seed, folder)


def trained(task: digits.Task, models: dict, method: str, setting: dict, seed: int, folder: str) -> tuple:
    """The method's model, trained from the shared checkpoint, and what the run's line says of the training."""
    spec, setting = METHODS[method], dict(setting)
    budget = budget_of(spec, task, seed, folder, setting.pop("rate", 1))
    model = copy.deepcopy(models[spec.starts_from]).to(PartialState().device)
    started = time.perf_counter()
    made = spec.train(model, task, budget, **setting)
    info = {"steps": 0 if spec.one_shot else budget.steps, "seconds": time.perf_counter() - started}
    model, measured = made if isinstance(made, tuple) else (made, {})
    return model, info | measured


def measure(model: nn.Module, task: digits.Task, part: str = "test") -> dict[str, float]:
    """Every metric of a task on its test (or validation) set."""
    logits, labels = predict(model, task.sets[part], task.processing_class, quiet=True)
    if task.bias_column is None:
        return removal_row(model, task, part, (logits, labels))
    attributes = np.asarray(task.sets[part].with_format(None)[task.bias_column])
    row = (
        TASKS[task.name].measure(logits, labels, attributes)
        if task.name in TASKS
        else bias_row(logits, labels, attributes)
    )
    if task.counterfactuals > 1:
        row["flip_rate"] = flip_rate(logits, task.counterfactuals)
    return row


def removal_row(model: nn.Module, task: digits.Task, part: str, unseen: tuple) -> dict[str, float]:
    """Accuracies on forget, retained and unseen rows, and membership attacks."""

    def accuracy(name: str) -> float:
        logits, labels = seen[name]
        return float((logits.argmax(-1) == labels).mean())

    seen = {"test": unseen}
    row = {"test_accuracy": accuracy("test")}
    for key, rows in (("forget", "forget"), ("retain", "retain"), ("removed", f"{part}_removed")):
        if rows in task.sets:
            seen[key] = predict(model, task.sets[rows], task.processing_class, quiet=True)
            row[f"{key}_accuracy"] = accuracy(key)

    def attacked(name: str) -> dict:
        return attack({k: seen[k] for k in ("forget", "retain")} | {"test": seen[name]}, n_bootstrap=0)

    # The AUC against unseen rows of the same classes; the published attack is fitted on the classes that stay
    auc = attacked("removed" if "removed" in seen else "test")["auc"]
    return row | {"attack_auc": auc, "mia_efficacy": attacked("test")["mia_efficacy"]}


def average_gap(row: dict, oracle: dict) -> float:
    """Mean absolute gap to the retrained model, in points: forget, retained and test accuracy, attack AUC."""
    return 100 * sum(abs(row[k] - oracle[k]) for k in GAPS) / len(GAPS)


def score(name: str, row: dict, oracle: dict | None) -> float:
    """What tuning maximises on the validation fold: conflicting accuracy minus shortcut rate, or minus the average gap."""
    if oracle is not None:
        return -average_gap(row, oracle)
    return sum(sign * row[key] for key, sign in TASKS[name].ranked_by.items() if key != "accuracy")


def validation_oracle(task: digits.Task, models: dict, seed: int, folder: str) -> dict | None:
    """The retrained model's figures on the validation fold of a removal task; None on a bias task."""
    if task.bias_column is not None:
        return None
    return measure(trained(task, models, "retrained", {}, seed, folder)[0], task, "validation")


def quiet() -> None:
    """No bars and no chatter of the libraries."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


# ---- Tuning -----------------------------------------------------------------------------------------------------


def grid_of(task: str, method: str) -> list[dict]:
    """The settings to tune over."""
    spec = METHODS[method]
    return spec.wrong_grid if spec.wrong_grid and TASKS[task].wrong else spec.grid


def seed_of(line: dict) -> int:
    """The fold that a line of the tuning file is about."""
    return line.get("seed", 100)


def scores_of(tried: list[dict], task: str, method: str) -> dict[int, dict[str, float]]:
    """Scores of a grid's settings, by validation fold: those of the task's folds on which all of the grid was tried."""
    grid = {json.dumps(setting) for setting in grid_of(task, method)}
    scores: dict[int, dict[str, float]] = {seed: {} for seed in TASKS[task].tuning_seeds}
    for line in tried:
        key = json.dumps(line["setting"])
        if (line["task"], line["method"]) == (task, method) and key in grid and seed_of(line) in scores:
            scores[seed_of(line)][key] = line["score"]
    return {seed: found for seed, found in scores.items() if found.keys() == grid}


def best_of(tried: list[dict], task: str, method: str) -> dict | None:
    """The best setting of a grid by its mean score over `scores_of`'s folds, or None where not all of it was tried."""
    scores = scores_of(tried, task, method).values()
    keys = [json.dumps(setting) for setting in grid_of(task, method)]
    return json.loads(max(keys, key=lambda key: sum(fold[key] for fold in scores))) if scores else None


def tuned_setting(task: str, method: str) -> dict:
    """The tuned setting of a method on a task, or on the nearest task that was (`TaskSpec.tuning_task`, else fashion-colour).

    Raises:
        ValueError: it was not tuned yet.
    """
    tried = results.read(results.TUNING)
    for name in (TASKS[task].tuning_task, "fashion-colour"):
        grid = grid_of(name, method)
        if len(grid) == 1:
            return grid[0]
        if setting := best_of(tried, name, method):
            return setting
    raise ValueError(
        f"{method} is not tuned; run `python -m benchmarks tune --tasks fashion-colour --methods {method}` first."
    )


def tune(options) -> None:
    """Every setting of every grid on the validation folds of further seeds; settings that are there are skipped."""
    quiet()
    done = {
        (line["task"], line["method"], seed_of(line), json.dumps(line["setting"]))
        for line in results.read(results.TUNING)
    }
    for name in (n for n in options.tasks if TASKS[n].tuning_task == n):
        grids = [(m, s) for m in options.methods for s in grid_of(name, m) if len(grid_of(name, m)) > 1]
        for seed in TASKS[name].tuning_seeds:
            missing = [(m, s) for m, s in grids if (name, m, seed, json.dumps(s)) not in done]
            if not missing:
                continue
            task = build(name, seed, options)
            models = checkpoints(task, name, seed, options)
            oracle = validation_oracle(task, models, seed, options.cache)
            for method, setting in missing:
                if applies(METHODS[method], name, task):
                    model, _ = trained(task, models, method, setting, seed, options.cache)
                    row = measure(model, task, "validation")
                    line = {"task": name, "method": method, "seed": seed, "setting": setting}
                    results.append(results.TUNING, line | {"score": score(name, row, oracle)} | row)


# ---- Runs -------------------------------------------------------------------------------------------------------


def run(
    options,
    setting_of: Callable[[str, str], dict] = tuned_setting,
    path: str | os.PathLike = results.RUNS,
    steps: int | None = None,
) -> None:
    """Do what is missing in the results.

    Args:
        setting_of: of task and method.
        path: the results file.
        steps: of every training, instead of the task's.
    """
    quiet()
    versions = {package: version(package) for package in ("torch", "transformers", "peft")}
    for name in options.tasks:
        for seed in options.seeds:
            done = {(line["task"], line["method"], line["seed"]) for line in results.read(path)}
            missing = [m for m in options.methods if (name, m, seed) not in done]
            if not missing:
                continue
            task = build(name, seed, options)
            if steps is not None:
                task.train_settings |= {k: steps for k in task.train_settings if k.endswith("steps")}
            models = checkpoints(task, name, seed, options)
            data = {part: fingerprint(task.sets[part]) for part in ("forget", "retain", "test")}
            for method in (m for m in missing if applies(METHODS[m], name, task)):
                setting = setting_of(name, method)
                model, info = trained(task, models, method, setting, seed, options.cache)
                line = {"task": name, "method": method, "seed": seed, "setting": setting} | info | measure(model, task)
                results.append(path, line | {"versions": versions, "data": data})
