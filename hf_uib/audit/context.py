"""What all checks look at: what each model says about the rows, and the figures that follow, computed once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from torch import nn

from ..inference import ModelOutputs, has_weights
from ..metrics import counterfactual_gap, klom, membership_attack, memorisation_strata, unlearning_gap
from .statistics import Estimate, Resampler
from .thresholds import AuditThresholds

P = ParamSpec("P")
R = TypeVar("R")
N_BOOTSTRAP = 200  # of the intervals that a metric makes itself


def _once(method: Callable[Concatenate["AuditContext", P], R]) -> Callable[Concatenate["AuditContext", P], R]:
    """Keeps what a method returned, by its arguments."""

    @wraps(method)
    def cached(self: "AuditContext", *args: P.args, **kwargs: P.kwargs) -> R:
        key = (method.__name__, args, *sorted(kwargs.items()))
        if key not in self._memo:
            self._memo[key] = method(self, *args, **kwargs)
        return self._memo[key]

    return cached


@dataclass(frozen=True)
class BiasAttribute:
    """The attribute of the test rows.

    Attributes:
        values: ``[n]`` as the user names them.
        codes: ``[n]`` integers; the class that the value stands for where ``stands_for_classes``. -1 is none.
        stands_for_classes: the attribute gave the label away on the forget set.
        groups: ``[n]`` names as ``sex=f``; empty where a row has no value.
        concerned: ``[n]``, of labelled tokens: those whose class the forget set's tokens have too. None: all rows.
    """

    values: np.ndarray
    codes: np.ndarray
    stands_for_classes: bool
    groups: np.ndarray
    concerned: np.ndarray | None = None


@dataclass
class AuditContext:
    """What all checks look at.

    Attributes:
        models: plain models by name: ``model`` (the audited one), ``reference`` and the retrained ones.
        oracles: names of the retrained models.
        sets: encoded rows that are looked at: ``forget``, ``test`` and, where they were given, ``retain``.
        outputs: of each model on each set.
        sizes: rows of each set before it was sampled.
        resamplers: by set; the resamples are the same for all models.
        attributes: of the test rows, by column; of several columns also their crossing, last. The first is the one whose bias the
            checks judge.
        examples: ``[n]`` ids of the test rows' examples, or None.
        processing_class: image processor or tokenizer.
        thresholds: the limits.
        seed: of every sample.
        deep: what `deep_audit` found; empty where it was not asked for.
        label: the one that is looked at, where a row has several.
        positive: the class that false alarms and misses are about, and its name; None where there is none.
    """

    models: dict[str, nn.Module]
    oracles: list[str]
    sets: dict[str, Any]
    outputs: dict[str, dict[str, ModelOutputs]]
    sizes: dict[str, int]
    resamplers: dict[str, Resampler]
    attributes: dict[str, BiasAttribute] = field(default_factory=dict)
    examples: np.ndarray | None = None
    processing_class: Any = None
    thresholds: AuditThresholds = field(default_factory=AuditThresholds)
    seed: int = 0
    deep: dict[str, Any] = field(default_factory=dict)
    label: str | None = None
    positive: tuple[int, str] | None = None
    _memo: dict[tuple, Any] = field(default_factory=dict, repr=False)

    # ---- What there is ----

    @property
    def names(self) -> list[str]:
        """Of the models: the audited one, the reference, the oracles."""
        return list(self.outputs)

    @property
    def parts(self) -> list[str]:
        """Names of the sets."""
        return list(self.resamplers)

    @property
    def attribute(self) -> BiasAttribute | None:
        """The one whose bias the checks judge."""
        return next(iter(self.attributes.values()), None)

    @property
    def weights(self) -> bool:
        """Whether every model has weights; an exported file has logits alone."""
        return all(map(has_weights, self.models.values()))

    @property
    def coded(self) -> bool:
        """Whether the attribute stands for classes."""
        return self.attribute is not None and self.attribute.stands_for_classes

    @property
    def codes(self) -> np.ndarray:
        """``[n]`` the attribute of the test rows, see `BiasAttribute`.

        Raises:
            ValueError: the audit has no bias attribute.
        """
        if self.attribute is None:
            raise ValueError("This audit has no bias attribute; give bias_column.")
        return self.attribute.codes

    @cached_property
    def conflicting(self) -> np.ndarray:
        """``[n]`` test rows whose attribute stands for another class."""
        against = (self.codes != self.outputs["reference"]["test"].labels) & (self.codes >= 0)
        return against if self._concerned is None else against & self._concerned

    @property
    def _concerned(self) -> np.ndarray | None:
        return None if self.attribute is None else self.attribute.concerned

    @property
    def of_tokens(self) -> bool:
        """Whether the examples are labelled tokens, of which a row has several."""
        return self.outputs["model"]["test"].rows is not None

    # ---- Accuracy and bias ----

    @_once
    def accuracy(self, name: str, part: str) -> Estimate:
        """Fraction of right predictions."""
        outputs = self.outputs[name][part]
        right = outputs.predictions == outputs.labels
        return self.resamplers[part].ratio(right, np.ones_like(right))

    @property
    def bias_figures(self) -> list[str]:
        """The figures of `bias` that can be had."""
        if self.attribute is None:
            return []
        return [*(["conflicting_accuracy", "follow_rate", "aligned_advantage"] if self.coded else []), "cramers_v"]

    @_once
    def bias(self, name: str, figure: str) -> Estimate:
        """A bias figure on the test set; ``aligned_advantage`` is accuracy where attribute and label agree minus where not."""
        outputs, resampler = self.outputs[name]["test"], self.resamplers["test"]
        if figure == "cramers_v":
            return resampler.cramers_v(outputs.predictions, self.codes, self._concerned)
        against = self.conflicting
        if figure == "follow_rate":
            return resampler.ratio((outputs.predictions == self.codes) & against, against)
        right = outputs.predictions == outputs.labels
        lost = resampler.ratio(right & against, against)
        if figure == "conflicting_accuracy":
            return lost
        aligned = self.codes == outputs.labels
        return resampler.ratio(right & aligned, aligned) - lost

    @_once
    def counterfactual(self, name: str) -> dict[str, float]:
        """`counterfactual_gap` of the test rows."""
        outputs, ids = self.outputs[name]["test"], np.asarray(self.examples)
        scores = outputs.probabilities[np.arange(len(ids)), outputs.labels]
        return counterfactual_gap(outputs.predictions, scores, outputs.labels, ids, n_bootstrap=N_BOOTSTRAP)

    # ---- Membership, and the distance from retraining ----

    @_once
    def attack(self, name: str) -> dict[str, float]:
        """`membership_attack` on the margins of the labels, without an interval; `auc` has it. A row of labelled tokens has their
        mean, and no class."""
        outputs = [self.outputs[name][part] for part in self.parts]
        margins = [o.row_margins for o in outputs]
        return membership_attack(
            scores=np.concatenate(margins),
            references=np.concatenate(
                [o.labels if o.rows is None else np.zeros(len(m)) for o, m in zip(outputs, margins, strict=True)]
            ),
            splits=np.repeat(self.parts, [len(m) for m in margins]),
            n_bootstrap=0,
            seed=self.seed,
        )

    @_once
    def auc(self, name: str) -> Estimate:
        """AUC of the margins, forget rows against test rows; resampled by example, the same for all models."""
        forget, test = (self.outputs[name][part].row_margins for part in ("forget", "test"))
        mine, theirs = (self.resamplers[part].of_groups() if self.of_tokens else self.resamplers[part]
                        for part in ("forget", "test"))  # fmt: skip
        return mine.auc(forget, test, theirs)

    @_once
    def gap(self, name: str) -> dict[str, float]:
        """`unlearning_gap` to the first retrained model; of labelled tokens, which are no independent rows, without an interval."""
        mine, oracle = self.outputs[name], self.outputs[self.oracles[0]]
        return unlearning_gap(
            predictions=np.concatenate([mine[part].predictions for part in self.parts]),
            retrained_predictions=np.concatenate([oracle[part].predictions for part in self.parts]),
            references=np.concatenate([mine[part].labels for part in self.parts]),
            splits=np.repeat(self.parts, [len(mine[part].labels) for part in self.parts]),
            attack=self.attack(name)["mia_efficacy"],
            retrained_attack=self.attack(self.oracles[0])["mia_efficacy"],
            n_bootstrap=0 if self.of_tokens else N_BOOTSTRAP,
        )

    @_once
    def strata(self, name: str) -> dict[str, dict[str, float]]:
        """Thirds of the forget set by the reference's margin, see `memorisation_strata`; against the first retrained model."""
        mine, oracle = self.outputs[name]["forget"], self.outputs[self.oracles[0]]["forget"]
        return memorisation_strata(
            predictions=mine.predictions,
            retrained_predictions=oracle.predictions,
            references=mine.labels,
            margins=mine.margins,
            retrained_margins=oracle.margins,
            confidences=self.outputs["reference"]["forget"].margins,
            n_bootstrap=0 if self.of_tokens else N_BOOTSTRAP,
            seed=self.seed,
        )["strata"]

    def klom(self, name: str, part: str) -> dict[str, float]:
        """`klom` of one model against all retrained models but one, which is the model itself if it is one of them, else each in
        turn: so what the retrained models get is the target."""
        margins = {n: self.outputs[n][part].margins for n in {name, *self.oracles}}
        left_out = [name] if name in self.oracles else self.oracles
        others = lambda out: np.stack([margins[oracle] for oracle in self.oracles if oracle != out], axis=1)
        values = [klom(margins[name][:, None], others(out)) for out in left_out]
        return {key: float(np.mean([value[key] for value in values])) for key in values[0]}

    # ---- Groups ----

    @cached_property
    def members(self) -> dict[str, np.ndarray]:
        """The groups of the test rows by name: classes, values of each attribute, and both together; small ones left out."""
        labels = self.outputs["reference"]["test"].labels
        groups = {f"class {y}": labels == y for y in np.unique(labels)}
        for attribute in self.attributes.values():
            alone = len(self.attributes) == 1
            names = np.char.add("attribute ", attribute.values) if alone else attribute.groups
            names = np.where(attribute.groups == "", "", names)
            for b in np.unique(names[names != ""]):
                groups[b] = names == b
                groups |= {f"class {y}, {b}": (labels == y) & (names == b) for y in np.unique(labels)}
        return {name: rows for name, rows in groups.items() if self.rows_in(rows) >= self.thresholds.min_group_rows}

    def rows_in(self, chosen: np.ndarray) -> int:
        """How many test rows the ``chosen [n]`` examples are of: tokens of one row are one."""
        rows = self.outputs["reference"]["test"].rows
        return int(chosen.sum()) if rows is None else len(np.unique(rows[chosen]))

    @_once
    def group(self, name: str, group: str) -> Estimate:
        """Accuracy on a group of the test rows."""
        outputs, rows = self.outputs[name]["test"], self.members[group]
        return self.resamplers["test"].ratio((outputs.predictions == outputs.labels) & rows, rows)

    def groups(self, name: str) -> dict[str, Any]:
        """Accuracy of every group, the worst, and the plain and the weighted mean."""
        groups = {key: self.group(name, key) for key in self.members}
        cells = {k: accuracy for k, accuracy in groups.items() if k.startswith("class ") and ", " in k} or groups
        values = np.array([accuracy.value for accuracy in cells.values()])
        sizes = np.array([self.members[key].sum() for key in cells])
        return {
            "worst": float(values.min(initial=1.0)),
            "worst_group": min(cells, key=lambda key: cells[key].value) if cells else "",
            "mean": float(values.mean()) if len(values) else float("nan"),
            "weighted_mean": float((values * sizes).sum() / sizes.sum()) if len(values) else float("nan"),
            "every": {key: accuracy.as_dict() for key, accuracy in groups.items()},
        }

    # ---- The re-fitted head ----

    def refit(self) -> dict[str, Estimate]:
        """Shortcut rate of each model's features under a new linear head; empty where the attribute stands for no classes, or a
        model has no features."""
        return {name: self._refit(name) for name in self.names} if self.coded and self.weights else {}

    @_once
    def _refit(self, name: str) -> Estimate:
        """The head is fitted on a small part of the forget set."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        forget, test = self.outputs[name]["forget"], self.outputs[name]["test"]
        rows = len(forget.labels) if forget.rows is None else int(forget.rows.max()) + 1
        wanted = round(self.thresholds.refit_fraction * self.sizes.get("forget", rows))
        chosen = np.random.default_rng(self.seed).permutation(rows)[: max(self.thresholds.refit_rows, wanted)]
        if forget.rows is not None:
            chosen = np.flatnonzero(np.isin(forget.rows, chosen))
        if len(np.unique(forget.labels[chosen])) < 2:
            return Estimate(float("nan"), np.full(2, np.nan))
        head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        head.fit(forget.features["head"][chosen], forget.labels[chosen])
        follows = head.predict(test.features["head"]) == self.codes
        return self.resamplers["test"].ratio(follows & self.conflicting, self.conflicting)
