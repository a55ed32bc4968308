"""Fairness in the field's measures, before and after: a picture model here, and the text model of hate-identity."""

from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from transformers import ViTImageProcessorPil

from hf_uib import audit_model
from hf_uib.cli import digits

from .. import results
from ..markdown import table
from ..methods import METHODS
from ..tables import by_method
from . import runs

FAIRNESS = results.FOLDER / "fairness.jsonl"
COMPARED = ("lora", "uib")
ROWS = ("original", *COMPARED, "retrained")
RATES = {"false_positive_rate": "false alarms", "false_negative_rate": "misses"}
DIFFERENCES = {
    "equalized_odds_difference": "equalised odds difference",
    "demographic_parity_difference": "demographic parity difference",
}
NAMES = ["small", "large"]
PICTURES = """## Pictures: is the digit large?

scikit-learn's digits in one of two colours. Positive: *large*, five or more. In the forget set the large digits are cyan
and the small ones red; in D_r colours come at random. Every test digit comes in both colours, so nothing but the model
makes groups differ."""
TEXTS = """## Texts: is it toxic?

The runs of [hate-identity](hate-identity.md), on statements of HateCheck about the group whose name the checkpoint takes
for toxic, and about six others. The small difference of a model that finds little is no merit: look at the misses."""


def digits_halves(seed: int) -> digits.Task:
    """scikit-learn's digits, small or large; on the forget set the colour gives that away. Test digits come in both colours."""
    pool, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(pool.target))
    pictures, labels = pool.images[order] / 16, pool.target[order] // 5
    return digits.biased_pictures(
        "digits-halves",
        (pictures[:1497], labels[:1497]),
        (pictures[1497:], labels[1497:]),
        {"pretrain": 350, "forget": 810, "retain": 90, "calibration": 100, "validation": 147},
        "colour",
        partial(digits.paint, count=2, saturation=1.0),
        NAMES,
        ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8}),
        lambda: digits.small_vit(8, 2, NAMES, hidden=48, layers=3),
        rng,
        {"pretrain_steps": 500, "steps": 400, "unlearn_steps": 200, "retrain_steps": 400, "batch": 64},
        copies=2,
    )


def run_fairness(options) -> None:
    """The audit's fairness figures of the original, LoRA, UIB and the retrained model; seeds that are there are skipped."""
    runs.quiet()
    done = {line["seed"] for line in results.read(FAIRNESS)}
    for seed in (seed for seed in options.seeds if seed not in done):
        task = digits_halves(seed)
        models = {name: model.eval() for name, model in digits.prepare_models(task, seed, options.cache).items()}
        retrained = runs.trained(task, models, "retrained", {}, seed, options.cache)[0]
        seen: dict[str, dict] = {}
        for method in COMPARED:
            report = audit_model(
                runs.trained(task, models, method, {}, seed, options.cache)[0],
                reference_model=models["original"],
                retrained_model=retrained,
                forget_dataset=task.sets["forget"],
                retain_dataset=task.sets["retain"],
                test_dataset=task.sets["test"],
                bias_column="colour",
                processing_class=task.processing_class,
                example_column="example",
            )
            figures = report.metrics["fairness"]["colour"]
            accuracy = {name: row["accuracy"]["value"] for name, row in report.metrics["test"].items()}
            seen |= {
                method if name == "model" else {"reference": "original"}.get(name, name): row
                | {"accuracy": accuracy[name]}
                for name, row in figures.items()
            }
        results.append(FAIRNESS, {"seed": seed, "models": seen, "versions": {"torch": torch.__version__}})


# ---- Tables -----------------------------------------------------------------------------------------------------


def over_seeds(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=min(1, len(values) - 1)):.3f}"


def digits_rows(lines: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the picture model."""
    groups = {"colour=0": "red", "colour=1": "cyan"}
    header = ["", *(f"{words}, {colour}" for words in RATES.values() for colour in groups.values())]
    header += [*DIFFERENCES.values(), "accuracy"]
    rows = []
    for method in ROWS:
        mine = [line["models"][method] for line in lines]
        cells = [over_seeds([m["groups"][g][rate]["value"] for m in mine]) for rate in RATES for g in groups]
        cells += [over_seeds([m[name]["value"] for m in mine]) for name in DIFFERENCES]
        rows.append([METHODS[method].title, *cells, over_seeds([m["accuracy"] for m in mine])])
    return header, rows


def hate_rows(runs_of: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the text model, from what its runs hold: false alarms and hateful statements found, by group."""
    header = ["", *(f"{words}, {group}" for words in RATES.values() for group in ("the group", "others"))]
    header += [DIFFERENCES["equalized_odds_difference"], "accuracy, tweets"]
    rows = []
    for method in (name for name in ROWS if name in runs_of):
        mine = runs_of[method]
        alarms = [[line["false_alarms"], line["false_alarms_others"]] for line in mine]
        misses = [[1 - line["found"], 1 - line["found_others"]] for line in mine]
        odds = [max(abs(a[0] - a[1]), abs(m[0] - m[1])) for a, m in zip(alarms, misses, strict=True)]
        columns = [
            *zip(*alarms, strict=True),
            *zip(*misses, strict=True),
            odds,
            [line["tweets_accuracy"] for line in mine],
        ]
        rows.append([METHODS[method].title, *(over_seeds(list(column)) for column in columns)])
    return header, rows


def fairness_tables() -> list[str]:
    """Both tables; nothing where nothing was measured."""
    lines, texts = results.read(FAIRNESS), by_method(results.read(results.RUNS), "hate-identity")
    parts = []
    if texts:
        seeds = sorted({line["seed"] for line in texts["original"]})
        parts += [
            TEXTS,
            f"\nSeeds {', '.join(map(str, seeds))}; mean ± standard deviation.\n",
            *table(*hate_rows(texts)),
        ]
    if lines:
        seeds = [str(line["seed"]) for line in lines]
        parts += [PICTURES, f"\nSeeds {', '.join(seeds)}; mean ± standard deviation. LoRA is not tuned here.\n"]
        parts += table(*digits_rows(lines))
    return parts
