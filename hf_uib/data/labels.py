"""Labels as the model's class ids. Names are matched; a mismatch never permutes classes in silence."""

import re
import warnings
from collections.abc import Iterable
from typing import Any

import datasets
import numpy as np

from .columns import Columns, is_list, is_string, label_column, values_of

IGNORED = -100  # the label of a token that has none, as in Transformers
NOT_LABELLED = (None, -1, IGNORED)  # the same in raw rows, of a word


def class_ids(
    dataset: datasets.Dataset,
    config,
    columns: Columns = Columns(),  # noqa: B008
    name: str = "the data",
    of_tokens: bool = False,
    listed: bool = False,
) -> dict | None:
    """What each label of a data set is in the model: ``{label: class id}``; None where the labels are ids already.

    Names (class labels, strings) are matched to the model's, whatever their case and order. Integers, whole floats and booleans are
    ids, and so are class labels of which the model knows no name. Of a model of several labels a row those that a row has may be
    listed by name or id; None where the rows hold a number for each label.

    Args:
        config: of the model.
        name: what a message calls the set.
        of_tokens: a row's labels are a list, one for each word (or token).
        listed: a row lists the labels that it has; see `lists_labels`.

    Raises:
        ValueError: a name is none of the model's while others are, or the labels are no classes.
    """
    column = label_column(dataset, columns)
    feature = dataset.features[column]
    values: Iterable = values_of(dataset, column)
    if several_labels(config) and not of_tokens:
        if not listed:
            return None
        feature = feature.feature
        values = (value for row in values_of(dataset, column) for value in row or ())
    elif of_tokens:
        if not is_list(feature):
            raise ValueError(
                f"The labels of {name} (column '{column}') are no lists; a model that labels tokens takes a label for each word."
            )
        feature = feature.feature
        values = (value for row in values for value in row if value not in NOT_LABELLED)
    if is_list(feature) or isinstance(feature, dict):
        raise ValueError(
            f"The labels of {name} (column '{column}') are lists; give one class for each row, or a model whose config says "
            "problem_type='multi_label_classification'."
        )
    values = list(dict.fromkeys(v for v in values if v is not None and v == v))
    if isinstance(feature, datasets.ClassLabel):
        names = {i: feature.names[i] for i in sorted(v for v in values if 0 <= v < feature.num_classes)}
        by_name = any_known(feature.names, config)  # one decision for all sets of the data
        found = match_names(names.values(), config, name, some=True) if by_name else None
        if found is None:
            if has_own_names(config) and names:
                pairs = ", ".join(f"{n} = {model_names(config).get(i, '?')}" for i, n in names.items())
                warnings.warn(
                    f"None of the labels of {name} is a class name of the model; they are taken by their number: {pairs}.",
                    stacklevel=2,
                )
            return None
        ids = {i: found[n] for i, n in names.items()}
        return None if all(i == k for i, k in ids.items()) else ids
    if is_string(feature):
        found = match_names(values, config, name)
        if found is None and values and all(re.fullmatch(r"\d+(\.0)?", v.strip()) for v in values):
            _refuse_other_numbers(config, name)
            found = {v: int(float(v)) for v in values}
        if found is None:
            raise ValueError(f"The label '{values[0]}' of {name} is no class of the model; it has {known(config)}.")
        return found
    return _ids_of_numbers(values, config, f"{name} (column '{column}')")


def lists_labels(dataset: datasets.Dataset, column: str, config) -> bool | None:
    """Whether each row lists the labels that it has, by name or id, or has a number for each label.

    The items of such lists are class labels or strings, or ids without a repetition, and the lists differ in their lengths or have
    ids above 1. None: they could be either.
    """
    feature = dataset.features[column]
    if not is_list(feature):
        return False
    item, labels = feature.feature, len(model_names(config))
    if isinstance(item, datasets.ClassLabel) or is_string(item):
        return True
    if not (isinstance(item, datasets.Value) and "int" in item.dtype):
        return False
    rows = [row for row in values_of(dataset, column) if row is not None]
    if not all(len(set(row)) == len(row) and all(v is not None and 0 <= v < labels for v in row) for row in rows):
        return False
    lengths = {len(row) for row in rows}
    return True if len(lengths) > 1 or labels not in lengths and any(v > 1 for row in rows for v in row) else None


def with_label_vectors(dataset: datasets.Dataset, config, columns: Columns) -> datasets.Dataset:
    """Where a model gives several labels a row, and a set has a column of numbers for each by its name: with ``labels`` made of
    these, -1 where one is missing. Other sets as they are."""
    if not several_labels(config) or not has_own_names(config) or has_labels(dataset, columns):
        return dataset
    by_name = {_plain(name): name for name, kind in dataset.features.items() if _is_number(kind)}
    names = [by_name.get(_plain(name)) for name in model_names(config).values()]
    if None in names:
        return dataset
    raw = dataset.with_format(None)
    vectors = zip(*(values_of(raw, str(name)) for name in names), strict=True)
    return dataset.add_column("labels", [[-1.0 if v is None else float(v) for v in row] for row in vectors])


def _is_number(feature) -> bool:
    return isinstance(feature, datasets.Value) and re.match(r"(u?int|float|bool)", feature.dtype) is not None


def _ids_of_numbers(values: list, config, name: str) -> dict | None:
    """As `class_ids`, of numbers and booleans."""
    if all(isinstance(v, bool) for v in values):
        if any_known(["true", "false"], config):
            found = match_names(["true", "false"], config, name) or {}
            return {v: found[str(v).lower()] for v in values}
        return {v: int(v) for v in values}
    if all(isinstance(v, (int, np.integer)) or isinstance(v, float) and v.is_integer() for v in values):
        _refuse_other_numbers(config, name)
        return None if all(isinstance(v, (int, np.integer)) for v in values) else {v: int(v) for v in values}
    raise ValueError(f"The labels of {name} are not integers; encode them as class ids, or give names.")


def _refuse_other_numbers(config, name: str) -> None:
    for i, n in model_names(config).items():
        if n.strip().isdecimal() and int(n) != i:
            raise ValueError(
                f"The labels of {name} are numbers, but the model calls class {i} '{n}': give the labels as text, to be matched "
                "by name."
            )


def several_labels(config) -> bool:
    """Whether a row has several labels: the model's ``problem_type`` says so."""
    return getattr(config, "problem_type", None) == "multi_label_classification"


def any_known(names: Iterable[str], config) -> bool:
    """Whether the model has a class of one of the names."""
    known_names = {_plain(n) for n in model_names(config).values()}
    return has_own_names(config) and any(_plain(n) in known_names for n in names)


def match_names(names: Iterable[str], config, name: str, some: bool = False) -> dict[str, int] | None:
    """Ids of class names; None if the model knows none of them.

    Args:
        some: other names of the data are the model's, so that an unknown one is a mistake even alone.

    Raises:
        ValueError: the model knows some of them, but not all.
    """
    names = list(names)
    ids, key = {_plain(n): i for i, n in model_names(config).items()}, _plain
    if len(ids) < len(model_names(config)):  # names that differ in their case alone
        ids, key = {n: i for i, n in model_names(config).items()}, lambda name: name
    found = {n: ids[key(n)] for n in names if key(n) in ids}
    unknown = [n for n in names if n not in found]
    if (found or some) and unknown:
        raise ValueError(
            f"The label '{unknown[0]}' of {name} is no class of the model, though others are; it has {known(config)}."
        )
    return found or None


def model_names(config) -> dict[int, str]:
    """Class names by id."""
    return {int(i): str(n) for i, n in (config.id2label or {}).items()}


def known(config) -> str:
    """The model's class names in a row, at most twenty of them."""
    names = list(model_names(config).values())
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def has_own_names(config) -> bool:
    """Whether somebody named the classes: Transformers calls them LABEL_0, LABEL_1, ... otherwise."""
    return any(n != f"LABEL_{i}" for i, n in model_names(config).items())


def name_classes(config, dataset, columns: Columns = Columns()) -> None:  # noqa: B008
    """Give classes that nobody named the names of a data set's class labels, whose numbers the model is trained on."""
    if not isinstance(dataset, datasets.Dataset) or not has_labels(dataset, columns) or has_own_names(config):
        return
    feature = dataset.features.get(label_column(dataset, columns))
    while is_list(feature):
        feature = feature.feature
    names = feature.names if isinstance(feature, datasets.ClassLabel) else []
    if len(names) == len({_plain(n) for n in names}) == len(model_names(config)):
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}


def named_config(configs: dict[str, Any]) -> Any:
    """The config whose class names the data go by: the first with names of its own, else the first.

    Args:
        configs: of several models, by what a message calls them.

    Raises:
        ValueError: two models have the same names in another order, so that no label would mean the same to both.
    """
    named = {what: config for what, config in configs.items() if has_own_names(config)}
    orders = {what: [_plain(n) for n in model_names(config).values()] for what, config in named.items()}
    first = next(iter(named), next(iter(configs)))
    for what, order in orders.items():
        if order != orders[first] and sorted(order) == sorted(orders[first]):
            raise ValueError(
                f"The classes of {what} and {first} have the same names in another order; give models that agree."
            )
    return configs[first]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", str(name)).strip().casefold()


def labels_of(dataset, columns: Columns = Columns()) -> np.ndarray:  # noqa: B008
    """All labels of an encoded set, ``[n, ...]``, as the model gets them."""
    if not isinstance(dataset, datasets.Dataset):
        name = label_column(dataset, columns) if len(dataset) else ""
        return np.asarray([np.asarray(dataset[i][name]) for i in range(len(dataset))])
    transform = transform_of(dataset)
    if (
        transform is not None
        and not hasattr(transform, "labels")
        and not {"label", "labels"} & set(dataset.column_names)
    ):
        name = next(n for n in ("labels", "label") if n in dataset[0])  # made by a transform of the user's
        return np.concatenate([np.asarray(batch[name]) for batch in dataset.iter(256)])
    name = getattr(transform, "label", None) or label_column(dataset, columns)
    values = dataset.with_format(None).select_columns([name])[:][name]
    values = transform.labels(values) if hasattr(transform, "labels") else values
    several = len(values) > 0 and isinstance(values[0], list)
    ragged = several and len({len(v) if isinstance(v, list) else 0 for v in values}) > 1
    return np.asarray(values, dtype=object if ragged else None)


def transform_of(dataset):
    """What `with_transform` was given, if it was."""
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
        return dataset.format["format_kwargs"]["transform"]
    return None


def has_labels(dataset, columns: Columns = Columns()) -> bool:  # noqa: B008
    """Whether a set has a column of labels."""
    try:
        label_column(dataset, columns)
    except ValueError:
        return bool({"label", "labels"} & set(dataset[0])) if len(dataset) and transform_of(dataset) else False
    return True
