"""The audit: what a model still knows of its forget set, against the model retrained without it."""

import copy
import json
import math
import os
from dataclasses import dataclass, field

import numpy as np
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.data import Subset

from .. import __version__
from ..checkpointing import write_json
from ..data.checks import check_labels
from ..data.pairing import sample_indices
from ..data.reading import encode
from ..inference import ModelOutputs, observe, processes
from ..metrics.bias_correlation import cramers_v
from ..metrics.tables import attribute_classes
from ..models import load_classifier
from ..provenance import detached
from .checks import CHECKS, AuditContext, Check
from .statistics import Resampler

SCHEMA = 1
TELLING = 0.3  # Cramér's V of attribute and label on the forget set, from which on the attribute stands for classes
LEAST = 30  # forget and test rows, under which no check is trusted
SAMPLE = {"forget": 1000, "retain": 1000, "test": 5000}  # rows looked at


@dataclass
class AuditReport:
    """What was measured, and what follows from it. `str` gives the table.

    Attributes:
        passed: no check fired.
        flags: names of the checks that did.
        checks: every check: name, value, limit, whether it fired (None: not measured), and what it means.
        metrics: nested: ``metrics[set or topic][model][figure]``, each figure with ``value``, ``low`` and ``high`` (95%).
        not_measured: what would have been needed for the rest, in words.
        verdict: one paragraph.
    """

    checks: list[Check]
    metrics: dict
    not_measured: list[str]
    verdict: str = ""
    deep: dict = field(default_factory=dict)

    @property
    def flags(self) -> list[str]:
        """Names of the checks that fired."""
        return [check.name for check in self.checks if check.fired]

    @property
    def passed(self) -> bool:
        """Whether no check fired."""
        return not self.flags

    def to_dict(self) -> dict:
        """Everything, ready for JSON; docs/audit.md describes the schema."""
        return {
            "schema": SCHEMA,
            "hf_uib": __version__,
            "passed": self.passed,
            "flags": self.flags,
            "verdict": self.verdict,
            "not_measured": self.not_measured,
            "checks": [check.as_dict() for check in self.checks],
            "metrics": self.metrics,
        } | ({"deep": self.deep} if self.deep else {})

    def to_json(self, path: str) -> None:
        """Write ``path``, whole or not at all; NaN becomes null."""
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write_json(json.loads(json.dumps(self.to_dict()), parse_constant=lambda _: None), path)

    def plot(self, folder: str) -> list[str]:
        """Draw ``audit.png`` (and ``deep.png``) to a folder; returns the paths."""
        from .figures import draw_audit, draw_deep

        os.makedirs(folder, exist_ok=True)
        return [draw_audit(self.metrics, self.checks, folder)] + ([draw_deep(self.deep, folder)] if self.deep else [])

    def __str__(self) -> str:
        models = list(self.metrics["test"])
        line = lambda name, cells: f"{name:34}" + "".join(f"{cell:>24}" for cell in cells)  # noqa: E731
        lines = [line("", models)]
        for topic in ("test", "forget", "retain", "membership", "head refit"):
            for name in dict.fromkeys(key for row in self.metrics.get(topic, {}).values() for key in row):
                cells = [self.metrics[topic].get(model, {}).get(name) for model in models]
                lines.append(line(f"{topic}: {name}", map(_interval, cells)))
        groups = {model: row for model, row in self.metrics.get("groups", {}).items() if row["every"]}
        for name in ("worst", "mean", "weighted_mean") if groups else ():
            cells = [f"{groups[model][name]:.3f}" if model in groups else "-" for model in models]
            lines.append(line(f"groups: {name.replace('_', ' ')} accuracy", cells))
        for name in ("average_gap", "tug_of_war", "tug_of_war_mia"):
            cells = [self.metrics.get("gap", {}).get(model, {}).get(name) for model in models]
            if any(cell is not None for cell in cells):
                cells = ["-" if cell is None else f"{cell:.3f}" for cell in cells]
                lines.append(line(f"gap: {name.replace('_', ' ')}", cells))
        deep = _deep_rows(self.deep) if self.deep else {}
        lines += [line(name, [f"{v:.3f}" for v in values[: len(models)]]) for name, values in deep.items()]
        lines.append("")
        width = max(len(check.name) for check in self.checks)
        mark = {True: "FIRED", False: "ok", None: "not measured"}
        lines += [f"{check.name:{width}}  {mark[check.fired]:12}  {check.detail}" for check in self.checks]
        return "\n".join([*lines, "", self.verdict])


def _interval(cell: dict | None) -> str:
    if cell is None or cell["value"] is None or math.isnan(cell["value"]):
        return "-"
    if math.isnan(cell["low"]):
        return f"{cell['value']:.3f}"
    return f"{cell['value']:.3f} ({cell['low']:.3f}, {cell['high']:.3f})"


def _deep_rows(deep: dict) -> dict[str, list[float]]:
    """The deep results of which the first three models have one figure each."""
    rows = {}
    if deep["probes"]:
        for kind in ("linear", "mlp", "control"):
            rows[f"probe of the head's input: {kind}"] = [blocks["head"][kind] for blocks in deep["probes"].values()]
    for kind in next(iter(deep["relearning"].values()))["curve"]:
        rows[f"bias after relearning: {kind}"] = [r["curve"][kind][-1][1] for r in deep["relearning"].values()]
    for kind, row in deep["compression"].items():
        rows[f"bias, {kind}"] = [r["bias"] for r in row.values()]
    if "rmia" in deep:
        rows["RMIA: AUC"] = [r["auc"] for r in deep["rmia"].values()]
    return rows


def audit_model(
    model: str | nn.Module,
    *,
    reference_model: str | nn.Module | None = None,
    forget_dataset,
    retain_dataset=None,
    test_dataset,
    bias_column: str | None = None,
    retrained_model: str | nn.Module | list | None = None,
    processing_class=None,
    example_column: str | None = None,
    deep: bool = False,
    seed: int = 0,
) -> AuditReport:
    """Audit any classifier that is said to have unlearned something.

    Args:
        model: the model, by folder, Hub id or object; of a PeftModel the merged weights are audited.
        reference_model: the model before unlearning; None takes a PeftModel's base.
        forget_dataset, retain_dataset, test_dataset: raw or encoded rows with labels; the test set is unbiased.
        bias_column: the attribute that gave the label away on the forget set.
        retrained_model: the oracle, trained without the forget set; several show how far retraining itself varies.
        processing_class: image processor or tokenizer.
        example_column: rows of the test set that share its value differ in the attribute alone (exact counterfactuals).
        deep: also probes of every block, relearning, robustness of the removal and per-example membership.
        seed: of every sample and resample.

    Raises:
        ValueError: no forget or test rows, ``bias_column`` is not there, or the model's classes differ from the reference's.
    """
    models, oracles = _models(model, reference_model, retrained_model)
    given = {"forget": forget_dataset, "retain": retain_dataset, "test": test_dataset}
    sets, evidence = gather(
        models, oracles, given, processing_class=processing_class, bias_column=bias_column, example_column=example_column,
        deep=deep, seed=seed,
    )  # fmt: skip
    metrics, not_measured = _metrics(evidence), _not_measured(evidence)
    report = AuditReport([check(evidence) for check in CHECKS], metrics, not_measured)
    if min(len(sets["forget"]), len(sets["test"])) < LEAST:
        for check in report.checks:
            check.fired = None if check.name not in ("unchanged", "encoder_untouched") else check.fired
        not_measured.append(f"most checks (they need {LEAST} forget and {LEAST} test rows)")
    if deep:
        from .deep import deep_audit

        report.deep, checks = deep_audit(models, oracles, sets, evidence, processing_class, seed)
        report.checks += checks
    else:
        report.not_measured.append("probes of every block, relearning, quantisation and pruning (deep=True)")
    report.verdict = _verdict(report, evidence)
    return report


def gather(
    models: dict[str, nn.Module],
    oracles: list[str],
    given: dict,
    *,
    processing_class=None,
    bias_column: str | None = None,
    example_column: str | None = None,
    deep: bool = False,
    seed: int = 0,
) -> tuple[dict, AuditContext]:
    """What the checks look at: the encoded samples of the sets, and what each plain model says about them.

    Args:
        models: ``model``, ``reference`` and the ``oracles`` by name.
        given: ``forget``, ``test`` and, where there is one, ``retain``.
        deep: keep the features of every block, not of the last alone.
    """
    sets = _sets(models["model"], given, processing_class, example_column, seed)
    for setting, name in (("bias_column", bias_column), ("example_column", example_column)):
        if name is not None and name not in _names(sets["test"]):
            raise ValueError(f"{setting} '{name}' is not among {', '.join(_names(sets['test']))}.")
    seen: dict[str, dict[str, ModelOutputs]] = {}
    for name, plain in models.items():
        seen[name] = {
            part: observe(plain, rows, processing_class, deep, f"{name}, {part} set") for part, rows in sets.items()
        }
    sizes = {part: len(rows) for part, rows in given.items() if rows is not None}
    return sets, _evidence(seen, oracles, sets, sizes, bias_column, example_column, seed)


def _models(model, reference_model, retrained_model) -> tuple[dict[str, nn.Module], list[str]]:
    """Plain models by name, and the names of the oracles."""
    model = loaded(model)
    if reference_model is None:
        if not isinstance(model, PeftModel):
            raise ValueError("Give reference_model: the model before unlearning.")
        models = {"model": _plain(model), "reference": detached(model)}
    else:
        models = {"model": _plain(model), "reference": _plain(reference_model)}
    retrained = retrained_model if isinstance(retrained_model, (list, tuple)) else [retrained_model]
    given = [m for m in retrained if m is not None]
    oracles = ["retrained" if len(given) == 1 else f"retrained {i + 1}" for i in range(len(given))]
    models |= {name: _plain(m) for name, m in zip(oracles, given, strict=True)}
    classes = {int(m.config.num_labels) for m in models.values()}
    if len(classes) > 1:
        raise ValueError(
            f"The models have different numbers of classes ({sorted(classes)}); audit models of one task."
        )
    return models, oracles


def loaded(model: str | nn.Module) -> nn.Module:
    """A model by folder or Hub id, on this process's device; a model that is given stays where it is."""
    return load_classifier(model).to(processes().device) if isinstance(model, str) else model


def _plain(model: str | nn.Module) -> nn.Module:
    model = loaded(model)
    if isinstance(model, PeftModel):
        return copy.deepcopy(model).merge_and_unload()
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "A model to audit has an adapter injected (PEFT changes the model it is given); load it anew, or leave "
            "reference_model out where it is the adapter's base."
        )
    return model


def _sets(model, given: dict, processing_class, example_column: str | None, seed: int) -> dict:
    """Encoded samples of the sets, copies of an example together."""
    sets = {}
    for part, rows in given.items():
        if part == "retain" and (rows is None or len(rows) == 0):
            continue
        if rows is None or len(rows) == 0:
            raise ValueError(f"{part}_dataset has no examples; the audit needs some.")
        encoded = encode(rows, processing_class, getattr(model, "main_input_name", "input_ids"))
        check_labels(f"{part}_dataset", encoded, model.config.num_labels)
        examples = _column(encoded, example_column) if part == "test" else None
        if examples is None:
            chosen = sorted(sample_indices(len(encoded), SAMPLE[part], seed))
        else:
            ids = np.unique(examples, return_inverse=True)[1]
            wanted = max(1, SAMPLE[part] * (ids.max() + 1) // len(ids))
            chosen = np.flatnonzero(np.isin(ids, sample_indices(int(ids.max()) + 1, wanted, seed))).tolist()
        if len(chosen) < len(encoded):
            encoded = encoded.select(chosen) if hasattr(encoded, "select") else Subset(encoded, chosen)
        sets[part] = encoded
    return sets


def _names(rows) -> list[str]:
    return getattr(rows, "column_names", None) or list(rows[0])


def _column(rows, name: str | None) -> np.ndarray | None:
    """A column's raw values, missing ones as None."""
    if name is None or name not in _names(rows):
        return None
    values = (
        rows.with_format(None)[name] if hasattr(rows, "with_format") else [rows[i][name] for i in range(len(rows))]
    )
    plain = [value.item() if hasattr(value, "item") else value for value in values]
    return np.asarray([None if value is None or value != value else value for value in plain], dtype=object)


def _evidence(seen, oracles, sets, sizes, bias_column, example_column, seed) -> AuditContext:
    attributes, values, coded = None, None, False
    if bias_column is not None:
        raw, known = _column(sets["test"], bias_column), _column(sets["forget"], bias_column)
        values = np.asarray([str(value) for value in raw])
        names = np.unique(values).tolist()
        attributes = np.asarray([-1 if r is None else names.index(v) for r, v in zip(raw, values, strict=True)])
        if known is not None:
            there = np.asarray([value is not None for value in known], dtype=bool)
            told, labels = (
                np.asarray([str(value) for value in known])[there],
                seen["reference"]["forget"].labels[there],
            )
            stands_for = attribute_classes(told, labels) if len(told) else None
            if stands_for is not None and cramers_v(told, labels) >= TELLING:
                coded = True
                attributes = np.asarray(
                    [-1 if r is None else stands_for.get(v, -1) for r, v in zip(raw, values, strict=True)]
                )
    examples = _column(sets["test"], example_column)
    examples = None if examples is None else np.unique([str(e) for e in examples], return_inverse=True)[1]
    rows = {part: Resampler(examples if part == "test" else None, len(s), seed=seed) for part, s in sets.items()}
    return AuditContext(seen, oracles, attributes, coded, examples, rows, seed, values, sizes)


def _metrics(evidence: AuditContext) -> dict:
    """Every figure of every model, with its interval."""
    metrics: dict = {part: {} for part in evidence.parts}
    for name in evidence.models:
        for part in evidence.parts:
            metrics[part][name] = {"accuracy": evidence.accuracy(name, part).as_dict()}
        for figure in evidence.bias_figures:
            metrics["test"][name][figure] = evidence.bias(name, figure).as_dict()
        if evidence.examples is not None:
            gap = evidence.counterfactual(name)
            metrics["test"][name] |= {k: _triple(gap, k) for k in ("counterfactual_gap", "flip_rate")}
    metrics["membership"] = {name: _attack(evidence, name) for name in evidence.models}
    metrics["head refit"] = {name: {"follow rate": e.as_dict()} for name, e in evidence.refit().items()}
    metrics["groups"] = {name: evidence.groups(name) for name in evidence.models}
    if evidence.oracles and "retain" in evidence.parts:
        metrics["gap"] = {name: evidence.gap(name) for name in ("model", "reference")}
    return metrics


def _triple(values: dict, name: str) -> dict:
    return {"value": values[name], "low": values[f"{name}_low"], "high": values[f"{name}_high"]}


def _attack(evidence: AuditContext, name: str) -> dict:
    attack = evidence.attack(name)
    plain = ("auc_balanced", "mia_efficacy", "tpr_at_1_fpr", "advantage", "logistic_accuracy")
    nan = float("nan")
    return {"auc": evidence.auc(name).as_dict()} | {k: {"value": attack[k], "low": nan, "high": nan} for k in plain}


def _not_measured(evidence: AuditContext) -> list[str]:
    missing = []
    if not evidence.oracles:
        missing.append("how far the model is from one retrained without the forget set (give retrained_model)")
    if evidence.attributes is None:
        missing.append("the bias (give bias_column)")
    elif not evidence.coded:
        missing.append("the follow rate (the attribute does not stand for classes in the forget set)")
    if evidence.examples is None:
        missing.append("exact counterfactuals (give example_column)")
    if "retain" not in evidence.parts:
        missing.append("accuracy on retained data and the published attack (give retain_dataset)")
    return missing


def _verdict(report: AuditReport, evidence: AuditContext) -> str:
    fired = [check for check in report.checks if check.fired]
    judged = sum(check.fired is not None for check in report.checks)
    if fired:
        text = f"Not passed: {len(fired)} of {judged} checks fired. " + " ".join(check.meaning for check in fired)
    else:
        text = f"Passed: none of {judged} checks fired."
        if evidence.oracles:
            text += " In what was measured the model is not told from one trained without the forget set."
    text += " This is evidence, not a proof of deletion."
    return text + (" Not measured: " + "; ".join(report.not_measured) + "." if report.not_measured else "")
