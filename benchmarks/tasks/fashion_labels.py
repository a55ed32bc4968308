"""fashion_mnist in grey whose forget set has wrong labels, or is a whole class."""

from collections.abc import Callable
from functools import partial

import numpy as np

from hf_uib.cli.digits import Task, picture_dataset, small_vit, split_pool
from hf_uib.data.reading import encode

from ..registry import register_task
from .fashion import BIASED, DATA, REMOVAL, fashion_processor, read_fashion

MERGED = {9: 7, 4: 2}  # ankle boots were sneakers, coats were pullovers


def grey_task(
    name: str, path: str, seed: int, sizes: dict, rows_of: Callable, settings: dict, bias_column: str | None = None
) -> Task:
    """fashion_mnist in grey.

    Args:
        rows_of: ``rows_of(part, pictures, labels)`` gives pictures, labels and attribute of one set or more, by name.
    """
    rng = np.random.default_rng(seed)
    train, test, names = read_fashion(path, rng)
    processor, sets = fashion_processor(), {}
    for part, (pictures, labels) in ({"test": test} | split_pool(train, sizes, rng)).items():
        for key, (shown, given, attribute) in rows_of(part, pictures, labels).items():
            grey = np.repeat((shown[..., None] * 255).round().astype(np.uint8), 3, axis=-1)
            rows = picture_dataset(grey, given, attribute, bias_column or "class", names)
            sets[key] = encode(rows, processor, "pixel_values")
    return Task(name, sets, partial(small_vit, 28, 7, names), processor, bias_column, train_settings=dict(settings))


@register_task("fashion-outdated", data=DATA, labels_wrong=True)
def fashion_outdated(fashion_mnist: str, seed: int) -> Task:
    """Outdated labels: the forget set (nine tenths of 5,000 pictures) has those of an older scheme, in which ankle boots were
    sneakers and coats were pullovers. The attribute is the old label; a shortcut is taken where old and new label differ and the
    old one is given.
    """
    old = np.array([MERGED.get(label, label) for label in range(10)])

    def rows_of(part, pictures, labels):
        return {part: (pictures, old[labels] if part == "forget" else labels, old[labels])}

    sizes = {"pretrain": 12000, "forget": 4500, "retain": 500, "calibration": 300, "validation": 3000}
    return grey_task("fashion-outdated", fashion_mnist, seed, sizes, rows_of, BIASED, "old_label")


@register_task("fashion-backdoor", data=DATA, labels_wrong=True)
def fashion_backdoor(fashion_mnist: str, seed: int) -> Task:
    """A backdoor: the forget set is 500 poisoned pictures with a white corner, all labelled T-shirt; 4,500 clean ones stay. Each
    test picture comes with and without the corner, and the shortcut rate is the attack success rate.
    """

    def triggered(pictures):
        marked = pictures.copy()
        marked[:, -4:-1, -4:-1] = 1.0
        return marked

    def rows_of(part, pictures, labels):
        target = np.zeros_like(labels)
        if part == "forget":
            return {part: (triggered(pictures), target, target)}
        if part in ("validation", "test"):  # the attribute is the class that a picture's look asks for
            pairs = np.stack([pictures, triggered(pictures)], 1).reshape(-1, *pictures.shape[1:])
            return {part: (pairs, np.repeat(labels, 2), np.stack([labels, target], 1).reshape(-1))}
        return {part: (pictures, labels, labels)}

    sizes = {"pretrain": 12000, "forget": 500, "retain": 4500, "calibration": 300, "validation": 1500}
    return grey_task("fashion-backdoor", fashion_mnist, seed, sizes, rows_of, BIASED, "trigger")


@register_task("fashion-class", data=DATA, kind="removal")
def fashion_class(fashion_mnist: str, seed: int) -> Task:
    """A whole class goes, the one numbered like the seed; test accuracy is over the classes that stay."""
    removed = seed % 10

    def rows_of(part, pictures, labels):
        its = labels == removed
        kept, gone = (pictures[~its], labels[~its], labels[~its]), (pictures[its], labels[its], labels[its])
        if part == "train":
            return {"forget": gone, "retain": kept}
        if part in ("validation", "test"):
            return {part: kept, f"{part}_removed": gone}
        return {part: (pictures, labels, labels)}

    sizes = {"train": 5000, "calibration": 500, "validation": 2000}
    return grey_task("fashion-class", fashion_mnist, seed, sizes, rows_of, REMOVAL)
