"""The sets of a run: checked, fingerprinted and encoded in one place, before the first step."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch

from .checks import check_inputs, check_sets, removed_classes
from .pairing import sample_indices
from .reading import encode


@dataclass
class UnlearningSets:
    """What a run learns from.

    Attributes:
        forget, retain, calibration: encoded rows; the last two may be None.
        evaluation: encoded rows, a dictionary of such sets, or None.
        fingerprints: by set, of the rows as they were given.
        removed_classes: the classes of the forget set, if none of them is in the retained data.
    """

    forget: datasets.Dataset
    retain: datasets.Dataset | None
    calibration: datasets.Dataset | None
    evaluation: datasets.Dataset | dict | None
    fingerprints: dict[str, str]
    removed_classes: list[int]

    @classmethod
    def prepare(
        cls,
        forget_dataset,
        retain_dataset,
        calibration_dataset,
        eval_dataset,
        *,
        check_labels: Callable[[str, Any], np.ndarray],
        processing_class,
        main_input: str,
    ) -> "UnlearningSets":
        """Check and encode the sets of a run.

        Args:
            check_labels: gives all labels of a set, or refuses it: ``(name, dataset) -> [n, ...]``.
            processing_class: encodes raw pictures and texts; None leaves them alone.
            main_input: ``model.main_input_name``.

        Raises:
            ValueError: a set is missing, a stream or empty, shares rows with another, or does not fit the model.
        """
        if forget_dataset is None:
            raise ValueError("UIBTrainer needs a forget_dataset: the examples that the model shall unlearn.")
        given = {"forget": forget_dataset, "retain": retain_dataset, "calibration": calibration_dataset}
        for name, dataset in given.items():
            if isinstance(dataset, (torch.utils.data.IterableDataset, datasets.IterableDataset)):
                raise ValueError(
                    f"{name}_dataset is a stream; its rows are sampled and paired, so give a set with a length: "
                    "datasets.Dataset.from_generator writes one to disk and reads it from there, in flat memory."
                )
        labels, fingerprints = check_sets(forget_dataset, retain_dataset, check_labels, calibration_dataset)
        prepare = partial(encode, processing_class=processing_class, main_input=main_input)
        encoded = {name: prepare(dataset) for name, dataset in given.items()}
        for name, dataset in encoded.items():
            check_inputs(f"{name}_dataset", dataset, main_input)
        if isinstance(eval_dataset, dict):
            evaluation = {name: prepare(dataset) for name, dataset in eval_dataset.items()}
        else:
            evaluation = prepare(eval_dataset)
        removed = removed_classes(labels["forget_dataset"], labels.get("retain_dataset"))
        return cls(**encoded, evaluation=evaluation, fingerprints=fingerprints, removed_classes=removed)

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
