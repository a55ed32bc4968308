"""Opening data sets and processors by name, and choosing rows."""

import os
import re
import tempfile

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

from .columns import is_string
from .fingerprints import row_hashes

KINDS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
CACHES: list[tempfile.TemporaryDirectory] = []  # of this process


def load_splits(name: str | os.PathLike, config: str | None = None) -> DatasetDict:
    """A data set by Hub id, folder or file, as a dictionary of splits.

    Raises:
        ValueError: it is not there, or cannot be read; in one line.
    """
    name = os.fspath(name)
    try:
        if os.path.isfile(name):
            return _load_file(name)
        if any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
            return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
        splits = datasets.load_dataset(name, config, cache_dir=_cache() if os.path.exists(name) else None)
        return DatasetDict({split: with_folder_labels(rows) for split, rows in splits.items()})
    except Exception as error:  # whatever datasets, pyarrow, fsspec or a file system say about a data set
        raise ValueError(_reason(name, error)) from error


def _load_file(name: str) -> DatasetDict:
    kind = KINDS.get(name.rpartition(".")[2].lower())
    if kind is None:
        raise ValueError(f"{name} is no CSV, JSON or Parquet file; give one, a folder, or a Hub id.")
    separator = {"sep": "\t"} if name.lower().endswith(".tsv") else {}
    return datasets.load_dataset(kind, data_files={"train": name}, cache_dir=_cache(), **separator)


def _cache() -> str:
    """A folder for what `datasets` makes of files, on the disk of its own cache; it goes with the process: no copy of rows that
    are to be forgotten stays behind."""
    folder = str(datasets.config.HF_DATASETS_CACHE)
    os.makedirs(folder, exist_ok=True)
    CACHES.append(tempfile.TemporaryDirectory(prefix="hf_uib_", dir=folder, ignore_cleanup_errors=True))
    return CACHES[-1].name


def _reason(name: str, error: Exception) -> str:
    """One line that says what is wrong with a data set."""
    text, cause = str(error), str(error.__cause__ or "")
    if name in text and "\n" not in text and isinstance(error, ValueError) and not text.startswith("Couldn't"):
        return text  # ours
    if found := re.search(r"available configs: \[(.*?)\]", text) or re.search(
        r"not found. Available: \[(.*?)\]", text
    ):
        known = found[1].replace("'", "")
        return f"{name} has several configurations: {known}; choose one with --dataset_config_name."
    if any(words in cause + text for words in ("Couldn't cast", "column names", "Schema at index")):
        return f"The files of {name} do not have the same columns; give one file, or make their columns alike."
    if isinstance(error, FileNotFoundError) and os.path.isdir(name):
        return f"{name} holds no file of data that can be read; give CSV, JSON, Parquet or a folder of pictures."
    if isinstance(error, (FileNotFoundError, ConnectionError)):
        return f"Dataset {name} was found neither here nor on the Hub; check the name. ({type(error).__name__})"
    reason = (cause or text or type(error).__name__).strip().splitlines()[0]
    return f"{name} cannot be read ({reason}); save or download it again."


def with_folder_labels(dataset: Dataset) -> Dataset:
    """Adds the class folder of each picture as ``label`` where a metadata file kept datasets from doing it."""
    pictures = [k for k, v in dataset.features.items() if isinstance(v, datasets.Image)]
    if len(pictures) != 1 or {"label", "labels"} & set(dataset.column_names):
        return dataset
    if any(isinstance(v, ClassLabel) for v in dataset.features.values()):
        return dataset
    paths = [row["path"] for row in dataset.cast_column(pictures[0], datasets.Image(decode=False))[pictures[0]]]
    if not all(paths):
        return dataset
    folders = [os.path.basename(os.path.dirname(path)) for path in paths]
    names = sorted(set(folders))
    if len(names) < 2:
        return dataset
    return dataset.add_column("label", [names.index(f) for f in folders]).cast_column("label", ClassLabel(names=names))


def split_of(splits: DatasetDict, name: str) -> Dataset:
    """A split by name.

    Raises:
        ValueError: there is none.
    """
    if name not in splits:
        raise ValueError(f"No split '{name}' in the dataset; it has {', '.join(splits)}.")
    return splits[name]


def load_processor(*names: str | os.PathLike | None, kind: str, trust_remote_code: bool = False):
    """Image processor (the PIL one: torchvision is not needed), feature extractor or tokenizer of the first checkpoint that has
    one.

    Args:
        names: an adapter's and its base's, say; None is passed over.
        kind: of the model's input, `models.input_kind`.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: no checkpoint has one; it speaks of the first.
    """
    first: ValueError | None = None
    for name in dict.fromkeys(name for name in names if name):
        try:
            return _load_processor(name, kind, trust_remote_code)
        except ValueError as error:
            first = first or error
    raise first or ValueError("Give a checkpoint that has a processor.")


PROCESSORS = {
    "image": "image processor",
    "video": "image processor",
    "audio": "feature extractor",
    "text": "tokenizer",
}


def _load_processor(name: str | os.PathLike, kind: str, trust_remote_code: bool):
    try:
        if kind == "audio":
            return AutoFeatureExtractor.from_pretrained(name, trust_remote_code=trust_remote_code)
        if kind in ("image", "video"):
            return AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=trust_remote_code)
        processor = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a library says about a folder's files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name} has no {PROCESSORS[kind]} that can be read ({reason}); save it there with save_pretrained."
        ) from error
    if len(processor) <= len(processor.all_special_tokens):
        raise ValueError(f"{name} has no tokenizer; save the one it was trained with beside the model.")
    return processor


def split_forget(train: Dataset, conditions: list[str], split: str) -> tuple[Dataset, Dataset]:
    """The rows that meet every condition, and the others.

    Raises:
        ValueError: no row does.
    """
    forget_rows = matching_rows(train, conditions)
    if not forget_rows.any():
        raise ValueError(f"No row of split '{split}' meets {' and '.join(conditions)}; nothing to forget.")
    return train.select(np.flatnonzero(forget_rows)), train.select(np.flatnonzero(~forget_rows))


def near_misses(dataset: Dataset, conditions: list[str]) -> dict[str, int]:
    """How many rows of a set would meet a condition on text if case and space did not count, by column."""
    found: dict[str, int] = {}
    for condition in conditions:
        column, _, value = condition.partition("=")
        if is_string(dataset.features.get(column)):
            wanted = " ".join(value.split()).casefold()
            entries = dataset.with_format(None)[column][:]
            count = sum(e is not None and e != value and " ".join(e.split()).casefold() == wanted for e in entries)
            if count:
                found[column] = count
    return found


def without_rows_of(dataset: Dataset, others: list[Dataset]) -> Dataset:
    """The rows of a set that are in none of the others, by content."""
    seen = set()
    for other in others:
        seen |= set(map(tuple, row_hashes(other).tolist()))
    kept = [i for i, row in enumerate(map(tuple, row_hashes(dataset).tolist())) if row not in seen]
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def condition_columns(conditions: list[str]) -> tuple[str, ...]:
    """The columns that conditions name."""
    return tuple(dict.fromkeys(condition.partition("=")[0] for condition in conditions))


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
            same = [n for n in feature.names if n == value] or [
                n for n in feature.names if n.casefold() == value.casefold()
            ]
            if len(same) == 1:
                wanted = feature.str2int(same[0])
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
        entries = dataset.with_format(None)[column][:]
        keep &= np.asarray([_is(entry, wanted) for entry in entries], dtype=bool)
    return keep


def _is(entry, wanted) -> bool:
    """Whether an entry is what a condition asks for. Dates are compared as they are written, with or without their time."""
    if entry is None:
        return wanted == ""
    if isinstance(wanted, float):
        return bool(np.isclose(entry, wanted, rtol=1e-6, atol=0))
    if isinstance(wanted, str) and not isinstance(entry, str):
        return wanted in (str(entry), str(entry).partition(" ")[0])
    return entry == wanted


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
