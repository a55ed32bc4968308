"""Fairness by group in the field's measures: predicted positives, false alarms, misses, and their differences between groups."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .context import AuditContext, BiasAttribute
from .statistics import Estimate

RATES = {  # words and fairlearn's names; of each: the class of the rows that it is a rate of (None: all of them)
    "selection_rate": None,
    "false_positive_rate": False,
    "false_negative_rate": True,
}
DIFFERENCES = (
    "demographic_parity_difference",
    "equalized_odds_difference",
    "false_positive_rate_difference",
    "false_negative_rate_difference",
)
MOST_GROUPS = 50  # of an attribute: more are no groups of people but ids


@dataclass(frozen=True)
class AuditedRows:
    """What the audited models said of the test rows; kept in memory and never written.

    Attributes:
        predictions: ``[n]`` classes, by model.
        labels: ``[n]`` classes.
        attributes: ``[n]`` values of each bias column, None where a row has none.
        positive: the class that counts as 1; None where there is none.
    """

    predictions: dict[str, np.ndarray]
    labels: np.ndarray
    attributes: dict[str, np.ndarray]
    positive: int | None


# ---- The audit's own figures ----


def fairness_of(context: AuditContext) -> dict[str, dict[str, dict]]:
    """Figures by bias column (and by their crossing) and model.

    Returns:
        ``cramers_v`` of several columns, and where there is a positive class `DIFFERENCES`, each with ``value``, ``low`` and
        ``high`` (95%), and ``groups``: of each its ``rows`` and `RATES`. Empty for one column without a positive class.

        Differences are the largest between two groups of at least ``thresholds.min_group_rows`` rows; equalised odds is the larger
        of false alarms' and misses'. Hardt et al. (2016), arXiv 1610.02413; as in fairlearn. Examples are resampled; the interval
        of a rate is the wider of resampling's and Wilson's, that of a difference is described in `_Difference`. A rate of a group
        without rows of that class is NaN.
    """
    if context.positive is None and len(context.attributes) < 2:
        return {}
    columns = [name for name, attribute in context.attributes.items() if _measurable(attribute)]
    return {column: {name: _figures(context, name, column) for name in context.names} for column in columns}


def _measurable(attribute: BiasAttribute) -> bool:
    return len(_names(attribute)) <= MOST_GROUPS


def _names(attribute: BiasAttribute) -> list[str]:
    return np.unique(attribute.groups[attribute.groups != ""]).tolist()


def _figures(context: AuditContext, name: str, column: str) -> dict[str, Any]:
    attribute, resampler = context.attributes[column], context.resamplers["test"]
    predictions = context.outputs[name]["test"].predictions
    figures: dict[str, Any] = {}
    if len(context.attributes) > 1:  # of the only one it stands among the test set's figures
        figures["cramers_v"] = resampler.cramers_v(predictions, attribute.codes, attribute.concerned).as_dict()
    if context.positive is None:
        return figures
    predicted, actual = (x == context.positive[0] for x in (predictions, context.outputs[name]["test"].labels))
    names = _names(attribute)
    members = attribute.groups[:, None] == np.asarray(names)  # [n, groups]
    sizes = [context.rows_in(group) for group in members.T]
    large = np.asarray(sizes) >= context.thresholds.min_group_rows
    groups: dict[str, dict] = {group: {"rows": size} for group, size in zip(names, sizes, strict=True)}
    differences: dict[str, _Difference] = {}
    for rate, of in RATES.items():
        counted = members if of is None else members & (actual == of)[:, None]
        wrong = counted & (~predicted if of else predicted)[:, None]
        estimates = resampler.ratios(wrong, counted)
        for group, estimate, rows in zip(names, estimates, counted.T, strict=True):
            low, high = resampler.wilson(estimate.value, rows)
            ends = {"low": float(np.fmin(low, estimate.low)), "high": float(np.fmax(high, estimate.high))}
            groups[group][rate] = {"value": estimate.value} | ends
        judged = [(e, groups[g][rate]) for g, e, enough in zip(names, estimates, large, strict=True) if enough]
        differences[rate] = _largest_difference(judged)
    parity, alarms, misses = differences.values()
    for key, difference in zip(DIFFERENCES, (parity, _larger(alarms, misses), alarms, misses), strict=True):
        figures[key] = difference.as_dict()
    return figures | {"groups": groups}


@dataclass
class _Difference:
    """The largest difference between the rates of two groups.

    Attributes:
        value: NaN with fewer than two groups that have the rate.
        errors: ``[draws]`` the most that any difference of two groups moved in a resample.
        most: the largest difference that the groups' own intervals allow.
    """

    value: float
    errors: np.ndarray
    most: float

    def as_dict(self) -> dict[str, float]:
        """The value, plus and minus the 95% quantile of the errors; a percentile interval would miss a true difference of 0, for a
        maximum only grows by resampling. Where no resample differs, as without one wrong row, `most` is the upper end."""
        if np.isnan(self.value):
            return dict.fromkeys(("value", "low", "high"), float("nan"))
        margin = float(np.nanquantile(self.errors, 0.95)) or self.most - self.value
        return {"value": self.value, "low": max(self.value - margin, 0.0), "high": min(self.value + margin, 1.0)}


def _largest_difference(rates: list[tuple[Estimate, dict[str, float]]]) -> _Difference:
    """Of the groups' rates and their intervals."""
    known = [(estimate, cell) for estimate, cell in rates if np.isfinite(estimate.value)]
    if len(known) < 2:
        return _Difference(float("nan"), np.full(1, np.nan), float("nan"))
    values, moved = [e.value for e, _ in known], np.stack([e.samples - e.value for e, _ in known])
    most = max(cell["high"] for _, cell in known) - min(cell["low"] for _, cell in known)
    return _Difference(max(values) - min(values), np.fmax.reduce(moved) - np.fmin.reduce(moved), most)


def _larger(first: _Difference, second: _Difference) -> _Difference:
    """NaN if one of them is."""
    return _Difference(
        float(np.maximum(first.value, second.value)),
        np.fmax(first.errors, second.errors),
        max(first.most, second.most),
    )


def without_small_groups(fairness: dict[str, dict[str, dict]], least: int) -> dict[str, dict[str, dict]]:
    """`fairness_of` as it is written and published: without groups so small that their rates would tell of single rows."""

    def public(figures: dict[str, Any]) -> dict[str, Any]:
        groups = {name: group for name, group in figures["groups"].items() if group["rows"] >= least}
        return figures | {"groups": groups}

    return {
        column: {model: public(figures) if "groups" in figures else figures for model, figures in models.items()}
        for column, models in fairness.items()
    }


def not_estimable(context: AuditContext) -> list[str]:
    """What of `fairness_of` cannot be had, in words."""
    missing = []
    if context.attributes and context.positive is None:
        missing.append("false alarms and misses by group (more than two classes: give positive_label)")
    for column, attribute in context.attributes.items():
        if not _measurable(attribute):
            count = len(_names(attribute))
            missing.append(f"false alarms and misses by {column} ({count} groups; at most {MOST_GROUPS} are measured)")
        elif context.positive is not None:
            missing += _without_rows(context, column)
    return missing


def _without_rows(context: AuditContext, column: str) -> list[str]:
    """Groups that are in no difference, or not in all. Small ones are not named: these sentences are published."""
    attribute = context.attributes[column]
    assert context.positive is not None
    positive, label = context.positive
    actual, least = context.outputs["reference"]["test"].labels == positive, context.thresholds.min_group_rows
    members = {name: attribute.groups == name for name in _names(attribute)}
    large = {name: rows for name, rows in members.items() if context.rows_in(rows) >= least}
    if len(large) < 2:
        return [f"differences by {column} (fewer than two groups of {least} test rows)"]
    few = len(members) - len(large)
    missing = [f"differences to small groups ({few} by {column}, of fewer than {least} test rows)"] if few else []
    for words, of in (("false alarms", False), ("misses", True)):
        where = f"of the class '{label}'" if of else f"of another class than '{label}'"
        never = [f"'{name}'" for name, rows in large.items() if not (actual[rows] == of).any()]
        missing += [f"{words} of groups without a test row {where}: {_listed(never)}"] if never else []
    return missing


def _listed(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- fairlearn ----


def audited_rows(context: AuditContext) -> AuditedRows:
    """What `metric_frame` needs."""
    columns = [
        name for name in context.attributes if len(context.attributes) == 1 or name != list(context.attributes)[-1]
    ]
    attributes = {}
    for name in columns:
        groups = context.attributes[name].groups
        attributes[name] = np.asarray([group[len(name) + 1 :] if group else None for group in groups], dtype=object)
    return AuditedRows(
        {name: context.outputs[name]["test"].predictions for name in context.names},
        context.outputs["reference"]["test"].labels,
        attributes,
        None if context.positive is None else context.positive[0],
    )


def metric_frame(rows: AuditedRows, bias_column: str | Sequence[str] | None, model: str) -> Any:
    """See `AuditReport.metric_frame`."""
    columns = [bias_column] if isinstance(bias_column, str) else list(bias_column or rows.attributes)
    for name, known, setting in (
        *((c, rows.attributes, "bias_column") for c in columns),
        (model, rows.predictions, "model"),
    ):
        if name not in known:
            raise ValueError(f"{setting} '{name}' is not in this audit; it has {', '.join(known) or 'none'}.")
    if not columns:
        raise ValueError("This audit has no bias_column; give audit one.")
    try:
        from fairlearn import metrics
    except ImportError as error:
        raise ImportError('metric_frame needs fairlearn: pip install "fairlearn>=0.15"') from error
    there = np.all([[value is not None for value in rows.attributes[name]] for name in columns], axis=0)
    if not there.any():
        raise ValueError(f"No test row has a value of {', '.join(columns)}.")
    labels, predictions = rows.labels[there], rows.predictions[model][there]
    groups = {name: rows.attributes[name][there].astype(str) for name in columns}
    figures: dict[str, Any] = {"count": metrics.count, "accuracy": _accuracy}
    if rows.positive is not None:
        labels, predictions = ((x == rows.positive).astype(int) for x in (labels, predictions))
        figures |= {rate: getattr(metrics, rate) for rate in RATES}
    frame = metrics.MetricFrame(metrics=figures, y_true=labels, y_pred=predictions, sensitive_features=groups)
    if rows.positive is not None:
        _warn_of_zeros(labels, groups)
    return frame


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def _warn_of_zeros(labels: np.ndarray, groups: dict[str, np.ndarray]) -> None:
    """fairlearn calls a rate over no rows 0."""
    names = np.asarray(
        [", ".join(f"{k}={v}" for k, v in zip(groups, row, strict=True)) for row in zip(*groups.values(), strict=True)]
    )
    for of, words in ((0, "false positive"), (1, "false negative")):
        never = [f"'{name}'" for name in np.unique(names) if not (labels[names == name] == of).any()]
        if never:
            warnings.warn(
                f"The {words} rate of {_listed(never)} is over no row; fairlearn gives 0 for it.", stacklevel=4
            )
