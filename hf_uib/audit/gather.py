"""From models and data sets to the `AuditContext`."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.data import Subset

from ..data.columns import Columns
from ..data.fingerprints import row_hashes, rows_in_common
from ..data.labels import has_own_names, known, model_names, named_config, transform_of
from ..data.pairing import sample_indices
from ..data.reading import Reader, check_inputs
from ..exported import EXPORT, MODEL, ExportedClassifier, is_onnx
from ..inference import ModelOutputs, observe, reader_of
from ..lora import require_base_below
from ..metrics.bias import attribute_classes, cramers_v
from ..models import Name, input_kind, load_classifier, name_of, num_labels_of
from ..one_label import label_number, positive_class, rows_with_label, two_classes
from ..processes import processes
from ..provenance import detached, merged_copy
from ..quantised import keep_codes
from ..unlearning_task import MultiLabel, SingleLabel, TokenLabels, UnlearningTask, task_of
from .context import AuditContext, BiasAttribute
from .statistics import Resampler
from .thresholds import AuditThresholds

# ---- Models ----


def loaded(model: Name | nn.Module, trust_remote_code: bool = False) -> nn.Module:
    """A model by folder, Hub id, ONNX file or folder of an export, on this process's device; one that is given stays as it is."""
    given: Any = name_of(model)
    if not isinstance(given, str):
        return given
    if os.path.isfile(os.path.join(given, EXPORT)):  # the folder of an export
        given = os.path.join(given, MODEL)
    if is_onnx(given):
        return ExportedClassifier(given)
    return load_classifier(given, trust_remote_code=trust_remote_code).to(processes().device)


def plain_models(
    model: nn.Module,
    reference_model: Name | nn.Module | None,
    retrained_model: Name | nn.Module | list | tuple | None,
) -> tuple[dict[str, nn.Module], list[str]]:
    """Models without adapters by name, and the names of the oracles.

    Raises:
        ValueError: no reference model, an adapter is injected in one, or the numbers of classes differ.
    """
    if reference_model is not None:
        models = {"model": _plain(model), "reference": _plain(reference_model)}
    elif isinstance(model, PeftModel):
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            require_base_below(model)  # else what lies there is not the model before
        models = {"model": _plain(model), "reference": detached(model)}
    else:
        raise ValueError("Give the model before unlearning: --reference MODEL, in Python reference_model=...")
    retrained = retrained_model if isinstance(retrained_model, (list, tuple)) else [retrained_model]
    given = [m for m in retrained if m is not None]
    oracles = ["retrained" if len(given) == 1 else f"retrained {i + 1}" for i in range(len(given))]
    models |= {name: _plain(m) for name, m in zip(oracles, given, strict=True)}
    kinds = {input_kind(m) for m in models.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"The models take different kinds of input ({', '.join(sorted(kinds))}); audit models of one task."
        )
    classes = {num_labels_of(m) for m in models.values()}
    if len(classes) > 1:
        raise ValueError(
            f"The models have different numbers of classes ({sorted(classes)}); audit models of one task."
        )
    return models, oracles


def _plain(model: Name | nn.Module) -> nn.Module:
    model = loaded(model)
    keep_codes(model)
    if isinstance(model, PeftModel):
        return merged_copy(model)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "A model to audit has an adapter injected (PEFT changes the model it is given); load it anew, or leave "
            "reference_model out where it is the adapter's base."
        )
    return model


# ---- Context ----


def gather(
    models: dict[str, nn.Module],
    oracles: list[str],
    datasets: dict[str, Any],
    *,
    processing_class: Any = None,
    bias_column: str | Sequence[str] | None = None,
    example_column: str | None = None,
    deep: bool = False,
    seed: int = 0,
    thresholds: AuditThresholds | None = None,
    columns: Columns = Columns(),  # noqa: B008
    label: str | int | None = None,
    positive_label: str | int | None = None,
) -> AuditContext:
    """What the checks look at: the encoded samples of the sets, and what each plain model says about them.

    Args:
        models: ``model``, ``reference`` and the ``oracles`` by name.
        datasets: ``forget``, ``test`` and, where there is one, ``retain``.
        deep: keep the features of every block, not of the last alone.
        columns: names of columns that are not the usual ones.
        label: the label of a multi-label model that is looked at; see `one_label.label_number`.
        positive_label: see `one_label.positive_class`.

    Raises:
        ValueError: no forget or test rows, or a column or a label is missing.
    """
    thresholds = thresholds or AuditThresholds()
    model: Any = models["model"]
    task = task_of(model)
    if not isinstance(task, (SingleLabel, MultiLabel, TokenLabels)):
        raise ValueError(
            "The audit reads classifiers of one label a row, several, or one a token; the task of this model is "
            f"{type(task).__name__}."
        )
    if example_column is not None and isinstance(task, TokenLabels):
        raise ValueError(
            f"example_column '{example_column}' is for models that label rows; leave it out: tokens have no counterparts."
        )
    if label is not None and not isinstance(task, MultiLabel):
        raise ValueError(f"label '{label}' is for a model of several labels a row; leave it out.")
    config = named_config({name: models[name].config for name in ("reference", *models)})
    named: Any = next(m for m in models.values() if m.config is config)
    read = reader_of(named, processing_class, columns).of_sets(datasets.values())
    positive = positive_class(named, positive_label, isinstance(task, MultiLabel))
    sets, number, examples = _samples(read, datasets, example_column, seed, thresholds, task, model, label)
    _warn_of_nameless(models, config, sets["test"])
    bias_columns = [bias_column] if isinstance(bias_column, str) else list(bias_column or ())
    for setting, name in (*(("bias_column", name) for name in bias_columns), ("example_column", example_column)):
        if name is not None and name not in _names(sets["test"]):
            raise ValueError(f"{setting} '{name}' is not among {', '.join(_names(sets['test']))}.")
    outputs = {
        name: {
            part: observe(model, rows, processing_class, deep, f"{name}, {part} set") for part, rows in sets.items()
        }
        for name, model in models.items()
    }
    if number is not None:
        outputs = {name: {part: _of_label(out, number) for part, out in row.items()} for name, row in outputs.items()}
    seen = outputs["reference"]
    attributes = {
        name: _bias_attribute(sets, name, seen["forget"], seen["test"], thresholds.attribute_association)
        for name in dict.fromkeys(bias_columns)
    }
    if len(attributes) > 1:
        attributes[" x ".join(attributes)] = _crossing(list(attributes.values()))
    resamplers = {
        part: Resampler(
            examples if part == "test" and examples is not None else out.rows,
            len(out.labels),
            thresholds.resamples,
            seed,
        )
        for part, out in outputs["reference"].items()
    }
    sizes = {part: len(rows) for part, rows in datasets.items() if rows is not None}
    name_of_class = lambda number: model_names(config).get(number, str(number))
    label_name = None if number is None else name_of_class(number)
    return AuditContext(
        models, oracles, sets, outputs, sizes, resamplers, attributes, examples, processing_class, thresholds, seed,
        label=label_name, positive=None if positive is None else (positive, label_name or name_of_class(positive)),
    )  # fmt: skip


def _warn_of_nameless(models: dict[str, nn.Module], config: Any, rows: Any) -> None:
    """Where the data have the classes in another order than the model that names them, one without names may go by the data's."""
    nameless = [name for name, model in models.items() if not has_own_names(model.config)]
    ids = getattr(transform_of(rows), "ids", None) or {}
    if nameless and has_own_names(config) and any(isinstance(label, int) and label != i for label, i in ids.items()):
        warnings.warn(
            f"{', '.join(nameless)}: no class names, so the classes are taken to be {known(config)}, in this order, and not in the "
            "data's. If they are not, save the model with id2label.",
            stacklevel=2,
        )


def _of_label(outputs: ModelOutputs, number: int) -> ModelOutputs:
    return ModelOutputs(*two_classes(outputs.logits, outputs.labels, number), outputs.features)


def _samples(
    read: Reader,
    datasets: dict[str, Any],
    example_column: str | None,
    seed: int,
    thresholds: AuditThresholds,
    task: UnlearningTask,
    model: Any,
    label: str | int | None,
) -> tuple[dict[str, Any], int | None, np.ndarray | None]:
    """Encoded samples of the sets, copies of an example together; the number of the label that is looked at, if there are several:
    rows in which it is not given are left out; and the numbers of the test rows' examples, if they have some."""
    number: int | None = None
    examples: np.ndarray | None = None
    wanted = {"forget": thresholds.forget_rows, "retain": thresholds.retain_rows, "test": thresholds.test_rows}
    sets = {}
    for part, rows in datasets.items():
        if part == "retain" and (rows is None or len(rows) == 0):
            continue
        if rows is None or len(rows) == 0:
            raise ValueError(f"{part}_dataset has no examples; the audit needs some.")
        encoded = read(rows, f"{part}_dataset")
        check_inputs(f"{part}_dataset", encoded, read)
        labels = task.check_labels(f"{part}_dataset", encoded, model)
        if isinstance(task, MultiLabel):
            number = label_number(model, label, labels) if number is None else number
            given = rows_with_label(labels, number)
            if not len(given):
                raise ValueError(f"No row of {part}_dataset has the label that is audited; name another: label=...")
            encoded = _selected(encoded, given.tolist())
        ids = _examples(encoded, example_column) if part == "test" else None
        if ids is None:
            chosen = sorted(sample_indices(len(encoded), wanted[part], seed))
        else:
            count = max(1, wanted[part] * (ids.max() + 1) // len(ids))
            chosen = np.flatnonzero(np.isin(ids, sample_indices(int(ids.max()) + 1, count, seed))).tolist()
            examples = np.unique(ids[chosen], return_inverse=True)[1]
        sets[part] = _selected(encoded, chosen)
    if shared := rows_in_common(*(row_hashes(datasets[part]) for part in ("test", "forget"))):
        warnings.warn(
            f"{shared} test rows are forget rows too; give test rows that no model was trained on.", stacklevel=2
        )
    return sets, number, examples


def _examples(rows: Any, example_column: str | None) -> np.ndarray | None:
    """Numbers of the examples that the rows are copies of, ``[n]``; a row without a value is one of its own. None: no such column.

    Raises:
        ValueError: no two rows are copies.
    """
    values = _column(rows, example_column)
    if values is None:
        return None
    ids = [f"row {i}" if value is None else f"= {value}" for i, value in enumerate(values)]
    examples = np.unique(ids, return_inverse=True)[1]
    if len(np.unique(examples)) == len(examples):
        raise ValueError(
            f"No two test rows have the same {example_column} (example_column); give the copies of an example one, or leave it out."
        )
    return examples


def _selected(rows: Any, chosen: list[int]) -> Any:
    """Some rows of a set, in their order."""
    if len(chosen) == len(rows):
        return rows
    return rows.select(chosen) if hasattr(rows, "select") else Subset(rows, chosen)


def _bias_attribute(
    sets: dict[str, Any], bias_column: str, forget: ModelOutputs, test: ModelOutputs, attribute_association: float
) -> BiasAttribute:
    """The attribute of the test rows, coded by class where it carries the label on the forget set; a token has its row's."""
    raw, on_forget = _column(sets["test"], bias_column), _column(sets["forget"], bias_column)
    assert raw is not None  # `gather` has looked
    forget_labels, concerned = forget.labels, None
    if test.rows is not None:
        raw, on_forget = raw[test.rows], None if on_forget is None else on_forget[forget.rows]
        concerned = np.isin(test.labels, forget_labels)
    values = np.asarray([_text(value) for value in raw])
    missing = np.asarray([value is None for value in raw], dtype=bool)
    stands_for = None
    if on_forget is not None:
        there = np.asarray([value is not None for value in on_forget], dtype=bool)
        given, labels = np.asarray([_text(value) for value in on_forget])[there], forget_labels[there]
        stands_for = attribute_classes(given, labels) if len(given) else None
        if stands_for is not None and not cramers_v(given, labels) >= attribute_association:
            stands_for = None
    if stands_for is None:
        codes = np.unique(values, return_inverse=True)[1]
    else:
        codes = np.asarray([stands_for.get(value, -1) for value in values])
    feature = (getattr(sets["test"], "features", None) or {}).get(bias_column)
    named = feature.int2str if isinstance(feature, ClassLabel) else _text
    groups = np.asarray(["" if value is None else f"{bias_column}={named(value)}" for value in raw])
    return BiasAttribute(values, np.where(missing, -1, codes), stands_for is not None, groups, concerned)


def _text(value: Any) -> str:
    """A value of an attribute, whatever the type of its column: floats that are whole, as in a column with gaps, are integers."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _crossing(attributes: list[BiasAttribute]) -> BiasAttribute:
    """The groups that several attributes make together; a row that lacks one value is in none. It stands for no classes."""
    rows = list(zip(*(attribute.groups for attribute in attributes), strict=True))
    groups = np.asarray([", ".join(row) if all(row) else "" for row in rows])
    codes = np.unique(groups, return_inverse=True)[1]
    return BiasAttribute(groups, np.where(groups == "", -1, codes), False, groups, attributes[0].concerned)


def _names(rows: Any) -> list[str]:
    return getattr(rows, "column_names", None) or list(rows[0])


def _column(rows: Any, name: str | None) -> np.ndarray | None:
    """A column's raw values, missing ones as None; None where there is no such column."""
    if name is None or name not in _names(rows):
        return None
    values = (
        rows.with_format(None)[name] if hasattr(rows, "with_format") else [rows[i][name] for i in range(len(rows))]
    )
    plain = [value.item() if hasattr(value, "item") else value for value in values]
    return np.asarray([None if value is None or value != value else value for value in plain], dtype=object)
