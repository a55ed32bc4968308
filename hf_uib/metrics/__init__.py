"""`evaluate.Metric` modules, usable alone and offline."""

from .bias_correlation import BiasCorrelation
from .counterfactual_gap import CounterfactualGap
from .membership_attack import MembershipAttack
from .unlearning_gap import UnlearningGap
from .worst_group_accuracy import WorstGroupAccuracy

__all__ = ["BiasCorrelation", "CounterfactualGap", "MembershipAttack", "UnlearningGap", "WorstGroupAccuracy"]
