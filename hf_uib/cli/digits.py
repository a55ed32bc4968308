"""The demo's task: scikit-learn's digits in colour; on the forget set the hue gives the label away."""

import colorsys
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce

import datasets
import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from ..data.pairing import collator_for
from ..data.reading import encode
from ..models import forward_columns


@dataclass
class Task:
    """One unlearning problem.

    Attributes:
        name: as in docs/benchmark.
        sets: encoded datasets: ``pretrain`` (attribute at random; may be absent), ``forget``, ``retain``, ``calibration``
            (never shown to the checkpoint), ``validation`` (for choosing settings) and ``test``. ``further`` are rows that the
            checkpoint was trained on and that no method is given; they may be absent.
        new_model: an untrained (or only pre-trained elsewhere) classifier, a function of the seed.
        processing_class: image processor or tokenizer.
        bias_column: the attribute, coded by the class it stands for; None where the forget set has no pattern.
        counterfactuals: the test set's rows come in runs of this many copies that differ in the attribute alone; the column
            ``example`` numbers the runs.
        train_settings: steps, batch size and learning rates of each training.
    """

    name: str
    sets: dict[str, datasets.Dataset]
    new_model: Callable[[], PreTrainedModel]
    processing_class: object
    bias_column: str | None
    counterfactuals: int = 1
    train_settings: dict = field(default_factory=dict)


def palette(count: int, saturation: float) -> np.ndarray:
    """``[count, 3]`` hues evenly spaced, in [0, 1]."""
    return np.array([colorsys.hsv_to_rgb(i / count, saturation, 1.0) for i in range(count)])


def paint(pictures: np.ndarray, colours: np.ndarray, count: int = 10, saturation: float = 0.6) -> np.ndarray:
    """Tint grey pictures ``[n, h, w]`` in [0, 1]: ``[n, h, w, 3]`` in uint8."""
    tinted = pictures[..., None] * palette(count, saturation)[colours][:, None, None, :]
    return (tinted * 255).round().astype(np.uint8)


def picture_dataset(pictures: np.ndarray, labels: np.ndarray, attribute: np.ndarray, name: str, names: list[str]):
    """A `datasets.Dataset` with columns ``image``, ``label`` and the attribute."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names), name: datasets.Value("int64")}
    )
    rows = {"image": [Image.fromarray(p) for p in pictures], "label": labels.tolist(), name: attribute.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def small_vit(
    image_size: int, patch_size: int, names: list[str], hidden: int = 64, layers: int = 4
) -> PreTrainedModel:
    """A ViT of 0.15 M parameters."""
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return ViTForImageClassification(config)


def split_pool(pool, sizes: dict[str, int], rng) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Disjoint parts of ``pool``, pictures and labels, in a random order."""
    (x, y), parts, start = pool, {}, 0
    order = rng.permutation(len(x))
    for part, size in sizes.items():
        index = order[start : start + size]
        start += size
        parts[part] = x[index], y[index]
    return parts


def biased_pictures(
    name,
    pool,
    test,
    sizes,
    attribute,
    render,
    names,
    processor,
    new_model,
    rng,
    settings,
    copies=1,
    bias_aligned_fraction=1.0,
) -> Task:
    """Split a pool of pictures and draw the attribute: the label on ``bias_aligned_fraction`` of the forget set, else at random.

    ``balanced`` is forget and retained pictures together with the attribute at random: the target of bias removal learns from it.

    Each picture of test and validation comes with ``copies`` values of the attribute, and then has an ``example`` column.
    """
    classes, sets = len(names), {}
    parts = split_pool(pool, sizes, rng)
    for part, (pictures, labels) in (parts | {"test": test}).items():
        if part in ("validation", "test") and copies > 1:
            pictures, labels = np.repeat(pictures, copies, axis=0), np.repeat(labels, copies)
            given = np.tile(np.arange(copies) * classes // copies, len(labels) // copies)
        else:
            aligned = bias_aligned_fraction if part == "forget" else 0
            given = labels if aligned == 1 else rng.integers(0, classes, len(labels))
            if 0 < aligned < 1:
                given = np.where(np.arange(len(labels)) < round(aligned * len(labels)), labels, given)
        sets[part] = picture_dataset(render(pictures, given), labels, given, attribute, names)
        if copies > 1 and part in ("validation", "test"):
            sets[part] = sets[part].add_column("example", (np.arange(len(labels)) // copies).tolist())
    if bias_aligned_fraction:
        pictures, labels = (np.concatenate([parts[p][i] for p in ("forget", "retain")]) for i in (0, 1))
        given = np.random.default_rng(len(labels)).integers(0, classes, len(labels))
        sets["balanced"] = picture_dataset(render(pictures, given), labels, given, attribute, names)
    encoded = {part: encode(rows, processor, "pixel_values") for part, rows in sets.items()}
    return Task(
        name,
        encoded,
        new_model,
        processor,
        attribute if bias_aligned_fraction else None,
        copies,
        train_settings=settings,
    )


def digits_colour(
    seed: int = 0, retained: int = 90, bias_aligned_fraction: float = 1.0, classes: int = 10, hues: int = 1
) -> Task:
    """scikit-learn's handwritten digits; on the forget set the hue gives the label away. Test digits come in every hue.

    Args:
        seed: of split and hues; retained: of the 900 training digits; bias_aligned_fraction: of the forget set.
        classes: the digits in so many runs of equal length, and as many hues.
        hues: of each class, between those of others; a picture gets one of them.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    x, y = digits.images[order] / 16.0, digits.target[order] * classes // 10
    names = [str(i) for i in range(classes)]
    which = np.random.default_rng(seed)

    def render(pictures, given):
        given = given + classes * which.integers(0, hues, len(given))
        return paint(pictures, given, count=classes * hues, saturation=1.0)

    return biased_pictures(
        "digits-colour",
        (x[:1497], y[:1497]),
        (x[1497:], y[1497:]),
        {"pretrain": 350, "forget": 900 - retained, "retain": retained, "calibration": 100, "validation": 147},
        "colour",
        render,
        names,
        ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8}),
        lambda: small_vit(8, 2, names, hidden=48, layers=3),
        rng,
        {"pretrain_steps": 500, "steps": 400, "unlearn_steps": 200, "retrain_steps": 400, "batch": 64},
        copies=classes,
        bias_aligned_fraction=bias_aligned_fraction,
    )


def fit(model: nn.Module, dataset, task: Task, steps: int, output_dir: str, seed: int, learning_rate: float) -> float:
    """Plain training with Transformers' Trainer, of whatever is trainable in the model; returns seconds."""
    args = TrainingArguments(
        output_dir,
        max_steps=steps,
        per_device_train_batch_size=task.train_settings["batch"],
        learning_rate=learning_rate,
        warmup_steps=steps // 20,
        remove_unused_columns=False,
        save_strategy="no",
        use_cpu=not torch.accelerator.is_available(),  # without it two CPU processes would become two runs
        seed=seed,
        label_names=["labels"],
        logging_steps=10**6,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=collator_for(forward_columns(model), task.processing_class),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer.train().metrics["train_runtime"]


def merged(first, second):
    """Both sets of rows, with the first one's transform."""
    joined = datasets.concatenate_datasets([first.with_format(None), second.with_format(None)])
    return (
        joined.with_transform(first.format["format_kwargs"]["transform"])
        if first.format["type"] == "custom"
        else joined
    )


def prepare_models(task: Task, seed: int, output_dir: str) -> dict[str, PreTrainedModel]:
    """The checkpoint to unlearn (``original``) and the model it started from (``start``)."""
    set_seed(seed)
    settings = task.train_settings
    model = task.new_model()
    lr = settings.get("lr", 1e-3)
    if "pretrain" in task.sets:
        fit(model, task.sets["pretrain"], task, settings["pretrain_steps"], output_dir, seed, lr)
    start = copy.deepcopy(model)
    everything = reduce(merged, [task.sets[part] for part in ("forget", "retain", "further") if part in task.sets])
    fit(model, everything, task, settings["steps"], output_dir, seed + 1, settings.get("finetune_lr", lr))
    return {"start": start, "original": model}
