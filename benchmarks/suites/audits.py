"""The audit itself: planted fakes and true retrained models."""

import copy
import functools
import os
import time

from . import cells

AUDIT = os.path.join(cells.ROOT, "audit.jsonl")
DEEP = "UIB, deep audit"
AUDITED = {"digits-colour": ((0, 1), 6), "tweets-airline": ((0,), 4)}  # seeds of the task, retrained models of each


def run_audit(options) -> None:
    """Every fake, UIB and retrained models other than the oracle through the default audit; cells that are there are skipped."""
    from hf_uib import audit_model
    from hf_uib.audit.fakes import FAKES
    from hf_uib.cli import digits

    cells.quiet()
    done = {(c["task"], c["seed"], c["subject"]) for c in cells.read(AUDIT)}
    for name in (n for n in AUDITED if n in options.tasks):
        for seed in AUDITED[name][0]:
            task = cells.build(name, seed, options)
            models = cells.checkpoints(task, name, seed, options)
            settings, oracles = task.train_settings, []
            rate = settings.get("full_lr", 1e-3)
            for i in range(AUDITED[name][1]):
                model = copy.deepcopy(models["start"])
                digits.fit(model, task.sets["retain"], task, settings["retrain_steps"], options.cache, 100 + i, rate)
                oracles.append(model.eval())

            @functools.cache
            def unlearned(task=task, models=models, seed=seed):
                model = copy.deepcopy(models["original"])
                return cells.unlearned(task, model, "uib", {}, seed, options.cache)[0].merge_and_unload()

            subjects = {f"retrained {i}": lambda i=i, o=oracles: o[i] for i in range(1, len(oracles))}
            subjects |= {
                fake: lambda make=make, m=models, o=oracles, t=task, r=rate: make(
                    m["original"], o[0], t.sets, t.processing_class, r
                )
                for fake, make in FAKES.items()
            }
            subjects |= {"UIB": unlearned} | ({DEEP: unlearned} if (name, seed) == ("digits-colour", 0) else {})
            for subject, make in subjects.items():
                if (name, seed, subject) in done:
                    continue
                start = time.perf_counter()
                model = make()
                made = time.perf_counter()
                report = audit_model(
                    model,
                    reference_model=models["original"],
                    forget_dataset=task.sets["forget"],
                    retain_dataset=task.sets["retain"],
                    test_dataset=task.sets["test"],
                    bias_column=task.bias_column,
                    retrained_model=oracles[0],
                    processing_class=task.processing_class,
                    example_column="example",
                    deep=subject == DEEP,
                )
                cell = {"task": name, "seed": seed, "subject": subject, "flags": report.flags}
                cell |= {"made_seconds": made - start, "audit_seconds": time.perf_counter() - made}
                cell["checks"] = {check.name: check.value for check in report.checks}
                cell |= {"deep": report.deep} if report.deep else {}
                cells.append(AUDIT, cell)


def audit_table() -> list[str]:
    """Fakes x checks, with how many of the runs each check fired in; and the false alarms."""
    runs = cells.read(AUDIT)
    if not runs:
        return []
    parts = ["### The audit on planted fakes and on true retrained models\n"]
    checks = list(runs[0]["checks"])
    for task in AUDITED:
        mine = [c for c in runs if c["task"] == task and c["subject"] != DEEP]
        if not mine:
            continue
        subject = lambda c: "retrained" if c["subject"].startswith("retrained") else c["subject"]  # noqa: E731
        parts += [f"{task}: runs in which each check fired\n", "| | runs | flagged | " + " | ".join(checks) + " |"]
        parts.append("|---" * (len(checks) + 3) + "|")
        for name in dict.fromkeys(subject(c) for c in mine):
            rows = [c for c in mine if subject(c) == name]
            fired = [sum(check in c["flags"] for c in rows) for check in checks]
            flagged = sum(bool(c["flags"]) for c in rows)
            parts.append(f"| {name} | {len(rows)} | **{flagged}** | " + " | ".join(str(f or "") for f in fired) + " |")
        seconds = [c["audit_seconds"] for c in mine]
        uib = [c["made_seconds"] for c in mine if c["subject"] == "UIB"]
        beside = f", unlearning {sum(uib) / len(uib):.1f} s" if uib else ""
        parts.append(f"\nOne default audit took {sum(seconds) / len(seconds):.1f} s{beside}.\n")
        parts += [line for c in runs if (c["task"], c["subject"]) == (task, DEEP) for line in deep_table(c)]
    return parts


def deep_table(cell: dict) -> list[str]:
    """What the deep audit of UIB found."""
    deep, rows = cell["deep"], {}
    names = {"model": "UIB", "reference": "original", "retrained": "retrained"}
    probes = {"linear": "linear probe", "mlp": "MLP probe", "control": "shuffled", "erased": "after linear erasure"}
    for kind, words in probes.items():
        rows[f"attribute read off the head's input, {words}"] = [deep["probes"][n]["head"].get(kind) for n in names]
    for kind, words in (
        ("retain", "retained rows"),
        ("forget", "1% of the forget set"),
        ("unrelated", "unrelated data"),
    ):
        rows[f"bias after 64 steps on {words}"] = [deep["relearning"][n]["curve"][kind][-1][1] for n in names]
    rows["steps to half of the bias, 1% of the forget set"] = [deep["relearning"][n]["half"]["forget"] for n in names]
    for kind in deep["compression"]:
        rows[f"bias, {kind}"] = [deep["compression"][kind][n]["bias"] for n in names]
    rows["RMIA, AUC"] = [deep["rmia"][n]["auc"] if n in deep["rmia"] else None for n in names]
    rows["RMIA, TPR at 1% FPR"] = [deep["rmia"][n]["tpr_at_1_fpr"] if n in deep["rmia"] else None for n in names]
    shown = lambda v: "-" if v is None else f"{v}" if isinstance(v, int) else f"{v:.3f}"  # noqa: E731
    fired, seconds = ", ".join(cell["flags"]) or "none", cell["audit_seconds"]
    parts = [f"{cell['task']}, deep audit of UIB (seed {cell['seed']}, {seconds:.0f} s, fired: {fired})\n"]
    parts += ["| | " + " | ".join(names.values()) + " |", "|---|---|---|---|"]
    parts += [f"| {name} | " + " | ".join(shown(v) for v in values) + " |" for name, values in rows.items()]
    scaled = ", ".join(f"{factor}: {row['bias']:.3f}" for factor, row in deep["scaled"])
    return [*parts, f"\nBias with a multiple of what unlearning did to the weights: {scaled}.\n"]
