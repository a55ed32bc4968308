"""Old place of these names, for call sites that are merged from other branches; goes once none is left."""

from .bias import attribute_classes
from .counterfactual import flip_rate
from .membership import attack
from .table import METRICS, bias_row, text_table

__all__ = ["COLUMNS", "attack", "attribute_classes", "bias_row", "flip_rate", "text_table"]
COLUMNS = {key: (metric.title, metric.direction) for key, metric in METRICS.items()}
