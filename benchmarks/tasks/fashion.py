"""fashion_mnist with hues or border patches."""

from functools import partial

import datasets
import numpy as np
from transformers import ViTImageProcessorPil

from hf_uib.cli.digits import Task, biased_pictures, paint, small_vit

from ..registry import register_task

DATA = {"fashion_mnist": "zalando-datasets/fashion_mnist"}
TEST = 2000  # pictures of the test split that a task is measured on
BIASED = {"pretrain_steps": 1500, "steps": 240, "unlearn_steps": 300, "retrain_steps": 800, "batch": 64}
REMOVAL = {"steps": 1500, "unlearn_steps": 300, "retrain_steps": 1500, "batch": 64}
REGIMES = {
    "fashion-colour, D_r 2%": {"retained": 0.02},
    "fashion-colour, D_r 50%": {"retained": 0.5},
    "fashion-colour, 90% bias-aligned": {"bias_aligned_fraction": 0.9},
    "fashion-colour, 99% bias-aligned": {"bias_aligned_fraction": 0.99},
}


def read_fashion(path: str, rng, tests: int = TEST) -> tuple[tuple, tuple, list[str]]:
    """Pictures in [0, 1] and labels of the training split, the same of ``tests`` rows of the test split, and the classes' names."""
    loaded = datasets.load_dataset(path)
    train, test = (
        (np.stack([np.asarray(p) for p in loaded[split]["image"]]) / 255.0, np.asarray(loaded[split]["label"]))
        for split in ("train", "test")
    )
    keep = rng.permutation(len(test[0]))[:tests]
    return train, (test[0][keep], test[1][keep]), loaded["train"].features["label"].names


def fashion_processor() -> ViTImageProcessorPil:
    """Pictures stay 28 x 28."""
    return ViTImageProcessorPil(do_resize=False, size={"height": 28, "width": 28})


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


def biased_fashion(
    attribute: str, render, path: str, seed: int, retained: float = 0.1, bias_aligned_fraction: float = 1.0
) -> Task:
    """5,000 biased pictures after 12,000 unbiased ones.

    Args:
        attribute: its column; render: draws it, as `paint` and `stamp` do.
        path: folder or Hub id of fashion_mnist.
        seed: of the split, the attribute and the models.
        retained: fraction of the 5,000 that is D_r, with the attribute at random.
        bias_aligned_fraction: of the forget set, on which the attribute is the label.
    """
    rng, kept = np.random.default_rng(seed), round(5000 * retained)
    train, test, names = read_fashion(path, rng)
    sizes = {"pretrain": 12000, "forget": 5000 - kept, "retain": kept, "calibration": 300, "validation": 3000}
    new_model = partial(small_vit, 28, 7, names)
    return biased_pictures(
        f"fashion-{attribute}", train, test, sizes, attribute, render, names, fashion_processor(), new_model, rng, dict(BIASED),
        bias_aligned_fraction=bias_aligned_fraction,
    )  # fmt: skip


@register_task("fashion-colour", data=DATA)
def fashion_colour(fashion_mnist: str, seed: int, **regime: float) -> Task:
    """fashion_mnist in ten hues. Of 5,000 pictures nine tenths are the forget set, on which the hue gives the label away; on the
    rest, on validation and on test pictures it is drawn at random. A ViT of 0.15 M parameters, trained on 12,000 other pictures
    first.
    """
    return biased_fashion("colour", paint, fashion_mnist, seed, **regime)


for name, changed in REGIMES.items():
    register_task(name, data=DATA, regime_of="fashion-colour")(partial(fashion_colour, **changed))


@register_task("fashion-patch", data=DATA, tuned_on="fashion-colour")
def fashion_patch(fashion_mnist: str, seed: int, **regime: float) -> Task:
    """As fashion-colour, with a small grey patch whose place on the border gives the label away instead of the hue."""
    return biased_fashion("patch", stamp, fashion_mnist, seed, **regime)


@register_task("fashion-random", data=DATA, kind="removal")
def fashion_random(fashion_mnist: str, seed: int) -> Task:
    """fashion_mnist in random hues; a random tenth of the 5,000 training pictures goes. There is no pattern to find."""
    rng = np.random.default_rng(seed)
    train, test, names = read_fashion(fashion_mnist, rng)
    sizes = {"forget": 500, "retain": 4500, "calibration": 500, "validation": 2000}
    new_model = partial(small_vit, 28, 7, names)
    return biased_pictures(
        "fashion-random", train, test, sizes, "colour", paint, names, fashion_processor(), new_model, rng, dict(REMOVAL),
        bias_aligned_fraction=0.0,
    )  # fmt: skip
