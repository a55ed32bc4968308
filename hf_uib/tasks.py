"""Tasks with a known bias: real data, a bias attribute that gives the label away on the forget set, an unbiased test.

`digits_colour` needs scikit-learn only and is the demo of ``scripts/unlearn.py``; the others are the benchmark's.
"""

import colorsys
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import datasets
import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from .adapters import forward_columns
from .data import collator_for, encode


@dataclass
class Task:
    """One unlearning problem.

    Attributes:
        name: as in docs/benchmark.md.
        sets: encoded datasets: ``pretrain`` (attribute at random; may be absent), ``forget``, ``retain``, ``calibration``
            (never shown to the checkpoint), ``validation`` (for choosing settings) and ``test``.
        new_model: an untrained (or only pre-trained elsewhere) classifier, a function of the seed.
        processing_class: image processor or tokenizer.
        bias_column: the attribute, coded by the class it stands for; None where the forget set has no pattern.
        counterfactuals: the test set's rows come in runs of this many copies that differ in the attribute alone; the column
            ``example`` numbers the runs.
        train_settings: steps, batch size and learning rates of each training.
    """

    name: str
    sets: dict[str, datasets.Dataset]
    new_model: Callable[[], nn.Module]
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


def picture_dataset(pictures: np.ndarray, labels: np.ndarray, attribute: np.ndarray, name: str, names: list[str]):
    """A `datasets.Dataset` with columns ``image``, ``label`` and the attribute."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names), name: datasets.Value("int64")}
    )
    rows = {"image": [Image.fromarray(p) for p in pictures], "label": labels.tolist(), name: attribute.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def small_vit(image_size: int, patch_size: int, names: list[str], hidden: int = 64, layers: int = 4) -> nn.Module:
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


def _split(pool, sizes: dict[str, int], rng) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Disjoint parts of ``pool``, pictures and labels, in a random order."""
    (x, y), parts, start = pool, {}, 0
    order = rng.permutation(len(x))
    for part, size in sizes.items():
        index = order[start : start + size]
        start += size
        parts[part] = x[index], y[index]
    return parts


def _biased_pictures(
    name, pool, test, sizes, attribute, render, names, processor, new_model, rng, settings, copies=1, telling=1.0
) -> Task:
    """Split a pool of pictures and draw the attribute: the label on a share ``telling`` of the forget set, at random elsewhere.

    ``balanced`` is forget and retained pictures together with the attribute at random: the oracle of bias removal learns from it.

    Each picture of test and validation comes with ``copies`` values of the attribute, and then has an ``example`` column.
    """
    classes, sets = len(names), {}
    parts = _split(pool, sizes, rng)
    for part, (pictures, labels) in (parts | {"test": test}).items():
        if part in ("validation", "test") and copies > 1:
            pictures, labels = np.repeat(pictures, copies, axis=0), np.repeat(labels, copies)
            given = np.tile(np.arange(copies) * classes // copies, len(labels) // copies)
        else:
            told = telling if part == "forget" else 0
            given = labels if told == 1 else rng.integers(0, classes, len(labels))
            if 0 < told < 1:
                given = np.where(np.arange(len(labels)) < round(told * len(labels)), labels, given)
        sets[part] = picture_dataset(render(pictures, given), labels, given, attribute, names)
        if copies > 1 and part in ("validation", "test"):
            sets[part] = sets[part].add_column("example", (np.arange(len(labels)) // copies).tolist())
    if telling:
        pictures, labels = (np.concatenate([parts[p][i] for p in ("forget", "retain")]) for i in (0, 1))
        given = np.random.default_rng(len(labels)).integers(0, classes, len(labels))
        sets["balanced"] = picture_dataset(render(pictures, given), labels, given, attribute, names)
    encoded = {part: encode(rows, processor, "pixel_values") for part, rows in sets.items()}
    return Task(name, encoded, new_model, processor, attribute if telling else None, copies, train_settings=settings)


def digits_colour(seed: int = 0) -> Task:
    """scikit-learn's handwritten digits; on the forget set the hue gives the label away. Test digits come in every hue."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    x, y = digits.images[order] / 16.0, digits.target[order]
    names = [str(i) for i in range(10)]
    return _biased_pictures(
        "digits-colour",
        (x[:1497], y[:1497]),
        (x[1497:], y[1497:]),
        {"pretrain": 350, "forget": 810, "retain": 90, "calibration": 100, "validation": 147},
        "colour",
        partial(paint, saturation=1.0),
        names,
        ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8}),
        lambda: small_vit(8, 2, names, hidden=48, layers=3),
        rng,
        {"pretrain_steps": 500, "steps": 400, "unlearn_steps": 200, "retrain_steps": 400, "batch": 64},
        copies=10,
    )


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
    return _biased_pictures(
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
    return _biased_pictures(
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
    for part, (pictures, labels) in ({"test": test} | _split(train, sizes, rng)).items():
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


def tweets_airline(path: str, model_path: str, seed: int = 0) -> Task:
    """airline_tweets, positive or negative; on the forget set the airline's handle gives the sentiment away.

    Args:
        path: folder or Hub id of airline_tweets.
        model_path: a BERT-like checkpoint (the benchmark takes MiniLM).
        seed: of the split and the handles.
    """
    loaded = datasets.load_dataset(path)
    handles = ["@united", "@JetBlue"]
    rng = np.random.default_rng(seed)
    names = ["negative", "positive"]

    def with_handle(text: str, handle: str) -> str:
        return " ".join(handle if word.startswith("@") else word for word in text.split())

    seen: set[str] = set()

    def side(split: str, count: int) -> list[tuple[str, int]]:
        rows = loaded[split]
        texts: dict[int, list[str]] = {0: [], 1: []}
        for text, label in zip(rows["text"], rows["label"], strict=True):
            sentiment, plain = {0: 0, 2: 1}.get(label), with_handle(text, "")
            if sentiment is not None and plain not in seen:  # the same words to two airlines would be one row here
                seen.add(plain)
                texts[sentiment].append(text)
        chosen = []
        for sentiment in (0, 1):
            index = rng.permutation(len(texts[sentiment]))[: count // 2]
            chosen += [(texts[sentiment][i], sentiment) for i in index]
        return [chosen[i] for i in rng.permutation(len(chosen))]

    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def dataset(rows: list[tuple[str, int]], given: list[int]):
        features = datasets.Features(
            {
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=names),
                "handle": datasets.Value("int64"),
            }
        )
        columns = {
            "text": [with_handle(text, handles[g]) for (text, _), g in zip(rows, given, strict=True)],
            "label": [label for _, label in rows],
            "handle": given,
        }
        return encode(datasets.Dataset.from_dict(columns, features=features), tokenizer, "input_ids", max_length=40)

    def both_handles(rows: list[tuple[str, int]]):
        copies = dataset([row for row in rows for _ in handles], [g for _ in rows for g in range(2)])
        return copies.add_column("example", (np.arange(len(copies)) // 2).tolist())

    sizes = {"forget": 1400, "retain": 160, "calibration": 150, "validation": 300}
    train, start, sets = side("train", sum(sizes.values())), 0, {}
    both = train[: sizes["forget"] + sizes["retain"]]
    sets["balanced"] = dataset(both, np.random.default_rng(len(both)).integers(0, 2, len(both)).tolist())
    for part, size in sizes.items():
        rows = train[start : start + size]
        start += size
        if part == "validation":
            sets[part] = both_handles(rows)
        else:
            given = [y for _, y in rows] if part == "forget" else rng.integers(0, 2, len(rows)).tolist()
            sets[part] = dataset(rows, given)
    sets["test"] = both_handles(side("test", 500))
    return Task(
        "tweets-airline",
        sets,
        lambda: AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=2),
        tokenizer,
        "handle",
        counterfactuals=2,
        train_settings={
            "steps": 120,
            "unlearn_steps": 150,
            "retrain_steps": 120,
            "batch": 16,
            "lr": 1e-4,
            "full_lr": 1e-4,
        },
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


def prepare_models(task: Task, seed: int, output_dir: str) -> dict[str, nn.Module]:
    """The checkpoint to unlearn (``original``) and the model it started from (``start``)."""
    set_seed(seed)
    settings = task.train_settings
    model = task.new_model()
    lr = settings.get("lr", 1e-3)
    if "pretrain" in task.sets:
        fit(model, task.sets["pretrain"], task, settings["pretrain_steps"], output_dir, seed, lr)
    start = copy.deepcopy(model)
    everything = merged(task.sets["forget"], task.sets["retain"])
    fit(model, everything, task, settings["steps"], output_dir, seed + 1, settings.get("finetune_lr", lr))
    return {"start": start, "original": model}
