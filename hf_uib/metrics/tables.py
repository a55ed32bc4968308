"""The rows of the tables, and how they are printed."""

import numpy as np
import torch

from ..metrics import BiasCorrelation, MembershipAttack, WorstGroupAccuracy
from ..objective import margin

COLUMNS = {
    "accuracy": ("accuracy", "higher"),
    "conflicting_accuracy": ("bias-conflicting accuracy", "higher"),
    "follow_rate": ("follow rate", "lower"),
    "cramers_v": ("Cramér's V", "lower"),
    "worst_group_accuracy": ("worst group", "higher"),
    "forget_accuracy": ("accuracy, forget set", "that of the retrained model"),
    "retain_accuracy": ("accuracy, retained set", "that of the retrained model"),
    "flip_rate": ("counterfactual flip rate", "lower"),
    "seconds": ("seconds", "lower"),
}


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
