"""Accuracy of every group, and of the worst."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """Accuracy by group (label x attribute), of the worst group, and the plain and the weighted mean over groups.
Target: the values of a model retrained without the forget set."""

_INPUTS = """
Args:
    predictions (list of int): predicted classes.
    references (list of int): true classes.
    attributes (list of int): any attribute; a group is one pair of class and attribute.
    min_group_size (int): smaller groups are listed but cannot be the worst; default 1.
Returns:
    worst_group_accuracy: in [0, 1], higher is better; worst_group: its name ``label/attribute``.
    mean_group_accuracy: plain mean over groups; weighted_accuracy: mean over examples, the ordinary accuracy.
    groups: accuracy and size of every group, by name.
"""

_CITATION = """@inproceedings{sagawa2020, title = {Distributionally Robust Neural Networks for Group Shifts}, author = {Sagawa,
Shiori and Koh, Pang Wei and Hashimoto, Tatsunori B. and Liang, Percy}, booktitle = {ICLR}, year = {2020}}"""


class WorstGroupAccuracy(evaluate.Metric):
    """See `_INPUTS`; the name in a combined result is ``worst_group_accuracy``."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {name: datasets.Value("int64") for name in ("predictions", "references", "attributes")}
            ),
        )

    def _compute(self, predictions, references, attributes, min_group_size: int = 1):
        predictions, references, attributes = (np.asarray(x) for x in (predictions, references, attributes))
        right = predictions == references
        groups = {}
        for label, attribute in sorted(set(zip(references.tolist(), attributes.tolist(), strict=True))):
            members = (references == label) & (attributes == attribute)
            groups[f"{label}/{attribute}"] = {"accuracy": float(right[members].mean()), "size": int(members.sum())}
        eligible = {name: g["accuracy"] for name, g in groups.items() if g["size"] >= min_group_size}
        worst = min(eligible, key=eligible.get) if eligible else None
        return {
            "worst_group_accuracy": eligible[worst] if worst else float("nan"),
            "worst_group": worst,
            "mean_group_accuracy": float(np.mean([g["accuracy"] for g in groups.values()])),
            "weighted_accuracy": float(right.mean()),
            "groups": groups,
        }
