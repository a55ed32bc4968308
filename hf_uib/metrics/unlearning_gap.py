"""Distance of a model from the one retrained without the forget set."""

import datasets
import evaluate
import numpy as np

from .membership_attack import SPLITS, check_splits

_DESCRIPTION = """Differences in accuracy (and in a membership attack) between a model and one retrained without the
forget set, and their two usual summaries. Target: gaps 0, average_gap 0 (lower is better), tug_of_war 1 (higher is
better). What a second retrained model reaches, with another seed, is the best that can be asked."""

_INPUTS = """
Args:
    predictions (list of int): classes predicted by the model.
    retrained_predictions (list of int): by the retrained model, on the same rows.
    references (list of int): true classes.
    splits (list of str): "forget", "retain" or "test".
    attack, retrained_attack (float): a membership attack's value of both models, in [0, 1]; the published tables use
        mia_efficacy of `MembershipAttack`. Give both or none.
    n_bootstrap (int): resamples of the intervals; default 1000, 0 makes them NaN.
    seed (int): of the resampling; default 0.
Returns:
    forget_gap, retain_gap, test_gap: accuracy of the model minus that of the retrained one, in [-1, 1]; NaN without
        rows. A positive forget_gap: forgotten too little; a negative one: over-unlearned.
    attack_gap: attack minus retrained_attack, in [-1, 1]; only when they are given.
    average_gap: mean of the absolute gaps that are measured, in [0, 1], lower is better. Avg. Gap of SalUn, arXiv
        2310.12508, as a fraction.
    tug_of_war: product of 1 - |gap| over forget, retain and test, in [0, 1], higher is better; NaN when one is not
        measured. Zhao et al. (2024), arXiv 2406.01257.
    tug_of_war_mia: the same with the attack's gap in place of forget's, only when that is given; ToW-MIA of the same
        authors' code.
    average_gap_low, average_gap_high, tug_of_war_low, tug_of_war_high: intervals of at least 95%. Rows are resampled
        within splits, the same rows for both models; the attacks' values are held fixed. Absolute values make a
        percentile interval miss a true gap of 0, the target. So the value is given plus and minus the 95% quantile of
        the largest change that a draw's gaps allow: their mean (for tug_of_war: summed) distance from the gaps seen.
        True gaps of 0 are covered about 95% of the time, others more often.
Raises:
    ValueError: an unknown split; one attack value without the other, or outside [0, 1].
"""

_CITATION = """@inproceedings{zhao2024, title = {What Makes Unlearning Hard and What to Do About It}, author = {Zhao,
Kairan and others}, booktitle = {NeurIPS}, year = {2024}}
@inproceedings{fan2024, title = {SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
Classification and Generation}, author = {Fan, Chongyu and others}, booktitle = {ICLR}, year = {2024}}"""


def gap_deviations(changes: np.ndarray, n_bootstrap: int, rng: np.random.Generator) -> np.ndarray:
    """``[n_bootstrap]`` distances of a resampled gap from the gap, the mean of ``changes`` in {-1, 0, 1} ``[n]``.

    A bootstrap draw of rows that take three values only is a multinomial draw of how many take each.
    """
    shares = np.bincount(changes + 1, minlength=3) / len(changes)
    counts = rng.multinomial(len(changes), shares, size=n_bootstrap)
    return np.abs((counts[:, 2] - counts[:, 0]) / len(changes) - changes.mean())


class UnlearningGap(evaluate.Metric):
    """See `_INPUTS`; the name in a combined result is ``unlearning_gap``."""

    def _info(self):
        features = {name: datasets.Value("int64") for name in ("predictions", "retrained_predictions", "references")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({**features, "splits": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions,
        retrained_predictions,
        references,
        splits,
        attack: float | None = None,
        retrained_attack: float | None = None,
        n_bootstrap: int = 1000,
        seed: int = 0,
    ):
        predictions, retrained, references, splits = (
            np.asarray(x) for x in (predictions, retrained_predictions, references, splits)
        )
        check_splits(splits)
        if (attack is None) != (retrained_attack is None):
            raise ValueError("attack and retrained_attack go together: give the value of both models or of none")
        if attack is not None and not (0 <= attack <= 1 and 0 <= retrained_attack <= 1):
            raise ValueError(f"attack values must be in [0, 1], not {attack} and {retrained_attack}: pass fractions")
        changes = (predictions == references).astype(int) - (retrained == references).astype(int)
        rng, deviation, gaps = np.random.default_rng(seed), np.zeros(max(n_bootstrap, 0)), {}
        for name in SPLITS:
            rows = changes[splits == name]
            gaps[name] = float(rows.mean()) if len(rows) else float("nan")
            if len(rows):
                deviation += gap_deviations(rows, len(deviation), rng)
        if attack is not None and retrained_attack is not None:
            gaps["attack"] = float(attack - retrained_attack)

        measured = [abs(gap) for gap in gaps.values() if not np.isnan(gap)]
        tug_of_war = lambda *names: float(np.prod([1 - abs(gaps[name]) for name in names]))  # noqa: E731
        result = {f"{name}_gap": gap for name, gap in gaps.items()}
        result |= {"average_gap": float(np.mean(measured)), "tug_of_war": tug_of_war(*SPLITS)}
        margin = float(np.quantile(deviation, 0.95)) if len(deviation) else float("nan")
        for name, width in (("average_gap", margin / len(measured)), ("tug_of_war", margin)):
            result[f"{name}_low"], result[f"{name}_high"] = (
                float(np.clip(result[name] + side * width, 0, 1)) for side in (-1, 1)
            )
        if "attack" in gaps:
            result["tug_of_war_mia"] = tug_of_war("attack", "retain", "test")
        return result
