"""From a checkpoint and its training data to the rows that teach a shortcut."""

from typing import Any, NamedTuple

import datasets
import numpy as np
from torch import nn

from ..data.columns import Columns, label_column
from ..data.labels import has_labels, labels_of, several_labels, transform_of
from ..data.reading import check_inputs
from ..data.sources import load_processor
from ..inference import reader_of
from ..models import Name, input_kind, labels_tokens, load_classifier, name_of, num_labels_of
from ..processes import processes
from .looks import Look, looks
from .report import FEWEST_SHARE, FULL_MEMBERS, Depth, Discovery
from .trimmed import distance_ratio, mask_p_value, trimmed_margins

FEWEST_ROWS = 100


def discover(
    model: Name | nn.Module,
    train: datasets.Dataset,
    *,
    unseen: datasets.Dataset | None = None,
    processing_class: Any = None,
    columns: Columns | None = None,
    seed: int = 0,
    batch_size: int = 256,
    trust_remote_code: bool = False,
) -> Discovery:
    """Rank the rows of a training set by how much they teach a shortcut; no attribute is labelled.

    A shortcut is what a simple head finds first. The head is a Gaussian for each class on the mean over the tokens of what enters
    the encoder, or of what one of the first half of its blocks gives; or a linear one on the places of a picture, or on the tokens
    that a text has (`looks.looks`). It is fitted across folds, again and again without the rows that it misreads
    (`trimmed.trimmed_margins`). The rows that it still misreads contradict the shortcut, the others teach it. The former are
    retained, with so many of the latter that the shortcut tells as little there as can be. Of all that is looked at `chosen` takes
    one; no attribute and no test row has a say.

    Args:
        model: checkpoint that was trained on the rows: model, folder or Hub id.
        train: its training set, with labels; raw or encoded.
        unseen: rows that the model never saw, such as a test set; labels are not needed. `Discovery.unseen_looks` says which class
            each looks like by the shortcut: that stands for the attribute where nothing labels it.
        processing_class: image processor, feature extractor or tokenizer; by default that of the checkpoint, where it has a name.
        columns: names of columns that are not the usual ones.
        seed: of folds, random masks and the teaching rows that are retained.
        trust_remote_code: see `load_classifier`.

    Raises:
        ValueError: the set is too small, or has one label; the model has no blocks, several labels a row, or labels of tokens.
    """
    given = name_of(model)
    classifier: Any = given
    if isinstance(given, str):
        classifier = load_classifier(given, trust_remote_code=trust_remote_code).to(processes().device)
    if processing_class is None and isinstance(given, str):
        base = getattr(classifier.config, "_name_or_path", None)
        processing_class = load_processor(
            given, base, kind=input_kind(classifier), trust_remote_code=trust_remote_code
        )
    if labels_tokens(classifier):
        raise ValueError("The model labels tokens; discover takes a model of one label a row.")
    if several_labels(classifier.config):
        raise ValueError("The model has several labels a row; discover takes a model of one label a row.")
    if not isinstance(train, datasets.Dataset) or len(train) < FEWEST_ROWS:
        raise ValueError(f"discover needs a datasets.Dataset of {FEWEST_ROWS} rows or more.")
    read = reader_of(classifier, processing_class, columns or Columns())
    encoded = read(train, "train")
    check_inputs("train", encoded, read)
    others_encoded = None
    if unseen is not None:
        if not isinstance(unseen, datasets.Dataset) or not len(unseen):
            raise ValueError(
                "unseen is a datasets.Dataset of one row or more; give a split of a data set, or leave it out."
            )
        others_encoded = read.settled(train)(_without_labels(unseen, read.columns), "unseen")
        check_inputs("unseen", others_encoded, read)
    labels = _labels(encoded, num_labels_of(classifier))
    names, classes = np.unique(labels, return_inverse=True)  # without gaps
    seen: list[Seen] = []
    depths = []
    for name, look in looks(classifier, encoded, others_encoded, processing_class, batch_size).items():
        found = trimmed_margins(look.x, classes, seed, look.margins_of)
        if found is None:
            depths.append(Depth(name, None, None))
            continue
        seen.append(Seen(name, look, *found))
        depths.append(Depth(name, seen[-1].ratio, seen[-1].misread))
    if not seen:
        margins, others, p_value, at = np.zeros(len(labels)), classes, 1.0, None
        unseen_looks = None
    else:
        at, look, margins, others = chosen(seen)
        misread = margins < 0
        enough = misread.mean() >= FEWEST_SHARE
        p_value = mask_p_value(look.x, classes, misread, seed) if enough else 1.0
        unseen_looks = None if unseen is None else names[read_as(look, classes, margins > 0, seed)]
    return Discovery(
        train, encoded, classifier.config, labels, margins, names[others], p_value, at, depths, unseen_looks, seed
    )


class Seen(NamedTuple):
    """What a head makes of a `Look`: margins ``[n]`` and most likely other classes ``[n]``."""

    name: str
    look: Look
    margins: np.ndarray
    others: np.ndarray

    @property
    def ratio(self) -> float:
        """`trimmed.distance_ratio`."""
        return distance_ratio(self.margins)

    @property
    def misread(self) -> float:
        """Share of the rows."""
        return float((self.margins < 0).mean())


def chosen(seen: list[Seen]) -> Seen:
    """Of what tells of a shortcut that on which the fewest blocks have worked, since a block is fitted to the rows, and takes some
    that contradict for their own class. Then, or where nothing tells of one, where the misread rows are the furthest in another
    class."""

    def rank(one: Seen) -> tuple:
        telling = one.ratio >= FULL_MEMBERS and one.misread >= FEWEST_SHARE
        return telling, -one.look.blocks * telling, one.ratio

    return max(seen, key=rank)


def read_as(look: Look, classes: np.ndarray, kept: np.ndarray, seed: int = 0) -> np.ndarray:
    """The class as which a head reads each unseen row, ``[m]``; it is fitted across folds, on the kept training rows."""
    new = np.zeros(len(look.unseen), dtype=int)  # read as the first class where that is the most likely one
    margins, others = look.margins_of(
        np.concatenate([look.x, look.unseen]),
        np.concatenate([classes, new]),
        np.concatenate([kept, new > 0]),
        seed,
    )
    return np.where(margins >= 0, 0, others)[len(classes) :]


def _without_labels(rows: datasets.Dataset, columns: Columns) -> datasets.Dataset:
    """A set without its labels, of which some may be missing; one that is encoded stays as it is."""
    if transform_of(rows) is not None:
        return rows
    label = {label_column(rows, columns)} if has_labels(rows, columns) else set()
    return rows.remove_columns([name for name in rows.column_names if name in {"label", "labels", *label}])


def _labels(encoded, num_labels: int) -> np.ndarray:
    """Class ids, ``[n]``."""
    labels = labels_of(encoded)
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or labels.min() < 0 or labels.max() >= num_labels:
        raise ValueError(
            f"The labels of train are no class ids from 0 to {num_labels - 1}; map them to the model's classes."
        )
    if labels.min() == labels.max():
        raise ValueError("All rows of train have one label; discover needs two classes or more.")
    return labels
