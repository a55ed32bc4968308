"""The audit itself: planted fakes and true retrained models."""

import copy
import time
from collections.abc import Callable, Iterator
from functools import cache, partial

from torch import nn

from hf_uib import audit_model
from hf_uib.audit.fakes import FAKES
from hf_uib.cli import digits

from .. import results
from ..markdown import table
from . import runs

AUDIT = results.FOLDER / "audit.jsonl"
DEEP = "UIB, deep audit"
AUDITED = {"digits-colour": ((0, 1), 6), "tweets-airline": ((0,), 4)}  # seeds of the task, retrained models of each
PROBES = {"linear": "linear probe", "mlp": "MLP probe", "control": "shuffled", "erased": "after linear erasure"}
RELEARNED = {"retain": "retained rows", "forget": "1% of the forget set", "unrelated": "unrelated data"}


def retrained_models(task: digits.Task, start: nn.Module, count: int, folder: str) -> list[nn.Module]:
    """Models trained on the retained rows from several seeds."""
    settings, models = task.train_settings, []
    for i in range(count):
        model = copy.deepcopy(start)
        rate = settings.get("full_lr", 1e-3)
        digits.fit(model, task.sets["retain"], task, settings["retrain_steps"], folder, 100 + i, rate)
        models.append(model.eval())
    return models


def subjects_of(task, models: dict, oracles: list, seed: int, folder: str) -> Iterator[tuple[str, Callable]]:
    """What is audited, and how it is made: retrained models other than the oracle, every fake, UIB."""
    for i in range(1, len(oracles)):
        yield f"retrained {i}", partial(oracles.__getitem__, i)
    rate = task.train_settings.get("full_lr", 1e-3)
    for name, make in FAKES.items():
        yield name, partial(make, models["original"], oracles[0], task.sets, task.processing_class, rate)

    @cache
    def unlearned() -> nn.Module:
        return runs.trained(task, models, "uib", {}, seed, folder)[0].merge_and_unload()

    yield "UIB", unlearned
    if (task.name, seed) == ("digits-colour", 0):
        yield DEEP, unlearned


def audited(make: Callable, original: nn.Module, oracle: nn.Module, task: digits.Task, is_deep: bool) -> dict:
    """What the default (or the deep) audit says of a subject, and how long both took."""
    start = time.perf_counter()
    model = make()
    made = time.perf_counter()
    report = audit_model(
        model,
        reference_model=original,
        forget_dataset=task.sets["forget"],
        retain_dataset=task.sets["retain"],
        test_dataset=task.sets["test"],
        bias_column=task.bias_column,
        retrained_model=oracle,
        processing_class=task.processing_class,
        example_column="example" if task.counterfactuals > 1 else None,
        deep=is_deep,
    )
    line = {"flags": report.flags, "made_seconds": made - start, "audit_seconds": time.perf_counter() - made}
    line["checks"] = {check.name: check.value for check in report.checks}
    return line | ({"deep": report.deep} if report.deep else {})


def run_audits(options) -> None:
    """Every subject through the audit; what is in the results is skipped."""
    runs.quiet()
    done = {(line["task"], line["seed"], line["subject"]) for line in results.read(AUDIT)}
    for name in (n for n in AUDITED if n in options.tasks):
        seeds, count = AUDITED[name]
        for seed in seeds:
            task = runs.build(name, seed, options)
            models = runs.checkpoints(task, name, seed, options)
            oracles = retrained_models(task, models["start"], count, options.cache)
            for subject, make in subjects_of(task, models, oracles, seed, options.cache):
                if (name, seed, subject) not in done:
                    line = {"task": name, "seed": seed, "subject": subject}
                    found = audited(make, models["original"], oracles[0], task, subject == DEEP)
                    results.append(AUDIT, line | found)


# ---- Tables -----------------------------------------------------------------------------------------------------


def audit_tables() -> list[str]:
    """For each task, fakes x checks: in how many of the runs each check fired; and what the deep audit found."""
    lines, parts = results.read(AUDIT), []
    for task in AUDITED:
        mine = [line for line in lines if line["task"] == task and line["subject"] != DEEP]
        if not mine:
            continue
        parts += [f"## {task}: runs in which each check fired\n", *fired_table(mine)]
        seconds = [line["audit_seconds"] for line in mine]
        uib = [line["made_seconds"] for line in mine if line["subject"] == "UIB"]
        beside = f", unlearning {sum(uib) / len(uib):.1f} s" if uib else ""
        parts.append(f"One default audit took {sum(seconds) / len(seconds):.1f} s{beside}.\n")
        for line in (x for x in lines if (x["task"], x["subject"]) == (task, DEEP)):
            parts += deep_table(line)
    return parts


def fired_table(lines: list[dict]) -> list[str]:
    """Subjects x checks."""
    checks, of = list(lines[0]["checks"]), {}
    for line in lines:
        subject = line["subject"]
        of.setdefault("retrained" if subject.startswith("retrained") else subject, []).append(line["flags"])
    rows = []
    for subject, flags in of.items():
        fired = [sum(check in found for found in flags) for check in checks]
        flagged = sum(bool(found) for found in flags)
        rows.append([subject, str(len(flags)), f"**{flagged}**", *(str(count or "") for count in fired)])
    return table(["", "runs", "flagged", *checks], rows)


def deep_table(line: dict) -> list[str]:
    """What the deep audit of UIB found."""
    deep, names = line["deep"], {"model": "UIB", "reference": "original", "retrained": "retrained"}
    probes, relearning, rmia = deep["probes"], deep["relearning"], deep["rmia"]
    rows = {
        f"attribute read off the head's input, {words}": [probes[n]["head"].get(kind) for n in names]
        for kind, words in PROBES.items()
    }
    for kind, words in RELEARNED.items():
        rows[f"bias after 64 steps on {words}"] = [relearning[n]["curve"][kind][-1][1] for n in names]
    rows["steps to half of the bias, 1% of the forget set"] = [relearning[n]["half"]["forget"] for n in names]
    for kind, found in deep["compression"].items():
        rows[f"bias, {kind}"] = [found[n]["bias"] for n in names]
    rows["RMIA, AUC"] = [rmia[n]["auc"] if n in rmia else None for n in names]
    rows["RMIA, TPR at 1% FPR"] = [rmia[n]["tpr_at_1_fpr"] if n in rmia else None for n in names]
    scaled = ", ".join(f"{factor}: {row['bias']:.3f}" for factor, row in deep["scaled"])
    return [
        f"### Deep audit of UIB on {line['task']}\n",
        f"Seed {line['seed']}, {line['audit_seconds']:.0f} s; checks that fired: {', '.join(line['flags']) or 'none'}.\n",
        *table(["", *names.values()], [[name, *map(number, values)] for name, values in rows.items()]),
        f"Bias with a multiple of what unlearning did to the weights: {scaled}.\n",
    ]


def number(value: float | None) -> str:
    """As it stands in a table."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
