"""Checks of the data before the first step."""

from collections.abc import Callable

import numpy as np

from .fingerprints import fingerprint_of, row_hashes, rows_in_common
from .reading import labels_of


def removed_classes(forget_labels: np.ndarray, retain_labels: np.ndarray | None) -> list[int]:
    """The classes of the forget set, if none of them occurs in the retained data: whole classes are to go. Else none."""
    if retain_labels is None:
        return []
    forgotten, kept = set(forget_labels.tolist()), set(retain_labels.tolist())
    return [] if forgotten & kept else sorted(forgotten)


def check_labels(name: str, dataset, num_labels: int) -> np.ndarray:
    """All labels, ``[n]``; refuses those that are no class ids of the model. ``name`` is what the message calls the set."""
    labels = labels_of(dataset)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"The labels of {name} are not integers; encode them as class ids (ClassLabel).")
    if labels.min() < 0 or labels.max() >= num_labels:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(
            f"{name} has label {wrong}, outside the model's {num_labels} classes; map labels to 0..{num_labels - 1}."
        )
    return labels


def check_inputs(name: str, dataset, main_input: str) -> None:
    """Refuse rows that the model cannot take; ``name`` is what the message calls the set."""
    if dataset is not None and not {main_input, "inputs_embeds"} & set(dataset[0]):
        raise ValueError(
            f"{name} has no {main_input} among {', '.join(dataset[0])}; encode it, or give the processing_class of this model."
        )


def check_sets(
    forget_dataset, retain_dataset, check_labels: Callable[[str, object], np.ndarray], calibration_dataset=None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The labels and the fingerprint of every set that is given, by name; refuses what cannot be unlearned.

    Args:
        check_labels: gives all labels of a set, or refuses it: ``(name, dataset) -> [n, ...]``.

    Raises:
        ValueError: an empty set, rows that are in two sets, or a label outside the model's classes.
    """
    sets = {
        "forget_dataset": forget_dataset,
        "retain_dataset": retain_dataset,
        "calibration_dataset": calibration_dataset,
    }
    labels = {}
    for name, dataset in sets.items():
        if dataset is None:
            continue
        if len(dataset) == 0:
            raise ValueError(f"{name} has no examples; check the condition that selects it.")
        labels[name] = check_labels(name, dataset)
    hashes = {name: row_hashes(sets[name]) for name in labels}
    pairs = (
        ("forget_dataset", "retain_dataset"),
        ("calibration_dataset", "forget_dataset"),
        ("calibration_dataset", "retain_dataset"),
    )
    for first, second in pairs:
        if first in hashes and second in hashes:
            common = rows_in_common(hashes[first], hashes[second])
            if common:
                raise ValueError(f"{common} rows of {first} are in {second} too; take them out of one of the two.")
    return labels, {name: fingerprint_of(rows) for name, rows in hashes.items()}
