"""How well an attack separates the forget set from unseen data."""

import numpy as np
from numpy.typing import ArrayLike

from .bootstrap import bootstrap_interval

SPLITS = ("forget", "retain", "test")


def membership_attack(
    scores: ArrayLike, references: ArrayLike, splits: ArrayLike, n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Membership inference on the forget set from one score per example, against unseen test data.

    Target of every value: that of a model retrained without the forget set, not 0.5 and not 0, for the two sets may differ
    in more than membership. An AUC above the retrained model's means that too little was forgotten; one below means
    over-unlearning: the forget set stands out because it is fitted worse than unseen data (the Streisand effect).

    Args:
        scores: finite ``[n]``, higher for members: the margin log p / (1 - p) of the label (from the logits: the label's minus
            the logsumexp of the others).
        references: true classes ``[n]``.
        splits: ``[n]`` of "forget", "retain" or "test" (never trained on).
        n_bootstrap: resamples of the interval; 0 makes it NaN.
        seed: of every random choice.

    Returns:
        auc: chance that a forget example scores above a test example, ties half, in [0, 1]. Mann and Whitney (1947).
        auc_low, auc_high: 95% percentile bootstrap, forget and test rows resampled separately.
        auc_balanced: mean of the AUCs within classes, weighted by their forget rows, so that another mix of labels is not
            taken for membership; NaN when no class is in both sets. Target and directions as for auc.
        advantage: largest TPR - FPR of a threshold, in [0, 1], high on few rows. Yeom et al. (2018), arXiv 1709.01604.
        tpr_at_1_fpr: largest TPR with FPR <= 1%, in [0, 1]. Carlini et al. (2022), arXiv 2112.03570.
        logistic_accuracy: see `logistic_accuracy`, equally many forget and test rows of each class; 0.5 is chance. Its slope is
            fitted, so over-unlearning raises it as well. NaN below 5 pairs.
        mia_efficacy: see `mia_efficacy`, in [0, 1], higher is more forgotten. NaN without retain rows.

    Raises:
        ValueError: no forget or no test rows; an unknown split; a score that is not finite.
    """
    scores, references, splits = np.asarray(scores, dtype=float), np.asarray(references), np.asarray(splits)
    check_splits(splits, needed=("forget", "test"))
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite: take the label's logit minus the logsumexp of the other logits")
    order = np.argsort(scores)  # all random choices are made on sorted rows: the order given is irrelevant
    scores, references, splits = scores[order], references[order], splits[order]
    forget, retain, test = (scores[splits == name] for name in SPLITS)
    rng = np.random.default_rng(seed)
    return {
        **_attack_by_threshold(scores, forget, test, n_bootstrap, seed),
        **_attack_within_classes(scores, references, splits, rng, seed),
        "mia_efficacy": mia_efficacy(forget, retain, test, rng) if len(retain) else float("nan"),
    }


def attack(seen: dict[str, tuple[np.ndarray, np.ndarray]], n_bootstrap: int = 1000, seed: int = 0) -> dict[str, float]:
    """`membership_attack` on the margins of logits.

    Args:
        seen: logits ``[n, classes]`` and labels ``[n]``, as `predict` gives them, for ``forget``, unseen rows as ``test`` and,
            for the published attack, ``retain``.
        n_bootstrap, seed: as in `membership_attack`.
    """
    import torch

    from ..objective import margin

    margins = [margin(torch.from_numpy(logits), torch.from_numpy(labels)).numpy() for logits, labels in seen.values()]
    return membership_attack(
        scores=np.concatenate(margins),
        references=np.concatenate([labels for _, labels in seen.values()]),
        splits=np.repeat(list(seen), [len(m) for m in margins]),
        n_bootstrap=n_bootstrap,
        seed=seed,
    )


def _attack_by_threshold(
    scores: np.ndarray, forget: np.ndarray, test: np.ndarray, n_bootstrap: int, seed: int
) -> dict:
    """The attacks by one threshold on the score; all rows are sorted."""
    low, high = bootstrap_interval(
        lambda *counts: weighted_auc(forget, test, *counts), [len(forget), len(test)], n_bootstrap, seed
    )
    thresholds = np.append(np.unique(scores), np.inf)
    tpr, fpr = ((len(side) - np.searchsorted(side, thresholds)) / len(side) for side in (forget, test))
    return {
        "auc": float(weighted_auc(forget, test)[0]),
        "auc_low": low,
        "auc_high": high,
        "advantage": float((tpr - fpr).max()),
        "tpr_at_1_fpr": float(tpr[fpr <= 0.01].max()),
    }


def _attack_within_classes(
    scores: np.ndarray, references: np.ndarray, splits: np.ndarray, rng: np.random.Generator, seed: int
) -> dict:
    """The attacks that another mix of labels cannot help; all rows are sorted by score."""
    aucs, weights, pairs = [], [], []
    for label in np.unique(references):
        members, others = (scores[(splits == name) & (references == label)] for name in ("forget", "test"))
        if size := min(len(members), len(others)):
            aucs.append(weighted_auc(members, others)[0])
            weights.append(len(members))
            pairs.append([rng.choice(side, size, replace=False) for side in (members, others)])
    nan = float("nan")
    if not pairs:
        return {"auc_balanced": nan, "logistic_accuracy": nan}
    members, others = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return {
        "auc_balanced": float(np.average(aucs, weights=weights)),
        "logistic_accuracy": logistic_accuracy(members, others, seed) if len(members) >= 5 else nan,
    }


def check_splits(splits: np.ndarray, needed: tuple[str, ...] = ()) -> None:
    """Raise ValueError on a name outside `SPLITS`, or when one of ``needed`` has no rows."""
    present = set(splits.tolist())
    if unknown := sorted(present - set(SPLITS)):
        raise ValueError(f"unknown split {unknown[0]!r}: use one of {', '.join(SPLITS)}")
    if missing := [name for name in needed if name not in present]:
        raise ValueError(f"no {missing[0]} rows: the attack compares forget with test, mark some rows {missing[0]!r}")


def weighted_auc(
    members: np.ndarray,
    others: np.ndarray,
    member_counts: np.ndarray | None = None,
    other_counts: np.ndarray | None = None,
) -> np.ndarray:
    """AUC, ``[draws]``, of sorted scores ``[n]`` against sorted ``[m]``, each row counted as often as given.

    Counts are ``[draws, n]`` and ``[draws, m]`` with sums n and m; by default one draw of ones. A cumulative sum gives
    the others below and up to every member, so a draw costs O(n + m).
    """
    member_counts = np.ones((1, len(members))) if member_counts is None else member_counts
    other_counts = np.ones((1, len(others))) if other_counts is None else other_counts
    below = np.pad(other_counts.cumsum(axis=1), ((0, 0), (1, 0)))
    rank = below[:, np.searchsorted(others, members, "left")] + below[:, np.searchsorted(others, members, "right")]
    return (member_counts * rank).sum(axis=1) / (2 * len(members) * len(others))


def logistic_accuracy(members: np.ndarray, others: np.ndarray, seed: int) -> float:
    """5-fold balanced accuracy of a logistic regression that tells ``members`` ``[n]`` from ``others`` ``[n]``."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression())
    scores, truth = np.concatenate([members, others])[:, None], np.repeat([1, 0], [len(members), len(others)])
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    return float(cross_val_score(model, scores, truth, cv=folds, scoring="balanced_accuracy").mean())


def mia_efficacy(forget: np.ndarray, retain: np.ndarray, test: np.ndarray, rng: np.random.Generator) -> float:
    """Share of ``forget`` scores ``[n]`` that an SVC calls non-members.

    It is fitted on the label's probability, the logistic function of the score, of retain (members) and test rows, equally many, at
    most 2000 each. Jia et al. (2023), arXiv 2304.04934, and SalUn, arXiv 2310.12508 (C = 3, RBF kernel, gamma = 1).
    """
    from sklearn.svm import SVC

    size = min(len(retain), len(test), 2000)
    sample = np.concatenate([rng.choice(scores, size, replace=False) for scores in (retain, test)])
    probability = lambda scores: (1 + np.tanh(scores[:, None] / 2)) / 2
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(probability(sample), np.repeat([1, 0], size))
    return float(1 - attack.predict(probability(forget)).mean())
