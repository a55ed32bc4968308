"""Hashes that name a data set without showing any of it."""

import hashlib
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import datasets
import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from .columns import content_of, undecoded

_PLAIN = (int, float, str, type(None))  # `repr` gives the whole of them
_KNOWN: WeakKeyDictionary = WeakKeyDictionary()  # a datasets.Dataset does not change


def row_hashes(dataset) -> np.ndarray:
    """A hash per row of everything in it, pictures and sounds by their files' bytes: ``[n, 2]`` unsigned 64-bit, in one pass."""
    if not isinstance(dataset, datasets.Dataset):
        return _row_hashes(dataset)
    if dataset not in _KNOWN:
        _KNOWN[dataset] = _row_hashes(dataset)
    return _KNOWN[dataset]


def _row_hashes(dataset) -> np.ndarray:
    if isinstance(dataset, datasets.Dataset):
        raw = dataset.with_format(None)
        for name, feature in dataset.features.items():
            if (files := undecoded(feature)) is not None:
                raw = raw.cast_column(name, files)
        rows = (
            _without_paths(dict(zip(raw.column_names, values, strict=True)))
            for batch in raw.with_format("arrow").iter(100)
            for values in zip(*(_values(column.combine_chunks()) for column in batch.columns), strict=True)
        )
    else:
        rows = (dataset[i] for i in range(len(dataset)))
    digests = bytearray()
    for row in tqdm(rows, "Hashing rows", len(dataset), delay=2, leave=False):
        digests += hashlib.blake2b(_bytes_of(row), digest_size=16).digest()
    return np.frombuffer(digests, ">u8").reshape(-1, 2)


def rows_in_common(first: np.ndarray, second: np.ndarray) -> int:
    """How many rows of ``first`` are in ``second`` too, both as `row_hashes`."""
    first, second = first.astype(np.uint64), second.astype(np.uint64)  # isin takes the machine's byte order alone
    near = first[np.isin(first[:, 0], second[:, 0], kind="sort")]
    there = set(map(tuple, second[np.isin(second[:, 0], first[:, 0], kind="sort")].tolist()))
    return sum(tuple(row) in there for row in near.tolist())


def _values(column: pa.Array) -> list:
    """A column's rows: nested lists of numbers (pixels, waveforms) as bytes, since as Python lists they take a hundred times as
    long; the others as they are."""
    lists = column.storage if isinstance(column, pa.ExtensionArray) else column
    values, depth, ends, lengths = lists, 0, np.arange(len(column) + 1), [b""] * len(column)
    while isinstance(values, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)) and not values.null_count:
        if isinstance(values, pa.FixedSizeListArray):
            offsets = np.arange(len(values) + 1) * values.type.list_size
        else:
            offsets = values.offsets.to_numpy() - values.offsets[0].as_py()
        sizes = np.diff(offsets).astype(np.int64)
        lengths = [length + sizes[i:j].tobytes() for length, i, j in zip(lengths, ends, ends[1:], strict=False)]
        values, depth, ends = values.flatten(), depth + 1, offsets[ends]
    floats = pa.types.is_floating(values.type)
    gaps = values.null_count > 0
    if gaps and (depth or lists.null_count) and len(column) > 1:  # a row's hash is that of the row alone
        return [value for i in range(len(column)) for value in _values(column.slice(i, 1))]
    if not (floats and depth or depth > 1 and pa.types.is_integer(values.type)) or gaps:
        return column.to_pylist()
    numbers = values.to_numpy().astype(np.float64 if floats else np.int64)
    return [numbers[i:j].tobytes() + length for length, i, j in zip(lengths, ends, ends[1:], strict=False)]


def _without_paths(row: dict) -> dict:
    def contents(v):
        if isinstance(v, list) and v and isinstance(v[0], dict):
            return b"".join(_bytes_of(contents(frame)) for frame in v)
        if not isinstance(v, dict) or "bytes" not in v:
            return v
        try:
            return content_of(v) or v
        except OSError:  # the reader says which row cannot be read
            return v

    return {k: contents(v) for k, v in row.items()}


def _bytes_of(value) -> bytes:
    if isinstance(value, Mapping):
        return b"".join(k.encode() + b"=" + _bytes_of(value[k]) + b";" for k in sorted(value))
    if isinstance(value, bytes):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
    if hasattr(value, "tobytes"):
        return value.tobytes()
    if isinstance(value, (list, tuple)) and any(not isinstance(one, _PLAIN) for one in value):
        return b"[" + b",".join(map(_bytes_of, value)) + b"]"
    return repr(value).encode()


def fingerprint(dataset) -> str:
    """A hash of a dataset's rows, whatever their order; names a data set without showing any of it."""
    return fingerprint_of(row_hashes(dataset))


def fingerprint_of(rows: np.ndarray) -> str:
    """As `fingerprint`, from the rows' hashes."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(rows[np.lexsort((rows[:, 1], rows[:, 0]))].tobytes())
    return digest.hexdigest()


def ordered_fingerprint(dataset) -> str:
    """A hash of a dataset's rows in their order, for row numbers that belong to it."""
    return hashlib.blake2b(row_hashes(dataset).tobytes(), digest_size=8).hexdigest()
