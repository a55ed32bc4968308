"""The tables of methods and tasks, from the results files alone."""

from itertools import product

import numpy as np
from scipy.stats import rankdata

from hf_uib.metrics import METRICS

from . import identity, results
from .markdown import table
from .methods import METHODS
from .registry import BIAS, suite
from .suites.runs import GAPS, SEEDS, average_gap, best_of, scores_of
from .tasks import TASKS

TITLES = {key: metric.title for key, metric in METRICS.items()} | identity.TITLES
SHOWN = {
    "bias": ["accuracy", "conflicting_accuracy", "follow_rate", "cramers_v", "worst_group_accuracy", "flip_rate"],
    "removal": [
        "forget_accuracy",
        "retain_accuracy",
        "test_accuracy",
        "removed_accuracy",
        "attack_auc",
        "mia_efficacy",
    ],
}


def tasks_of(kind: str) -> list[str]:
    """The ranked tasks of a kind."""
    return [name for name, spec in suite().items() if spec.kind == kind and not spec.regime_of]


def mean(rows: list[dict], key: str) -> float:
    """Over seeds."""
    return float(np.mean([row[key] for row in rows]))


def judged(rows: list[dict]) -> list[float]:
    """Means of the figures that count on a task with an attribute."""
    return [mean(rows, key) for key in BIAS]


def by_method(runs: list[dict], task: str) -> dict[str, list[dict]]:
    """The newest runs of a task, by method in the order of the tables."""
    newest = {(run["method"], run["seed"]): run for run in runs if run["task"] == task}
    rows: dict[str, list[dict]] = {}
    for method in METHODS:
        if mine := [run for (name, _), run in newest.items() if name == method]:
            rows[method] = mine
    return rows


def measured(rows: dict[str, list[dict]], methods) -> bool:
    """Whether each of the methods was run from at least `SEEDS` seeds."""
    return all(len(rows.get(m, [])) >= SEEDS for m in methods)


def gaps(rows: list[dict], oracle: list[dict]) -> list[float]:
    """Average gap of each seed's run to that seed's retrained model, in points."""
    of = {run["seed"]: run for run in oracle}
    return [average_gap(row, of[row["seed"]]) for row in rows if row["seed"] in of]


def tug_of_war(row: dict, oracle: dict) -> float:
    """Product of 1 minus the absolute accuracy gaps on forget, retained and test rows; 1 is the retrained model."""
    return float(np.prod([1 - abs(row[k] - oracle[k]) for k in GAPS[:3]]))


def figures(*values: float) -> str:
    """Three decimals each."""
    return " / ".join(f"{v:.3f}" for v in values)


def spread(values: list[float], key: str) -> str:
    """Mean ± standard deviation over seeds."""
    if key in ("seconds", "steps"):
        return f"{np.mean(values):.0f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"


# ---- One task ---------------------------------------------------------------------------------------------------


def task_table(task: str, runs: list[dict], methods=None, keys: list[str] | None = None) -> list[str]:
    """One row for each method that was run, mean ± standard deviation over seeds.

    Args:
        methods: the rows, all that were run by default. keys: the columns, those of the task's kind by default.
    """
    rows, spec = by_method(runs, task), TASKS[task]
    seeds = {run["seed"] for mine in rows.values() for run in mine}
    if keys is None:
        keys = [k for k in spec.shown or SHOWN[spec.kind] if any(k in run for mine in rows.values() for run in mine)]
        if spec.labels_wrong:  # the attribute is most rows' own label: the perfect model has a high V
            keys.remove("cramers_v")
        keys += ["steps", "seconds"]
    oracle, extra = rows.get("retrained", []), ["average gap", "tug-of-war"] if spec.kind == "removal" else []
    lines = []
    for method in (m for m in rows if methods is None or m in methods):
        mine = rows[method]
        values = [spread([run[k] for run in mine], k) for k in keys]
        if extra:
            values += removal_figures(mine, oracle)
        count = "" if len(mine) == len(seeds) else f" ({len(mine)} of {len(seeds)} seeds)"
        lines.append([METHODS[method].title + count, *values])
    return table(["", *(TITLES[k] for k in keys), *extra], lines)


def removal_figures(mine: list[dict], oracle: list[dict]) -> list[str]:
    """Average gap and tug-of-war, where the retrained model was measured."""
    found, of = gaps(mine, oracle), {run["seed"]: run for run in oracle}
    if not found:
        return ["-", "-"]
    wars = [tug_of_war(run, of[run["seed"]]) for run in mine if run["seed"] in of]
    return [f"{np.mean(found):.2f}", f"{np.mean(wars):.3f}"]


# ---- Targets ----------------------------------------------------------------------------------------------------

VARIANTS = {"uib": "", "uib_fifth": "— a fifth of the steps"}
CONDITIONS = {
    "conflicting": "conflicting accuracy at least the retrained model's",
    "half of LoRA": "shortcut rate at most half of tuned LoRA fine-tuning's",
    "below all weights": "shortcut rate below that of tuned fine-tuning of all weights",
    "accuracy": "accuracy no lower than that of either fine-tuning",
    "steps": "at most a fifth of the retraining's steps",
}


def conditions(rows: dict[str, list[dict]], variant: str) -> dict[str, bool]:
    """Which of `CONDITIONS` a variant of UIB meets on a task."""
    (conflicting, shortcut, accuracy), lora, full, oracle = (
        judged(rows[m]) for m in (variant, "lora", "full", "retrained")
    )
    return {
        "conflicting": conflicting >= oracle[0],
        "half of LoRA": shortcut <= lora[1] / 2,
        "below all weights": shortcut < full[1],
        "accuracy": accuracy >= max(lora[2], full[2]),
        "steps": mean(rows[variant], "steps") <= mean(rows["retrained"], "steps") / 5,
    }


def comparable(runs: list[dict], variant: str) -> dict[str, dict[str, list[dict]]]:
    """Runs by method of the bias tasks, regimes included, on which a variant can be held against the others."""
    found = {name: by_method(runs, name) for name, spec in suite().items() if spec.about_an_attribute}
    return {name: rows for name, rows in found.items() if measured(rows, (variant, "lora", "full", "retrained"))}


def target_table(runs: list[dict]) -> list[str]:
    """UIB against the retrained model and fine-tuning on every bias task."""
    lines = []
    for task in TASKS:
        for variant, words in VARIANTS.items():
            rows = comparable(runs, variant).get(task)
            if rows is None:
                continue
            of = {m: judged(rows[m]) for m in (variant, "lora", "full", "retrained")}
            met = conditions(rows, variant)
            missed = ", ".join(name for name, good in met.items() if not good)
            lines.append(
                [
                    words or task,
                    figures(of[variant][0], of["retrained"][0]),
                    figures(*(row[1] for row in of.values())),
                    figures(*(row[2] for row in list(of.values())[:3])),
                    f"{mean(rows[variant], 'steps'):.0f} / {mean(rows['retrained'], 'steps'):.0f}",
                    f"all but {missed}" if missed else "all",
                ]
            )
    header = [
        "task",
        "conflicting accuracy: UIB / retrained",
        "shortcut rate: UIB / LoRA / all weights / retrained",
        "accuracy: UIB / LoRA / all weights",
        "steps: UIB / retrained",
        "met",
    ]
    return table(header, lines)


def missed_table(runs: list[dict]) -> list[str]:
    """For each condition, the tasks on which UIB misses it with its usual steps, and in a fifth of the retraining's."""
    met = {v: {task: conditions(rows, v) for task, rows in comparable(runs, v).items()} for v in VARIANTS}

    def missing(variant: str, name: str) -> str:
        tasks = [task for task, found in met[variant].items() if not found[name]]
        return f"{len(tasks)} of {len(met[variant])}" + (f": {'; '.join(tasks)}" if tasks else "")

    lines = [[words, *(missing(v, name) for v in VARIANTS)] for name, words in CONDITIONS.items()]
    return table(["condition", "missed by UIB on", "missed in a fifth of the retraining's steps on"], lines)


def lora_table(runs: list[dict]) -> list[str]:
    """UIB minus tuned LoRA fine-tuning, seed by seed: mean difference ± standard error, **bold** where it is two of them behind."""
    lines = []
    for task, spec in suite().items():
        rows = by_method(runs, task)
        if not measured(rows, ("uib", "lora")):
            continue
        if spec.kind == "removal":
            if not measured(rows, ("retrained",)):
                continue
            found = {
                "average gap, points": (
                    gaps(rows["uib"], rows["retrained"]),
                    gaps(rows["lora"], rows["retrained"]),
                    -1,
                )
            }
        else:
            found = {
                TITLES.get(key, key): (*(paired(rows, m, key) for m in ("uib", "lora")), sign)
                for key, sign in spec.ranked_by.items() | {"worst_group_accuracy": 1}.items()
                if all(key in run for m in ("uib", "lora") for run in rows[m])
            }
        for title, (mine, theirs, sign) in sorted(found.items()):
            differences = np.asarray(mine) - np.asarray(theirs)
            error = differences.std(ddof=1) / len(differences) ** 0.5
            text = f"{differences.mean():+.3f} ± {error:.3f}"
            behind = sign * differences.mean() < -2 * error
            lines.append(
                [task, title, f"{np.mean(mine):.3f}", f"{np.mean(theirs):.3f}", f"**{text}**" if behind else text]
            )
    return table(["task", "", "UIB", "LoRA, tuned", "difference"], lines)


def paired(rows: dict[str, list[dict]], method: str, key: str) -> list[float]:
    """A figure of the seeds from which UIB and LoRA were both run, in their order."""
    both = {run["seed"] for run in rows["uib"]} & {run["seed"] for run in rows["lora"]}
    return [run[key] for run in sorted(rows[method], key=lambda run: run["seed"]) if run["seed"] in both]


# ---- Ranks ------------------------------------------------------------------------------------------------------


def ranks(values: dict[str, float], higher: bool) -> dict[str, float]:
    """Rank of each, 1 is best; ties share the mean."""
    found = rankdata([-value if higher else value for value in values.values()])
    return dict(zip(values, found.tolist(), strict=True))


def task_ranks(task: str, rows: dict[str, list[dict]], methods: list[str]) -> dict[str, float]:
    """Of the methods that were run: the mean rank over what is judged, or the rank by average gap."""
    there = [m for m in methods if m in rows]
    if TASKS[task].kind == "removal":
        found = {m: gaps(rows[m], rows["retrained"]) for m in there}
        return ranks({m: float(np.mean(g)) for m, g in found.items() if g}, False)
    each = [ranks({m: mean(rows[m], k) for m in there}, sign > 0) for k, sign in TASKS[task].ranked_by.items()]
    return {m: float(np.mean([rank[m] for rank in each])) for m in there}


def rank_table(runs: list[dict]) -> list[str]:
    """Ranks on every task, and their mean over the bias tasks on which every method was run; partly run methods come last."""
    methods = [m for m, spec in METHODS.items() if spec.ranked]
    everywhere = [m for m in methods if not METHODS[m].needs_attribute]
    bias, removal = tasks_of("bias"), tasks_of("removal")
    found = {task: by_method(runs, task) for task in (*bias, *removal)}
    of = {t: task_ranks(t, rows, methods) for t, rows in found.items() if measured(rows, (*everywhere, "retrained"))}
    bias, removal = [t for t in bias if t in of], [t for t in removal if t in of]
    own = {m: [of[t][m] for t in bias if m in of[t]] for m in methods}
    lines = []
    for m in sorted((m for m in methods if own[m]), key=lambda m: (-len(own[m]), np.mean(own[m]))):
        partly = "" if len(own[m]) == len(bias) else f" ({len(own[m])} tasks)"
        lines.append(
            [
                METHODS[m].title,
                *(f"{of[t][m]:.1f}" if m in of[t] else "-" for t in bias),
                f"**{np.mean(own[m]):.2f}**{partly}",
                *(f"{of[t][m]:.0f}" if m in of[t] else "-" for t in removal),
            ]
        )
    missing = [t for t in found if t not in of]
    note = f"Not ranked, as not every method was run from {SEEDS} seeds: {', '.join(missing)}.\n"
    return [*table(["", *bias, "**mean, bias tasks**", *removal], lines), *([note] if missing else [])]


# ---- Hosting ----------------------------------------------------------------------------------------------------


def shortfall(mine: list[dict], rows: dict[str, list[dict]]) -> float:
    """Points that a method falls short of the retrained model, mean over what is judged; more than it counts as equal."""
    lacking = zip(judged(mine), judged(rows["retrained"]), BIAS.values(), strict=True)
    return 100 * float(np.mean([max(0.0, sign * (target - value)) for value, target, sign in lacking]))


def hosted_text(mine: list[dict], rows: dict[str, list[dict]]) -> str:
    """What is judged, and the shortfall in brackets."""
    return f"{', '.join(f'{v:.3f}' for v in judged(mine))} ({shortfall(mine, rows):.1f})"


def hosting_table(runs: list[dict]) -> list[str]:
    """X against UIB + X on every bias task; **bold** where conflicting accuracy and shortcut rate are better."""
    hosts = {m: spec.hosts for m, spec in METHODS.items() if spec.hosts}
    found = {task: by_method(runs, task) for task in tasks_of("bias") if TASKS[task].about_an_attribute}
    found = {task: rows for task, rows in found.items() if any(m in rows for m in hosts)}
    lines, both, nearer, compared = [], 0, 0, 0
    for m, host in hosts.items():
        line = [f"{METHODS[host].title} → {METHODS[m].title}"]
        for rows in found.values():
            if not measured(rows, (m, host, "retrained")):
                line.append("-")
                continue
            alone, inside = judged(rows[host]), judged(rows[m])
            better = inside[0] > alone[0] and inside[1] < alone[1]
            closer = shortfall(rows[m], rows) < shortfall(rows[host], rows) - 0.05
            both, nearer, compared = both + better, nearer + closer, compared + 1
            text = " → ".join(hosted_text(rows[x], rows) for x in (host, m))
            line.append(f"**{text}**" if better else text)
        lines.append(line)
    for m in ("uib_none", "retrained"):
        line = [hosted_text(rows[m], rows) if {m, "retrained"} <= set(rows) else "-" for rows in found.values()]
        lines.append([METHODS[m].title, *line])
    summary = (
        f"Of {compared} pairs UIB + X is better in both on {both}, and falls less short of the retrained model (by more than "
        f"0.05 points) on {nearer}.\n"
    )
    return [*table(["", *found], lines), summary]


# ---- Tuning -----------------------------------------------------------------------------------------------------


def tuning_table() -> list[str]:
    """The settings that the validation folds chose, and where it was more than one fold."""
    tried = results.read(results.TUNING)
    tasks = [task for task in suite() if any(line["task"] == task for line in tried)]
    methods = [method for method in METHODS if any(line["method"] == method for line in tried)]
    lines, further = [], []
    for method in methods:
        best = [best_of(tried, task, method) or {} for task in tasks]
        shown = [", ".join(f"{k} {v:g}" for k, v in setting.items()) or "-" for setting in best]
        lines.append([METHODS[method].title, str(len(METHODS[method].grid)), *shown])
    for task, method in product(tasks, methods):
        folds = sorted(scores_of(tried, task, method))
        if len(folds) > 1:
            further.append(f"- {METHODS[method].title} on {task}: {', '.join(map(str, folds))}")
    return [*table(["", "grid", *tasks], lines), "\nFolds, where there was more than that of seed 100:\n", *further]
