"""Checks of the data before the first step."""

from collections.abc import Mapping
from itertools import combinations

import datasets
import numpy as np
from tqdm.auto import tqdm

from .columns import rows_refused
from .fingerprints import rows_in_common
from .labels import IGNORED, labels_of


def check_one_set(name: str, dataset) -> None:
    """Refuse what is no set of rows: the name of one, a dictionary of splits, a table of another library, rows without columns."""
    if isinstance(dataset, (str, dict)) or hasattr(dataset, "iloc"):
        said = ": datasets.Dataset.from_pandas(...)" if hasattr(dataset, "iloc") else ", a split of a data set"
        raise ValueError(f"{name} is a {type(dataset).__name__}; give one set of rows{said}.")
    if isinstance(dataset, datasets.Dataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return
    if len(dataset) and not isinstance(row := dataset[0], Mapping):
        raise ValueError(rows_refused(name, row))


def of_tokens(labels: np.ndarray) -> bool:
    """Whether labels of a set are those of tokens, as `check_token_labels` gives them: ``[n, classes]`` booleans."""
    return labels.dtype == bool and labels.ndim == 2


def classes_of(labels: np.ndarray) -> set[int] | None:
    """The classes that occur in a set; None where a row has several labels.

    Args:
        labels: ``[n]`` class ids, or ``[n, classes]`` booleans of a set whose tokens are labelled (`check_token_labels`).
    """
    if of_tokens(labels):
        return set(np.flatnonzero(labels.any(0)).tolist())
    return set(labels.tolist()) if labels.ndim == 1 else None


def unretained_classes(forget_labels: np.ndarray, retain_labels: np.ndarray | None) -> list[int]:
    """The classes of the forget set that no retained row has."""
    forgotten, kept = classes_of(forget_labels), None if retain_labels is None else classes_of(retain_labels)
    return [] if forgotten is None or kept is None else sorted(forgotten - kept)


def removed_classes(forget_labels: np.ndarray, retain_labels: np.ndarray | None) -> list[int]:
    """The classes of the forget set, if none of them occurs in the retained data: whole classes are to go. Else none."""
    gone = unretained_classes(forget_labels, retain_labels)
    return gone if set(gone) == classes_of(forget_labels) else []


def compared_classes(forget_labels: np.ndarray, retain_labels: np.ndarray | None) -> list[int]:
    """Where tokens are labelled: the classes of the forget set's tokens that retained tokens have too. Tokens are compared with
    those of the same classes, for a forget set may name some words of a row alone. Empty: no token is left out."""
    if retain_labels is None or not of_tokens(retain_labels):
        return []
    return np.flatnonzero(forget_labels.any(0) & retain_labels.any(0)).tolist()


def one_label(labels: np.ndarray) -> bool:
    """Whether all rows of a set (where tokens are labelled: all tokens) have the same label."""
    if of_tokens(labels):
        return int(labels.any(0).sum()) == 1
    return len(np.unique(labels, axis=0)) == 1


def comparable(forget_labels: np.ndarray, retain_labels: np.ndarray | None) -> np.ndarray:
    """Numbers of the retained rows that the forget rows are compared with, ``[n]``: those with a label that occurs in the forget
    set, where it has half of the retained rows' labels at most; all rows where it has more of them, or none.

    Against rows of other labels the contrast of a set of one label would hold what tells the labels apart, not what tells the sets
    apart. A set of most labels lacks some because of the pattern itself (an older scheme that did not have them, say).
    Where tokens are labelled: the rows with a token of the `compared_classes`.
    """
    if retain_labels is None:
        return np.arange(0)
    everything = np.arange(len(retain_labels))
    if of_tokens(retain_labels):
        classes = compared_classes(forget_labels, retain_labels)
        return np.flatnonzero(retain_labels[:, classes].any(1)) if classes else everything
    if retain_labels.ndim != 1:
        return everything
    shared = np.isin(retain_labels, forget_labels)
    few = len(np.unique(retain_labels[shared])) <= len(np.unique(retain_labels)) / 2
    return np.flatnonzero(shared) if few and shared.any() else everything


def check_labels(name: str, dataset, num_labels: int) -> np.ndarray:
    """All labels, ``[n]``; refuses those that are no class ids of the model. ``name`` is what the message calls the set."""
    labels = _some_labels(name, dataset)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"The labels of {name} are not integers; encode them as class ids (ClassLabel).")
    if labels.min() < 0 or labels.max() >= num_labels:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(
            f"{name} has label {wrong}, outside the model's {num_labels} classes; map labels to 0..{num_labels - 1}."
        )
    return labels


def check_label_vectors(name: str, dataset, num_labels: int) -> np.ndarray:
    """All label vectors, ``[n, num_labels]`` of 0 and 1, -1 where none is given (-1 or NaN); refuses others."""
    labels = _some_labels(name, dataset)
    if labels.dtype.kind not in "iufb" or labels.ndim != 2 or labels.shape[1] != num_labels:
        found = f"vectors of {labels.shape[1]}" if labels.ndim == 2 else "no vectors of one length"
        raise ValueError(
            f"The labels of {name} are {found}; a model with problem_type multi_label_classification and {num_labels} labels "
            f"takes {num_labels} numbers a row, 0 or 1 (-1: not given)."
        )
    labels = np.where(np.isnan(labels.astype(float)), -1, labels)
    if not np.isin(labels, (-1, 0, 1)).all():
        wrong = labels[~np.isin(labels, (-1, 0, 1))][0]
        raise ValueError(f"{name} has label value {wrong:g}; give 0 or 1, or -1 for a label that is not given.")
    empty = np.flatnonzero((labels < 0).all(1))
    if len(empty):
        raise ValueError(f"Row {empty[0]} of {name} has none of its labels given; drop it.")
    return labels


def check_token_labels(name: str, dataset, num_labels: int) -> np.ndarray:
    """Which classes the labelled tokens of each row have, ``[n, num_labels]`` booleans; refuses labels that are no lists of class
    ids as long as the row (-100: no label), and rows without a labelled token."""
    found = np.zeros((len(dataset), num_labels), dtype=bool)
    if len(dataset) == 0:
        raise ValueError(f"{name} has no examples; check the condition that selects it.")
    for i, (ids, labels) in enumerate(
        tqdm(_token_rows(dataset), "Checking labels", len(dataset), delay=2, leave=False)
    ):
        if np.ndim(labels) != 1 or labels.dtype.kind not in "iu":
            raise ValueError(
                f"The labels of {name} are not lists of integers; a model that labels tokens takes a class id for each token."
            )
        if ids is not None and len(ids) != len(labels):
            raise ValueError(f"Row {i} of {name} has {len(labels)} labels for {len(ids)} tokens; give one for each.")
        labels = labels[labels != IGNORED]
        if not len(labels):
            raise ValueError(f"Row {i} of {name} has no labelled token; drop it (or raise max_length, if it was cut).")
        if labels.min() < 0 or labels.max() >= num_labels:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise ValueError(
                f"{name} has label {wrong}, outside the model's {num_labels} classes; map labels to 0..{num_labels - 1}, and to "
                f"{IGNORED} where a token has none."
            )
        found[i, labels] = True
    return found


def _token_rows(dataset):
    """Tokens, if they are there, and labels of each encoded row."""
    if isinstance(dataset, datasets.Dataset):
        batches = dataset.iter(256)
    else:
        batches = ({key: [value] for key, value in dataset[i].items()} for i in range(len(dataset)))
    for batch in batches:
        labels = batch["labels"] if "labels" in batch else batch["label"]
        for ids, row in zip(batch.get("input_ids", [None] * len(labels)), labels, strict=True):
            yield ids, np.asarray(row)


def _some_labels(name: str, dataset) -> np.ndarray:
    """All labels of a set that has rows."""
    labels = labels_of(dataset)
    if len(labels) == 0:
        raise ValueError(f"{name} has no examples; check the condition that selects it.")
    return labels


def check_overlap(hashes: dict[str, np.ndarray]) -> None:
    """Refuse rows that are in two sets.

    Args:
        hashes: `row_hashes` of each set, by name.

    Raises:
        ValueError: two sets share rows, by content.
    """
    for first, second in combinations(hashes, 2):
        common = rows_in_common(hashes[first], hashes[second])
        if common:
            raise ValueError(f"{common} rows of {first} are in {second} too; take them out of one of the two.")
