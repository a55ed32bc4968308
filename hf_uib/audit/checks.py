"""The checks: each compares the audited model with the reference and with the retrained models, and fires or does not.

A check of one's own is a function and a decorator:

    @register_check("too_sure", meaning="The model is surer of the forget examples than before.")
    def too_sure(context: AuditContext) -> Check:
        mine, before = (context.outputs[name]["forget"].margins.mean() for name in ("model", "reference"))
        return Check(fired=mine > before, value=mine, limit=before, detail=f"mean margin {mine:.2f} nats, before {before:.2f}")
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from ..inference import ModelOutputs
from ..metrics.bias import cramers_v
from .context import AuditContext
from .statistics import Estimate

# ---- The registry ----


@dataclass
class Check:
    """One check's outcome.

    Attributes:
        fired: None where it could not be measured.
        value, limit: what was compared.
        detail: the comparison in words.
        name: the check's; set by the registry.
        meaning: what it means when the check fires; left empty, it is what the check was registered with.
    """

    fired: bool | None
    value: float
    limit: float
    detail: str
    name: str = ""
    meaning: str = ""

    @classmethod
    def not_measured(cls, limit: float, why: str, value: float = float("nan")) -> "Check":
        """The outcome where something that the check needs was not given or is not there."""
        return cls(None, value, limit, why)

    def as_dict(self) -> dict:
        """Ready for JSON, NaN aside."""
        return {key: getattr(self, key) for key in ("name", "fired", "value", "limit", "detail", "meaning")}


@dataclass(frozen=True)
class RegisteredCheck:
    """A check by name, see `register_check`. Calling it gives its outcome."""

    name: str
    meaning: str
    function: Callable[[AuditContext], Check]
    any_size: bool = False
    deep: bool = False

    def __call__(self, context: AuditContext) -> Check:
        check = self.function(context)
        return replace(
            check,
            fired=None if check.fired is None else bool(check.fired),
            value=float(check.value),
            limit=float(check.limit),
            name=self.name,
            meaning=check.meaning or self.meaning,
        )


CHECKS: dict[str, RegisteredCheck] = {}


def register_check(
    name: str, meaning: str, any_size: bool = False, deep: bool = False
) -> Callable[[Callable[[AuditContext], Check]], Callable[[AuditContext], Check]]:
    """Makes a function of the `AuditContext` a check of every audit from now on; ``CHECKS.pop(name)`` takes it out.

    Args:
        name: in the report and its flags.
        meaning: one sentence, shown when the check fires.
        any_size: it is trusted on a few rows too.
        deep: it reads ``context.deep``, so it needs ``audit_model(deep=True)``.

    Raises:
        ValueError: there is a check of this name.
    """

    def register(function: Callable[[AuditContext], Check]) -> Callable[[AuditContext], Check]:
        if name in CHECKS:
            raise ValueError(f"There is a check '{name}' already; take another name.")
        CHECKS[name] = RegisteredCheck(name, meaning, function, any_size, deep)
        return function

    return register


def run_checks(context: AuditContext) -> list[Check]:
    """The outcome of every check; with few rows most of them count as not measured."""
    few = few_rows(context)
    checks = []
    for entry in CHECKS.values():
        if entry.deep and not context.deep:
            continue
        check = entry(context)
        checks.append(replace(check, fired=None) if few and not entry.any_size else check)
    return checks


def few_rows(context: AuditContext) -> bool:
    """Whether the forget or the test set is too small for most checks."""
    return min(len(context.sets["forget"]), len(context.sets["test"])) < context.thresholds.min_rows


# ---- Is the model the reference in disguise? ----


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    """Relative to the spread of the second; both ``[n, d]``."""
    spread = second - second.mean(0)
    return float(np.linalg.norm(first - second) / np.maximum(np.linalg.norm(spread), 1e-12))


@register_check(
    "unchanged",
    "The model answers as the reference does: nothing was unlearned, or the adapter is missing from these files.",
    any_size=True,
)
def unchanged(context: AuditContext) -> Check:
    """The model gives the reference's answers: nothing was unlearned, or the adapter is not in the released files."""
    outputs, limit = context.outputs, context.thresholds.unchanged
    value = max(_distance(outputs["model"][p].logits, outputs["reference"][p].logits) for p in context.parts)
    return Check(value < limit, value, limit, f"relative distance of the logits {value:.2g} (limit {limit})")


def _explained(context: AuditContext, name: str) -> float:
    """Fraction of the variance of a model's centred logits that those of the reference explain."""
    outputs, parts = context.outputs, context.parts
    logits = [np.concatenate([outputs[n][p].logits for p in parts]) for n in (name, "reference")]
    mine, theirs = (x - x.mean(0) for x in (x - x.mean(1, keepdims=True) for x in logits))
    correlation = (mine * theirs).sum() / np.maximum(np.linalg.norm(mine) * np.linalg.norm(theirs), 1e-12)
    return float(max(correlation, 0) ** 2)


@register_check("logits_shifted", "The logits are the reference's, shifted by class: only thresholds were moved.")
def logits_shifted(context: AuditContext) -> Check:
    """The logits are the reference's with an offset for each class and one factor: a shift of thresholds."""
    limit, explained = context.thresholds.logits_shifted, _explained(context, "model")
    usual = max((_explained(context, oracle) for oracle in context.oracles), default=0.0)
    if not context.oracles and context.outputs["model"]["test"].logits.shape[1] == 2:
        return Check.not_measured(limit, "two classes: needs retrained_model", explained)
    fired = explained > limit and 1 - explained < (1 - usual) / 2 and not unchanged(context).fired
    detail = f"{explained:.1%} of the logits' variance is the reference's (limit {limit:.0%})"
    return Check(fired, explained, limit, detail)


def _encoder_distance(context: AuditContext, name: str, block: str) -> float:
    """From the reference's output of a block; NaN where it has no such block or another width."""
    pairs = [[context.outputs[n][p].features.get(block) for n in (name, "reference")] for p in context.parts]
    distances = [
        _distance(mine, theirs) if mine is not None and theirs is not None and mine.shape == theirs.shape else np.nan
        for mine, theirs in pairs
    ]
    return float(np.max(distances))


@register_check(
    "encoder_untouched",
    "The encoder is the reference's: only the head was changed, so what it knew is still inside.",
    any_size=True,
)
def encoder_untouched(context: AuditContext) -> Check:
    """The encoder is the reference's: only the head was changed."""
    limit = context.thresholds.encoder_untouched
    blocks = [block for block in context.outputs["model"]["test"].features if block != "head"]
    if not blocks:
        return Check.not_measured(limit, "the model has no list of blocks")
    value = _encoder_distance(context, "model", blocks[-1])
    if np.isnan(value):
        return Check.not_measured(limit, "the reference has another architecture")
    if any(_encoder_distance(context, oracle, blocks[-1]) < limit for oracle in context.oracles):
        return Check.not_measured(limit, "a retrained model has the reference's encoder too", value)
    fired = value < limit and not unchanged(context).fired
    return Check(fired, value, limit, f"relative distance of the last block's output {value:.2g} (limit {limit})")


# ---- Is the pattern still there, or more than gone? ----


def _way_back(
    context: AuditContext, figures: Callable[[], dict[str, Estimate]], difference: float, limit: float
) -> Check:
    """Fires where more than ``limit`` of what distinguishes the reference from the nearest retrained model is still there.

    Args:
        figures: of each model by name; empty where they cannot be had.
        difference: of reference and retrained models, under which there is no way back; the check then fires if the model is above
            them all by more.
    """
    values = figures() if context.oracles else {}
    if not values:
        return Check.not_measured(limit, "needs retrained_model and what it is measured on")
    model, reference, oracles = values["model"], values["reference"], [values[o] for o in context.oracles]
    if not reference.value - max(o.value for o in oracles) >= difference:
        above = model - max([reference, *oracles], key=lambda e: e.value)
        detail = f"reference and retrained models are alike here; the model is {above.value:+.3f} above them (limit {difference})"
        return Check(above.value > difference and above.low > 0 or None, above.value, difference, detail)
    nearest = min(oracles, key=lambda o: abs(model.value - o.value))
    gap, way = model - nearest, reference.value - nearest.value
    fraction = gap.value / way if way else 0.0
    detail = f"{fraction:.0%} of the way back from the retrained model to the reference (limit {limit:.0%})"
    return Check(fraction > limit and gap.low > 0, fraction, limit, detail)


@register_check("bias_remains", "Most of the bias that retraining removes is still there.")
def bias_remains(context: AuditContext) -> Check:
    """Too little was unlearned: the shortcut rate (Cramér's V where it cannot be had) is still the reference's."""
    limits, figure = context.thresholds, "follow_rate" if context.coded else "cramers_v"
    names = context.names if context.attribute is not None else []
    figures = lambda: {name: context.bias(name, figure) for name in names}
    return _way_back(context, figures, limits.bias_difference, limits.bias_remains)


@register_check("bias_reversed", "The bias is reversed: the attribute's class is avoided.")
def bias_reversed(context: AuditContext) -> Check:
    """The attribute's class is now avoided: where attribute and label agree the model does worse."""
    limit = context.thresholds.bias_reversed
    if not context.coded:
        return Check.not_measured(limit, "needs a bias_column whose values stand for classes in the forget set")
    mine = context.bias("model", "aligned_advantage")
    if not np.isfinite(mine.value):
        why = "attribute and label always agree (or never) on the test set"
        return Check.not_measured(-limit, why, mine.value)
    excess = mine
    if context.oracles:
        excess = mine - min((context.bias(o, "aligned_advantage") for o in context.oracles), key=lambda e: e.value)
    fired = mine.value < -limit and mine.high < 0 and excess.value < -limit and excess.high < 0
    detail = f"accuracy where attribute and label agree minus where not: {mine.value:+.3f} (limit -{limit})"
    return Check(fired, mine.value, -limit, detail)


@register_check(
    "head_refit",
    "The encoder still offers the pattern: a new head, fitted on a few biased rows, takes it up again.",
)
def head_refit(context: AuditContext) -> Check:
    """The encoder still offers the pattern: a new head on a few biased rows takes it up as readily as before."""
    return _way_back(context, context.refit, context.thresholds.refit_difference, context.thresholds.head_refit)


@register_check("membership_remains", "An attack still separates the forget examples from unseen ones.")
def membership_remains(context: AuditContext) -> Check:
    """An attack still separates forget rows from unseen ones."""
    figures = lambda: {name: context.auc(name) for name in context.names}
    return _way_back(context, figures, context.thresholds.auc_difference, context.thresholds.membership_remains)


@register_check(
    "over_unlearned", "Over-unlearned: the forget examples stand out by being less likely than unseen ones."
)
def over_unlearned(context: AuditContext) -> Check:
    """Forget rows stand out by being *less* likely than unseen ones: over-unlearning gives them away too."""
    limit = context.thresholds.over_unlearned
    if not context.oracles:
        return Check.not_measured(limit, "needs retrained_model")
    below = min((context.auc(o) for o in context.oracles), key=lambda e: e.value) - context.auc("model")
    detail = f"attack AUC minus the retrained model's: {-below.value:+.3f} (limit -{limit})"
    return Check(below.value > limit and below.low > 0, -below.value, -limit, detail)


# ---- What did it cost? ----


@register_check("accuracy_lost", "Accuracy is lost: far below both the reference and the retrained model.")
def accuracy_lost(context: AuditContext) -> Check:
    """Accuracy on the test or the retained set fell below that of the reference and of the retrained models."""
    limit = context.thresholds.accuracy_lost
    worst, where, fired = -1.0, "", False
    for part in (p for p in ("test", "retain") if p in context.parts):
        floor = [context.accuracy(n, part) for n in ["reference", *context.oracles]]
        lost = min(floor, key=lambda e: e.value) - context.accuracy("model", part)
        if lost.value > worst:
            worst, where = lost.value, part
        fired |= lost.value > limit and lost.low > 0
    detail = f"{where} accuracy minus the lowest of theirs: {-worst:+.3f} (limit -{limit})"
    return Check(fired, -worst, -limit, detail)


@register_check("collapsed", "The model has collapsed to a few classes.")
def collapsed(context: AuditContext) -> Check:
    """Many classes are never predicted on the test set, though the reference predicts them, or one takes them all."""
    limits, classes = context.thresholds, context.outputs["model"]["test"].logits.shape[1]
    others = ["reference", *context.oracles]
    counts = {n: np.bincount(context.outputs[n]["test"].predictions, minlength=classes) for n in ["model", *others]}
    usual = np.all([counts[n] >= limits.usual_predictions for n in others], axis=0)
    left = float((counts["model"][usual] > 0).sum() / max(usual.sum(), 1)) if usual.any() else 1.0
    fractions = {n: count.max() / count.sum() for n, count in counts.items()}
    largest = float(fractions["model"] - max(fractions[n] for n in others))
    detail = f"{left:.0%} of the usual classes are predicted; the most frequent one {largest:+.2f} more often"
    return Check(left <= limits.collapsed or largest > limits.largest_class, left, limits.collapsed, detail)


@register_check("group_harmed", "Error has moved to another group.")
def group_harmed(context: AuditContext) -> Check:
    """A group's accuracy is far below what both the reference and the retrained models have there, after Bonferroni."""
    limit, members = context.thresholds.group_harmed, context.members
    if not context.oracles:  # less help from the pattern is what unlearning is for; only an oracle tells it from harm
        return Check.not_measured(limit, "needs retrained_model")
    z = NormalDist().inv_cdf(1 - 0.025 / max(len(members), 1))
    worst, where, fired = 0.0, "no group", False
    others = ["reference", *context.oracles]
    overall = min((context.accuracy(n, "test") for n in others), key=lambda e: e.value)
    general = overall.value - context.accuracy("model", "test").value
    for name in members:
        mine = context.group("model", name)
        lost = min((context.group(n, name) - mine for n in others), key=lambda e: e.value)
        excess = lost.value - max(general, 0)
        harmed = excess > limit and lost.value > z * lost.error
        if (harmed, excess) > (fired, worst):
            worst, where, fired = excess, name, harmed
    detail = f"{where}: {-worst:+.3f} against both, beyond the whole set's (limit -{limit}, {len(members)} groups)"
    return Check(fired, -worst, -limit, detail, meaning=f"Error has moved to another group ({where}).")


# ---- Does it come back? (deep) ----


def plain_bias(outputs: ModelOutputs, context: AuditContext) -> float:
    """The bias of a model's outputs on the test rows, without an interval: shortcut rate, Cramér's V, or NaN."""
    if context.attribute is None or (context.coded and not context.conflicting.any()):
        return float("nan")
    if context.coded:
        return float((outputs.predictions == context.codes)[context.conflicting].mean())
    return cramers_v(outputs.predictions, context.codes)


@register_check(
    "relearns_faster",
    "The bias comes back in fewer steps than a retrained model needs to take it up.",
    any_size=True,
    deep=True,
)
def relearns_faster(context: AuditContext) -> Check:
    """Training on a few forget rows brings half of the bias back in far fewer steps than in the retrained model."""
    limit = context.thresholds.relearns_faster
    if not context.oracles or context.attribute is None:
        return Check.not_measured(limit, "needs retrained_model and bias_column")
    never = 2 * context.thresholds.relearning_steps[-1]
    mine, theirs = (
        never if half is None else half
        for half in (context.deep["relearning"][n]["half"]["forget"] for n in ("model", context.oracles[0]))
    )
    original = plain_bias(context.outputs["reference"]["test"], context)
    if theirs == 0 or mine == theirs == never or not np.isfinite(original):
        return Check.not_measured(
            limit, "the bias does not come back in either, or half of it is there from the start"
        )
    ratio = mine / theirs
    detail = f"half of the bias is back after {mine} steps, in the retrained model after {theirs} ({never}: not seen)"
    return Check(ratio < limit, ratio, limit, detail)


@register_check(
    "comes_back_compressed", "Rounding or pruning the weights gives the bias back.", any_size=True, deep=True
)
def comes_back_compressed(context: AuditContext) -> Check:
    """Rounded or pruned weights are more biased, beyond what happens to the retrained model's."""
    limit = context.thresholds.comes_back_compressed
    if not context.oracles or context.attribute is None:
        return Check.not_measured(limit, "needs retrained_model and bias_column")
    oracle = context.oracles[0]
    plain = {n: plain_bias(context.outputs[n]["test"], context) for n in ("model", "reference", oracle)}
    way = plain["reference"] - plain[oracle]
    if not way >= context.thresholds.bias_difference:
        return Check.not_measured(limit, "the reference is hardly more biased than the retrained model")
    gains = {
        kind: (row["model"]["bias"] - plain["model"] - max(row[oracle]["bias"] - plain[oracle], 0)) / way
        for kind, row in context.deep["compression"].items()
    }
    worst = max(gains, key=lambda kind: gains[kind])
    detail = f"{worst}: {gains[worst]:+.0%} of the way back to the reference (limit {limit:.0%})"
    return Check(gains[worst] > limit, gains[worst], limit, detail)
