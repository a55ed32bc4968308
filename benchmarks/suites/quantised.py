"""Quantised bases against the full-precision one: the contrast's subspaces, and what is left of unlearning after merging and after
quantising again."""

import logging
import os
import tempfile
from collections.abc import Callable

import numpy as np
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from hf_uib.posterior import ChannelPosterior
from hf_uib.provenance import merged_copy
from hf_uib.quantised import keep_codes, plain_tensors

from .. import results
from ..markdown import table
from ..methods import METHODS
from ..methods.uib import uib_trainer
from . import runs

QUANTISED = results.FOLDER / "quantised.jsonl"
TASKS = ("digits-colour", "tweets-airline")
FULL, CONTROL = "full precision", "control: full precision, other rows measured"


def torchao_int8() -> TorchAoConfig:
    """Weights in 8 bits, a scale per output."""
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


KINDS: dict[str, Callable | None] = {
    FULL: None,
    "bitsandbytes, 4-bit nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes, 8-bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao, 8-bit": torchao_int8,
}
STAGES = {
    "original": "before",
    "adapted": "adapter on the base",
    "merged": "merged, full precision",
    "dequantised": "merged, de-quantised",
    "again": "merged, quantised again",
}


Z = {"z": "pattern_z", "mean_z": "mean_token_z"}
COLUMNS = [
    "base",
    "weights, MB",
    "overlap of V_l",
    "output scale, largest change",
    "z of the pattern (of mean tokens)",
    *STAGES.values(),
]


def overlap(one: ChannelPosterior, other: ChannelPosterior) -> float:
    """Mean over layers and directions of the squared cosines of the principal angles between the subspaces."""
    found = []
    for name in one.subspaces:
        squares = (one.subspaces[name] @ other.subspaces[name].T).square().sum()
        found.append((squares / one.subspaces[name].square().sum()).item())
    return float(np.mean(found))


def scale_change(one: ChannelPosterior, other: ChannelPosterior) -> float:
    """Largest relative difference of a layer's output scale."""
    return max(abs(other.output_scales[n] / scale - 1).item() for n, scale in one.output_scales.items())


def loaded(folder: str, kind: type[nn.Module], make: Callable | None) -> nn.Module:
    """A checkpoint, quantised or not."""
    model = kind.from_pretrained(folder, **({} if make is None else {"quantization_config": make()})).eval()
    keep_codes(model)
    return model


def weights_of(model: nn.Module) -> float:
    """What a model's weights take, codes and scales of quantised ones included, in MB."""
    parts = [part for weight in model.state_dict().values() for part in plain_tensors(weight)]
    return sum(part.nelement() * part.element_size() for part in parts) / 2**20


def run_weights(options) -> None:
    """What the weights of each kind of base take; it is the same for every seed."""
    seed = options.seeds[0]
    for name in (n for n in TASKS if n in options.tasks):
        done = {x["kind"] for x in results.read(QUANTISED) if x["task"] == name and "weights" in x}
        if set(KINDS) <= done:
            continue
        task = runs.build(name, seed, options)
        runs.checkpoints(task, name, seed, options)
        folder = os.path.join(options.cache, f"{name}-{seed}", "original")
        for words in (w for w in KINDS if w not in done):
            model = loaded(folder, type(task.new_model()), KINDS[words])
            results.append(QUANTISED, {"task": name, "seed": None, "kind": words, "weights": weights_of(model)})


def run_quantised(options) -> None:
    """Do what is missing in the results."""
    runs.quiet()
    run_weights(options)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each product with a float32 input
    for name in (n for n in TASKS if n in options.tasks):
        for seed in options.seeds:
            done = {x["kind"] for x in results.read(QUANTISED) if (x["task"], x["seed"]) == (name, seed)}
            if set(KINDS) <= done:
                continue
            task = runs.build(name, seed, options)
            runs.checkpoints(task, name, seed, options)
            folder, kind = os.path.join(options.cache, f"{name}-{seed}", "original"), type(task.new_model())
            budget = runs.budget_of(METHODS["uib"], task, seed, options.cache)
            full = uib_trainer(loaded(folder, kind, None), task, budget)
            full.run_statistics_pass()
            measured = lambda model: runs.measure(model.eval(), task)  # noqa: B023
            if CONTROL not in done:
                budget.seed += 1
                other = uib_trainer(loaded(folder, kind, None), task, budget)
                budget.seed -= 1
                other.run_statistics_pass()
                write(name, seed, CONTROL, full.posterior, other.posterior)
            for words in (w for w in KINDS if w not in done):
                make = KINDS[words]
                model = loaded(folder, kind, make)
                rows = {"original": measured(model)}
                trainer = uib_trainer(model, task, budget)
                trainer.train()
                merged = trainer.merge_and_unload()
                rows |= {"adapted": measured(trainer.adapted_model), "merged": measured(merged)}
                if make is not None:
                    rows["dequantised"] = measured(merged_copy(trainer.adapted_model))
                    with tempfile.TemporaryDirectory() as place:
                        merged.save_pretrained(place)
                        rows["again"] = measured(loaded(place, kind, make))
                z = {key: trainer.statistics[what] for key, what in Z.items() if what in trainer.statistics}
                write(name, seed, words, full.posterior, trainer.posterior, rows=rows, **z)


def write(task: str, seed: int, kind: str, one: ChannelPosterior, other: ChannelPosterior, **found) -> None:
    """A line of the results."""
    line = {"task": task, "seed": seed, "kind": kind}
    results.append(QUANTISED, line | {"overlap": overlap(one, other), "scale": scale_change(one, other)} | found)


def z_words(line: dict) -> str:
    """The z-value of a line, and in brackets that of the mean tokens, where these were compared."""
    return f"{line['z']:.1f}" + (f" ({line['mean_z']:.1f})" if "mean_z" in line else "")


def quantised_tables() -> list[str]:
    """One table a task: a row for each kind of base."""
    lines, found = results.read(QUANTISED), []
    for task in dict.fromkeys(x["task"] for x in lines):
        there = {(x["seed"], x["kind"]): x for x in lines if x["task"] == task and "overlap" in x}
        weights = {x["kind"]: f"{x['weights']:.2f}" for x in lines if x["task"] == task and "weights" in x}
        seeds = sorted({seed for seed, _ in there if all((seed, kind) in there for kind in KINDS)})  # whole ones alone
        rows = []
        for kind in (CONTROL, *KINDS):
            mine = [there[seed, kind] for seed in seeds if (seed, kind) in there]
            if mine:
                angles = [] if kind == FULL else [figures([x[key] for x in mine]) for key in ("overlap", "scale")]
                z = ", ".join(z_words(x) for x in mine if "z" in x) or "-"
                rows.append(
                    [kind, weights.get(kind, "-"), *(angles or ["-", "-"]), z, *(stage(mine, key) for key in STAGES)]
                )
        named = f"{task}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        found += [f"{named}: accuracy, and in brackets conflicting accuracy (mean ± sd).\n", *table(COLUMNS, rows)]
    head = (
        "Quantised bases, in this version (`python -m benchmarks quantised`). Overlap of the contrast's subspaces with those "
        "on the base in full precision: the mean of the squared cosines of the principal angles, over 16 directions a layer.\n"
    )
    return [head, *found] if found else []


def figures(values: list[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def stage(lines: list[dict], key: str) -> str:
    """A cell: accuracy and conflicting accuracy of a stage."""
    rows = [x["rows"][key] for x in lines if key in x.get("rows", {})]
    if not rows:
        return "-"
    return f"{figures([r['accuracy'] for r in rows])} ({figures([r['conflicting_accuracy'] for r in rows])})"
