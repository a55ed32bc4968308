"""The deep audit: probes of every block, relearning, robustness of the removal, per-example membership."""

import copy
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from ..data.pairing import fetch
from ..inference import ModelOutputs, batcher, observe, processes
from .checks import AuditContext, Check

PROBE_ROWS = 2000
RELEARN_STEPS = (0, 1, 2, 4, 8, 16, 32, 64)
RELEARN_BATCH, RELEARN_RATE = 32, 1e-4
RELEARN_DRAWS = 3  # of the few forget rows, and of everything else that is random
RELEARN_RATIO = 0.5  # of the retrained model's steps
RMIA_A = 0.3  # how a model that saw the row is inferred from those that did not, as published for small models
SURVIVES = 0.25  # share of the way back to the reference that compression may give back


def deep_audit(models, oracles, sets, evidence: AuditContext, processing_class, seed: int) -> tuple[dict, list[Check]]:
    """What `audit_model(deep=True)` adds; says first how long it will take. Returns the results and the checks."""
    _say_estimate(models, sets, processing_class)
    results: dict = {"probes": probe_every_block(evidence), "relearning": {}, "compression": {}}
    subjects = ["model", "reference", *oracles[:1]]
    for name in tqdm(subjects, desc="Relearning", leave=False):
        results["relearning"][name] = relearn(models[name], sets, evidence, processing_class, seed)
    for kind in tqdm(COMPRESSIONS, desc="Compressing", leave=False):
        results["compression"][kind] = {
            name: bias_of(compress(models[name], kind), sets["test"], evidence, processing_class) for name in subjects
        }
    shapes = [[p.shape for p in models[name].parameters()] for name in ("model", "reference")]
    if shapes[0] == shapes[1]:
        results["scaled"] = [
            [
                factor,
                bias_of(
                    scaled(models["model"], models["reference"], factor), sets["test"], evidence, processing_class
                ),
            ]
            for factor in tqdm(SCALES, desc="Scaling", leave=False)
        ]
    if oracles:
        results["rmia"] = per_example(evidence)
    return results, [_relearns_faster(results, evidence), _comes_back(results, evidence)]


def _say_estimate(models, sets, processing_class) -> None:
    rows = fetch(sets["test"], list(range(min(64, len(sets["test"])))))
    model = models["model"]
    inputs, labels = batcher(model, processing_class)(rows)
    start = time.perf_counter()
    with torch.no_grad():
        model(**inputs)
    one = (time.perf_counter() - start) / len(labels)
    subjects = min(len(models), 3)
    curves = subjects * 3 * RELEARN_DRAWS
    evaluations = (subjects * len(COMPRESSIONS) + curves * len(RELEARN_STEPS) + len(SCALES)) * len(sets["test"])
    training = curves * RELEARN_STEPS[-1] * RELEARN_BATCH * 3
    seconds = one * (evaluations + training) * 2  # the probes, and what is not a forward pass
    if processes().is_main_process:
        print(f"Deep audit: about {max(seconds / 60, 0.1):.1f} minutes.", flush=True)


# ---- Probes ----


def probe_every_block(evidence: AuditContext, models: list[str] | None = None) -> dict:
    """Accuracy of reading the bias attribute off each block, given the label, with a random-label control.

    Features are centred within each class first, so that what the label says about the attribute does not count. Half of the test
    examples fit the probe, the other half measure it. The control's attribute is shuffled within classes.

    Args:
        models: names of those to probe; all by default.

    Returns:
        ``probes[model][block]`` with ``linear``, ``mlp``, ``control`` and ``chance``; empty without a bias attribute.
    """
    if evidence.attributes is None:
        return {}
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = evidence.seen["reference"]["test"].labels
    rng = np.random.default_rng(evidence.seed)
    groups = evidence.rows["test"].ids
    wanted = max(PROBE_ROWS * evidence.rows["test"].groups // len(labels), 2)
    chosen = np.isin(groups, rng.permutation(evidence.rows["test"].groups)[:wanted])
    rows = np.flatnonzero(chosen)
    fitting = np.isin(groups[rows], rng.permutation(np.unique(groups[rows]))[::2])
    attribute, classes = evidence.attributes[rows], labels[rows]
    shuffled = attribute.copy()
    for y in np.unique(classes):
        shuffled[classes == y] = rng.permutation(attribute[classes == y])
    enough = fitting.sum() // 10 >= len(np.unique(attribute))
    probes = {
        "linear": lambda: LogisticRegression(max_iter=300),
        "mlp": lambda: MLPClassifier((64,), early_stopping=bool(enough), max_iter=60, random_state=evidence.seed),
    }
    result: dict = {}
    for name in tqdm(models or evidence.models, desc="Probing", leave=False):
        result[name] = {}
        for block, features in evidence.seen[name]["test"].features.items():
            x = features[rows].astype(np.float64)
            for y in np.unique(classes):
                x[classes == y] -= x[(classes == y) & fitting].mean(0) if ((classes == y) & fitting).any() else 0.0

            def score(probe, target, x=x):
                if len(np.unique(target[fitting])) < 2:
                    return float("nan")
                fitted = make_pipeline(StandardScaler(), probe()).fit(x[fitting], target[fitting])
                return float(fitted.score(x[~fitting], target[~fitting]))

            result[name][block] = {kind: score(probe, attribute) for kind, probe in probes.items()}
            result[name][block] |= {
                "control": score(probes["linear"], shuffled),
                "chance": float(np.bincount(np.unique(attribute, return_inverse=True)[1]).max() / len(attribute)),
                "erased": erased(x, attribute, fitting, score),
            }
    return result


def erased(x: np.ndarray, attribute: np.ndarray, fitting: np.ndarray, score) -> float:
    """Accuracy of the linear probe after linear erasure: what is left is not linear.

    The oblique projection of LEACE (arXiv 2306.03819), fitted on the fitting half: it takes the attribute's class means out in the
    metric of the features' covariance.
    """
    from sklearn.linear_model import LogisticRegression

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
    cleaned = x - (x - mean) @ (colour @ u @ u.T @ whiten).T
    return score(lambda: LogisticRegression(max_iter=300), attribute, x=cleaned)


# ---- Relearning ----


def relearn(model: nn.Module, sets: dict, evidence: AuditContext, processing_class, seed: int) -> dict:
    """How the bias comes back while all weights are trained on: by number of steps, for three kinds of data.

    ``retain``: retained rows alone; ``forget``: 1% of the forget set (at least 16 rows) besides; ``unrelated``: retained inputs
    whose pixels or tokens are shuffled, with the labels the model gives them.

    Every curve is the mean of `RELEARN_DRAWS` draws of the rows.

    Returns:
        ``curve[kind]``: ``[steps, bias, spread]``; ``half[kind]``: the first step at which half of the reference's bias is
        there, or None.
    """
    curves: dict = {"curve": {}, "half": {}}
    start = _reference_bias(evidence)
    for kind in ("retain", "forget", "unrelated") if "retain" in sets else ("forget",):
        draws = [
            relearning_curve(model, kind, sets, evidence, processing_class, seed + i) for i in range(RELEARN_DRAWS)
        ]
        mean, spread = np.mean(draws, axis=0), np.std(draws, axis=0, ddof=1)
        curves["curve"][kind] = [list(row) for row in zip(RELEARN_STEPS, mean.tolist(), spread.tolist(), strict=True)]
        back = [step for step, bias in zip(RELEARN_STEPS, mean, strict=True) if bias >= start / 2]
        curves["half"][kind] = back[0] if back else None
    return curves


def relearning_curve(model, kind: str, sets: dict, evidence: AuditContext, processing_class, seed: int) -> list[float]:
    """The bias at each of `RELEARN_STEPS`."""
    rng = np.random.default_rng(seed)
    trained = copy.deepcopy(model).train().requires_grad_(True)
    for module in trained.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(trained.parameters(), lr=RELEARN_RATE, weight_decay=0.0)
    batch = batcher(model, processing_class)
    few = rng.permutation(len(sets["forget"]))[: max(16, evidence.sizes["forget"] // 100)]
    curve, done = [], 0
    for mark in RELEARN_STEPS:
        for _ in range(mark - done):
            rows = []
            if "retain" in sets:
                rows += fetch(sets["retain"], rng.integers(0, len(sets["retain"]), RELEARN_BATCH).tolist())
            if kind == "forget":
                half = rows[: RELEARN_BATCH // 2]
                rows = half + fetch(sets["forget"], rng.choice(few, RELEARN_BATCH - len(half)).tolist())
            inputs, labels = batch(rows)
            if kind == "unrelated":
                inputs = _shuffled(inputs, model.main_input_name, rng)
                with torch.no_grad():
                    labels = model(**inputs).logits.argmax(-1)
            F.cross_entropy(trained(**inputs).logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        done = mark
        curve.append(bias_of(trained, sets["test"], evidence, processing_class)["bias"])
    return curve


def _shuffled(inputs: dict, main_input: str, rng: np.random.Generator) -> dict:
    """Tokens ``[n, t]`` or pixels ``[n, c, h, w]`` of every row in one random order; nothing that was learned is left in it."""
    x = inputs[main_input]
    flat = x if x.ndim == 2 else x.flatten(2)
    order = torch.from_numpy(rng.permutation(flat.shape[-1])).to(x.device)
    return inputs | {main_input: flat[..., order].view(x.shape)}


def _reference_bias(evidence: AuditContext) -> float:
    return _bias_value(evidence.seen["reference"]["test"], evidence)["bias"]


def _bias_value(seen: ModelOutputs, evidence: AuditContext) -> dict:
    """Accuracy and the bias figure: the follow rate, or Cramér's V where that cannot be had."""
    from ..metrics.bias_correlation import cramers_v

    right = seen.predictions == seen.labels
    if evidence.attributes is None or (evidence.coded and not evidence.conflicting.any()):
        return {"accuracy": float(right.mean()), "bias": float("nan")}
    if evidence.coded:
        bias = float((seen.predictions == evidence.attributes)[evidence.conflicting].mean())
    else:
        bias = cramers_v(seen.predictions, evidence.attributes)
    return {"accuracy": float(right.mean()), "bias": bias}


def bias_of(model: nn.Module, test, evidence: AuditContext, processing_class) -> dict:
    """``accuracy`` and ``bias`` of a model on the audit's test rows; see `_bias_value`."""
    return _bias_value(observe(model, test, processing_class), evidence)


# ---- Compression ----

COMPRESSIONS = ("int8", "4-bit", "pruned 30%")


@torch.no_grad()
def compress(model: nn.Module, kind: str) -> nn.Module:
    """A copy with its linear weights rounded (symmetric, a scale per output) or the smallest 30% of each set to zero."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        weight = module.weight.flatten(1)
        if kind.startswith("pruned"):
            threshold = weight.abs().flatten().float().kthvalue(max(int(0.3 * weight.numel()), 1)).values
            weight = weight * (weight.abs() > threshold)
        else:
            top = 127 if kind == "int8" else 7
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / top
            weight = (weight / scale).round() * scale
        module.weight.copy_(weight.view_as(module.weight))
    return model


SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


@torch.no_grad()
def scaled(model: nn.Module, reference: nn.Module, factor: float) -> nn.Module:
    """A copy with ``factor`` times what unlearning did to the weights: 0 is the reference, 1 the model; an adapter's strength."""
    copied = copy.deepcopy(model)
    for mine, theirs in zip(copied.parameters(), reference.parameters(), strict=True):
        mine.copy_(torch.lerp(theirs.to(mine), mine, factor))
    return copied


# ---- Per-example membership ----


def per_example(evidence: AuditContext) -> dict:
    """RMIA (arXiv 2312.03262), offline: how much more likely a row is under the model than under models that never saw it.

    The retrained models are the reference models. A forget row's ratio ``p(x | model) / p(x)`` is compared with those of all unseen
    rows; its score is the share it beats.

    Returns:
        ``auc`` and ``tpr_at_1_fpr`` of forget against test rows, for the audited model and the reference.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    def own(name, part):
        seen = evidence.seen[name][part]
        return seen.probabilities[np.arange(len(seen.labels)), seen.labels]

    result = {}
    for name in ("model", "reference"):
        ratios = {}
        for part in ("forget", "test"):
            out = np.mean([own(oracle, part) for oracle in evidence.oracles], axis=0)
            ratios[part] = own(name, part) / (((1 + RMIA_A) * out + 1 - RMIA_A) / 2)
        population = np.sort(ratios["test"])
        scores = {part: np.searchsorted(population, r, side="right") / len(population) for part, r in ratios.items()}
        truth = np.r_[np.ones(len(scores["forget"])), np.zeros(len(scores["test"]))]
        joined = np.r_[scores["forget"], scores["test"]]
        false, true, _ = roc_curve(truth, joined)
        result[name] = {"auc": float(roc_auc_score(truth, joined)), "tpr_at_1_fpr": float(true[false <= 0.01].max())}
    return result


# ---- Checks ----


def _relearns_faster(results: dict, evidence: AuditContext) -> Check:
    name, meaning = "relearns_faster", "The bias comes back in fewer steps than a retrained model needs to take it up."
    if not evidence.oracles or evidence.attributes is None:
        return Check(name, None, float("nan"), RELEARN_RATIO, "needs retrained_model and bias_column", meaning)
    last = 2 * RELEARN_STEPS[-1]
    mine, theirs = (
        (lambda half: last if half is None else half)(results["relearning"][n]["half"]["forget"])
        for n in ("model", evidence.oracles[0])
    )
    if theirs == 0 or mine == theirs == last or not np.isfinite(_reference_bias(evidence)):
        detail = "the bias does not come back in either, or half of it is there from the start"
        return Check(name, None, float("nan"), RELEARN_RATIO, detail, meaning)
    ratio = mine / theirs
    detail = f"half of the bias is back after {mine} steps, in the retrained model after {theirs} ({last}: not seen)"
    return Check(name, bool(ratio < RELEARN_RATIO), ratio, RELEARN_RATIO, detail, meaning)


def _comes_back(results: dict, evidence: AuditContext) -> Check:
    name, meaning = "comes_back_compressed", "Rounding or pruning the weights gives the bias back."
    if not evidence.oracles or evidence.attributes is None:
        return Check(name, None, float("nan"), SURVIVES, "needs retrained_model and bias_column", meaning)
    oracle = evidence.oracles[0]
    plain = {n: _bias_value(evidence.seen[n]["test"], evidence)["bias"] for n in ("model", "reference", oracle)}
    way = plain["reference"] - plain[oracle]
    if not way >= 0.02:
        return Check(
            name, None, float("nan"), SURVIVES, "the reference is hardly more biased than the oracle", meaning
        )
    gains = {
        kind: (row["model"]["bias"] - plain["model"] - max(row[oracle]["bias"] - plain[oracle], 0)) / way
        for kind, row in results["compression"].items()
    }
    worst = max(gains, key=lambda kind: gains[kind])
    detail = f"{worst}: {gains[worst]:+.0%} of the way back to the reference (limit {SURVIVES:.0%})"
    return Check(name, gains[worst] > SURVIVES, gains[worst], SURVIVES, detail, meaning)
