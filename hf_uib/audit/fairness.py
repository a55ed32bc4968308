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
        of false alarms' and misses'. Hardt et al. (2016), arXiv 1610.02413; as in fairlearn. Examples are resampled; the samples
        of a difference are centred on its value, for resampling inflates a maximum. The interval of a rate is the wider of
        resampling's and Wilson's. A rate of a group without rows of that class is NaN.
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
        figures["cramers_v"] = resampler.cramers_v(predictions, attribute.codes).as_dict()
    if context.positive is None:
        return figures
    predicted, actual = (x == context.positive[0] for x in (predictions, context.outputs[name]["test"].labels))
    names = _names(attribute)
    members = attribute.groups[:, None] == np.asarray(names)  # [n, groups]
    sizes = members.sum(0).tolist()
    large = np.asarray(sizes) >= context.thresholds.min_group_rows
    groups: dict[str, dict] = {group: {"rows": size} for group, size in zip(names, sizes, strict=True)}
    spreads = {}
    for rate, of in RATES.items():
        counted = members if of is None else members & (actual == of)[:, None]
        wrong = counted & (~predicted if of else predicted)[:, None]
        estimates = resampler.ratios(wrong, counted)
        for group, estimate, rows in zip(names, estimates, counted.T, strict=True):
            low, high = resampler.wilson(estimate.value, rows)
            ends = {"low": float(np.fmin(low, estimate.low)), "high": float(np.fmax(high, estimate.high))}
            groups[group][rate] = {"value": estimate.value} | ends
        spreads[rate] = _largest_difference([e for e, enough in zip(estimates, large, strict=True) if enough])
    parity, alarms, misses = spreads.values()
    odds = Estimate(float(np.maximum(alarms.value, misses.value)), np.maximum(alarms.samples, misses.samples))
    for key, spread in zip(DIFFERENCES, (parity, odds, alarms, misses), strict=True):
        figures[key] = _centred(spread).as_dict()
    return figures | {"groups": groups}


def _largest_difference(estimates: list[Estimate]) -> Estimate:
    """Between the rates of two groups; NaN with fewer than two groups that have the rate."""
    known = [estimate for estimate in estimates if np.isfinite(estimate.value)]
    if len(known) < 2:
        return Estimate(float("nan"), np.full(1, np.nan))
    values, samples = [e.value for e in known], np.stack([e.samples for e in known])
    drawn = np.isfinite(samples).sum(0) > 1  # else a resample has rows of that class in one group at most
    differences = np.where(drawn, np.fmax.reduce(samples) - np.fmin.reduce(samples), np.nan)
    return Estimate(max(values) - min(values), differences)


def _centred(difference: Estimate) -> Estimate:
    if not np.isfinite(difference.samples).any():
        return difference
    samples = difference.samples - np.nanmean(difference.samples) + difference.value
    return Estimate(difference.value, samples.clip(0, 1))


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
            missing += _without_rows(context, attribute)
    return missing


def _without_rows(context: AuditContext, attribute: BiasAttribute) -> list[str]:
    """Groups that are in no difference, or not in all."""
    assert context.positive is not None
    positive, label = context.positive
    actual, least = context.outputs["reference"]["test"].labels == positive, context.thresholds.min_group_rows
    members = {name: attribute.groups == name for name in _names(attribute)}
    few = [f"'{name}' ({rows.sum()})" for name, rows in members.items() if rows.sum() < least]
    sentences = [(few, f"differences to groups of fewer than {least} test rows")]
    for words, of in (("false alarms", False), ("misses", True)):
        where = f"of the class '{label}'" if of else f"of another class than '{label}'"
        never = [f"'{name}'" for name, rows in members.items() if not (actual[rows] == of).any()]
        sentences.append((never, f"{words} of groups without a test row {where}"))
    return [f"{sentence}: {_listed(names)}" for names, sentence in sentences if names]


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
