"""Predictions of a classifier on a set, and the rows of the tables."""

import json
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..adapters import forward_columns
from ..bound import margin
from ..data import collator_for, fetch
from ..metrics import BiasCorrelation, MembershipAttack, WorstGroupAccuracy
from .columns import COLUMNS


def batcher(model: nn.Module, processing_class=None) -> Callable[[list[dict]], tuple[dict, torch.Tensor]]:
    """Makes encoded rows one batch on the model's device: what its forward takes, and the labels ``[n]``."""
    collator, device = collator_for(forward_columns(model), processing_class), next(model.parameters()).device

    def batch(rows: list[dict]) -> tuple[dict, torch.Tensor]:
        inputs = {name: value.to(device) for name, value in collator(rows).items()}
        return inputs, inputs.pop("labels")

    return batch


@torch.no_grad()
def predict(
    model: nn.Module,
    dataset,
    processing_class=None,
    batch_size: int = 256,
    description: str = "Evaluating",
    rows: Sequence[int] | None = None,
    quiet: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``[n, classes]`` and labels ``[n]`` of encoded rows (all, or some), in eval mode; the model's mode is restored."""
    rows = range(len(dataset)) if rows is None else rows
    batch = batcher(model, processing_class)
    training = model.training
    model.eval()
    logits, labels = [], []
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc=description, leave=False, disable=quiet or len(starts) < 8):
        inputs, told = batch(fetch(dataset, list(rows[start : start + batch_size])))
        labels.append(told.cpu())
        logits.append(model(**inputs).logits.float().cpu())
    model.train(training)
    return torch.cat(logits).numpy(), torch.cat(labels).numpy()


def bias_row(logits: np.ndarray, labels: np.ndarray, attributes: np.ndarray, coded: bool = True) -> dict[str, float]:
    """One row of a bias table.

    Args:
        logits: ``[n, classes]``; labels and attributes: ``[n]``.
        coded: whether the attribute is coded by the class it stands for; conflicting accuracy and follow rate need that.
    """
    predictions = logits.argmax(-1)
    columns = {"predictions": predictions, "references": labels, "attributes": attributes}
    bias = BiasCorrelation(keep_in_memory=True).compute(**columns, num_classes=logits.shape[1])
    groups = WorstGroupAccuracy(keep_in_memory=True).compute(**columns, min_group_size=10)
    row = {"accuracy": float((predictions == labels).mean())}
    if coded:
        row |= {name: bias[name] for name in ("conflicting_accuracy", "follow_rate")}
    return row | {"cramers_v": bias["cramers_v"], "worst_group_accuracy": groups["worst_group_accuracy"]}


def attack(seen: dict[str, tuple[np.ndarray, np.ndarray]], **settings) -> dict:
    """`MembershipAttack` on margins.

    Args:
        seen: what `predict` gave, logits ``[n, classes]`` and labels ``[n]``, for ``forget``, unseen rows as ``test`` and, for the
            published attack, ``retain``.
        settings: further arguments of `MembershipAttack.compute`.
    """
    margins = [margin(torch.from_numpy(logits), torch.from_numpy(labels)).numpy() for logits, labels in seen.values()]
    return MembershipAttack(keep_in_memory=True).compute(
        scores=np.concatenate(margins),
        references=np.concatenate([labels for _, labels in seen.values()]),
        splits=np.repeat(list(seen), [len(m) for m in margins]),
        **settings,
    )


def attribute_classes(forget_attributes: np.ndarray, forget_labels: np.ndarray) -> dict | None:
    """The class each value of the attribute stands for in the forget set, or None where it does not tell classes apart."""
    majority = {}
    for value in np.unique(forget_attributes):
        labels, counts = np.unique(forget_labels[forget_attributes == value], return_counts=True)
        majority[value.item()] = int(labels[counts.argmax()])
    return majority if len(set(majority.values())) > 1 else None


def flip_rate(logits: np.ndarray, copies: int) -> float:
    """Share of examples whose prediction is not the same for all ``copies`` that differ in the attribute alone."""
    predictions = logits.argmax(-1).reshape(-1, copies)
    return float((predictions != predictions[:, :1]).any(1).mean())


def text_table(results: dict[str, dict]) -> str:
    """The table as it is printed."""
    names = [key for key in COLUMNS if any(key in row for row in results.values())]
    header = ["", *(COLUMNS[name][0] for name in names)]
    body = []
    for model, row in results.items():
        values = [row.get(name) for name in names]
        body.append(
            [
                model,
                *(
                    "-" if v is None else f"{v:.1f}" if n == "seconds" else f"{v:.3f}"
                    for n, v in zip(names, values, strict=True)
                ),
            ]
        )
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [header, *body]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_json(content: dict, path: str) -> None:
    """Write whole or not at all."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, allow_nan=True)
        file.write("\n")
    os.replace(temporary, path)
