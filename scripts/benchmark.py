"""Methods x tasks x seeds, one JSON line a cell; cells that are there are skipped.

python scripts/benchmark.py --tasks digits-colour fashion-colour --fashion_mnist ../shared/data/fashion_mnist --seeds 0 1 2
python scripts/benchmark.py --cost
python scripts/benchmark.py --audit
python scripts/benchmark.py --report
"""

import argparse
import copy
import functools
import json
import os
import subprocess
import sys
import time

RESULTS = os.path.join(os.path.dirname(__file__), "..", "benchmarks", "results.jsonl")
COST = os.path.join(os.path.dirname(__file__), "..", "benchmarks", "cost.jsonl")
AUDIT = os.path.join(os.path.dirname(__file__), "..", "benchmarks", "audit.jsonl")
METHODS = ("original", "lora", "full", "uib", "retrained")
NAMES = {
    "original": "original",
    "lora": "fine-tuned LoRA",
    "full": "fine-tuned, all weights",
    "uib": "UIB",
    "retrained": "retrained",
}
TASKS = ("digits-colour", "fashion-colour", "fashion-patch", "fashion-random", "tweets-airline")


def build(name: str, seed: int, options):
    """The task by name."""
    from hf_uib import tasks

    if name == "digits-colour":
        return tasks.digits_colour(seed)
    if name == "tweets-airline":
        return tasks.tweets_airline(options.airline_tweets, options.minilm, seed)
    if name == "fashion-random":
        return tasks.fashion_random(options.fashion_mnist, seed)
    return tasks.fashion(name.removeprefix("fashion-"), options.fashion_mnist, seed)


def run_cell(task, models: dict, method: str, seed: int, folder: str) -> dict:
    """Train one method from the shared checkpoint and measure it on the test set."""
    from peft import get_peft_model

    from hf_uib import UIBConfig, UIBTrainer, tasks
    from hf_uib.adapters import default_peft_config

    settings, cell = task.train_settings, {}
    steps = settings["unlearn_steps"]
    model = copy.deepcopy(models["start" if method == "retrained" else "original"])
    start = time.perf_counter()
    if method == "uib":
        args = UIBConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=settings["batch"],
            seed=seed,
            save_strategy="no",
            logging_steps=100,
        )
        trainer = UIBTrainer(
            model,
            args,
            forget_dataset=task.sets["forget"],
            retain_dataset=task.sets["retain"],
            calibration_dataset=task.sets["calibration"],
            processing_class=task.processing_class,
        )
        trainer.train()
        model = trainer.model
        cell = {"statistics": trainer.statistics, "measured_examples": trainer.measured_examples}
    elif method != "original":
        if method == "lora":
            model = get_peft_model(model, default_peft_config(model, 16))
        rate = settings["full_lr"] if method in ("full", "retrained") and "full_lr" in settings else 1e-3
        steps = settings["retrain_steps"] if method == "retrained" else steps
        tasks.fit(model, task.sets["retain"], task, steps, folder, seed, rate)
    cell |= {"steps": 0 if method == "original" else steps, "seconds": time.perf_counter() - start}
    return cell | measure(model, task)


def measure(model, task) -> dict:
    """Every metric of a task on its test set."""
    import numpy as np
    import torch
    from sklearn.metrics import roc_auc_score

    from hf_uib.audit import report
    from hf_uib.bound import margin

    logits, labels = report.predict(model, task.sets["test"], task.processing_class)
    if task.bias_column is not None:
        attributes = np.asarray(task.sets["test"].with_format(None)[task.bias_column])
        row = report.bias_row(logits, labels, attributes)
        if task.counterfactuals > 1:
            row["flip_rate"] = report.flip_rate(logits, task.counterfactuals)
        return row
    row, margins = {"accuracy": float((logits.argmax(-1) == labels).mean())}, {}
    for part in ("forget", "retain", "test"):
        logits, labels = report.predict(model, task.sets[part], task.processing_class)
        row[f"{part}_accuracy"] = float((logits.argmax(-1) == labels).mean())
        margins[part] = margin(torch.tensor(logits), torch.tensor(labels)).numpy()
    members = [1] * len(margins["forget"]) + [0] * len(margins["test"])
    row["attack_auc"] = float(roc_auc_score(members, np.concatenate([margins["forget"], margins["test"]])))
    return row


def run(options) -> None:
    """Fill the missing cells."""
    from importlib.metadata import version

    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    done = {(c["task"], c["method"], c["seed"]) for c in read(RESULTS)}
    os.makedirs(os.path.dirname(RESULTS), exist_ok=True)
    for name in options.tasks:
        for seed in options.seeds:
            missing = [m for m in options.methods if (name, m, seed) not in done]
            if not missing:
                continue
            task = build(name, seed, options)
            models = checkpoints(task, name, seed, options)
            for method in missing:
                cell = {"task": name, "method": method, "seed": seed} | run_cell(
                    task, models, method, seed, options.cache
                )
                cell["versions"] = {p: version(p) for p in ("torch", "transformers", "peft")}
                with open(RESULTS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(cell) + "\n")
                print(
                    json.dumps({k: v for k, v in cell.items() if k not in ("versions", "measured_examples")}),
                    flush=True,
                )


def checkpoints(task, name: str, seed: int, options) -> dict:
    """``start`` and ``original`` of a task, from the cache or made now."""
    from hf_uib import tasks

    cache = os.path.join(options.cache, f"{name}-{seed}")
    if not os.path.isdir(os.path.join(cache, "original")):
        for key, model in tasks.prepare_models(task, seed, options.cache).items():
            model.save_pretrained(os.path.join(cache, key))
    return {
        key: type(task.new_model()).from_pretrained(os.path.join(cache, key)).eval() for key in ("start", "original")
    }


def read(path: str) -> list[dict]:
    """The cells of a results file."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


# ---- Cost: step time and memory against a plain LoRA step on the same number of examples ----


def cost_cell(variant: str, model_name: str, retain: int, forget: int, options) -> None:
    """One process: median step time and peak memory of a variant; prints a JSON line."""
    import resource
    import statistics

    import datasets
    import numpy as np
    from peft import get_peft_model
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    from hf_uib import UIBConfig, UIBTrainer, tasks
    from hf_uib.adapters import default_peft_config

    logging.set_verbosity_error()
    rng, rows, steps = np.random.default_rng(0), 512, 16
    labels = rng.integers(0, 2, rows).tolist()
    if model_name == "minilm-size BERT":
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        model = BertForSequenceClassification(config)
        columns = {
            "input_ids": rng.integers(5, 30000, (rows, 40)).tolist(),
            "attention_mask": np.ones((rows, 40), int).tolist(),
        }
    else:
        model = tasks.small_vit(28, 7, ["a", "b"], hidden=192, layers=6)
        columns = {"pixel_values": rng.normal(size=(rows, 3, 28, 28)).astype("float32").tolist()}

    def dataset(seed):
        return datasets.Dataset.from_dict(
            columns | {"labels": labels, "row": list(range(seed, seed + rows))}
        ).with_format("torch")

    class Clock(TrainerCallback):
        def __init__(self):
            self.starts, self.times = 0.0, []

        def on_step_begin(self, *args, **kwargs):
            self.starts = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.times.append(time.perf_counter() - self.starts)

    clock, folder = Clock(), options.cache
    common = dict(max_steps=steps, save_strategy="no", disable_tqdm=True, logging_steps=1000, learning_rate=1e-4)
    if variant == "lora":
        args = TrainingArguments(folder, per_device_train_batch_size=retain + forget, label_names=["labels"], **common)
        trainer = Trainer(
            get_peft_model(model, default_peft_config(model, 16)),
            args,
            train_dataset=dataset(0).remove_columns("row"),
            callbacks=[clock],
        )
    else:
        args = UIBConfig(
            folder, per_device_train_batch_size=retain, forget_batch_size=max(forget, 1), noise_to_signal=0.5, prior_fraction=1.0,
            prior="calibrated" if forget else "none", prior_update_steps=1000, contrast_samples=64, **common,
        )  # fmt: skip
        trainer = UIBTrainer(model, args, dataset(rows), dataset(0), dataset(2 * rows), callbacks=[clock])
    trainer.train()
    cell = {
        "model": model_name,
        "variant": variant,
        "retain": retain,
        "forget": forget,
        "step_seconds": statistics.median(clock.times[2:]),
    }
    print(json.dumps(cell | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def run_cost(options) -> None:
    """Every variant in a process of its own, interleaved, three times; nothing else may run beside it."""
    os.makedirs(os.path.dirname(COST), exist_ok=True)
    with open(COST, "w", encoding="utf-8") as file:
        for repeat in range(3):
            for model in ("ViT 192x6", "minilm-size BERT"):
                for variant, retain, forget in (("lora", 32, 0), ("uib", 32, 0), ("lora", 32, 32), ("uib", 32, 32)):
                    command = [
                        sys.executable,
                        __file__,
                        "--cost_cell",
                        variant,
                        model,
                        str(retain),
                        str(forget),
                        "--cache",
                        options.cache,
                    ]
                    line = (
                        subprocess.run(command, capture_output=True, text=True, check=True)
                        .stdout.strip()
                        .splitlines()[-1]
                    )
                    file.write(json.dumps(json.loads(line) | {"repeat": repeat}) + "\n")
                    file.flush()
                    print(line, flush=True)


# ---- The audit itself: planted fakes and true retrained models ----

DEEP = "UIB, deep audit"
AUDITED = {"digits-colour": ((0, 1), 6), "tweets-airline": ((0,), 4)}  # seeds of the task, retrained models of each


def run_audit(options) -> None:
    """Every fake, UIB and retrained models other than the oracle through the default audit; cells that are there are skipped."""
    import transformers

    from hf_uib import UIBConfig, UIBTrainer, audit_model, tasks
    from hf_uib.audit.fakes import FAKES

    transformers.utils.logging.set_verbosity_error()
    done = {(c["task"], c["seed"], c["subject"]) for c in read(AUDIT)}
    for name in (n for n in AUDITED if n in options.tasks):
        for seed in AUDITED[name][0]:
            task = build(name, seed, options)
            models = checkpoints(task, name, seed, options)
            settings, oracles = task.train_settings, []
            rate = settings.get("full_lr", 1e-3)
            for i in range(AUDITED[name][1]):
                model = copy.deepcopy(models["start"])
                tasks.fit(model, task.sets["retain"], task, settings["retrain_steps"], options.cache, 100 + i, rate)
                oracles.append(model.eval())

            @functools.cache
            def unlearned(task=task, models=models, settings=settings, seed=seed):
                args = UIBConfig(
                    options.cache, max_steps=settings["unlearn_steps"], per_device_train_batch_size=settings["batch"], seed=seed,
                    save_strategy="no", logging_steps=100,
                )  # fmt: skip
                trainer = UIBTrainer(
                    copy.deepcopy(models["original"]), args, task.sets["forget"], task.sets["retain"],
                    calibration_dataset=task.sets["calibration"], processing_class=task.processing_class,
                )  # fmt: skip
                trainer.train()
                return trainer.merge_and_unload()

            subjects = {f"retrained {i}": lambda i=i, o=oracles: o[i] for i in range(1, len(oracles))}
            subjects |= {
                fake: lambda make=make, m=models, o=oracles, t=task, r=rate: make(
                    m["original"], o[0], t.sets, t.processing_class, r
                )
                for fake, make in FAKES.items()
            }
            subjects |= {"UIB": unlearned} | ({DEEP: unlearned} if seed == AUDITED[name][0][0] else {})
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
                with open(AUDIT, "a", encoding="utf-8") as file:
                    file.write(json.dumps(cell) + "\n")
                print(json.dumps({k: v for k, v in cell.items() if k not in ("checks", "deep")}), flush=True)


def audit_table() -> list[str]:
    """Fakes x checks, with how many of the runs each check fired in; and the false alarms."""
    cells = read(AUDIT)
    if not cells:
        return []
    parts = ["### The audit on planted fakes and on true retrained models\n"]
    checks = list(cells[0]["checks"])
    for task in AUDITED:
        mine = [c for c in cells if c["task"] == task and c["subject"] != DEEP]
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
        parts += [line for c in cells if (c["task"], c["subject"]) == (task, DEEP) for line in deep_table(c)]
    return parts


def deep_table(cell: dict) -> list[str]:
    """What the deep audit of UIB found."""
    deep, rows = cell["deep"], {}
    names = {"model": "UIB", "reference": "original", "retrained": "retrained"}
    last = list(deep["probes"]["model"])[-1]
    probes = {"linear": "linear probe", "mlp": "MLP probe", "control": "shuffled", "erased": "after linear erasure"}
    for kind, words in probes.items():
        rows[f"attribute read off the last block, {words}"] = [deep["probes"][n][last].get(kind) for n in names]
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


# ---- Report ----


def report() -> str:
    """Markdown tables of mean and spread over seeds, from the results files alone."""
    import numpy as np

    from hf_uib.audit.columns import COLUMNS

    cells, parts = read(RESULTS), []
    for task in TASKS:
        mine = [c for c in cells if c["task"] == task]
        if not mine:
            continue
        keys = [k for k in [*COLUMNS, "attack_auc", "steps"] if k != "seconds" and any(k in c for c in mine)]
        keys = [k for k in keys if k != "accuracy" or task != "fashion-random"]
        titles = {k: COLUMNS[k][0] for k in COLUMNS} | {
            "attack_auc": "attack AUC",
            "steps": "steps",
            "test_accuracy": "accuracy, test",
        }
        keys = [*keys[:2], "test_accuracy", *keys[2:]] if task == "fashion-random" else keys
        seeds = sorted({c["seed"] for c in mine})
        extra = ["mean gap"] if task == "fashion-random" else []
        parts += [
            f"### {task} (seeds {', '.join(map(str, seeds))})\n",
            "| | " + " | ".join([*(titles[k] for k in keys), *extra]) + " |",
            "|---" * (len(keys) + len(extra) + 1) + "|",
        ]
        for method in METHODS:
            rows = [c for c in mine if c["method"] == method]
            if not rows:
                parts.append(f"| {NAMES[method]} | not run |")
                continue
            values = [_cell([r[k] for r in rows if k in r], k, np) for k in keys]
            if extra:
                values.append(_gap(rows, [c for c in mine if c["method"] == "retrained"], np))
            count = "" if len(rows) == len(seeds) else f" ({len(rows)} of {len(seeds)} seeds)"
            parts.append(f"| {NAMES[method]}{count} | " + " | ".join(values) + " |")
        parts.append("")
    costs = read(COST)
    if costs:
        parts += [
            "### Cost of a step, as a ratio to a plain LoRA step on the same number of examples\n",
            "| model | retained + forget examples | step time | peak memory |",
            "|---|---|---|---|",
        ]
        for model in dict.fromkeys(c["model"] for c in costs):
            for forget in (0, 32):
                ratios = {}
                for key in ("step_seconds", "peak_mb"):
                    mine, plain = (
                        np.array(
                            [c[key] for c in costs if (c["model"], c["variant"], c["forget"]) == (model, v, forget)]
                        )
                        for v in ("uib", "lora")
                    )
                    ratios[key] = mine / plain
                parts.append(
                    f"| {model} | 32 + {forget} | {np.median(ratios['step_seconds']):.2f} | {np.median(ratios['peak_mb']):.2f} |"
                )
        parts.append("")
    return "\n".join(parts + audit_table())


def _cell(values: list[float], key: str, np) -> str:
    if not values:
        return ""
    if key in ("seconds", "steps"):
        return f"{np.mean(values):.0f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"


def _gap(rows: list[dict], oracle: list[dict], np) -> str:
    """Mean over seeds of the mean absolute gap to the retrained model, in points: forget, retain, test, attack AUC."""
    gaps = []
    for row in rows:
        against = next((o for o in oracle if o["seed"] == row["seed"]), None)
        if against is not None:
            keys = ("forget_accuracy", "retain_accuracy", "test_accuracy", "attack_auc")
            gaps.append(100 * np.mean([abs(row[k] - against[k]) for k in keys]))
    return f"{np.mean(gaps):.2f}" if gaps else "not measured"


def write_report() -> None:
    """Write docs/benchmark.md and the table of the README."""
    root = os.path.join(os.path.dirname(__file__), "..")
    text = report()
    with open(os.path.join(root, "docs", "benchmark.md"), "w", encoding="utf-8") as file:
        file.write(
            "# Benchmark\n\nWritten by `python scripts/benchmark.py --report` from benchmarks/*.jsonl. "
            "Mean ± standard deviation over seeds; "
        )
        file.write(
            "every row below the first starts from the same checkpoint, the retrained model from the one before it.\n\n"
            + text
        )
    path = os.path.join(root, "README.md")
    with open(path, encoding="utf-8") as file:
        readme = file.read()
    begin, end = "<!-- results -->", "<!-- /results -->"
    if begin in readme:
        head, tail = readme.split(begin)[0], readme.split(end)[1]
        digits = text.split("### fashion-")[0].split("\n", 2)[2].strip()
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"{head}{begin}\n{digits}\n{end}{tail}")
    print(text)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits-colour"], choices=TASKS, help="tasks to run")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="methods to run")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of split, attribute and training"
    )
    parser.add_argument(
        "--fashion_mnist", default="zalando-datasets/fashion_mnist", help="folder or Hub id of fashion_mnist"
    )
    parser.add_argument("--airline_tweets", default="airline_tweets", help="folder or Hub id of airline_tweets")
    parser.add_argument(
        "--minilm", default="sentence-transformers/all-MiniLM-L6-v2", help="checkpoint for the text task"
    )
    parser.add_argument("--cache", default=".bench", help="folder for checkpoints")
    parser.add_argument("--cost", action="store_true", help="measure step time and memory instead")
    parser.add_argument("--cost_cell", nargs=4, help="used by --cost: variant, model, retained and forget examples")
    parser.add_argument("--audit", action="store_true", help="audit planted fakes and retrained models instead")
    parser.add_argument("--report", action="store_true", help="write the tables from the results")
    options = parser.parse_args()
    if options.cost_cell:
        variant, model, retain, forget = options.cost_cell
        cost_cell(variant, model, int(retain), int(forget), options)
    elif options.cost:
        run_cost(options)
    elif options.audit:
        run_audit(options)
    elif options.report:
        write_report()
    else:
        run(options)


if __name__ == "__main__":
    main()
