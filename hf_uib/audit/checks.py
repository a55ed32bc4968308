"""The checks: each compares the audited model with the reference and with the retrained models, and fires or does not.

A check that needs what was not given says "not measured". Limits are the same for every task.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist

import numpy as np

from ..inference import ModelOutputs
from ..metrics import CounterfactualGap, MembershipAttack, UnlearningGap
from .statistics import Estimate, Resampler

REMAINS = 0.5  # share of the way from the retrained model back to the reference
REFIT_REMAINS = 0.7
REFIT_SHARE = 0.02  # of the forget set, for the re-fitted head
ACCURACY_LOST = 0.08
GROUP_LOST = 0.2
GROUP_ROWS = 20
REVERSED = 0.05
OVER = 0.05  # of AUC
USUAL = 5  # predictions of a class on the test set, by the reference and every retrained model
SAME = 1e-3  # relative distance of logits or features
EXPLAINED = 0.98  # of the variance of the logits, by those of the reference


@dataclass
class Check:
    """One check's outcome; ``fired`` is None where it could not be measured."""

    name: str
    fired: bool | None
    value: float
    limit: float
    detail: str
    meaning: str

    def as_dict(self) -> dict:
        """Ready for JSON."""
        return {k: getattr(self, k) for k in ("name", "fired", "value", "limit", "detail", "meaning")}


@dataclass
class AuditContext:
    """What all checks look at; figures are computed once.

    Attributes:
        seen: observations by model (``model``, ``reference`` and the oracles) and set.
        oracles: names of the retrained models.
        attributes: ``[n]`` of the test rows, coded by the class they stand for where ``coded``; -1 is no class.
        examples: ``[n]`` ids of the test rows' examples, or None.
        rows: a resampler by set.
        values: ``[n]`` the attribute as the user names it, for the groups.
        sizes: rows of each set before it was sampled.
    """

    seen: dict[str, dict[str, ModelOutputs]]
    oracles: list[str]
    attributes: np.ndarray | None
    coded: bool
    examples: np.ndarray | None
    rows: dict[str, Resampler]
    seed: int = 0
    values: np.ndarray | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    _memo: dict = field(default_factory=dict)

    def _once(self, key: tuple, compute: Callable):
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    @property
    def models(self) -> list[str]:
        """Names: the audited model, the reference, the oracles."""
        return list(self.seen)

    @property
    def parts(self) -> list[str]:
        """Names of the sets."""
        return list(self.rows)

    @cached_property
    def conflicting(self) -> np.ndarray:
        """``[n]`` test rows whose attribute stands for another class."""
        attributes = np.asarray(self.attributes)
        return (attributes != self.seen["reference"]["test"].labels) & (attributes >= 0)

    @property
    def bias_figures(self) -> list[str]:
        """The figures of `bias` that can be had."""
        if self.attributes is None:
            return []
        return [*(["conflicting_accuracy", "follow_rate", "aligned_advantage"] if self.coded else []), "cramers_v"]

    def accuracy(self, name: str, part: str) -> Estimate:
        """Share of right predictions."""
        seen = self.seen[name][part]
        right = seen.predictions == seen.labels
        return self._once(("accuracy", name, part), lambda: self.rows[part].ratio(right, np.ones_like(right)))

    def bias(self, name: str, figure: str) -> Estimate:
        """A bias figure on the test set; ``aligned_advantage`` is accuracy where attribute and label agree minus where not."""
        seen, rows = self.seen[name]["test"], self.rows["test"]
        right, against = seen.predictions == seen.labels, self.conflicting if self.coded else None

        def compute() -> Estimate:
            if figure == "cramers_v":
                return rows.cramers_v(seen.predictions, self.attributes)
            if figure == "follow_rate":
                return rows.ratio((seen.predictions == self.attributes) & against, against)
            lost = rows.ratio(right & against, against)
            if figure == "conflicting_accuracy":
                return lost
            aligned = self.attributes == seen.labels
            return rows.ratio(right & aligned, aligned) - lost

        return self._once((figure, name), compute)

    def attack(self, name: str) -> dict:
        """`MembershipAttack` on the margins of the labels; `auc` has the interval."""

        def compute() -> dict:
            parts = [self.seen[name][part] for part in self.parts]
            columns = {
                "scores": np.concatenate([p.margins for p in parts]),
                "references": np.concatenate([p.labels for p in parts]),
                "splits": [part for part in self.parts for _ in self.seen[name][part].labels],
            }
            return MembershipAttack(keep_in_memory=True).compute(**columns, n_bootstrap=0, seed=self.seed)

        return self._once(("attack", name), compute)

    def auc(self, name: str) -> Estimate:
        """AUC of the margins, forget rows against test rows; resampled by example, the same for all models."""

        def compute() -> Estimate:
            forget, test = (self.seen[name][part].margins for part in ("forget", "test"))
            return self.rows["forget"].auc(forget, test, self.rows["test"])

        return self._once(("auc", name), compute)

    def counterfactual(self, name: str) -> dict:
        """`CounterfactualGap` of the test rows."""
        seen = self.seen[name]["test"]
        ids = np.unique(self.examples, return_inverse=True)[1]
        scores = seen.probabilities[np.arange(len(ids)), seen.labels]
        metric = CounterfactualGap(keep_in_memory=True)
        columns = {"predictions": seen.predictions, "references": seen.labels, "scores": scores, "examples": ids}
        return self._once(("counterfactual", name), lambda: metric.compute(**columns, n_bootstrap=200))

    def gap(self, name: str) -> dict:
        """`UnlearningGap` to the first retrained model."""

        def compute() -> dict:
            mine, oracle = self.seen[name], self.seen[self.oracles[0]]
            columns = {
                "predictions": np.concatenate([mine[part].predictions for part in self.parts]),
                "retrained_predictions": np.concatenate([oracle[part].predictions for part in self.parts]),
                "references": np.concatenate([mine[part].labels for part in self.parts]),
                "splits": [part for part in self.parts for _ in mine[part].labels],
            }
            attacks = {"attack": self.attack(name), "retrained_attack": self.attack(self.oracles[0])}
            attacks = {key: attack["mia_efficacy"] for key, attack in attacks.items()}
            return UnlearningGap(keep_in_memory=True).compute(**columns, **attacks, n_bootstrap=200)

        return self._once(("gap", name), compute)

    @cached_property
    def members(self) -> dict[str, np.ndarray]:
        """The groups of the test rows by name: classes, values of the attribute, and both together; small ones left out."""
        labels = self.seen["reference"]["test"].labels
        groups = {f"class {y}": labels == y for y in np.unique(labels)}
        if self.values is not None:
            for b in np.unique(self.values):
                groups[f"attribute {b}"] = self.values == b
                groups |= {f"class {y}, attribute {b}": (labels == y) & (self.values == b) for y in np.unique(labels)}
        return {name: rows for name, rows in groups.items() if rows.sum() >= GROUP_ROWS}

    def group(self, name: str, group: str) -> Estimate:
        """Accuracy on a group of the test rows."""
        seen, rows = self.seen[name]["test"], self.members[group]
        right = (seen.predictions == seen.labels) & rows
        return self._once(("group", name, group), lambda: self.rows["test"].ratio(right, rows))

    def groups(self, name: str) -> dict:
        """Accuracy of every group, the worst, and the plain and the weighted mean."""
        groups = {key: self.group(name, key) for key in self.members}
        cells = {k: v for k, v in groups.items() if ", " in k} or groups
        values = np.array([e.value for e in cells.values()])
        sizes = np.array([self.members[k].sum() for k in cells])
        return {
            "worst": float(values.min(initial=1.0)),
            "worst_group": min(cells, key=lambda k: cells[k].value) if cells else "",
            "mean": float(values.mean()) if len(values) else float("nan"),
            "weighted_mean": float((values * sizes).sum() / sizes.sum()) if len(values) else float("nan"),
            "every": {key: e.as_dict() for key, e in groups.items()},
        }

    def refit(self) -> dict[str, Estimate]:
        """Follow rate of each model's features under a new linear head, fitted on 2% of the forget set (at least 50 rows)."""
        if not self.coded:
            return {}
        return {name: self._once(("refit", name), lambda n=name: self._refit(n)) for name in self.models}

    def _refit(self, name: str) -> Estimate:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        forget, test = self.seen[name]["forget"], self.seen[name]["test"]
        wanted = round(REFIT_SHARE * self.sizes.get("forget", len(forget.labels)))
        count = min(max(50, wanted), len(forget.labels))
        chosen = np.random.default_rng(self.seed).permutation(len(forget.labels))[:count]
        if len(np.unique(forget.labels[chosen])) < 2:
            return Estimate(float("nan"), np.full(2, np.nan))
        head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        head.fit(forget.features["head"][chosen], forget.labels[chosen])
        follows = head.predict(test.features["head"]) == self.attributes
        return self.rows["test"].ratio(follows & self.conflicting, self.conflicting)


# ---- The checks ----


def _share(model: Estimate, reference: Estimate, oracles: list[Estimate]) -> tuple[float, Estimate]:
    """How far the model is from the nearest oracle, back towards the reference: 0 at the oracle, 1 at the reference."""
    nearest = min(oracles, key=lambda o: abs(model.value - o.value))
    way = reference.value - nearest.value
    return ((model - nearest).value / way if way else 0.0), model - nearest


def _remains(
    name: str, evidence: AuditContext, figures: dict[str, Estimate], least: float, limit: float, meaning: str
) -> Check:
    """Fires where more than ``limit`` of what told the reference from the retrained models is still there."""
    if not evidence.oracles or not figures:
        return Check(name, None, float("nan"), limit, "needs retrained_model and what it is measured on", meaning)
    oracles = [figures[o] for o in evidence.oracles]
    share, difference = _share(figures["model"], figures["reference"], oracles)
    way = figures["reference"].value - max(o.value for o in oracles)
    if not way >= least:
        above = figures["model"] - max([figures["reference"], *oracles], key=lambda e: e.value)
        detail = f"reference and retrained models are alike here; the model is {above.value:+.3f} above them (limit {least})"
        worse = bool(above.value > least and above.low > 0)
        return Check(name, worse or None, above.value, least, detail, meaning)
    detail = f"{share:.0%} of the way back from the retrained model to the reference (limit {limit:.0%})"
    return Check(name, bool(share > limit and difference.low > 0), share, limit, detail, meaning)


def bias_remains(evidence: AuditContext) -> Check:
    """Too little was unlearned: the follow rate (Cramér's V where it cannot be had) is still the reference's."""
    figure = "follow_rate" if evidence.coded else "cramers_v"
    figures = {n: evidence.bias(n, figure) for n in evidence.models} if evidence.attributes is not None else {}
    meaning = "Most of the bias that retraining removes is still there."
    return _remains("bias_remains", evidence, figures, 0.02, REMAINS, meaning)


def head_refit(evidence: AuditContext) -> Check:
    """The encoder still offers the pattern: a new head on a few biased rows takes it up as readily as before."""
    meaning = "The encoder still offers the pattern: a new head, fitted on a few biased rows, takes it up again."
    return _remains("head_refit", evidence, evidence.refit(), 0.05, REFIT_REMAINS, meaning)


def membership_remains(evidence: AuditContext) -> Check:
    """Forget rows are still told from unseen ones."""
    meaning = "An attack still tells the forget examples from unseen ones."
    figures = {n: evidence.auc(n) for n in evidence.models} if evidence.oracles else {}
    return _remains("membership_remains", evidence, figures, 0.03, REMAINS, meaning)


def over_unlearned(evidence: AuditContext) -> Check:
    """Forget rows stand out by being *less* likely than unseen ones: over-unlearning gives them away too."""
    name, meaning = (
        "over_unlearned",
        "Over-unlearned: the forget examples stand out by being less likely than unseen ones.",
    )
    if not evidence.oracles:
        return Check(name, None, float("nan"), OVER, "needs retrained_model", meaning)
    lowest = min((evidence.auc(o) for o in evidence.oracles), key=lambda e: e.value)
    below = lowest - evidence.auc("model")
    detail = f"attack AUC minus the retrained model's: {-below.value:+.3f} (limit -{OVER})"
    return Check(name, bool(below.value > OVER and below.low > 0), -below.value, -OVER, detail, meaning)


def bias_reversed(evidence: AuditContext) -> Check:
    """The attribute's class is now avoided: where attribute and label agree the model does worse."""
    name, meaning = "bias_reversed", "The bias is reversed: the attribute's class is avoided."
    if not evidence.coded:
        return Check(name, None, float("nan"), REVERSED, "needs bias_column", meaning)
    mine = evidence.bias("model", "aligned_advantage")
    if not np.isfinite(mine.value):
        return Check(
            name, None, mine.value, -REVERSED, "attribute and label always agree (or never) on the test set", meaning
        )
    excess = mine
    if evidence.oracles:
        excess = mine - min((evidence.bias(o, "aligned_advantage") for o in evidence.oracles), key=lambda e: e.value)
    fired = mine.value < -REVERSED and mine.high < 0 and excess.value < -REVERSED and excess.high < 0
    detail = f"accuracy where attribute and label agree minus where not: {mine.value:+.3f} (limit -{REVERSED})"
    return Check(name, bool(fired), mine.value, -REVERSED, detail, meaning)


def accuracy_lost(evidence: AuditContext) -> Check:
    """Accuracy on the test or the retained set fell below that of the reference and of the retrained models."""
    meaning = "Accuracy is lost: far below both the reference and the retrained model."
    worst, where, fired = -1.0, "", False
    for part in (p for p in ("test", "retain") if p in evidence.parts):
        floor = [evidence.accuracy(n, part) for n in ["reference", *evidence.oracles]]
        lost = min(floor, key=lambda e: e.value) - evidence.accuracy("model", part)
        if lost.value > worst:
            worst, where = lost.value, part
        fired |= lost.value > ACCURACY_LOST and lost.low > 0
    detail = f"{where} accuracy minus the lowest of theirs: {-worst:+.3f} (limit -{ACCURACY_LOST})"
    return Check("accuracy_lost", bool(fired), -worst, -ACCURACY_LOST, detail, meaning)


def collapsed(evidence: AuditContext) -> Check:
    """Fewer than half of the classes are ever predicted on the test set, though the reference predicts them."""
    classes = evidence.seen["model"]["test"].logits.shape[1]
    others = ["reference", *evidence.oracles]
    counts = {n: np.bincount(evidence.seen[n]["test"].predictions, minlength=classes) for n in ["model", *others]}
    usual = np.all([counts[n] >= USUAL for n in others], axis=0)
    left = float((counts["model"][usual] > 0).sum() / max(usual.sum(), 1)) if usual.any() else 1.0
    shares = {n: count.max() / count.sum() for n, count in counts.items()}
    largest = float(shares["model"] - max(shares[n] for n in others))
    detail = f"{left:.0%} of the usual classes are predicted; the most frequent one {largest:+.2f} more often"
    fired = left <= 0.5 or largest > 0.4
    return Check("collapsed", bool(fired), left, 0.5, detail, "The model has collapsed to a few classes.")


def group_harmed(evidence: AuditContext) -> Check:
    """A group's accuracy is far below what both the reference and the retrained models have there."""
    if not evidence.oracles:  # less help from the pattern is what unlearning is for; only an oracle tells it from harm
        meaning = "Error has moved to another group."
        return Check("group_harmed", None, float("nan"), GROUP_LOST, "needs retrained_model", meaning)
    members = evidence.members
    z = NormalDist().inv_cdf(1 - 0.025 / max(len(members), 1))
    worst, where, fired = 0.0, "no group", False
    overall = [evidence.accuracy(n, "test") for n in ["reference", *evidence.oracles]]
    general = min(overall, key=lambda e: e.value).value - evidence.accuracy("model", "test").value
    for name in members:
        mine = evidence.group("model", name)
        lost = min((evidence.group(n, name) - mine for n in ["reference", *evidence.oracles]), key=lambda e: e.value)
        excess = lost.value - max(general, 0)
        harmed = excess > GROUP_LOST and lost.value > z * lost.error
        if (harmed, excess) > (fired, worst):
            worst, where, fired = excess, name, harmed
    detail = (
        f"{where}: {-worst:+.3f} against both, beyond the whole set's (limit -{GROUP_LOST}, {len(members)} groups)"
    )
    return Check(
        "group_harmed", bool(fired), -worst, -GROUP_LOST, detail, f"Error has moved to another group ({where})."
    )


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    spread = second - second.mean(0)
    return float(np.linalg.norm(first - second) / max(np.linalg.norm(spread), 1e-12))


def unchanged(evidence: AuditContext) -> Check:
    """The model gives the reference's answers: nothing was unlearned, or the adapter is not in the released files."""
    seen = evidence.seen
    value = max(_distance(seen["model"][p].logits, seen["reference"][p].logits) for p in evidence.parts)
    meaning = (
        "The model answers as the reference does: nothing was unlearned, or the adapter is missing from these files."
    )
    detail = f"relative distance of the logits {value:.2g} (limit {SAME})"
    return Check("unchanged", value < SAME, value, SAME, detail, meaning)


def _explained(evidence: AuditContext, name: str) -> float:
    """Share of the variance of a model's centred logits that those of the reference explain."""
    mine, theirs = (np.concatenate([evidence.seen[n][p].logits for p in evidence.parts]) for n in (name, "reference"))
    mine, theirs = (x - x.mean(1, keepdims=True) for x in (mine, theirs))
    mine, theirs = mine - mine.mean(0), theirs - theirs.mean(0)
    correlation = (mine * theirs).sum() / max(np.linalg.norm(mine) * np.linalg.norm(theirs), 1e-12)
    return float(max(correlation, 0) ** 2)


def logits_shifted(evidence: AuditContext) -> Check:
    """The logits are the reference's but for an offset of each class and one factor: a shift of thresholds."""
    explained = _explained(evidence, "model")
    usual = max((_explained(evidence, o) for o in evidence.oracles), default=0.0)
    meaning = "The logits are the reference's but for a shift of each class: only thresholds were moved."
    if not evidence.oracles and evidence.seen["model"]["test"].logits.shape[1] == 2:
        return Check("logits_shifted", None, explained, EXPLAINED, "two classes: needs retrained_model", meaning)
    already = unchanged(evidence).fired
    detail = f"{explained:.1%} of the logits' variance is the reference's (limit {EXPLAINED:.0%})"
    fired = explained > EXPLAINED and 1 - explained < (1 - usual) / 2 and not already
    return Check("logits_shifted", bool(fired), explained, EXPLAINED, detail, meaning)


def encoder_untouched(evidence: AuditContext) -> Check:
    """The encoder is the reference's: only the head was changed."""
    blocks = [k for k in evidence.seen["model"]["test"].features if k != "head"]
    meaning = "The encoder is the reference's: only the head was changed, so what it knew is still inside."
    if not blocks:
        return Check("encoder_untouched", None, float("nan"), SAME, "the model has no list of blocks", meaning)
    last = blocks[-1]

    def moved(name: str) -> float:
        pairs = [[evidence.seen[n][p].features.get(last) for n in (name, "reference")] for p in evidence.parts]
        if any(a is None or b is None or a.shape != b.shape for a, b in pairs):
            return float("nan")
        return max(_distance(a, b) for a, b in pairs)

    value = moved("model")
    if np.isnan(value):
        return Check("encoder_untouched", None, value, SAME, "the reference has another architecture", meaning)
    if any(moved(oracle) < SAME for oracle in evidence.oracles):
        detail = "a retrained model has the reference's encoder too"
        return Check("encoder_untouched", None, value, SAME, detail, meaning)
    detail = f"relative distance of the last block's output {value:.2g} (limit {SAME})"
    fired = value < SAME and not unchanged(evidence).fired
    return Check("encoder_untouched", bool(fired), value, SAME, detail, meaning)


CHECKS: list[Callable[[AuditContext], Check]] = [
    unchanged,
    logits_shifted,
    encoder_untouched,
    bias_remains,
    bias_reversed,
    head_refit,
    membership_remains,
    over_unlearned,
    accuracy_lost,
    collapsed,
    group_harmed,
]
