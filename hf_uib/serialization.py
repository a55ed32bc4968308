"""JSON that every reader takes: no NaN, no infinity, nothing but plain values. And the mark of our own files."""

import json
import math
from collections.abc import Callable
from typing import Any

MARK = "hf_uib"  # a key of our reports, and the software of our figures


def plain(value: Any, not_finite: Callable[[float], Any] = lambda number: None) -> Any:
    """The value as JSON has it: NumPy's and PyTorch's numbers and arrays as Python's, other objects in words.

    Args:
        not_finite: what NaN and infinities become; None by default.

    >>> plain({"loss": float("nan"), 3: (1, 2.5)})
    {'loss': None, '3': [1, 2.5]}
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return str(getattr(value, "value", value))  # an Enum's
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else not_finite(float(value))
    if isinstance(value, dict):
        name = lambda key: key if isinstance(key, str) else dumps(key)
        return {name(key): plain(entry, not_finite) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry, not_finite) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), not_finite)
    return str(value)


def dumps(value: Any, **settings) -> str:
    """`json.dumps` of the `plain` value."""
    return json.dumps(plain(value), allow_nan=False, **settings)


def is_marked(path: str) -> bool:
    """Whether hf_uib wrote a figure or a report: its PNG, JSON and HTML files say so inside."""
    try:
        if not path.endswith(".png"):
            with open(path, encoding="utf-8") as file:
                return MARK in (json.load(file) if path.endswith(".json") else file.read())
        from PIL import Image

        with Image.open(path) as picture:
            return MARK in str(picture.info.get("Software"))
    except Exception:  # not there, or somebody else's of any kind
        return False
