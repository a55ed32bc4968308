"""Metrics: plain functions of arrays, `METRICS` (the rows of the tables), and the functions as `evaluate.Metric` modules.

The modules (`BiasCorrelation`, ...) can be used alone and offline; `evaluate` is imported when the first of them is asked for.
"""

from typing import TYPE_CHECKING, Any

from .bias import attribute_classes, bias_correlation
from .counterfactual import counterfactual_gap, flip_rate
from .groups import worst_group_accuracy
from .klom import klom
from .membership import attack, membership_attack
from .strata import memorisation_strata
from .table import METRICS, Metric, MetricInputs, bias_row, text_table
from .unlearning import unlearning_gap

if TYPE_CHECKING:
    from .evaluate_modules import (
        BiasCorrelation,
        CounterfactualGap,
        Klom,
        MembershipAttack,
        MemorisationStrata,
        UnlearningGap,
        WorstGroupAccuracy,
    )

__all__ = [
    "METRICS",
    "BiasCorrelation",
    "CounterfactualGap",
    "Klom",
    "MembershipAttack",
    "MemorisationStrata",
    "Metric",
    "MetricInputs",
    "UnlearningGap",
    "WorstGroupAccuracy",
    "attack",
    "attribute_classes",
    "bias_correlation",
    "bias_row",
    "counterfactual_gap",
    "flip_rate",
    "klom",
    "membership_attack",
    "memorisation_strata",
    "text_table",
    "unlearning_gap",
    "worst_group_accuracy",
]
_EVALUATE_MODULES = {
    "BiasCorrelation",
    "CounterfactualGap",
    "Klom",
    "MembershipAttack",
    "MemorisationStrata",
    "UnlearningGap",
    "WorstGroupAccuracy",
}


def __getattr__(name: str) -> Any:
    if name in _EVALUATE_MODULES:
        from . import evaluate_modules

        return getattr(evaluate_modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
