"""The metrics as `evaluate.Metric` modules, for `evaluate.combine`, batches and the Hub's tools; the functions do the work."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import datasets
import evaluate

from .bias import bias_correlation
from .counterfactual import counterfactual_gap
from .groups import worst_group_accuracy
from .klom import klom
from .membership import membership_attack
from .strata import memorisation_strata
from .unlearning import unlearning_gap


class FunctionMetric(evaluate.Metric):
    """An `evaluate.Metric` that calls a function; its name in a combined result is the class's in snake case.

    Attributes:
        function: of the columns and of the settings given to ``compute``; its docstring is the module's.
        columns: name and type of each column; "margins" is a list of float64.
        citation_text: BibTeX.
    """

    function: ClassVar[Callable[..., dict[str, Any]]]
    columns: ClassVar[dict[str, str]]
    citation_text: ClassVar[str]

    def _info(self) -> evaluate.MetricInfo:
        description = inspect.getdoc(type(self).function) or ""
        return evaluate.MetricInfo(
            description=description.partition("\n\nArgs:")[0],
            citation=self.citation_text,
            inputs_description=description,
            features=datasets.Features(
                {name: _MARGINS if kind == "margins" else datasets.Value(kind) for name, kind in self.columns.items()}
            ),
        )

    def _compute(self, **columns_and_settings: Any) -> dict[str, Any]:
        return type(self).function(**columns_and_settings)


_MARGINS = datasets.List(datasets.Value("float64"))
_LABELS = {"predictions": "int64", "references": "int64", "attributes": "int64"}
_RUM = """@inproceedings{zhao2024, title = {What Makes Unlearning Hard and What to Do About It}, author = {Zhao, Kairan and others},
booktitle = {NeurIPS}, year = {2024}}"""
_SALUN = """@inproceedings{fan2024, title = {SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
Classification and Generation}, author = {Fan, Chongyu and others}, booktitle = {ICLR}, year = {2024}}"""


class BiasCorrelation(FunctionMetric):
    """See [`~hf_uib.metrics.bias_correlation`]."""

    function = staticmethod(bias_correlation)
    columns = _LABELS
    citation_text = (
        r"@book{cramer1946, author = {Harald Cram\'er}, title = {Mathematical Methods of Statistics}, year = {1946}}"
    )


class WorstGroupAccuracy(FunctionMetric):
    """See [`~hf_uib.metrics.worst_group_accuracy`]."""

    function = staticmethod(worst_group_accuracy)
    columns = _LABELS
    citation_text = """@inproceedings{sagawa2020, title = {Distributionally Robust Neural Networks for Group Shifts}, author =
{Sagawa, Shiori and Koh, Pang Wei and Hashimoto, Tatsunori B. and Liang, Percy}, booktitle = {ICLR}, year = {2020}}"""


class CounterfactualGap(FunctionMetric):
    """See [`~hf_uib.metrics.counterfactual_gap`]."""

    function = staticmethod(counterfactual_gap)
    columns: ClassVar = {"predictions": "int64", "scores": "float64", "references": "int64", "examples": "int64"}
    citation_text = """@inproceedings{garg2019, title = {Counterfactual Fairness in Text Classification through Robustness},
author = {Garg, Sahaj and Perot, Vincent and Limtiaco, Nicole and Taly, Ankur and Chi, Ed H. and Beutel, Alex},
booktitle = {AIES}, year = {2019}}"""


class MembershipAttack(FunctionMetric):
    """See [`~hf_uib.metrics.membership_attack`]."""

    function = staticmethod(membership_attack)
    columns: ClassVar = {"scores": "float64", "references": "int64", "splits": "string"}
    citation_text = f"""@inproceedings{{jia2023, title = {{Model Sparsity Can Simplify Machine Unlearning}}, author = {{Jia, Jinghan
and others}}, booktitle = {{NeurIPS}}, year = {{2023}}}}
{_SALUN}"""


class Klom(FunctionMetric):
    """See [`~hf_uib.metrics.klom`]."""

    function = staticmethod(klom)
    columns: ClassVar = {"margins": "margins", "retrained_margins": "margins"}
    citation_text = """@inproceedings{georgiev2025, title = {Attribute-to-Delete: Machine Unlearning via Datamodel Matching},
author = {Georgiev, Kristian and Rinberg, Roy and Park, Sung Min and Garg, Shivam and Ilyas, Andrew and Madry, Aleksander and Neel,
Seth}, booktitle = {ICLR}, year = {2025}}"""


class MemorisationStrata(FunctionMetric):
    """See [`~hf_uib.metrics.memorisation_strata`]."""

    function = staticmethod(memorisation_strata)
    columns: ClassVar = {
        "predictions": "int64",
        "retrained_predictions": "int64",
        "references": "int64",
        "margins": "float64",
        "retrained_margins": "float64",
        "confidences": "float64",
    }
    citation_text = _RUM


class UnlearningGap(FunctionMetric):
    """See [`~hf_uib.metrics.unlearning_gap`]."""

    function = staticmethod(unlearning_gap)
    columns: ClassVar = {
        "predictions": "int64",
        "retrained_predictions": "int64",
        "references": "int64",
        "splits": "string",
    }
    citation_text = f"{_RUM}\n{_SALUN}"
