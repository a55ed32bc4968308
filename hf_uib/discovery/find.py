"""From a checkpoint and its training data to the rows that teach a shortcut."""

from typing import Any

import datasets
import numpy as np
import torch
from torch import nn

from ..data.columns import Columns
from ..data.labels import labels_of, several_labels
from ..data.reading import check_inputs
from ..data.sources import load_processor
from ..inference import pooled, predict, reader_of
from ..mean_tokens import principal_components
from ..models import Name, blocks_of, input_kind, labels_tokens, load_classifier, name_of, num_labels_of
from ..pattern_tokens import block_input
from ..processes import processes
from .report import FEWEST_SHARE, Depth, Discovery
from .trimmed import distance_ratio, mask_p_value, trimmed_margins

FEWEST_ROWS = 100


def discover(
    model: Name | nn.Module,
    train: datasets.Dataset,
    *,
    processing_class: Any = None,
    columns: Columns | None = None,
    seed: int = 0,
    batch_size: int = 256,
    trust_remote_code: bool = False,
) -> Discovery:
    """Rank the rows of a training set by how much they teach a shortcut; no attribute is labelled.

    A shortcut is what a simple head finds first. The head is a Gaussian for each class on the mean over the tokens of what enters
    the encoder, or of what one of the first half of its blocks gives. It is fitted across folds, again and again without the rows
    that it misreads (`trimmed.trimmed_margins`). The rows that it still misreads contradict the shortcut, the others teach it. The
    former are retained, with so many of the latter that the shortcut tells as little there as can be. Of the depths the one is
    taken whose misread rows are furthest in another class (`trimmed.distance_ratio`); no attribute and no test row has a say.

    Args:
        model: checkpoint that was trained on the rows: model, folder or Hub id.
        train: its training set, with labels; raw or encoded.
        processing_class: image processor, feature extractor or tokenizer; by default that of the checkpoint, where it has a name.
        columns: names of columns that are not the usual ones.
        seed: of folds and random masks.
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
    check_inputs("train", encoded, read.main_input)
    labels = _labels(encoded, num_labels_of(classifier))
    _, classes = np.unique(labels, return_inverse=True)  # without gaps
    best: tuple | None = None
    depths = []
    for name, features in mean_features(classifier, encoded, processing_class, batch_size).items():
        x = principal_components(features)
        found = trimmed_margins(x, classes, seed)
        if found is None:
            depths.append(Depth(name, None, None))
            continue
        ratio = distance_ratio(found[0])
        depths.append(Depth(name, ratio, float((found[0] < 0).mean())))
        if best is None or ratio > best[0]:
            best = ratio, name, found, x
    if best is None:
        margins, others, p_value, at = np.zeros(len(labels)), classes, 1.0, None
    else:
        ratio, at, (margins, others), x = best
        misread = margins < 0
        enough = misread.mean() >= FEWEST_SHARE
        p_value = mask_p_value(x, classes, misread, seed) if enough else 1.0
    return Discovery(
        train, encoded, classifier.config, labels, margins, np.unique(labels)[others], p_value, at, depths
    )


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


@torch.no_grad()
def mean_features(model: nn.Module, dataset, processing_class=None, batch_size: int = 256) -> dict[str, np.ndarray]:
    """Means over the tokens of what enters the encoder's first block, and of what each block of its first half gives, by name:
    ``[n, width]``. Padding does not count.

    Raises:
        ValueError: the model has no list of blocks.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no list of blocks, whose inputs discover looks at.")
    watched = dict(list(blocks.items())[: (len(blocks) + 1) // 2])
    seen: dict[str, list[np.ndarray]] = {name: [] for name in ("input", *watched)}
    mask: Any = None

    def note(batch):
        nonlocal mask
        mask = batch.get("attention_mask")
        return batch

    def keep(name, hidden):
        seen[name].append(pooled(hidden, mask).cpu().numpy())

    def on_block(name):
        return lambda module, inputs, output: keep(name, output[0] if isinstance(output, tuple) else output)

    first = next(iter(blocks.values()))
    handles = [module.register_forward_hook(on_block(name)) for name, module in watched.items()]
    handles.append(
        first.register_forward_pre_hook(
            lambda _, args, named: keep("input", block_input(args, named)), with_kwargs=True
        )
    )
    try:
        predict(model, dataset, processing_class, batch_size, "Reading the training set", note=note)
    finally:
        for handle in handles:
            handle.remove()
    return {name: np.concatenate(parts) for name, parts in seen.items()}
