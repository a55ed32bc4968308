"""Reading data: which columns a model takes, and which rows are to be forgotten."""

import os

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor


def encode(dataset: datasets.Dataset, processing_class, main_input: str, max_length: int | None = None):
    """Give a raw dataset the input its model takes: pictures through the image processor, text through the tokenizer.

    Datasets that have ``main_input`` already, have their own transform, or are no ``datasets.Dataset`` are left alone.

    Args:
        dataset: rows with an `Image` column or a string column (``text`` or ``sentence``, else the first of strings).
        processing_class: image processor or tokenizer; None leaves the data alone.
        main_input: ``model.main_input_name``.
        max_length: truncation length of a text.
    """
    if not isinstance(dataset, datasets.Dataset) or main_input in dataset.column_names or processing_class is None:
        return dataset
    if dataset.format["type"] == "custom":
        return dataset
    if isinstance(processing_class, BaseImageProcessor):
        column = image_column(dataset)
        if column is None:
            return dataset

        def pictures(batch):
            images = [image.convert("RGB") if image.mode not in ("RGB", "L") else image for image in batch[column]]
            rest = {k: v for k, v in batch.items() if k != column}
            return {**rest, main_input: processing_class(images, return_tensors="pt")[main_input]}

        return dataset.with_transform(pictures)
    if isinstance(processing_class, PreTrainedTokenizerBase):
        column = text_column(dataset)
        if column is None:
            return dataset
        return dataset.map(
            lambda batch: processing_class(batch[column], truncation=True, max_length=max_length),
            batched=True,
            desc="Tokenizing",
        )
    return dataset


def image_column(dataset: datasets.Dataset) -> str | None:
    """The first `Image` column."""
    return next((k for k, v in dataset.features.items() if isinstance(v, datasets.Image)), None)


def text_column(dataset: datasets.Dataset) -> str | None:
    """``text``, ``sentence``, or the first string column."""
    strings = [
        k
        for k, v in dataset.features.items()
        if isinstance(v, datasets.Value) and v.dtype in ("string", "large_string")
    ]
    return next((k for k in ("text", "sentence") if k in strings), strings[0] if strings else None)


def label_column(dataset) -> str:
    """``labels`` or ``label``.

    Raises:
        ValueError: neither is there.
    """
    names = getattr(dataset, "column_names", None) or list(dataset[0])
    for name in ("labels", "label"):
        if name in names:
            return name
    raise ValueError(f"No column 'label' or 'labels' among {', '.join(names)}; rename the label column to 'label'.")


def labels_of(dataset) -> np.ndarray:
    """All labels, ``[n]``."""
    name = label_column(dataset)
    if isinstance(dataset, datasets.Dataset):
        return np.asarray(dataset.with_format(None).select_columns([name])[:][name])
    return np.asarray([int(dataset[i][name]) for i in range(len(dataset))])


def split_forget(train: Dataset, conditions: list[str], split: str) -> tuple[Dataset, Dataset]:
    """The rows that meet every condition, and the others.

    Raises:
        ValueError: no row does.
    """
    forget_rows = matching_rows(train, conditions)
    if not forget_rows.any():
        raise ValueError(f"No row of split '{split}' meets {' and '.join(conditions)}; nothing to forget.")
    return train.select(np.flatnonzero(forget_rows)), train.select(np.flatnonzero(~forget_rows))


def load_splits(name: str, config: str | None = None) -> DatasetDict:
    """A dataset by Hub id, folder or file, as a dictionary of splits."""
    if os.path.isfile(name):
        kind = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}.get(
            name.rpartition(".")[2]
        )
        if kind is None:
            raise ValueError(f"{name} is no CSV, JSON or Parquet file; give one, a folder, or a Hub id.")
        try:
            return datasets.load_dataset(
                kind, data_files={"train": name}, **({"sep": "\t"} if name.endswith(".tsv") else {})
            )
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:  # pyarrow's errors are ValueErrors
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ValueError(f"{name} cannot be read as {kind} ({reason}); save or download it again.") from error
    if os.path.isfile(os.path.join(name, "dataset_dict.json")) or os.path.isfile(os.path.join(name, "state.json")):
        loaded = datasets.load_from_disk(name)
        return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
    try:
        return datasets.load_dataset(name, config)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"Dataset {name} was found neither here nor on the Hub; check the name. ({type(error).__name__})"
        ) from error


def split_of(splits: DatasetDict, name: str) -> Dataset:
    if name not in splits:
        raise ValueError(f"No split '{name}' in the dataset; it has {', '.join(splits)}.")
    return splits[name]


def load_processor(name: str, picture: bool):
    """Image processor (the PIL one: torchvision is not needed) or tokenizer of a checkpoint.

    Raises:
        ValueError: the checkpoint has no tokenizer (Transformers then makes an empty one up).
    """
    if picture:
        return AutoImageProcessor.from_pretrained(name, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(name)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"{name} has no tokenizer; save the one it was trained with beside the model.")
    return tokenizer


def with_class_ids(dataset: Dataset, config) -> Dataset:
    """Labels as the model's class ids: by name where both sides have names, as they are otherwise.

    Raises:
        ValueError: there is no label column, or a class name that the model does not have.
    """
    column = label_column(dataset)
    feature = dataset.features[column]
    names = feature.names if isinstance(feature, ClassLabel) else None
    ids = {str(name): int(i) for name, i in (config.label2id or {}).items()}
    if names is None and feature.dtype in ("string", "large_string"):
        names = sorted(set(dataset[column]))
        unknown = [n for n in names if n not in ids]
        if unknown:
            raise ValueError(f"Label '{unknown[0]}' is no class of the model; it has {', '.join(ids)}.")
        return dataset.map(
            lambda row: {column: ids[row[column]]}, features=_integer(dataset, column), desc="Class ids"
        )
    if names and all(n in ids for n in names) and any(ids[n] != i for i, n in enumerate(names)):
        return dataset.map(
            lambda row: {column: ids[names[row[column]]]}, features=_integer(dataset, column), desc="Class ids"
        )
    return dataset


def _integer(dataset: Dataset, column: str) -> datasets.Features:
    return datasets.Features({**dataset.features, column: datasets.Value("int64")})


def matching_rows(dataset: Dataset, conditions: list[str]) -> np.ndarray:
    """Which rows meet every ``COLUMN=VALUE``, ``[n]`` booleans. Nothing is evaluated: values are compared.

    Raises:
        ValueError: no ``=``, a column that is not there, or a value its type cannot have.
    """
    keep = np.ones(len(dataset), dtype=bool)
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals or not column:
            raise ValueError(f"{condition!r} is no condition; write COLUMN=VALUE.")
        if column not in dataset.column_names:
            raise ValueError(f"Column {column!r} is not in the dataset; it has {', '.join(dataset.column_names)}.")
        feature = dataset.features[column]
        if isinstance(feature, ClassLabel):
            if value in feature.names:
                wanted = feature.str2int(value)
            elif value.isdecimal() and int(value) < feature.num_classes:
                wanted = int(value)
            else:
                raise ValueError(f"{value!r} is no class of column {column!r}; it has {', '.join(feature.names)}.")
        elif not isinstance(feature, datasets.Value):
            raise ValueError(
                f"Column {column!r} holds {type(feature).__name__}, which cannot be compared; choose another."
            )
        else:
            wanted = _as_type(value, feature.dtype, column)
        keep &= np.asarray([entry == wanted for entry in dataset.with_format(None)[column]], dtype=bool)
    return keep


def _as_type(value: str, dtype: str, column: str):
    if dtype == "bool":
        if value.lower() in ("true", "1", "false", "0"):
            return value.lower() in ("true", "1")
        raise ValueError(f"Column {column!r} holds true or false, not {value!r}.")
    for prefix, kind in (("int", int), ("uint", int), ("float", float)):
        if dtype.startswith(prefix):
            try:
                return kind(value)
            except ValueError:
                raise ValueError(f"Column {column!r} holds numbers ({dtype}), not {value!r}.") from None
    return value
