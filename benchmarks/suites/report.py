"""Markdown tables and figures, from the results files alone."""

import os
import re

import numpy as np

from hf_uib.metrics import METRICS

from . import audits, cells, cost, lifecycle, research, scale, truth

DOCS = os.path.join(cells.ROOT, "..", "docs")
TITLES = {key: metric.title for key, metric in METRICS.items()}
BIAS_COLUMNS = ["accuracy", "conflicting_accuracy", "follow_rate", "cramers_v", "worst_group_accuracy", "flip_rate"]
REMOVAL_COLUMNS = [
    "forget_accuracy",
    "retain_accuracy",
    "test_accuracy",
    "removed_accuracy",
    "attack_auc",
    "mia_efficacy",
]
MAIN = ("original", "lora", "full", "uib", "uib_fifth", "balanced", "retrained")  # the README's rows


def measured(rows: dict[str, list[dict]], methods) -> bool:
    """Whether each of the methods was run from at least `cells.SEEDS` seeds."""
    return all(len(rows.get(m, [])) >= cells.SEEDS for m in methods)


def main_methods() -> list[str]:
    """What is ranked: every method but the oracles and UIB with another method inside."""
    return [m for m, how in cells.METHODS.items() if how.kind != "oracle" and not how.hosts and not how.shown_only]


def mean(rows: list[dict], key: str) -> float:
    """Over seeds."""
    return float(np.mean([row[key] for row in rows]))


def _cell(values: list[float], key: str) -> str:
    if key in ("seconds", "steps"):
        return f"{np.mean(values):.0f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"


def by_method(results: list[dict], task: str) -> dict[str, list[dict]]:
    """The cells of a task."""
    newest = {(cell["method"], cell["seed"]): cell for cell in results if cell["task"] == task}
    rows: dict[str, list[dict]] = {}
    for (method, _), cell in newest.items():
        rows.setdefault(method, []).append(cell)
    return rows


def gaps(rows: list[dict], oracle: list[dict]) -> list[float]:
    """Average gap of each seed's cell to that seed's retrained model, in points."""
    of = {cell["seed"]: cell for cell in oracle}
    return [cells.average_gap(row, of[row["seed"]]) for row in rows if row["seed"] in of]


def tug_of_war(row: dict, oracle: dict) -> float:
    """Product of 1 minus the absolute accuracy gaps on forget, retained and test rows; 1 is the retrained model."""
    return float(np.prod([1 - abs(row[k] - oracle[k]) for k in cells.GAPS[:3]]))


def task_table(task: str, results: list[dict], methods=tuple(cells.METHODS)) -> list[str]:
    """One row a method, mean ± standard deviation over seeds."""
    rows = by_method(results, task)
    seeds = sorted({cell["seed"] for mine in rows.values() for cell in mine})
    removal = task in cells.REMOVAL
    wanted = REMOVAL_COLUMNS if removal else BIAS_COLUMNS
    keys = [k for k in wanted if any(k in c for m in rows.values() for c in m)]
    if task in cells.WRONG and not removal:  # the attribute is most rows' own label: the perfect model has a high V
        keys.remove("cramers_v")
    keys += ["steps", "seconds"]
    extra = ["average gap", "tug-of-war"] if removal else []
    lines = [
        f"### {task} (seeds {', '.join(map(str, seeds))})\n",
        "| | " + " | ".join([*(TITLES[k] for k in keys), *extra]) + " |",
        "|---" * (len(keys) + len(extra) + 1) + "|",
    ]
    oracle = {cell["seed"]: cell for cell in rows.get("retrained", [])}
    for method in methods:
        title = cells.METHODS[method].title
        if method not in rows:
            if not (cells.METHODS[method].needs_attribute and task not in PAINTED):
                lines.append(f"| {title} | not run |" + " |" * (len(keys) + len(extra) - 1))
            continue
        mine = rows[method]
        values = [_cell([r[k] for r in mine], k) for k in keys]
        if removal:
            found = gaps(mine, list(oracle.values()))
            values.append(f"{np.mean(found):.2f}" if found else "not measured")
            wars = [tug_of_war(r, oracle[r["seed"]]) for r in mine if r["seed"] in oracle]
            values.append(f"{np.mean(wars):.3f}" if wars else "not measured")
        count = "" if len(mine) == len(seeds) else f" ({len(mine)} of {len(seeds)} seeds)"
        lines.append(f"| {title}{count} | " + " | ".join(values) + " |")
    return [*lines, ""]


PAINTED = ("digits-colour", "fashion-colour", "fashion-patch", "tweets-airline", *cells.REGIMES)


def target_table(results: list[dict]) -> list[str]:
    """Target 1 on every bias task: conflicting accuracy, follow rate, accuracy, steps."""
    lines = [
        "### Target 1: against the retrained model and tuned fine-tuning\n",
        "Conflicting accuracy at least the retrained model's; follow rate at most half of tuned LoRA fine-tuning's and below that "
        "of fine-tuning all weights; accuracy no lower than both; at most a fifth of the retraining's steps (a task's second "
        "row; in the first UIB takes as many as fine-tuning).\n",
        "| task | conflicting: UIB / retrained | follow: UIB / LoRA / all weights / retrained | accuracy: UIB / LoRA / all weights "
        "| steps: UIB / retrained | met |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for task in (*cells.BIAS, *cells.REGIMES):
        rows = by_method(results, task)
        for variant in ("uib", "uib_fifth"):
            if not measured(rows, (variant, "lora", "full", "retrained")):
                continue
            of = lambda m, k, rows=rows: mean(rows[m], k)  # noqa: E731
            conflicting = of(variant, "conflicting_accuracy"), of("retrained", "conflicting_accuracy")
            follow = [of(m, "follow_rate") for m in (variant, "lora", "full", "retrained")]
            accuracy = [of(m, "accuracy") for m in (variant, "lora", "full")]
            steps = of(variant, "steps"), of("retrained", "steps")
            met = {
                "conflicting": conflicting[0] >= conflicting[1],
                "half of LoRA": follow[0] <= follow[1] / 2,
                "below all weights": follow[0] < follow[2],
                "accuracy": accuracy[0] >= max(accuracy[1:]),
                "steps": steps[0] <= steps[1] / 5,
            }
            missed = ", ".join(name for name, good in met.items() if not good)
            cell = lambda values: " / ".join(f"{v:.3f}" for v in values)  # noqa: E731
            lines.append(
                f"| {task if variant == 'uib' else '— a fifth of the steps'} | {cell(conflicting)} | {cell(follow)} | "
                f"{cell(accuracy)} | {steps[0]:.0f} / {steps[1]:.0f} | {'all' if not missed else 'all but ' + missed} |"
            )
    return [*lines, ""]


def ranks(values: dict[str, float], higher: bool) -> dict[str, float]:
    """Rank of each, 1 is best; ties share the mean."""
    from scipy.stats import rankdata

    names = list(values)
    found = rankdata([-values[n] if higher else values[n] for n in names])
    return dict(zip(names, found.tolist(), strict=True))


def rank_table(results: list[dict]) -> list[str]:
    """Target 2: mean rank by conflicting accuracy, follow rate and accuracy on bias tasks; by average gap on removal tasks.

    The mean is over the tasks on which every method was run; those that do not apply to all of them come last.
    """
    table: dict[str, dict[str, float]] = {m: {} for m in main_methods()}
    judged = {"conflicting_accuracy": True, "follow_rate": False, "accuracy": True}
    everywhere = [m for m in table if not cells.METHODS[m].needs_attribute]
    tasks, removal = [], []
    for task in (*cells.BIAS, *cells.REMOVAL):
        rows = by_method(results, task)
        there = [m for m in table if m in rows]
        if not measured(rows, (*everywhere, "retrained")):
            continue
        if task in cells.BIAS:
            tasks.append(task)
            each = [ranks({m: mean(rows[m], k) for m in there}, higher) for k, higher in judged.items()]
        else:
            removal.append(task)
            found = {m: gaps(rows[m], rows["retrained"]) for m in there}
            each = [ranks({m: float(np.mean(g)) for m, g in found.items() if g}, False)]
        for m in each[0]:
            table[m][task] = float(np.mean([r[m] for r in each]))
    missing = [t for t in (*cells.BIAS, *cells.REMOVAL) if t not in tasks and t not in removal]
    lines = [
        "### Target 2: ranks\n",
        "Bias tasks: mean of the ranks by conflicting accuracy, follow rate and accuracy. Removal tasks: rank by average gap to "
        "the retrained model."
        + (
            f" Not ranked, as not every method was run from {cells.SEEDS} seeds: {', '.join(missing)}."
            if missing
            else ""
        )
        + "\n",
        "| | " + " | ".join([*tasks, "**mean, bias tasks**", *removal]) + " |",
        "|---" * (len(tasks) + len(removal) + 2) + "|",
    ]
    means = {
        m: float(np.mean([row[t] for t in tasks if t in row]))
        for m, row in table.items()
        if any(t in row for t in tasks)
    }
    count = {m: sum(t in table[m] for t in tasks) for m in means}
    for m in sorted(means, key=lambda m: (-count[m], means[m])):
        shown = [f"{table[m][t]:.1f}" if t in table[m] else "-" for t in tasks]
        gone = [f"{table[m][t]:.0f}" if t in table[m] else "-" for t in removal]
        partly = "" if count[m] == len(tasks) else f" ({count[m]} tasks)"
        lines.append(
            f"| {cells.METHODS[m].title} | " + " | ".join([*shown, f"**{means[m]:.2f}**{partly}", *gone]) + " |"
        )
    return [*lines, ""]


def hosting_table(results: list[dict]) -> list[str]:
    """Target 3: X against UIB + X on every bias task."""
    lines = [
        "### Target 3: what UIB does for the methods it hosts\n",
        "Conflicting accuracy, follow rate and accuracy of X (tuned) and of UIB + X (one setting for all tasks); **bold** where "
        "the first two are better. In brackets how far each falls short of the retrained model, in points: the mean of what is "
        "missing in both accuracies and of what is too much in the follow rate; what goes beyond the retrained model does not make "
        "up for it. A method that wrecks the model has a low follow rate, and shows there. With two classes (tweets-airline) a "
        "reversed bias passes for a high conflicting accuracy: there look at the accuracy.\n",
    ]  # fmt: skip
    hosts = {m: method.hosts for m, method in cells.METHODS.items() if method.hosts}
    tasks = [t for t in cells.BIAS if any(m in by_method(results, t) for m in hosts)]
    lines += ["| | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    both, nearer, compared = 0, 0, 0
    for m, host in hosts.items():
        shown = []
        for task in tasks:
            rows = by_method(results, task)
            if not measured(rows, (m, host, "retrained")):
                shown.append("not run")
                continue
            (theirs, mine), (far, near) = (
                [f(rows[x]) for x in (host, m)] for f in (_three, lambda r, o=rows: _short(r, o))
            )
            better = mine[0] > theirs[0] and mine[1] < theirs[1]
            both, nearer, compared = both + better, nearer + (near < far - 0.05), compared + 1
            text = " → ".join(f"{_shown(row)} ({gap:.1f})" for row, gap in ((theirs, far), (mine, near)))
            shown.append(f"**{text}**" if better else text)
        lines.append(f"| {cells.METHODS[host].title} → {cells.METHODS[m].title} | " + " | ".join(shown) + " |")
    for m in ("uib_none", "retrained"):
        found = [by_method(results, task) for task in tasks]
        figures = [f"{_shown(_three(r[m]))} ({_short(r[m], r):.1f})" if m in r else "not run" for r in found]
        lines.append(f"| {cells.METHODS[m].title} | " + " | ".join(figures) + " |")
    lines.append(
        f"\nOf {compared} pairs UIB + X is better in both on {both}, and falls less short of the retrained model (by more than "
        f"0.05 points) on {nearer}."
    )
    return [*lines, ""]


def _three(rows: list[dict]) -> list[float]:
    return [mean(rows, k) for k in ("conflicting_accuracy", "follow_rate", "accuracy")]


def _shown(figures: list[float]) -> str:
    return ", ".join(f"{v:.3f}" for v in figures)


def _short(mine: list[dict], rows: dict[str, list[dict]]) -> float:
    """Points that a method falls short of the retrained model, mean of conflicting accuracy, follow rate and accuracy."""
    lacking = zip(_three(mine), _three(rows["retrained"]), (1, -1, 1), strict=True)
    return 100 * float(np.mean([max(0.0, sign * (target - value)) for value, target, sign in lacking]))


def draw(results: list[dict]) -> list[str]:
    """``pareto.png``: quality against seconds, a panel a task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    tasks = [t for t in (*cells.BIAS, *cells.REMOVAL) if "uib" in by_method(results, t)]
    if not tasks:
        return []
    figure, axes = plt.subplots(
        2, (len(tasks) + 1) // 2, figsize=(3.1 * ((len(tasks) + 1) // 2), 5.6), layout="constrained"
    )
    for axis, task in zip(axes.flat, tasks, strict=False):
        rows = by_method(results, task)
        for method, mine in rows.items():
            if cells.METHODS[method].hosts or cells.METHODS[method].shown_only or method in ("original", "balanced"):
                continue
            if task in cells.REMOVAL:
                if "retrained" not in rows:
                    continue
                y = float(np.mean(gaps(mine, rows["retrained"])))
            else:
                y = mean(mine, "conflicting_accuracy")
            colour = {"uib": "#1b7837", "retrained": "#b2182b"}.get(method, "#8c8c8c")
            axis.scatter(max(mean(mine, "seconds"), 0.1), y, s=36 if method == "uib" else 16, color=colour, zorder=3)
            name = cells.METHODS[method].title.strip("*").split(",")[0].replace("fine-tuned", "FT")
            axis.annotate(
                name, (max(mean(mine, "seconds"), 0.1), y), fontsize=5.5, xytext=(3, 2), textcoords="offset points"
            )
        axis.set_xscale("log")
        axis.set_title(task, fontsize=9)
        axis.set_ylabel(
            "average gap, points (lower is better)" if task in cells.REMOVAL else "conflicting accuracy", fontsize=7
        )
        axis.set_xlabel("seconds", fontsize=7)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(labelsize=6)
        axis.spines[["top", "right"]].set_visible(False)
        if task in cells.BIAS:
            values = [mean(m, "conflicting_accuracy") for k, m in rows.items() if k != "original"]
            axis.set_ylim(np.quantile(values, 0.15) - 0.02, max(values) + 0.01)
        else:
            axis.set_ylim(0, 15)
    for axis in list(axes.flat)[len(tasks) :]:
        axis.set_visible(False)
    figure.savefig(os.path.join(DOCS, "pareto.png"), dpi=130)
    plt.close(figure)
    note = "Methods far below the others lie outside the panels; seconds were taken while other jobs ran.\n"
    return ["### Quality against time\n", note, "![Quality against seconds, a panel a task](pareto.png)\n"]


def tuning_table() -> list[str]:
    """The settings that the validation fold chose."""
    tried = cells.read(cells.TUNING)
    tasks = list(dict.fromkeys(c["task"] for c in tried))
    lines = [
        "### What was tuned\n",
        f"Grid search on the validation fold of seed {cells.TUNING_SEED}, by conflicting accuracy minus follow rate (bias) or "
        "average gap (removal). Where a method was not tuned it takes over its setting of fashion-colour. UIB and UIB + X are not "
        "tuned here: they have one set of defaults for all tasks, chosen on validation folds of digits-colour, fashion-colour, "
        "-patch, -outdated, -backdoor, -random and tweets-airline ([research.md](research.md)), "
        "with more trials than any grid here. UIB also sees the calibration set (its margins alone); the row without it shows "
        "what that is worth.\n",
        "| | grid | " + " | ".join(tasks) + " |",
        "|---" * (len(tasks) + 2) + "|",
    ]  # fmt: skip
    show = lambda setting: ", ".join(f"{k} {v:g}" for k, v in setting.items())  # noqa: E731
    for method in dict.fromkeys(c["method"] for c in tried):
        best = []
        for task in tasks:
            setting = cells.best_of(tried, task, method)
            best.append(show(setting) if setting else "-")
        lines.append(
            f"| {cells.METHODS[method].title} | {len(cells.METHODS[method].grid)} | " + " | ".join(best) + " |"
        )
    return [*lines, ""]


def text() -> str:
    """All tables."""
    results = cells.read(cells.RESULTS)
    parts = [*target_table(results), *rank_table(results), *hosting_table(results), *draw(results)]
    for task in cells.TASKS:
        if by_method(results, task):
            methods = (
                cells.METHODS
                if task not in cells.REGIMES
                else [m for m in cells.METHODS if m in by_method(results, task)]
            )
            parts += task_table(task, results, methods)
    return "\n".join([*parts, *tuning_table(), *truth.truth_table(), *cost.tables(), *audits.audit_table()])


def write_report() -> None:
    """Write docs/benchmark.md, its figure and the table of the README."""
    body = text()
    with open(os.path.join(DOCS, "benchmark.md"), "w", encoding="utf-8") as file:
        file.write(
            "# Benchmark\n\nWritten by `python scripts/benchmark.py --report` from benchmarks/*.jsonl. Mean ± standard deviation "
            "over seeds; every method starts from the same checkpoint, the oracles (trained on balanced data; retrained) from the "
            "model before it. No published code was used: `hf_uib/baselines.py` has each rule and its source.\n\n" + body
        )  # fmt: skip
    table = "\n".join(task_table("digits-colour", cells.read(cells.RESULTS), MAIN)[1:]).strip()
    _between_marks(os.path.join(DOCS, "..", "README.md"), table)
    _printed_numbers(os.path.join(DOCS, "..", "README.md"))
    _between_marks(os.path.join(DOCS, "research.md"), "\n".join(research.table()).strip())
    _between_marks(os.path.join(DOCS, "scale.md"), "\n".join(scale.scale_tables()).strip())
    _between_marks(os.path.join(DOCS, "lifecycle.md"), "\n".join(lifecycle.lifecycle_table()).strip())
    print(body)


def _printed_numbers(path: str) -> None:
    """The comment of the README's first block."""
    rows = by_method(cells.read(cells.RESULTS), "digits-colour")
    before, after, target = (mean(rows[m], "follow_rate") for m in ("original", "uib", "retrained"))
    with open(path, encoding="utf-8") as file:
        page = file.read()
    told = f"# digits of other hues: follow rate {before:.3f} before, {after:.3f} after, {target:.3f} retrained"
    with open(path, "w", encoding="utf-8") as file:
        file.write(re.sub("# digits of other hues: .*", told, page))


def _between_marks(path: str, table: str) -> None:
    """Put a table in its place in a page."""
    if not table:  # nothing was measured: the page stays
        return
    with open(path, encoding="utf-8") as file:
        page = file.read()
    begin, end = "<!-- results -->", "<!-- /results -->"
    head, tail = page.split(begin)[0], page.split(end)[1]
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{head}{begin}\n{table}\n{end}{tail}")
