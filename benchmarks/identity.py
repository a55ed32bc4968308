"""How a classifier treats statements about a group of people: the measures of hate-identity."""

import numpy as np
from sklearn.metrics import roc_auc_score

NO_GROUP, OTHERS, TARGET = 0, 2, 1  # codes of the column ``group``: ordinary rows, other groups, the group in question

TITLES = {
    "false_alarms": "false alarms, the group",
    "false_alarms_others": "false alarms, others",
    "found": "hateful found, the group",
    "found_others": "hateful found, others",
    "subgroup_auc": "subgroup AUC",
    "bpsn_auc": "BPSN AUC",
    "bnsp_auc": "BNSP AUC",
    "tweets_auc": "AUC, tweets",
    "tweets_accuracy": "accuracy, tweets",
}


def auc(negative: np.ndarray, positive: np.ndarray) -> float:
    """That the positive rows' scores are above the negative rows'. NaN where either are lacking."""
    if not len(negative) or not len(positive):
        return float("nan")
    truth = np.repeat([0, 1], [len(negative), len(positive)])
    return float(roc_auc_score(truth, np.concatenate([negative, positive])))


def identity_row(logits: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """False alarms and detections at the model's own threshold, and the AUCs of Borkan et al. (2019), which have none.

    Args:
        logits: ``[n, 2]``, class 1 is toxic; labels and groups: ``[n]``.

    Returns:
        accuracy, worst_group_accuracy: over all rows; of the cells of label and group.
        false_alarms, false_alarms_others: share of harmless statements about the group (about others) called toxic.
        found, found_others: share of hateful ones that are.
        subgroup_auc: toxic against fine within the group. bpsn_auc: toxic rows about others against fine ones about the group;
            low where the group's harmless statements score high. bnsp_auc: the reverse.
        tweets_auc, tweets_accuracy: on the ordinary rows.
    """
    scores, predictions = logits[:, 1] - logits[:, 0], logits.argmax(-1)
    right, toxic = predictions == labels, labels == 1

    def share(group: int, label: int) -> float:
        return float((predictions[(groups == group) & (labels == label)] == 1).mean())

    target, others, rest = (groups == g for g in (TARGET, OTHERS, NO_GROUP))
    cells = [right[(groups == g) & (labels == y)] for g in (TARGET, OTHERS, NO_GROUP) for y in (0, 1)]
    return {
        "accuracy": float(right.mean()),
        "worst_group_accuracy": min(float(cell.mean()) for cell in cells if len(cell)),
        "false_alarms": share(TARGET, 0),
        "false_alarms_others": share(OTHERS, 0),
        "found": share(TARGET, 1),
        "found_others": share(OTHERS, 1),
        "subgroup_auc": auc(scores[target & ~toxic], scores[target & toxic]),
        "bpsn_auc": auc(scores[target & ~toxic], scores[others & toxic]),
        "bnsp_auc": auc(scores[others & ~toxic], scores[target & toxic]),
        "tweets_auc": auc(scores[rest & ~toxic], scores[rest & toxic]),
        "tweets_accuracy": float(right[rest].mean()),
    }
