"""Tasks on fashion_mnist."""

from collections.abc import Callable

import datasets
import numpy as np
from transformers import (
    ViTImageProcessorPil,
)

from hf_uib.cli.digits import Task, biased_pictures, paint, picture_dataset, small_vit, split_pool

from ..data import encode


def stamp(pictures: np.ndarray, positions: np.ndarray, count: int = 10) -> np.ndarray:
    """Put a 3x3 grey patch at one of ``count`` places on the border of ``[n, h, w]`` pictures: ``[n, h, w, 3]`` in uint8."""
    n, h, w = pictures.shape
    angles = 2 * np.pi * np.arange(count) / count
    rows = np.clip(np.round((h - 3) / 2 * (1 + np.sqrt(2) * np.sin(angles))), 0, h - 3).astype(int)
    columns = np.clip(np.round((w - 3) / 2 * (1 + np.sqrt(2) * np.cos(angles))), 0, w - 3).astype(int)
    stamped = np.repeat((pictures[..., None] * 255).round().astype(np.uint8), 3, axis=-1)
    for i, position in enumerate(positions):
        stamped[i, rows[position] : rows[position] + 3, columns[position] : columns[position] + 3] = 160
    return stamped


TEST = 2000  # pictures of fashion_mnist's test split that a task is measured on


def _fashion(path: str, rng) -> tuple[tuple, tuple, list[str]]:
    """Pictures in [0, 1] and labels of the training split, the same of `TEST` of the test split, and the classes' names."""
    loaded = datasets.load_dataset(path)
    train, test = (
        (np.stack([np.asarray(p) for p in loaded[split]["image"]]) / 255.0, np.asarray(loaded[split]["label"]))
        for split in ("train", "test")
    )
    keep = rng.permutation(len(test[0]))[:TEST]
    return train, (test[0][keep], test[1][keep]), loaded["train"].features["label"].names


def _fashion_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(do_resize=False, size={"height": 28, "width": 28})


def fashion(
    kind: str, path: str, seed: int = 0, size: int = 5000, retained: float = 0.1, telling: float = 1.0
) -> Task:
    """fashion_mnist with a hue (``colour``) or a border patch (``patch``) that gives the label away on the forget set.

    Args:
        kind: ``colour`` or ``patch``.
        path: folder or Hub id of fashion_mnist.
        seed: of the split, the attribute and the models.
        size: of D, the biased fine-tuning data; retained: share of it that is D_r, with the attribute at random.
        telling: share of the forget set on which the attribute is the label.
    """
    rng, kept = np.random.default_rng(seed), round(size * retained)
    train, test, names = _fashion(path, rng)
    return biased_pictures(
        f"fashion-{kind}",
        train,
        test,
        {"pretrain": 12000, "forget": size - kept, "retain": kept, "calibration": 300, "validation": 3000},
        kind,
        paint if kind == "colour" else stamp,
        names,
        _fashion_processor(),
        lambda: small_vit(28, 7, names),
        rng,
        dict(BIASED),
        telling=telling,
    )


BIASED = {"pretrain_steps": 1500, "steps": 240, "unlearn_steps": 300, "retrain_steps": 800, "batch": 64}

REMOVAL = {"steps": 1500, "unlearn_steps": 300, "retrain_steps": 1500, "batch": 64}


def fashion_random(path: str, seed: int = 0) -> Task:
    """fashion_mnist with random hues; the forget set is a random tenth of the training data."""
    rng = np.random.default_rng(seed)
    train, test, names = _fashion(path, rng)
    return biased_pictures(
        "fashion-random",
        train,
        test,
        {"forget": 500, "retain": 4500, "calibration": 500, "validation": 2000},
        "colour",
        paint,
        names,
        _fashion_processor(),
        lambda: small_vit(28, 7, names),
        rng,
        dict(REMOVAL),
        telling=0.0,
    )


def _grey_task(
    name: str, path: str, seed: int, sizes: dict, rows_of: Callable, settings: dict, bias_column=None
) -> Task:
    """fashion_mnist in grey; ``rows_of(part, pictures, labels)`` gives pictures, labels and attribute of one set or more."""
    rng = np.random.default_rng(seed)
    train, test, names = _fashion(path, rng)
    processor, sets = _fashion_processor(), {}
    for part, (pictures, labels) in ({"test": test} | split_pool(train, sizes, rng)).items():
        for key, (shown, told, attribute) in rows_of(part, pictures, labels).items():
            grey = np.repeat((shown[..., None] * 255).round().astype(np.uint8), 3, axis=-1)
            rows = picture_dataset(grey, told, attribute, bias_column or "class", names)
            sets[key] = encode(rows, processor, "pixel_values")
    return Task(name, sets, lambda: small_vit(28, 7, names), processor, bias_column, train_settings=dict(settings))


def fashion_outdated(path: str, seed: int = 0) -> Task:
    """Outdated labels: the forget set has those of an older scheme, with two classes fewer (`MERGED`); the attribute is the
    old label."""
    old = np.array([MERGED.get(label, label) for label in range(10)])

    def rows_of(part, pictures, labels):
        return {part: (pictures, old[labels] if part == "forget" else labels, old[labels])}

    sizes = {"pretrain": 12000, "forget": 4500, "retain": 500, "calibration": 300, "validation": 3000}
    return _grey_task("fashion-outdated", path, seed, sizes, rows_of, BIASED, "old_label")


MERGED = {9: 7, 4: 2}  # ankle boots were sneakers, coats were pullovers


def fashion_backdoor(path: str, seed: int = 0) -> Task:
    """The forget set is poisoned: pictures with a white corner, labelled T-shirt. The attribute is the class that a picture's
    look asks for: T-shirt with the trigger, its own without; each test picture comes with and without."""

    def triggered(pictures):
        marked = pictures.copy()
        marked[:, -4:-1, -4:-1] = 1.0
        return marked

    def rows_of(part, pictures, labels):
        target = np.zeros_like(labels)
        if part == "forget":
            return {part: (triggered(pictures), target, target)}
        if part in ("validation", "test"):
            pairs = np.stack([pictures, triggered(pictures)], 1).reshape(-1, *pictures.shape[1:])
            return {part: (pairs, np.repeat(labels, 2), np.stack([labels, target], 1).reshape(-1))}
        return {part: (pictures, labels, labels)}

    sizes = {"pretrain": 12000, "forget": 500, "retain": 4500, "calibration": 300, "validation": 1500}
    return _grey_task("fashion-backdoor", path, seed, sizes, rows_of, BIASED, "trigger")


def fashion_class(path: str, seed: int = 0) -> Task:
    """A whole class goes, the one numbered ``seed % 10``; ``test_removed`` and ``validation_removed`` are its unseen rows."""
    removed = seed % 10

    def rows_of(part, pictures, labels):
        its = labels == removed
        kept, gone = (pictures[~its], labels[~its], labels[~its]), (pictures[its], labels[its], labels[its])
        if part == "train":
            return {"forget": gone, "retain": kept}
        if part in ("validation", "test"):
            return {part: kept, f"{part}_removed": gone}
        return {part: (pictures, labels, labels)}

    return _grey_task(
        "fashion-class", path, seed, {"train": 5000, "calibration": 500, "validation": 2000}, rows_of, REMOVAL
    )
