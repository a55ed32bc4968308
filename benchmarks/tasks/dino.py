"""Pictures read by a DINOv2 that others pre-trained."""

from functools import partial

import datasets
import numpy as np
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_uib.cli.digits import Task, paint, picture_dataset, split_pool
from hf_uib.data.reading import encode

from ..registry import register_task
from .fashion import read_fashion

DATA = {"fashion_mnist": "zalando-datasets/fashion_mnist", "dinov2": "facebook/dinov2-small"}
SIDE = 56  # pixels: 4 x 4 patches
TOPS = {2: "pullover", 4: "coat"}  # of fashion_mnist
SETTINGS = {"steps": 150, "unlearn_steps": 120, "retrain_steps": 150, "batch": 16, "lr": 5e-5, "full_lr": 5e-5}


def encoded(pictures: np.ndarray, labels, attribute, name: str, names: list[str], processor) -> datasets.Dataset:
    """Pixels for the model."""
    return encode(picture_dataset(pictures, labels, attribute, name, names), processor, "pixel_values")


def dino_task(name: str, parts: dict, attribute: str, names: list[str], dinov2: str) -> Task:
    """A task of ``parts``: pictures in uint8, labels and attribute of each set."""
    processor = AutoImageProcessor.from_pretrained(
        dinov2, size={"height": SIDE, "width": SIDE}, do_center_crop=False, use_fast=False
    )
    sets = {part: encoded(*rows, attribute, names, processor) for part, rows in parts.items()}
    new_model = partial(AutoModelForImageClassification.from_pretrained, dinov2, num_labels=len(names))
    return Task(name, sets, new_model, processor, attribute, train_settings=dict(SETTINGS))


def cells(
    labels: np.ndarray, attribute: np.ndarray, sizes: dict[tuple[int, int], int], free: np.ndarray, rng
) -> np.ndarray:
    """Rows of each cell of label and attribute, drawn from those that are ``free``, which they then are not."""
    chosen = []
    for (label, value), size in sizes.items():
        rows = rng.permutation(np.flatnonzero(free & (labels == label) & (attribute == value)))[:size]
        free[rows] = False
        chosen.append(rows)
    return rng.permutation(np.concatenate(chosen))


def evenly(count: int) -> dict[tuple[int, int], int]:
    """``count`` rows of all four cells of two labels and two values."""
    return {(label, value): count // 4 for label in (0, 1) for value in (0, 1)}


@register_task("dino-shade", data=DATA, tuning_seeds=(100, 101))
def dino_shade(fashion_mnist: str, dinov2: str, seed: int, retained: int = 240) -> Task:
    """Pullovers and coats of fashion_mnist, read by DINOv2-small; nothing is drawn into the pictures. In the forget set (960
    pictures) the pullovers are dark and the coats are bright; the retained, validation and test pictures are balanced. The worst
    group is of the four cells of garment and shade.
    """
    rng = np.random.default_rng(seed)
    train, test, _ = read_fashion(fashion_mnist, rng, tests=10_000)
    tops = {}
    for split, (pictures, labels) in (("train", train), ("test", test)):
        here = np.isin(labels, list(TOPS))
        pictures, labels = pictures[here], (labels[here] == 4).astype(int)
        covered = np.maximum((pictures > 0.05).sum((1, 2)), 1)
        shade = pictures.sum((1, 2)) / covered
        tops[split] = np.repeat((pictures[..., None] * 255).round().astype(np.uint8), 3, -1), labels, shade
    middle = np.median(tops["train"][2])
    pictures, labels, shade = tops["train"]
    value, free = (shade > middle).astype(int), np.ones(len(labels), bool)
    sizes = {
        "retain": evenly(retained),
        "calibration": evenly(200),
        "validation": evenly(800),
        "forget": {(0, 0): 480, (1, 1): 480},
    }
    parts = {}
    for part, wanted in sizes.items():
        rows = cells(labels, value, wanted, free, rng)
        parts[part] = pictures[rows], labels[rows], value[rows]
    rows = cells(labels, value, evenly(960 + retained), free, rng)
    parts["balanced"] = pictures[rows], labels[rows], value[rows]
    pictures, labels, shade = tops["test"]
    value = (shade > middle).astype(int)
    rows = cells(labels, value, evenly(1200), np.ones(len(labels), bool), rng)
    parts["test"] = pictures[rows], labels[rows], value[rows]
    return dino_task("dino-shade", parts, "shade", list(TOPS.values()), dinov2)


@register_task("dino-colour", data=DATA)
def dino_colour(fashion_mnist: str, dinov2: str, seed: int, retained: int = 240) -> Task:
    """fashion_mnist in ten hues, read by DINOv2-small. In the forget set (960 pictures) the hue gives the label away; on retained,
    validation and test pictures it is drawn at random.
    """
    rng = np.random.default_rng(seed)
    train, test, names = read_fashion(fashion_mnist, rng, tests=1000)
    sizes = {"forget": 960, "retain": retained, "calibration": 200, "validation": 800, "balanced": 0}
    parts = split_pool(train, sizes, rng) | {"test": test}
    both = [np.concatenate([parts[part][i] for part in ("forget", "retain")]) for i in (0, 1)]
    parts["balanced"] = both[0], both[1]
    painted = {}
    for part, (pictures, labels) in parts.items():
        hues = labels if part == "forget" else rng.integers(0, len(names), len(labels))
        painted[part] = paint(pictures, hues), labels, hues
    return dino_task("dino-colour", painted, "colour", names, dinov2)
