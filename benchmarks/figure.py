"""``pareto.png``: quality against seconds, a panel a task."""

from pathlib import Path

import numpy as np

from .methods import METHODS
from .tables import TITLES, by_method, gaps, mean, tasks_of
from .tasks import TASKS

COLOURS = {"uib": "#1b7837", "retrained": "#b2182b"}


def draw(runs: list[dict], path: Path) -> bool:
    """Draw the panels; gives whether there were any."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {task: by_method(runs, task) for kind in ("bias", "removal") for task in tasks_of(kind)}
    found = {task: rows for task, rows in found.items() if {"uib", "retrained"} <= set(rows)}
    if not found:
        return False
    columns = (len(found) + 1) // 2
    figure, axes = plt.subplots(2, columns, figsize=(3.1 * columns, 5.6), layout="constrained", squeeze=False)
    for axis, (task, rows) in zip(axes.flat, found.items(), strict=False):
        panel(axis, task, rows)
    for axis in list(axes.flat)[len(found) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def panel(axis, task: str, rows: dict[str, list[dict]]) -> None:
    """Conflicting accuracy, or average gap, of the methods and the retrained model against their seconds."""
    from matplotlib.ticker import NullFormatter

    removal, key = TASKS[task].kind == "removal", next(iter(TASKS[task].ranked_by))
    quality = {
        m: float(np.mean(gaps(mine, rows["retrained"]))) if removal else mean(mine, key) for m, mine in rows.items()
    }
    for method in (m for m in rows if METHODS[m].ranked or m == "retrained"):
        point = max(mean(rows[method], "seconds"), 0.1), quality[method]
        axis.scatter(*point, s=36 if method == "uib" else 16, color=COLOURS.get(method, "#8c8c8c"), zorder=3)
        name = METHODS[method].title.strip("*").split(",")[0].replace("fine-tuned", "FT")
        axis.annotate(name, point, fontsize=5.5, xytext=(3, 2), textcoords="offset points")
    axis.set_xscale("log")
    axis.set_title(task, fontsize=9)
    axis.set_ylabel("average gap, points (lower is better)" if removal else TITLES[key], fontsize=7)
    axis.set_xlabel("seconds", fontsize=7)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=6)
    axis.spines[["top", "right"]].set_visible(False)
    if removal:
        axis.set_ylim(0, 15)
    else:
        shown = [value for m, value in quality.items() if m != "original"]
        axis.set_ylim(np.quantile(shown, 0.15) - 0.02, max(shown) + 0.01)
