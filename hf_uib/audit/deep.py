"""The deep audit: residual-information probes, relearning, robustness of the removal, per-example membership."""

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..data.pairing import fetch
from ..inference import batcher, observe
from ..lora import weight_matrix
from ..processes import processes
from ..quantised import dequantised
from .checks import plain_bias
from .context import AuditContext

COMPRESSIONS = ("int8", "4-bit", "pruned 30%")


def deep_audit(context: AuditContext) -> dict[str, Any]:
    """What `audit_model(deep=True)` adds; says first how long it will take.

    Returns:
        ``probes``, ``relearning``, ``compression``, ``scaled`` (where the model has the reference's architecture) and ``rmia``
        (where there is a retrained model); docs/audit.md describes them.
    """
    if processes().is_main_process:
        print(f"Deep audit: about {max(_estimated_seconds(context) / 60, 0.1):.1f} minutes.", flush=True)
    models, subjects = {name: dequantised(m) for name, m in context.models.items()}, _subjects(context)
    results: dict[str, Any] = {"probes": probe_every_block(context), "relearning": {}, "compression": {}}
    for name in tqdm(subjects, desc="Relearning", leave=False):
        results["relearning"][name] = relearn(models[name], context)
    for kind in tqdm(COMPRESSIONS, desc="Compressing", leave=False):
        results["compression"][kind] = {name: bias_of(compress(models[name], kind), context) for name in subjects}
    shapes = [[p.shape for p in models[name].parameters()] for name in ("model", "reference")]
    if shapes[0] == shapes[1]:
        results["scaled"] = [
            [factor, bias_of(scaled(models["model"], models["reference"], factor), context)]
            for factor in tqdm(context.thresholds.scales, desc="Scaling", leave=False)
        ]
    if context.oracles:
        results["rmia"] = per_example(context)
    return results


def _subjects(context: AuditContext) -> list[str]:
    """The models that are trained on and compressed: one retrained model is enough."""
    return ["model", "reference", *context.oracles[:1]]


def _estimated_seconds(context: AuditContext) -> float:
    """From the time of one forward pass."""
    test, model, limits = context.sets["test"], context.models["model"], context.thresholds
    inputs, labels = batcher(model, context.processing_class)(fetch(test, list(range(min(64, len(test))))))
    start = time.perf_counter()
    with torch.no_grad():
        model(**inputs)
    one = (time.perf_counter() - start) / len(labels)
    subjects = len(_subjects(context))
    curves = subjects * 3 * limits.relearning_draws
    passes = subjects * len(COMPRESSIONS) + curves * len(limits.relearning_steps) + len(limits.scales)
    trained = curves * limits.relearning_steps[-1] * limits.relearning_batch_size * 3
    return one * (passes * len(test) + trained) * 2  # the probes, and what is not a forward pass


def bias_of(model: nn.Module, context: AuditContext) -> dict[str, float]:
    """``accuracy`` and ``bias`` (see `plain_bias`) of a plain model on the audit's test rows."""
    outputs = observe(model, context.sets["test"], context.processing_class)
    accuracy = float((outputs.predictions == outputs.labels).mean())
    return {"accuracy": accuracy, "bias": plain_bias(outputs, context)}


# ---- Residual-information probes ----


def probe_every_block(context: AuditContext, models: list[str] | None = None) -> dict[str, Any]:
    """Accuracy of reading the bias attribute off each block, given the label, with a random-label control.

    Features are centred within each class first, so that what the label says about the attribute does not count. Half of the test
    examples fit the probe, the other half measure it. The control's attribute is shuffled within classes.

    Args:
        models: names of those to probe; all by default.

    Returns:
        ``probes[model][block]`` with the accuracies ``linear``, ``mlp``, ``control`` (linear, shuffled attribute), ``erased`` and
        ``chance``; empty without a bias attribute.
    """
    if context.attribute is None:
        return {}
    rows, fitting, shuffled = _probe_rows(context)
    attribute, classes = context.codes[rows], context.outputs["reference"]["test"].labels[rows]
    chance = float(np.bincount(np.unique(attribute, return_inverse=True)[1]).max() / len(attribute))
    result: dict[str, Any] = {}
    for name in tqdm(models or context.names, desc="Probing", leave=False):
        result[name] = {}
        for block, features in context.outputs[name]["test"].features.items():
            x = features[rows].astype(np.float64)
            for y in np.unique(classes):
                x[classes == y] -= x[(classes == y) & fitting].mean(0) if ((classes == y) & fitting).any() else 0.0
            result[name][block] = {
                "linear": _probe(_linear, x, attribute, fitting),
                "mlp": _probe(lambda: _mlp(context, attribute, fitting), x, attribute, fitting),
                "control": _probe(_linear, x, shuffled, fitting),
                "chance": chance,
                "erased": _probe(_linear, erase(x, attribute, fitting), attribute, fitting),
            }
    return result


def _probe_rows(context: AuditContext) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Test rows of the probes ``[m]``, which of them fit ``[m]``, and their attribute shuffled within classes ``[m]``."""
    labels, rng = context.outputs["reference"]["test"].labels, np.random.default_rng(context.seed)
    examples, count = context.resamplers["test"].ids, context.resamplers["test"].groups
    wanted = max(context.thresholds.probe_rows * count // len(labels), 2)
    rows = np.flatnonzero(np.isin(examples, rng.permutation(count)[:wanted]))
    fitting = np.isin(examples[rows], rng.permutation(np.unique(examples[rows]))[::2])
    attribute, classes = context.codes[rows], labels[rows]
    shuffled = attribute.copy()
    for y in np.unique(classes):
        shuffled[classes == y] = rng.permutation(attribute[classes == y])
    return rows, fitting, shuffled


def _linear() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=300)


def _mlp(context: AuditContext, attribute: np.ndarray, fitting: np.ndarray) -> Any:
    """Stops early where a tenth of the fitting rows can hold every value of the attribute."""
    from sklearn.neural_network import MLPClassifier

    enough = fitting.sum() // 10 >= len(np.unique(attribute))
    return MLPClassifier((64,), early_stopping=bool(enough), max_iter=60, random_state=context.seed)


def _probe(make: Callable[[], Any], x: np.ndarray, target: np.ndarray, fitting: np.ndarray) -> float:
    """Accuracy of a probe of ``x [m, d]`` for ``target [m]``, fitted on the ``fitting`` rows and measured on the others."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(target[fitting])) < 2:
        return float("nan")
    probe = make_pipeline(StandardScaler(), make()).fit(x[fitting], target[fitting])
    return float(probe.score(x[~fitting], target[~fitting]))


def erase(x: np.ndarray, attribute: np.ndarray, fitting: np.ndarray) -> np.ndarray:
    """Features ``[m, d]`` after linear erasure of the attribute ``[m]``: what a probe still finds is not linear.

    The oblique projection of LEACE (arXiv 2306.03819), fitted on the ``fitting`` rows: it takes the attribute's class means out in
    the metric of the features' covariance.
    """
    codes = np.eye(attribute.max() + 2)[attribute]
    z = codes[:, codes[fitting].any(0)]
    mean = x[fitting].mean(0)
    centred = x[fitting] - mean
    covariance = centred.T @ centred / len(centred) + 1e-9 * np.eye(x.shape[1])
    cross = centred.T @ (z[fitting] - z[fitting].mean(0)) / len(centred)
    values, vectors = np.linalg.eigh(covariance)
    keep = values > 1e-8 * values.max()
    whiten = vectors[:, keep] / np.sqrt(values[keep]) @ vectors[:, keep].T
    colour = vectors[:, keep] * np.sqrt(values[keep]) @ vectors[:, keep].T
    u, s, _ = np.linalg.svd(whiten @ cross, full_matrices=False)
    u = u[:, s > 1e-8 * max(s.max(), 1e-30)]
    return x - (x - mean) @ (colour @ u @ u.T @ whiten).T


# ---- Relearning ----


def relearn(model: nn.Module, context: AuditContext) -> dict[str, Any]:
    """How the bias comes back while all weights are trained on: by number of steps, for three kinds of data.

    ``retain``: retained rows alone; ``forget``: a small part of the forget set besides; ``unrelated``: retained inputs whose pixels
    or tokens are shuffled, with the labels the model gives them. Every curve is the mean of several draws of the rows.

    Returns:
        ``curve[kind]``: ``[steps, bias, spread]``; ``half[kind]``: the first step at which half of the reference's bias is
        there, or None.
    """
    curves: dict[str, Any] = {"curve": {}, "half": {}}
    start, marks = plain_bias(context.outputs["reference"]["test"], context), context.thresholds.relearning_steps
    for kind in ("retain", "forget", "unrelated") if "retain" in context.sets else ("forget",):
        draws = [
            relearning_curve(model, kind, context, context.seed + i)
            for i in range(context.thresholds.relearning_draws)
        ]
        mean, spread = np.mean(draws, axis=0), np.std(draws, axis=0, ddof=1)
        curves["curve"][kind] = [list(row) for row in zip(marks, mean.tolist(), spread.tolist(), strict=True)]
        back = [step for step, bias in zip(marks, mean, strict=True) if bias >= start / 2]
        curves["half"][kind] = back[0] if back else None
    return curves


def relearning_curve(model: nn.Module, kind: str, context: AuditContext, seed: int) -> list[float]:
    """The bias at each of `AuditThresholds.relearning_steps`; ``kind`` as in `relearn`."""
    limits, sets, rng = context.thresholds, context.sets, np.random.default_rng(seed)
    trained = copy.deepcopy(model).train().requires_grad_(True)
    for module in trained.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(trained.parameters(), lr=limits.relearning_rate, weight_decay=0.0)
    batch, size = batcher(model, context.processing_class), limits.relearning_batch_size
    wanted = int(context.sizes["forget"] * limits.relearning_fraction + 1e-9)  # 2900 * 0.01 is a little less than 29
    few = rng.permutation(len(sets["forget"]))[: max(limits.relearning_rows, wanted)]
    curve, done = [], 0
    for mark in limits.relearning_steps:
        for _ in range(mark - done):
            rows: list[dict] = []
            if "retain" in sets:
                rows += fetch(sets["retain"], rng.integers(0, len(sets["retain"]), size).tolist())
            if kind == "forget":
                half = rows[: size // 2]
                rows = half + fetch(sets["forget"], rng.choice(few, size - len(half)).tolist())
            inputs, labels = batch(rows)
            if kind == "unrelated":
                inputs = _shuffled(inputs, str(model.main_input_name), rng)
                with torch.no_grad():
                    labels = model(**inputs).logits.argmax(-1)
            F.cross_entropy(trained(**inputs).logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        done = mark
        curve.append(bias_of(trained, context)["bias"])
    return curve


def _shuffled(inputs: dict[str, Tensor], main_input: str, rng: np.random.Generator) -> dict[str, Tensor]:
    """Tokens ``[n, t]`` or pixels ``[n, c, h, w]`` of every row in one random order; nothing that was learned is left in it."""
    x = inputs[main_input]
    flat = x if x.ndim == 2 else x.flatten(2)
    order = torch.from_numpy(rng.permutation(flat.shape[-1])).to(x.device)
    return inputs | {main_input: flat[..., order].view(x.shape)}


# ---- Compression, and the strength of what was unlearned ----


@torch.no_grad()
def compress(model: nn.Module, kind: str) -> nn.Module:
    """A copy with its linear weights rounded (symmetric, a scale per output) or the smallest 30% of each set to zero."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d, Conv1D)):
            continue
        weight = weight_matrix(module)
        if kind.startswith("pruned"):
            threshold = weight.abs().flatten().float().kthvalue(max(int(0.3 * weight.numel()), 1)).values
            weight = weight * (weight.abs() > threshold)
        else:
            top = 127 if kind == "int8" else 7
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / top
            weight = (weight / scale).round() * scale
        module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight.view_as(module.weight))
    return model


@torch.no_grad()
def scaled(model: nn.Module, reference: nn.Module, factor: float) -> nn.Module:
    """A copy with ``factor`` times what unlearning did to the weights: 0 is the reference, 1 the model; an adapter's strength."""
    copied = copy.deepcopy(model)
    for mine, theirs in zip(copied.parameters(), reference.parameters(), strict=True):
        mine.copy_(torch.lerp(theirs.to(mine), mine, factor))
    return copied


# ---- Per-example membership ----


def per_example(context: AuditContext) -> dict[str, dict[str, float]]:
    """RMIA (arXiv 2312.03262), offline: how much more likely a row is under the model than under models that never saw it.

    The retrained models are the reference models. A forget row's ratio ``p(x | model) / p(x)`` is compared with those of all unseen
    rows; its score is the fraction it beats.

    Returns:
        ``auc`` and ``tpr_at_1_fpr`` of forget against test rows, for the audited model and the reference.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    offset = context.thresholds.rmia_offset
    own = lambda outputs: outputs.probabilities[np.arange(len(outputs.labels)), outputs.labels]
    result = {}
    for name in ("model", "reference"):
        ratios = {}
        for part in ("forget", "test"):
            out = np.mean([own(context.outputs[oracle][part]) for oracle in context.oracles], axis=0)
            ratios[part] = own(context.outputs[name][part]) / (((1 + offset) * out + 1 - offset) / 2)
        population = np.sort(ratios["test"])
        scores = {part: np.searchsorted(population, r, side="right") / len(population) for part, r in ratios.items()}
        truth = np.r_[np.ones(len(scores["forget"])), np.zeros(len(scores["test"]))]
        joined = np.r_[scores["forget"], scores["test"]]
        false, true, _ = roc_curve(truth, joined)
        result[name] = {"auc": float(roc_auc_score(truth, joined)), "tpr_at_1_fpr": float(true[false <= 0.01].max())}
    return result
