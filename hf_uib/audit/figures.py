"""Pictures of a run: who follows the bias, and where it lived."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # without pyplot, whose backend is the user's

from ..metrics.table import METRICS, title_of
from ..serialization import MARK
from .checks import Check

INK, MUTED, OURS = "#222222", "#9aa5b1", "#2166ac"
BEFORE, RETRAINED = "#b2182b", "#1b7837"
MOST_GROUPS = 12  # that a picture shows
PANELS = ("conflicting_accuracy", "follow_rate", "cramers_v", "accuracy", "forget_accuracy", "retain_accuracy")


def draw_bias(
    results: dict[str, dict],
    folder: str,
    images: Sequence[Any] | None = None,
    labels: Sequence[int] = (),
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    names: Any = None,
) -> str:
    """``bias.png``: a bar per model and metric, and, if given, test pictures with predictions before and after.

    Args:
        results: rows by model name.
        images: up to eight test pictures, never from the forget set; labels, before, after: their classes.
    """
    panels = [p for p in PANELS if any(p in row for row in results.values())][:3]
    rows = 2 if images else 1
    figure = Figure(figsize=(3.2 * max(len(panels), 2), 2.6 * rows + 0.4), layout="constrained")
    parts = figure.subfigures(rows, 1, squeeze=False)[:, 0]
    if images:
        parts[0].suptitle("test pictures: label, then prediction before → after", fontsize=10, color=INK)
        for axis, image, label, old, new in zip(
            parts[0].subplots(1, len(images)), images, labels, before, after, strict=True
        ):
            axis.imshow(image, interpolation="nearest")
            axis.set_axis_off()
            name = (lambda c: c) if names is None else (lambda c: names[c])
            axis.set_title(
                f"{name(label)}:  {name(old)} → {name(new)}",
                fontsize=9,
                color="#1a7f37" if new == label else "#b2182b",
            )
    axes = parts[-1].subplots(1, len(panels), squeeze=False)[0]
    models = list(results)
    for axis, panel in zip(axes, panels, strict=True):
        values = [results[m].get(panel, np.nan) for m in models]
        axis.barh(models, values, color=[OURS if m.startswith("UIB") else MUTED for m in models])
        axis.invert_yaxis()
        axis.set_title(f"{METRICS[panel].title}\n({METRICS[panel].goal})", fontsize=9, color=INK)
        axis.tick_params(labelsize=8, colors=INK)
        if axis is not axes[0]:
            axis.set_yticklabels([])
        for y, value in enumerate(values):
            axis.text(value, y, f" {value:.3f}", va="center", fontsize=8, color=INK)
        axis.set_xlim(0, max((v for v in values if v == v), default=0) * 1.25 + 1e-9)
        axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, folder, "bias.png")


def draw_layers(layers: list[dict], folder: str) -> str:
    """``layers.png``: nats of the bound by layer, "where the bias lived"."""
    names = [entry["layer"] for entry in layers]
    figure = Figure(figsize=(7, 0.6 + 0.2 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.barh(names, [entry["nats"] for entry in layers], color=OURS)
    axis.invert_yaxis()
    axis.set_xlabel("R(l): nats that the adapter took from the retained data", fontsize=9, color=INK)
    axis.set_title("Where the bias lived", fontsize=10, color=INK)
    axis.tick_params(labelsize=7, colors=INK)
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, folder, "layers.png")


def draw_audit(metrics: dict[str, Any], checks: list[Check], folder: str) -> str:
    """``audit.png``: the main figures of every model with their intervals, false alarms and misses by group, and every check."""
    wanted = [("test", k) for k in ("accuracy", "conflicting_accuracy", "follow_rate", "cramers_v")]
    wanted += [("forget", "accuracy"), ("membership", "auc")]
    models = list(metrics["test"])
    panels = [(topic, k) for topic, k in wanted if all(k in metrics[topic].get(m, {}) for m in models)]
    groups = _groups_shown(metrics.get("fairness", {}))
    by_group = 0.9 + (0.14 * len(models) + 0.1) * len(groups) if groups else 0
    heights = [1.2 + 0.25 * len(models), by_group, 0.7 + 0.24 * len(checks)]
    figure = Figure(figsize=(2.7 * max(len(panels), 3), sum(heights)), layout="constrained")
    heights = [height for height in heights if height]
    top, *middle, bottom = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (topic, key) in zip(top.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for y, model in enumerate(models):
            cell = metrics[topic][model][key]
            colour = OURS if model == "model" else MUTED
            axis.plot([cell["low"], cell["high"]], [y, y], color=colour, linewidth=2)
            axis.plot([cell["value"]], [y], "o", color=colour, markersize=5)
        axis.set_yticks(range(len(models)), models if axis.get_subplotspec().is_first_col() else [""] * len(models))
        axis.set_ylim(len(models) - 0.5, -0.5)
        axis.set_title(f"{topic}: {title_of(key)}", fontsize=9, color=INK)
        axis.tick_params(labelsize=8, colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
    for part in middle:
        _draw_groups(part, metrics["fairness"], groups, models)
    axis = bottom.subplots()
    axis.set_axis_off()
    axis.set_ylim(len(checks) - 0.5, -0.7)
    for y, check in enumerate(checks):
        word, colour = {True: ("FIRED", "#b2182b"), False: ("ok", "#1a7f37"), None: ("not measured", MUTED)}[
            check.fired
        ]
        axis.text(0.0, y, check.name, fontsize=8, color=INK, va="center", transform=axis.get_yaxis_transform())
        axis.text(0.2, y, word, fontsize=8, color=colour, va="center", transform=axis.get_yaxis_transform())
        axis.text(0.31, y, check.detail, fontsize=8, color=INK, va="center", transform=axis.get_yaxis_transform())
    return _save(figure, folder, "audit.png")


def _groups_shown(fairness: dict[str, Any]) -> list[tuple[str, str]]:
    """Column and name of the largest groups: of single columns first, then of their crossing."""
    shown: list[tuple[str, str]] = []
    for column, figures in fairness.items():
        groups = figures["model"].get("groups", {})
        shown += [(column, name) for name in sorted(groups, key=lambda name: -groups[name]["rows"])]
    return shown[:MOST_GROUPS]


def _draw_groups(figure: Any, fairness: dict[str, Any], groups: list[tuple[str, str]], models: list[str]) -> None:
    """False alarms and misses of each group, a line a model."""
    axes = figure.subplots(1, 2, sharey=True)
    step = 0.7 / len(models)
    for axis, rate in zip(axes, ("false_positive_rate", "false_negative_rate"), strict=True):
        for offset, model in enumerate(models):
            cells = [fairness[column][model]["groups"][name][rate] for column, name in groups]
            at = np.arange(len(groups)) + (offset - (len(models) - 1) / 2) * step
            colour = {"model": OURS, "reference": BEFORE}.get(model, RETRAINED)
            axis.hlines(at, [c["low"] for c in cells], [c["high"] for c in cells], color=colour, linewidth=1.5)
            axis.plot([c["value"] for c in cells], at, "o", color=colour, markersize=4, label=model)
        sizes = [fairness[column]["model"]["groups"][name]["rows"] for column, name in groups]
        names = [f"{name if len(name) <= 40 else name[:39] + '…'} ({size})" for (_, name), size in zip(groups, sizes)]
        axis.set_yticks(range(len(groups)), names)
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.set_xlim(-0.02, 1.02)
        axis.set_title(f"test: {title_of(rate)} by group (rows)", fontsize=9, color=INK)
        axis.tick_params(labelsize=8, colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
        for line in np.arange(1, len(groups)) - 0.5:
            axis.axhline(line, color=MUTED, linewidth=0.4)
    axes[1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_deep(deep: dict, folder: str) -> str:
    """``deep.png``: the linear probe by block, and how the bias comes back with 1% of the forget set."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    colour = lambda name: {"model": OURS, "reference": "#b2182b"}.get(name, MUTED)
    for name, blocks in deep["probes"].items():
        left.plot(
            list(blocks), [b["linear"] for b in blocks.values()], "o-", color=colour(name), label=name, markersize=4
        )
    left.set_title("bias attribute read off each block, given the label", fontsize=9, color=INK)
    for name, curves in deep["relearning"].items():
        steps = np.array(curves["curve"]["forget"])
        right.plot(np.log2(steps[:, 0] + 1), steps[:, 1], "o-", color=colour(name), label=name, markersize=4)
    right.set_xticks(np.log2(steps[:, 0] + 1), [f"{int(s)}" for s in steps[:, 0]])
    right.set_title("bias against steps on 1% of the forget set", fontsize=9, color=INK)
    for axis in (left, right):
        axis.tick_params(labelsize=8, colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
    left.tick_params(axis="x", rotation=30)
    right.legend(fontsize=8, frameon=False)
    return _save(figure, folder, "deep.png")


def _save(figure: Figure, folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    figure.savefig(path, dpi=130, metadata={"Software": f"{MARK}, matplotlib"})
    return path
