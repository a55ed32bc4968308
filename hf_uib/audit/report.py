"""The audit: what a model still knows of its forget set, against the model retrained without it."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .. import __version__
from ..checkpointing import write_json
from ..data.checks import check_one_set
from ..data.columns import Columns
from ..data.streams import StreamFolder
from ..metrics.strata import STRATA
from ..metrics.table import title_of
from ..models import Name
from .checks import Check, few_rows, run_checks
from .context import AuditContext
from .fairness import AuditedRows, audited_rows, fairness_of, metric_frame, not_estimable, without_small_groups
from .gather import gather, loaded, plain_models
from .thresholds import AuditThresholds

SCHEMA = 1
LEAST_FOR_KLOM = 3  # retrained models: each is compared with the others, which make a distribution from two on
MOST_SHOWN = 12  # groups of a column in the printed table


def audit_model(
    model: Name | nn.Module,
    *,
    reference_model: Name | nn.Module | None = None,
    forget_dataset: Any,
    retain_dataset: Any = None,
    test_dataset: Any,
    bias_column: str | Sequence[str] | None = None,
    retrained_model: Name | nn.Module | list | tuple | None = None,
    processing_class: Any = None,
    example_column: str | None = None,
    deep: bool = False,
    seed: int = 0,
    thresholds: AuditThresholds | None = None,
    columns: Columns = Columns(),  # noqa: B008
    label: str | int | None = None,
    positive_label: str | int | None = None,
) -> "AuditReport":
    """Audit any classifier that is said to have unlearned something.

    Args:
        model: the model, by folder, Hub id, ONNX file or object; of a PeftModel the merged weights are audited. Of an ONNX file
            there are logits alone: what needs weights is not measured.
        reference_model: the model before unlearning; None takes a PeftModel's base.
        forget_dataset, retain_dataset, test_dataset: raw or encoded rows with labels; the test set is unbiased.
        bias_column: the attribute that gave the label away on the forget set. Of several the first is the one that the checks
            judge; fairness is measured by each of them and by their crossing.
        retrained_model: trained without the forget set, the target; several show how far retraining itself varies.
        processing_class: image processor or tokenizer.
        example_column: rows of the test set that share its value differ in the attribute alone (exact counterfactuals).
        deep: also probes of every block, relearning, robustness of the removal and per-example membership.
        seed: of every sample and resample.
        thresholds: limits of the checks and sizes of the samples; `AuditThresholds()` by default.
        columns: names of text, picture and label columns that are not the usual ones.
        label: of a model of several labels a row, the name or number of the one that is looked at, as a classifier of two
            classes; by default the one that most forget rows have.
        positive_label: name or number of the class that false alarms and misses by group are about, against all others. By default
            class 1 of two; of more classes there is none.

    Raises:
        ValueError: no forget or test rows, ``bias_column`` is not there, or the model's classes differ from the reference's.
    """
    models, oracles = plain_models(loaded(model), reference_model, retrained_model)
    streams, sets = StreamFolder(), {"forget": forget_dataset, "retain": retain_dataset, "test": test_dataset}
    for name, dataset in sets.items():
        check_one_set(f"{name}_dataset", dataset)
    context = gather(
        models,
        oracles,
        {name: streams.stored(dataset, f"{name}_dataset") for name, dataset in sets.items()},
        processing_class=processing_class,
        bias_column=bias_column,
        example_column=example_column,
        deep=deep,
        seed=seed,
        thresholds=thresholds,
        columns=columns,
        label=label,
        positive_label=positive_label,
    )
    if (
        deep and context.label is None and context.weights and not context.of_tokens
    ):  # it trains heads of one label a row
        from .deep import deep_audit

        context.deep = deep_audit(context)
    return report_of(context)


@dataclass
class AuditReport:
    """What was measured, and what follows from it. `str` gives the table.

    Attributes:
        checks: every check: name, value, limit, whether it fired (None: not measured), and what it means.
        metrics: nested: ``metrics[set or topic][model][figure]``, each figure with ``value``, ``low`` and ``high`` (95%).
        not_measured: what would have been needed for the rest, in words.
        verdict: one paragraph.
        deep: what the deep audit found.
        thresholds: the limits that the checks had.
        positive_label: the class that false alarms and misses are about.
        rows: what `metric_frame` needs of the test rows; never written.
    """

    checks: list[Check]
    metrics: dict[str, Any]
    not_measured: list[str]
    verdict: str = ""
    deep: dict[str, Any] = field(default_factory=dict)
    thresholds: AuditThresholds = field(default_factory=AuditThresholds)
    positive_label: str | None = None
    rows: AuditedRows | None = field(default=None, repr=False, compare=False)

    @property
    def flags(self) -> list[str]:
        """Names of the checks that fired."""
        return [check.name for check in self.checks if check.fired]

    @property
    def passed(self) -> bool:
        """Whether no check fired."""
        return not self.flags

    @property
    def public_metrics(self) -> dict[str, Any]:
        """`metrics` as file, card and picture have them: of groups with few test rows they hold no rates."""
        fairness = without_small_groups(self.metrics.get("fairness", {}), self.thresholds.min_group_rows)
        return self.metrics | {"fairness": fairness}

    def to_dict(self) -> dict[str, Any]:
        """Everything; docs/audit.md describes the schema."""
        return {
            "schema": SCHEMA,
            "hf_uib": __version__,
            "passed": self.passed,
            "flags": self.flags,
            "verdict": self.verdict,
            "not_measured": self.not_measured,
            "positive_label": self.positive_label,
            "thresholds": self.thresholds.as_dict(),
            "checks": [check.as_dict() for check in self.checks],
            "metrics": self.public_metrics,
        } | ({"deep": self.deep} if self.deep else {})

    def to_json(self, path: str) -> None:
        """Write ``path``, whole or not at all; NaN becomes null."""
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write_json(self.to_dict(), path)

    def plot(self, folder: str) -> list[str]:
        """Draw ``audit.png`` (and ``deep.png``) to a folder; returns the paths."""
        from .figures import draw_audit, draw_deep

        os.makedirs(folder, exist_ok=True)
        return [draw_audit(self.public_metrics, self.checks, folder)] + (
            [draw_deep(self.deep, folder)] if self.deep else []
        )

    def metric_frame(self, bias_column: str | Sequence[str] | None = None, model: str = "model") -> Any:
        """A `fairlearn.metrics.MetricFrame` of the audited test rows: fairlearn's differences, ratios and plots of its figures.

        Args:
            bias_column: one column of the audit or several, whose crossing is then taken; by default all of them.
            model: ``model``, ``reference`` or a retrained one.

        Returns:
            The frame of ``count``, ``accuracy`` and, with a positive label (which counts as 1), ``selection_rate``,
            ``false_positive_rate`` and ``false_negative_rate``. Rows without a value of the column are left out. fairlearn gives 0
            for a rate over no rows; a warning names such groups.

        Raises:
            ValueError: no such column or model in this audit, or the report was not made by an audit of this process.
            ImportError: fairlearn is not installed.
        """
        if self.rows is None:
            raise ValueError("This report has no rows: they are kept in memory alone, so audit the model again.")
        return metric_frame(self.rows, bias_column, model)

    def __str__(self) -> str:
        models = list(self.metrics["test"])
        rows = [("", models), *_figure_rows(self.metrics, models), *_summary_rows(self.metrics, models)]
        rows += _fairness_rows(self.metrics.get("fairness", {}), models)
        rows += _deep_rows(self.deep, len(models)) if self.deep else []
        width = max(34, *(len(name) + 2 for name, _ in rows))
        table = [f"{name:{width}}" + "".join(f"{cell:>24}" for cell in cells) for name, cells in rows]
        width = max(len(check.name) for check in self.checks)
        mark = {True: "FIRED", False: "ok", None: "not measured"}
        checks = [f"{check.name:{width}}  {mark[check.fired]:12}  {check.detail}" for check in self.checks]
        return "\n".join([*table, "", *checks, "", self.verdict])


# ---- From the context to the report ----


def report_of(context: AuditContext) -> AuditReport:
    """Checks, figures, what is missing, and the verdict."""
    report = AuditReport(
        run_checks(context),
        _metrics(context),
        _not_measured(context),
        deep=context.deep,
        thresholds=context.thresholds,
        positive_label=None if context.positive is None else context.positive[1],
        rows=audited_rows(context),
    )
    report.verdict = _verdict(report, context.oracles)
    return report


def _metrics(context: AuditContext) -> dict[str, Any]:
    """Every figure of every model, with its interval."""
    metrics: dict[str, Any] = {part: {} for part in context.parts}
    for name in context.names:
        for part in context.parts:
            metrics[part][name] = {"accuracy": context.accuracy(name, part).as_dict()}
        for figure in context.bias_figures:
            metrics["test"][name][figure] = context.bias(name, figure).as_dict()
        if context.examples is not None:
            gap = context.counterfactual(name)
            metrics["test"][name] |= {k: _triple(gap, k) for k in ("counterfactual_gap", "flip_rate")}
    metrics["membership"] = {name: _attack(context, name) for name in context.names}
    metrics["head refit"] = {name: {"follow rate": rate.as_dict()} for name, rate in context.refit().items()}
    metrics["groups"] = {name: context.groups(name) for name in context.names}
    metrics["fairness"] = fairness_of(context)
    if context.oracles and "retain" in context.parts:
        metrics["gap"] = {name: context.gap(name) for name in ("model", "reference")}
    if context.oracles and len(context.sets["forget"]) >= len(STRATA):
        metrics["strata"] = {name: context.strata(name) for name in ("model", "reference")}
    if len(context.oracles) >= LEAST_FOR_KLOM:
        metrics["klom"] = {name: {part: context.klom(name, part) for part in context.parts} for name in context.names}
    return metrics


def _triple(values: dict[str, float], name: str) -> dict[str, float]:
    return {"value": values[name], "low": values[f"{name}_low"], "high": values[f"{name}_high"]}


def _attack(context: AuditContext, name: str) -> dict[str, dict[str, float]]:
    attack, nan = context.attack(name), float("nan")
    plain = ("auc_balanced", "mia_efficacy", "tpr_at_1_fpr", "advantage", "logistic_accuracy")
    return {"auc": context.auc(name).as_dict()} | {k: {"value": attack[k], "low": nan, "high": nan} for k in plain}


def _not_measured(context: AuditContext) -> list[str]:
    missing = []
    if not context.oracles:
        missing.append("how far the model is from one retrained without the forget set (give retrained_model)")
    if context.attribute is None:
        missing.append("the bias (give bias_column)")
    elif not context.coded:
        missing.append("the shortcut rate (the attribute does not stand for classes in the forget set)")
    missing += not_estimable(context)
    if context.examples is None and not context.of_tokens:
        missing.append("exact counterfactuals (give example_column)")
    if "retain" not in context.parts:
        missing.append("accuracy on retained data and the published attack (give retain_dataset)")
    if few_rows(context):
        least = context.thresholds.min_rows
        missing.append(f"most checks (they need {least} forget and {least} test rows)")
    if context.label is not None:
        missing.append(
            f"labels other than '{context.label}' (give label), and the deep audit, which is for one label a row"
        )
    elif context.of_tokens:
        missing.append("the deep audit, which is for one label a row")
    elif not context.weights:
        missing.append(
            "what needs weights and features: a head fitted anew, the encoder, and the deep audit (an ONNX file has logits alone)"
        )
    elif not context.deep:
        missing.append("probes of every block, relearning, quantisation and pruning (deep=True)")
    return missing


def _told_apart(metrics: dict[str, Any], oracles: list[str]) -> list[str]:
    """The figures whose interval meets that of no retrained model."""
    found, none = [], {"low": math.nan, "high": math.nan}
    for topic, name in _figures(metrics):
        mine, *theirs = (metrics[topic].get(model, {}).get(name, none) for model in ("model", *oracles))
        if all(mine["low"] > other["high"] or mine["high"] < other["low"] for other in theirs):
            found.append(_title(topic, name))
    return found


def _verdict(report: AuditReport, oracles: list[str]) -> str:
    fired = [check for check in report.checks if check.fired]
    judged = sum(check.fired is not None for check in report.checks)
    if fired:
        text = f"Not passed: {len(fired)} of {judged} checks fired. " + " ".join(check.meaning for check in fired)
    else:
        text = f"Passed: none of {judged} checks fired."
        if oracles:
            apart = ", ".join(_told_apart(report.metrics, oracles)) or "none"
            text += f" Figures whose intervals do not meet the retrained model's: {apart}."
    text += " This is evidence, not a proof of deletion."
    return text + (" Not measured: " + "; ".join(report.not_measured) + "." if report.not_measured else "")


# ---- The printed table: names and one cell a model ----

Rows = list[tuple[str, list[str]]]


def _figure_rows(metrics: dict[str, Any], models: list[str]) -> Rows:
    """The figures with an interval."""
    return [
        (_title(topic, name), [_interval(metrics[topic].get(model, {}).get(name)) for model in models])
        for topic, name in _figures(metrics)
    ]


def _figures(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Topic and name of each figure with an interval."""
    topics = ("test", "forget", "retain", "membership", "head refit")
    return [
        (t, name) for t in topics for name in dict.fromkeys(key for row in metrics.get(t, {}).values() for key in row)
    ]


def _title(topic: str, name: str) -> str:
    return f"{topic}: {title_of(name.replace(' ', '_'))}"


def _interval(cell: dict[str, float] | None) -> str:
    if cell is None or math.isnan(cell["value"]):
        return "-"
    if math.isnan(cell["low"]):
        return f"{cell['value']:.3f}"
    return f"{cell['value']:.3f} ({cell['low']:.3f}, {cell['high']:.3f})"


def _summary_rows(metrics: dict[str, Any], models: list[str]) -> Rows:
    """Over groups, and the distance from the retrained model."""
    groups = {model: row for model, row in metrics["groups"].items() if row["every"]}
    wanted = [(groups, "groups", name, " accuracy") for name in ("worst", "mean", "weighted_mean")]
    wanted += [(metrics.get("gap", {}), "gap", name, "") for name in ("average_gap", "tug_of_war", "tug_of_war_mia")]
    rows = []
    for figures, topic, name, noun in wanted:
        values = [figures.get(model, {}).get(name) for model in models]
        if any(value is not None for value in values):
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            rows.append((f"{topic}: {name.replace('_', ' ')}{noun}", cells))
    strata = metrics.get("strata", {})
    for stratum in STRATA if strata else ():
        of = {model: _triple(every[stratum], "accuracy_gap") for model, every in strata.items()}
        rows.append((f"{stratum} memorisation: accuracy gap", [_interval(of.get(model)) for model in models]))
    divergence = metrics.get("klom", {})
    parts = divergence.get("model", {})
    rows += [(f"{part}: KLoM", [f"{divergence[model][part]['klom']:.3f}" for model in models]) for part in parts]
    return rows


def _fairness_rows(fairness: dict[str, Any], models: list[str]) -> Rows:
    """Differences between groups, then false alarms and misses of each group, the largest first."""
    rows = []
    for column, figures in fairness.items():
        names = [name for name in figures[models[0]] if name != "groups"]
        rows += [(f"{column}: {title_of(name)}", [_interval(figures[m][name]) for m in models]) for name in names]
        groups = figures[models[0]].get("groups", {})
        for group in sorted(groups, key=lambda name: -groups[name]["rows"])[:MOST_SHOWN]:
            for rate in ("false_positive_rate", "false_negative_rate"):
                cells = [_interval(figures[model]["groups"][group][rate]) for model in models]
                rows.append((f"{group} ({groups[group]['rows']} rows): {title_of(rate)}", cells))
    return rows


def _deep_rows(deep: dict[str, Any], models: int) -> Rows:
    """The deep results of which the first three models have one figure each."""
    rows: dict[str, list[float]] = {}
    if deep["probes"]:
        for kind in ("linear", "mlp", "control"):
            rows[f"probe of the head's input: {kind}"] = [blocks["head"][kind] for blocks in deep["probes"].values()]
    for kind in next(iter(deep["relearning"].values()))["curve"]:
        rows[f"bias after relearning: {kind}"] = [r["curve"][kind][-1][1] for r in deep["relearning"].values()]
    for kind, row in deep["compression"].items():
        rows[f"bias, {kind}"] = [r["bias"] for r in row.values()]
    if "rmia" in deep:
        rows["RMIA: AUC"] = [r["auc"] for r in deep["rmia"].values()]
    return [(name, [f"{value:.3f}" for value in values[:models]]) for name, values in rows.items()]
