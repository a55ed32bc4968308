"""The sets of a run: checked, fingerprinted and encoded in one place, before the first step."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from .checks import (
    check_one_set,
    check_overlap,
    comparable,
    compared_classes,
    one_label,
    removed_classes,
    unretained_classes,
)
from .columns import label_column
from .fingerprints import fingerprint_of, row_hashes
from .labels import model_names, transform_of, with_label_vectors
from .pairing import sample_indices
from .reading import Reader, check_inputs
from .streams import StreamFolder


@dataclass
class UnlearningSets:
    """What a run learns from.

    Attributes:
        forget, retain, calibration: encoded rows; the last two may be None.
        evaluation: encoded rows, a dictionary of such sets, or None.
        fingerprints: by set, of the rows as they were given.
        removed_classes: the classes of the forget set, if none of them is in the retained data.
        comparable: numbers of the retained rows that the forget rows are compared with, ``[n]``; see `checks.comparable`.
        compared_classes: where tokens are labelled, the classes of the tokens that are compared; see `checks.compared_classes`.
        one_label: whether all forget rows have the same label.
        reader: of further sets of the same data.
    """

    forget: datasets.Dataset
    retain: datasets.Dataset | None
    calibration: datasets.Dataset | None
    evaluation: datasets.Dataset | dict | None
    fingerprints: dict[str, str]
    removed_classes: list[int]
    comparable: np.ndarray
    compared_classes: list[int]
    one_label: bool
    reader: Reader

    @classmethod
    def prepare(
        cls,
        forget_dataset,
        retain_dataset,
        calibration_dataset,
        eval_dataset,
        *,
        read: Reader,
        check_labels: Callable[[str, Any], np.ndarray],
        streams: StreamFolder,
    ) -> "UnlearningSets":
        """Check and encode every set of a run.

        Args:
            read: encodes raw pictures and texts, and gives labels as the model's.
            check_labels: gives all labels of an encoded set, or refuses it: ``(name, dataset) -> [n, ...]``.
            streams: where streams are written to, and read from as long as it is there.

        Raises:
            ValueError: a set is missing or empty, shares rows with another or does not fit the model, or a stream breaks off.
        """
        if forget_dataset is None:
            raise ValueError("UIBTrainer needs a forget_dataset: the examples that the model is to unlearn.")
        given = {"forget": forget_dataset, "retain": retain_dataset, "calibration": calibration_dataset}
        hashes, labels, encoded = {}, {}, dict.fromkeys(given)
        stored = {}
        for name, dataset in given.items():
            if dataset is not None:
                check_one_set(f"{name}_dataset", dataset)
                stored[name] = streams.stored(dataset, f"{name}_dataset")
        read = read.of_sets(stored.values())
        for name, dataset in stored.items():
            if len(dataset) == 0:
                raise ValueError(f"{name}_dataset has no examples; check the condition that selects it.")
            if isinstance(dataset, datasets.Dataset) and transform_of(dataset) is None:
                label_column(with_label_vectors(dataset, read.config, read.columns), read.columns)
            encoded[name] = read(dataset, f"{name}_dataset")
            read = read.settled(dataset)
            labels[name] = check_labels(f"{name}_dataset", encoded[name])
            hashes[f"{name}_dataset"] = row_hashes(dataset)
        check_overlap(hashes)
        evaluation = prepare_evaluation(eval_dataset, read, check_labels)
        for name, dataset in encoded.items():
            check_inputs(f"{name}_dataset", dataset, read)
        removed = removed_classes(labels["forget"], labels.get("retain"))
        if not removed and (gone := unretained_classes(labels["forget"], labels.get("retain"))):
            names = model_names(read.config)
            listed = ", ".join(names.get(label, str(label)) for label in gone[:10])
            more = f" (or of {len(gone) - 10} more)" if len(gone) > 10 else ""
            warnings.warn(
                f"Forget rows have the label {listed}{more}, and no retained row has: the model may give it up like a class that "
                "is to go. Retain some of its rows.",
                stacklevel=3,
            )
        return cls(
            **encoded,
            evaluation=evaluation,
            fingerprints={name: fingerprint_of(rows) for name, rows in hashes.items()},
            removed_classes=removed,
            comparable=comparable(labels["forget"], labels.get("retain")),
            compared_classes=compared_classes(labels["forget"], labels.get("retain")),
            one_label=one_label(labels["forget"]),
            reader=read,
        )

    def hold_out(self, fraction: float, seed: int) -> set[int]:
        """Retained rows that stand in for a calibration set while the prior acts; a warning says what that costs."""
        if self.retain is None:
            return set()
        count = int(len(self.retain) * fraction)
        if count < 2:
            warnings.warn(
                f"No calibration_dataset, and {len(self.retain)} retained examples are too few to hold some out: the prior gets no "
                "margins of unseen rows. Give a calibration_dataset.",
                stacklevel=3,
            )
            return set()
        warnings.warn(
            f"No calibration_dataset: {count} retained examples are held out for it until the prior's last step. The checkpoint "
            "has fitted them, so a systematic pattern is forgotten, but random rows hardly: for those give data it never saw.",
            stacklevel=3,
        )
        return set(sample_indices(len(self.retain), count, seed))


def prepare_evaluation(eval_dataset, read: Reader, check_labels: Callable[[str, Any], np.ndarray]):
    """The encoded evaluation set, or a dictionary of them; each has labels that the model knows.

    Raises:
        ValueError: one does not fit the model.
    """
    if eval_dataset is None:
        return None
    sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    encoded = {}
    for name, dataset in sets.items():
        what = f"eval_dataset '{name}'" if name else "eval_dataset"
        check_one_set(what, dataset)
        encoded[name] = read(dataset, what)
        if isinstance(dataset, datasets.Dataset):  # of other kinds one row could cost as much as a step
            check_labels(what, encoded[name])
            check_inputs(what, encoded[name], read)
    return encoded if isinstance(eval_dataset, dict) else encoded[""]
