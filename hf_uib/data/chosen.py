"""Which rows are to be forgotten and which stay: by condition, by a list of rows, or by a score for each."""

import json
import os

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset

from ..serialization import MARK
from .fingerprints import ordered_fingerprint
from .sources import load_splits, split_forget


def choose_rows(
    train: Dataset, split: str, where: list[str], rows: str | None, scores: str | None, top: int | None
) -> tuple[Dataset, Dataset]:
    """The rows of a split to forget, and those to retain.

    Args:
        where: conditions of `split_forget`; rows: file of `listed_rows`; scores, top: file and count of `scored_rows`. One of the
            three is given.

    Raises:
        ValueError: none of them is, or more than one.
    """
    if bool(where) + (rows is not None) + (scores is not None) != 1:
        raise ValueError(
            "Say which rows are to be forgotten in one way: --forget_where, --forget_rows, or --forget_scores."
        )
    if (scores is None) != (top is None):
        raise ValueError("--forget_scores FILE and --forget_top N go together; give both.")
    if rows is not None:
        forget, retain = listed_rows(rows, train)
    elif scores is not None and top is not None:
        forget, retain = scored_rows(scores, train, top)
    else:
        return split_forget(train, where, split)
    return train.select(forget), train.select(retain)


def listed_rows(path: str, train: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows with ``set`` = ``forget`` and = ``retain`` in a file that `Discovery.save` wrote; others stay out.

    Raises:
        ValueError: it is no such file, belongs to another data set, or has no row to forget.
    """
    if not os.path.isfile(path):
        raise ValueError(f"There is no file {path}; hf-uib discover writes it.")
    try:
        table = pq.read_table(path)
        origin = json.loads((table.schema.metadata or {})[MARK.encode()])
        numbers, sets = (table.column(name).to_numpy() for name in ("row", "set"))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is no rows.parquet of hf-uib discover; for scores from elsewhere take --forget_scores."
        ) from error
    if origin["rows"] != len(train) or origin["fingerprint"] != ordered_fingerprint(train):
        raise ValueError(
            f"{path} belongs to another data set or split, or its rows have changed; run hf-uib discover on this one."
        )
    forget, retain = (np.sort(numbers[sets == name]) for name in ("forget", "retain"))
    if not len(forget):
        scored = (
            f" Its scores can be taken: --forget_scores {path} --forget_top N." if len(numbers) == len(train) else ""
        )
        raise ValueError(f"{path} has no row to forget: nothing was found.{scored}")
    return forget, retain


def scored_rows(path: str, train: Dataset, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the ``top`` rows with the highest scores, and of the others.

    Args:
        path: CSV, JSON or Parquet file with a score for each row: its column ``score``, or its only one. They are in the rows'
            order, or there is a column ``row`` with their numbers.

    Raises:
        ValueError: it cannot be read, has not a finite number for each row, or ``top`` is none of 1 to all rows but one.
    """
    if not os.path.isfile(path):
        raise ValueError(f"There is no file {path}; --forget_scores takes a CSV, JSON or Parquet file.")
    table = load_splits(path)["train"]
    name = "score" if "score" in table.column_names else table.column_names[0]
    if name != "score" and len(table.column_names) > 1:
        raise ValueError(f"{path} has columns {', '.join(table.column_names)}; call the one with the scores `score`.")
    try:
        scores = np.asarray(table.with_format(None)[name][:], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Column `{name}` of {path} holds no numbers; give a score for each row.") from error
    if scores.shape != (len(train),):
        raise ValueError(
            f"{path} has {len(scores)} scores, the split {len(train)} rows; give one for each row, in their order."
        )
    if not np.isfinite(scores).all():
        raise ValueError(
            f"Score {int(np.flatnonzero(~np.isfinite(scores))[0])} of {path} is not finite; give a number for each row."
        )
    if not 0 < top < len(train):
        raise ValueError(f"--forget_top is {top}; give a number from 1 to {len(train) - 1}.")
    if scores.min() == scores.max():
        raise ValueError(
            f"All scores of {path} are {scores[0]:g}, which puts no row before another; give other scores."
        )
    if "row" in table.column_names:
        numbers = np.asarray(table.with_format(None)["row"][:])
        if not np.array_equal(np.sort(numbers), np.arange(len(train))):
            raise ValueError(
                f"Column `row` of {path} does not hold each number from 0 to {len(train) - 1} once; mend it, or leave it out where "
                "the scores are in the rows' order."
            )
        scores = scores[np.argsort(numbers)]
    order = np.argsort(-scores, kind="stable")
    return np.sort(order[:top]), np.sort(order[top:])
