"""Rows that teach a shortcut, found without attribute labels: recall and precision, controls without one, and the whole way."""

import copy
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from hf_uib import discover
from hf_uib.cli import digits
from hf_uib.discovery.report import Discovery
from hf_uib.inference import ModelOutputs, predict

from .. import results
from ..markdown import table
from ..tasks import TASKS
from ..tasks.fashion import fashion_colour, fashion_patch
from ..tasks.hate import WORDS
from ..tasks.tweets import SIZES, tweets_airline
from . import runs

DISCOVER = results.FOLDER / "discover.jsonl"
SHARES = (0.05, 0.1)  # of the training rows whose attribute stands for another class
CONTROLS = 20
EARLY = 40  # steps of the fit whose errors JTT takes
# How often JTT shows them: of 1, 5, 20 and 50 by the worst group of the validation rows of seeds 100 and 101
UPWEIGHT = 5
TWO_CLASSES = "digits-colour, two classes"
# On which the whole way is gone
WAY = ("digits-colour", TWO_CLASSES, "fashion-colour", "fashion-patch", "tweets-airline")
COMPARED = ("digits-colour", TWO_CLASSES)  # on which other methods go it too
ELSEWHERE = ("dino-colour", "dino-shade")  # further tasks
TITLES = {
    "discover": "`discover`",
    "jtt": "errors of an early-stopped fit (JTT)",
    "confidence": "least confident rows",
}
FIGURES = {"worst_group_accuracy": "worst-group accuracy", "conflicting_accuracy": "bias-conflicting accuracy"}
MODELS = {
    "original": "original",
    "found": "UIB, rows that were found",
    "known": "UIB, rows that are known",
    "neggrad": "NegGrad+, by confidence",
    "salun": "SalUn, by confidence",
    "jtt": "JTT",
}
WAY_WORDS = f"""The last column is paired over seeds, with its standard error; runs that found none are left out.
NegGrad+ and SalUn, tuned with known rows, forget all but the least confident rows, of which they retain as many as
`discover` does. JTT trains anew with the errors of the early-stopped fit {UPWEIGHT} times over.
"""
IDENTITY_TASK, FIRST_WORDS = "hate-identity", 10


def digits_task(options, seed: int, share: float | None) -> digits.Task:
    """digits-colour of which ``share`` conflicts, about; None: the hue is at random."""
    if share is None:
        return digits.digits_colour(seed, bias_aligned_fraction=0.0)
    return digits.digits_colour(seed, round(900 * share / 0.9))  # a tenth of hues at random is the label's own


def two_classes(options, seed: int, share: float) -> digits.Task:
    """Digits below five and from five on, in two hues."""
    return digits.digits_colour(seed, round(2 * 900 * share), classes=2)


def many_groups(options, seed: int, share: float) -> digits.Task:
    """Two classes, each in five of ten hues, which alternate: no direction in colour tells the classes apart."""
    return digits.digits_colour(seed, round(2 * 900 * share), classes=2, hues=5)


def fashion_task(options, seed: int, share: float) -> digits.Task:
    """fashion-colour, likewise."""
    return fashion_colour(options.fashion_mnist, seed, retained=share / 0.9)


def patch_task(options, seed: int, share: float) -> digits.Task:
    """fashion-patch, likewise."""
    return fashion_patch(options.fashion_mnist, seed, retained=share / 0.9)


def tweets_task(options, seed: int, share: float | None) -> digits.Task:
    """tweets-airline of which ``share`` conflicts, about; None: the handle is at random."""
    if share is not None:  # half of the retained rows conflict
        retained = round(2 * share / (1 - 2 * share) * SIZES["forget"])
        return tweets_airline(options.airline_tweets, options.minilm, seed, retained=retained)
    task = tweets_airline(options.airline_tweets, options.minilm, seed)
    rows = task.sets["balanced"]
    return replace(task, sets=task.sets | {"forget": rows.select([]), "retain": rows})


INJECTED: dict[str, Callable] = {
    "digits-colour": digits_task,
    "fashion-colour": fashion_task,
    "fashion-patch": patch_task,
    TWO_CLASSES: two_classes,
    "digits-colour, two classes in ten hues": many_groups,
    "tweets-airline": tweets_task,
}
RANDOM: dict[str, Callable] = {"digits-colour": digits_task, "tweets-airline": tweets_task}  # without a shortcut


def start_of(name: str, task: digits.Task, seed: int, options):
    """The model that the checkpoint is trained from; it is the same whatever share conflicts."""
    ready = name not in TASKS or os.path.isdir(os.path.join(options.cache, f"{name}-{seed}", "start"))
    return runs.checkpoints(task if ready else runs.build(name, seed, options), name, seed, options)["start"]


def trained_on(task: digits.Task, start, seed: int, folder: str):
    """The checkpoint of a task's training rows, and these."""
    rows = digits.merged(task.sets["forget"], task.sets["retain"])
    return fitted(start, rows, task, task.train_settings["steps"], seed, folder), rows


def fitted(start, rows, task: digits.Task, steps: int, seed: int, folder: str):
    """A copy of ``start``, trained on rows."""
    model = copy.deepcopy(start)
    digits.fit(model, rows, task, steps, folder, seed + 1, task.train_settings.get("lr", 1e-3))
    return model.eval()


def conflicting(task: digits.Task, rows) -> np.ndarray:
    """``[n]`` booleans: the attribute stands for another class than the label."""
    raw = rows.with_format(None)
    return np.asarray(raw["label"][:]) != np.asarray(
        raw["colour" if task.bias_column is None else task.bias_column][:]
    )


def share_found(proposed: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Recall and precision of the rows that are said to contradict."""
    hits = (proposed & truth).sum()
    return {"recall": float(hits / max(1, truth.sum())), "precision": float(hits / max(1, proposed.sum()))}


def searched(model, rows, task: digits.Task) -> tuple[Discovery, dict]:
    """What is found, and what a line says of it."""
    started = time.perf_counter()
    found = discover(model, rows, processing_class=task.processing_class)
    line = {"found": found.found, "p_value": found.p_value, "ratio": found.ratio, "depth": found.depth}
    return found, line | {"seconds": time.perf_counter() - started}


def injected_line(name: str, seed: int, share: float, options) -> dict:
    """One run: `discover` and two baselines; on `WAY` also the whole way, with found and with known rows."""
    task = INJECTED[name](options, seed, share)
    start = start_of(name, task, seed, options)
    model, rows = trained_on(task, start, seed, options.cache)
    truth = conflicting(task, rows)
    found, line = searched(model, rows, task)
    logits, labels = predict(model, rows, task.processing_class, quiet=True)
    margins = ModelOutputs(logits, labels).margins
    unsure = np.argsort(margins, kind="stable")
    least_sure = np.zeros(len(truth), dtype=bool)
    least_sure[unsure[: found.contradicts.sum()]] = True
    early = fitted(start, rows, task, EARLY, seed, options.cache)
    logits, _ = predict(early, rows, task.processing_class, quiet=True)
    early_errors = logits.argmax(-1) != labels
    proposals = {"discover": found.contradicts, "jtt": early_errors, "confidence": least_sure}
    line["methods"] = {method: share_found(mask, truth) for method, mask in proposals.items()}
    if name in WAY and found.found:
        models = {"start": start, "original": model}
        setting_of = partial(runs.tuned_setting, name if name in TASKS else "digits-colour")
        line["way"] = whole_way(task, models, found, setting_of, seed, options.cache)
        if name in COMPARED:
            kept, wrong = int(found.retained.sum()), np.repeat(np.flatnonzero(early_errors), UPWEIGHT - 1)
            sets = {
                "forget": rows.select(np.sort(unsure[kept:])),
                "retain": rows.select(np.sort(unsure[:kept])),
                "jtt": rows.select(np.concatenate([np.arange(len(rows)), wrong])),
            }
            line["way"] |= others(task, models, sets, setting_of, seed, options.cache)
    return line


def after(method: str, sets: dict, task: digits.Task, models: dict, setting: dict, seed: int, folder: str) -> dict:
    """What the test rows say of a method that is given other sets."""
    there = replace(task, sets=task.sets | sets)
    return figures_of(runs.trained(there, models, method, setting, seed, folder)[0], task)


def whole_way(
    task: digits.Task, models: dict, found: Discovery, setting_of: Callable, seed: int, folder: str
) -> dict[str, dict[str, float]]:
    """What the test rows say of the original, and of UIB with known rows and with found ones."""
    sets = {"known": {}, "found": {"forget": found.forget, "retain": found.retain}}
    return {"original": figures_of(models["original"], task)} | {
        name: after("uib", mine, task, models, setting_of("uib"), seed, folder) for name, mine in sets.items()
    }


def others(
    task: digits.Task, models: dict, sets: dict, setting_of: Callable, seed: int, folder: str
) -> dict[str, dict[str, float]]:
    """Likewise of NegGrad+ and SalUn, tuned with known rows, that retain as many of the rows that the model is the least sure of;
    and of JTT, which trains anew with the errors of the early-stopped fit repeated (Liu et al., arXiv 2107.09044)."""
    jtt = fitted(models["start"], sets.pop("jtt"), task, task.train_settings["steps"], seed, folder)
    methods = ("neggrad", "salun")
    return {name: after(name, sets, task, models, setting_of(name), seed, folder) for name in methods} | {
        "jtt": figures_of(jtt, task)
    }


def figures_of(model, task: digits.Task) -> dict[str, float]:
    """Accuracies on the test rows: of the worst group, and where the attribute stands for another class."""
    row = runs.measure(model, task)
    return {key: row[key] for key in FIGURES}


def control_line(name: str, seed: int, options) -> dict:
    """A task with its attribute at random. The checkpoint starts from the start model of seed ``seed % 3``."""
    task = RANDOM[name](options, seed, None)
    start = start_of(name, task, seed % 3, options)
    return searched(*trained_on(task, start, seed, options.cache), task)[1]


def task_line(name: str, seed: int, options) -> dict:
    """A task of the benchmark, and its cached checkpoint."""
    task = runs.build(name, seed, options)
    model = runs.checkpoints(task, name, seed, options)["original"]
    rows = digits.merged(task.sets["forget"], task.sets["retain"])
    found, line = searched(model, rows, task)
    if name == IDENTITY_TASK:
        words = [word for word, _ in found.words(FIRST_WORDS)["LABEL_1"]["teach"]]
        return line | {"identity_ranks": [i + 1 for i, word in enumerate(words) if WORDS.fullmatch(word)]}
    if task.bias_column is not None:
        line["methods"] = {"discover": share_found(found.contradicts, conflicting(task, rows))}
    return line


def run_discover(options) -> None:
    """Do what is missing in the results."""
    runs.quiet()
    wanted: list[tuple[dict, Callable]] = []
    for seed in options.seeds:
        for name in INJECTED:
            for share in SHARES:
                key = {"kind": "injected", "task": name, "seed": seed, "share": share}
                wanted.append(
                    (key, lambda name=name, seed=seed, share=share: injected_line(name, seed, share, options))
                )
        for name in (IDENTITY_TASK, "fashion-random", *ELSEWHERE):
            key = {"kind": "task", "task": name, "seed": seed, "share": None}
            wanted.append((key, lambda name=name, seed=seed: task_line(name, seed, options)))
    for name in RANDOM:
        for seed in range(CONTROLS):
            key = {"kind": "control", "task": name, "seed": seed, "share": None}
            wanted.append((key, lambda name=name, seed=seed: control_line(name, seed, options)))
    names = {name.partition(",")[0] for name in options.tasks}
    for key, make in wanted:
        there = [{k: line[k] for k in key} for line in results.read(DISCOVER)]
        if key["task"].partition(",")[0] in names and key not in there:
            results.append(DISCOVER, key | make())


def mean(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=min(1, len(values) - 1)):.3f}"


def discover_tables() -> list[str]:
    """Recall and precision, the whole way, controls, words, and other tasks."""
    lines = results.read(DISCOVER)
    injected = [line for line in lines if line["kind"] == "injected"]
    if not injected:
        return []
    cells = []
    for name in INJECTED:
        for share in SHARES:
            mine = [line for line in injected if (line["task"], line["share"]) == (name, share)]
            for method, title in TITLES.items() if mine else ():
                figures = [mean([line["methods"][method][key] for line in mine]) for key in ("recall", "precision")]
                found = f"{sum(line['found'] for line in mine)} of {len(mine)}" if method == "discover" else ""
                took = f"{np.mean([line['seconds'] for line in mine]):.0f}" if method == "discover" else ""
                cells.append([name, f"{share:.0%}", title, *figures, found, took])
    parts = ["## Rows that conflict, and rows that are said to\n"]
    parts += table(["task", "conflicting", "method", "recall", "precision", "found", "seconds"], cells)
    parts += ["\n## The whole way\n", WAY_WORDS]
    for key, title in FIGURES.items():
        parts += [f"\n### {title[0].upper()}{title[1:]}\n", *way_table(injected, key)]
    parts += ["\n## Without a shortcut\n"]
    for name, kind in (*((name, "control") for name in RANDOM), ("fashion-random", "task")):
        mine = [line for line in lines if (line["task"], line["kind"]) == (name, kind)]
        if mine:
            found, largest = sum(line["found"] for line in mine), max(line["ratio"] for line in mine)
            title = f"{name}, its attribute at random" if kind == "control" else name
            parts.append(f"- {title}: found in {found} of {len(mine)} (largest distance ratio {largest:.2f}).")
    ranks = [line for line in lines if line["task"] == IDENTITY_TASK]
    if ranks:
        parts += [f"\n## Words on {IDENTITY_TASK}\n"]
        parts += [
            f"- Seed {line['seed']}: {len(line['identity_ranks'])} of the first {FIRST_WORDS} words of toxic rows that teach are "
            f"identity words, at ranks {', '.join(map(str, line['identity_ranks'])) or 'none'}. "
            f"{'Found' if line['found'] else 'None found'} (distance ratio {line['ratio']:.2f})."
            for line in ranks
        ]
    return parts + ["", *failures(lines)]


def way_table(injected: list[dict], key: str) -> list[str]:
    """One of `FIGURES` of all models; of UIB also how far found rows are from known ones, paired."""
    way, cells = [line for line in injected if "way" in line], []
    for name in INJECTED:
        for share in SHARES:
            mine = [
                {model: figures[key] for model, figures in line["way"].items()}
                for line in way
                if (line["task"], line["share"]) == (name, share)
            ]
            if mine:
                apart = np.array([one["found"] - one["known"] for one in mine])
                error = f" ± {apart.std(ddof=1) / len(apart) ** 0.5:.3f}" if len(apart) > 1 else ""
                figures = [mean([one[model] for one in mine]) if model in mine[0] else "" for model in MODELS]
                cells.append([name, f"{share:.0%}", str(len(mine)), *figures, f"{apart.mean():+.3f}{error}"])
    return table(["task", "conflicting", "seeds", *MODELS.values(), "found - known"], cells)


def failures(lines: list[dict]) -> list[str]:
    """Further tasks that have a shortcut, in a pre-trained model of pictures."""
    cells = []
    for name in ELSEWHERE:
        mine = [line for line in lines if line["task"] == name]
        if mine:
            figures = [mean([line["methods"]["discover"][key] for line in mine]) for key in ("recall", "precision")]
            ratios = mean([line["ratio"] for line in mine])
            cells.append([name, f"{sum(line['found'] for line in mine)} of {len(mine)}", ratios, *figures])
    if not cells:
        return []
    return [
        "## In a pre-trained model of pictures\n",
        "That blocks come last was seen on dino-colour's seeds 100 and 101 too.\n",
        *table(["task", "found", "distance ratio", "recall", "precision"], cells),
        "",
    ]
