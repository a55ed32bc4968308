"""Tables of figures, as a card or a deletion report shows them."""

import math
import re

from ..metrics.table import METRICS, measured, title_of

WORST = 30  # groups that a card shows; audit.json has all
TITLES = {"model": "unlearned", "reference": "original"}


def table_of(results: dict[str, dict]) -> tuple[list[tuple[str, str]], list[tuple[str, list[str]]]]:
    """Title and direction of each figure that was measured, and each model's name and cells."""
    names = measured(results)
    rows = [(model, [_number(row.get(name), name) for name in names]) for model, row in results.items()]
    return [(METRICS[name].title, METRICS[name].direction) for name in names], rows


def has_oracle(results: dict[str, dict]) -> bool:
    """Whether a model retrained without the forget set is among the rows of the table."""
    return any(name.startswith("retrained") for name in results)


def results_table(results: dict[str, dict]) -> str:
    """A Markdown table of models x figures, with the direction of each."""
    header, rows = table_of(results)
    if not header:
        return ""
    titles = [f"{title} ({direction})" for title, direction in header]
    return _markdown(["", *titles], [[model, *cells] for model, cells in rows])


def groups_table(groups: dict[str, dict]) -> tuple[str, int]:
    """A Markdown table of groups x models with 95% intervals, worst first, at most `WORST` rows; and how many groups there are."""
    models = [model for model, row in groups.items() if row["every"]]
    if "model" not in models:
        return "", 0
    every = groups["model"]["every"]
    rows = []
    for group in sorted(every, key=lambda name: every[name]["value"])[:WORST]:
        cells = [groups[model]["every"].get(group) for model in models]
        rows.append([plain(group), *map(_interval, cells)])
    return _markdown(["group", *(TITLES.get(model, model) for model in models)], rows), len(every)


def fairness_table(fairness: dict[str, dict]) -> tuple[str, int]:
    """A Markdown table of differences between groups, then of the rates of each, at most `WORST` groups, the largest first; and how
    many groups there are."""
    rows: list[list[str]] = []
    rates: list[tuple[int, list[str]]] = []
    models: list[str] = []
    for column, figures in fairness.items():
        models = list(figures)
        names = [name for name in figures["model"] if name != "groups"]
        rows += [[f"{plain(column)}: {title_of(n)}", *(_interval(figures[m][n]) for m in models)] for n in names]
        for group, seen in figures["model"].get("groups", {}).items():
            for rate in ("false_positive_rate", "false_negative_rate"):
                cells = [_interval(figures[m]["groups"][group][rate]) for m in models]
                rates.append((seen["rows"], [f"{plain(group)} ({seen['rows']} rows): {title_of(rate)}", *cells]))
    rates.sort(key=lambda pair: -pair[0])
    rows += [cells for _, cells in rates[: 2 * WORST]]
    return _markdown(["", *(TITLES.get(m, m) for m in models)], rows) if rows else "", len(rates) // 2


def plain(text: str) -> str:
    """Outside text on one line, with nothing in it that Markdown or HTML would read."""
    escaped = re.sub(r"([\\`*_\[\]#|<>])", r"\\\1", " ".join(str(text).split()))
    return escaped.replace("\\<", "&lt;").replace("\\>", "&gt;")


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None, name: str) -> str:
    if value is None and name == "seconds":
        return ""
    if value is None or math.isnan(value):
        return "not measured"
    return METRICS[name].text(value)


def _interval(cell: dict | None) -> str:
    return (
        "not measured"
        if cell is None or math.isnan(cell["value"])
        else f"{cell['value']:.3f} ({cell['low']:.3f}, {cell['high']:.3f})"
    )
