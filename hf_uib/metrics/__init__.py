"""`evaluate.Metric` modules, usable alone and offline."""

from .bias_correlation import BiasCorrelation
from .worst_group_accuracy import WorstGroupAccuracy

__all__ = ["BiasCorrelation", "WorstGroupAccuracy"]
