"""Streams (`IterableDataset`) are written to disk once and read from there: rows are sampled, paired and gone through again."""

import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from functools import cached_property, partial

import datasets
import torch
from accelerate.utils import gather_object

from ..processes import processes
from .columns import content_of, rows_refused, undecoded

MAX_ROWS = 10_000_000  # of a stream: one without an end has to stop somewhere
LEFT_FREE = 256 * 2**20  # bytes of the disk
ROWS_IN_MEMORY = 100  # are written at a time; the disk is then looked at


def is_stream(dataset) -> bool:
    """Whether a data set can only be gone through in its order."""
    return isinstance(dataset, (torch.utils.data.IterableDataset, datasets.IterableDataset))


class StreamFolder:
    """A temporary folder for the streams of a run, on the disk of `datasets`' cache. It is made for the first of them, and removed
    with this object, with the process, or where a ``with`` block ends in an error.

    Under several processes the first of each machine writes, and the others read its files.
    """

    def __enter__(self) -> "StreamFolder":
        return self

    def __exit__(self, error, *rest) -> None:
        if error is not None and "path" in self.__dict__:
            self.remove()

    @cached_property
    def path(self) -> str:
        """Of the folder."""
        above = str(datasets.config.HF_DATASETS_CACHE)
        os.makedirs(above, exist_ok=True)
        path = tempfile.mkdtemp(prefix="hf_uib_", dir=above)
        self.remove = weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
        return path

    def stored(self, dataset, name: str):
        """A stream as a memory-mapped `datasets.Dataset` with its features and format, a dictionary's one by one; others stay.

        Args:
            name: what a message calls the set.

        Raises:
            ValueError: the stream breaks off, has no rows or over `MAX_ROWS`, is split by process, or does not fit on the disk.
        """
        if isinstance(dataset, dict):
            return {key: self.stored(rows, f"{name} '{key}'") for key, rows in dataset.items()}
        if not is_stream(dataset):
            return dataset
        if getattr(dataset, "_distributed", None) is not None:
            raise ValueError(f"{name} is a stream that is split by process; give every process the whole stream.")
        state, files, refusal = processes(), [], None
        if state.is_local_main_process:
            try:
                files = self._write(dataset, name)
            except ValueError as error:
                refusal = str(error)
        if state.num_processes > 1:
            files, refusal = gather_object([(files, refusal)])[state.process_index - state.local_process_index]
        if refusal is not None:
            raise ValueError(refusal)
        info = datasets.DatasetInfo(features=_features_of(dataset))
        stored = datasets.concatenate_datasets([datasets.Dataset.from_file(file, info) for file in files])
        return stored.with_format(_format_of(dataset))

    def _write(self, dataset, name: str) -> list[str]:
        """The files of a stream's rows."""
        features = _features_of(dataset)
        try:
            rows = datasets.Dataset.from_generator(
                partial(_rows, dataset, name, self.path),
                features=features and datasets.Features({k: _plain(v) for k, v in features.items()}),
                cache_dir=self.path,
                fingerprint=uuid.uuid4().hex,  # else the stream would be pickled for one
                writer_batch_size=ROWS_IN_MEMORY,
            )
        except Exception as error:  # whatever a stream, `datasets` or pyarrow say
            raise ValueError(_reason(name, error.__cause__ or error, self.path)) from error
        return [file["filename"] for file in rows.cache_files]


def _features_of(dataset) -> datasets.Features | None:
    return dataset.features if isinstance(dataset, datasets.IterableDataset) else None


def _plain(feature):
    """What a column holds under its kind: of files their bytes and path, which `datasets` would else encode again."""
    if isinstance(feature, (datasets.Image, datasets.Audio)):
        return {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_plain(feature.feature))
    return feature


def _rows(dataset, name: str, folder: str) -> Iterator[dict]:
    """The stream's rows, files undecoded; those on other machines are fetched.

    Raises:
        ValueError: no or too many rows, rows without named columns, or a disk that is nearly full.
    """
    columns = [k for k, v in (_features_of(dataset) or {}).items() if undecoded(v) is not None]
    if isinstance(dataset, datasets.IterableDataset):
        dataset = dataset.with_format(None)
        dataset = dataset.decode(False) if columns else dataset
    count = 0
    for count, row in enumerate(dataset, 1):
        if not isinstance(row, dict):
            raise _Refusal(rows_refused(name, row))
        if count > MAX_ROWS:
            raise _Refusal(
                f"{name} is a stream of more than {MAX_ROWS:,} rows; if it has no end cut it with .take(n), else write it to disk "
                "(datasets.Dataset.from_generator) and give that."
            )
        if count % ROWS_IN_MEMORY == 0 and shutil.disk_usage(folder).free < LEFT_FREE:
            raise _Refusal(_no_space(name, folder))
        yield row | {column: _fetched(row[column]) for column in columns}
    if count == 0:
        raise _Refusal(f"{name} has no examples; check the condition that selects it.")


def _fetched(file):
    """An undecoded file, or a list of them, with its bytes where its path is none of this machine's."""
    if isinstance(file, list):
        return [_fetched(one) for one in file]
    if not isinstance(file, dict) or file.get("bytes") is not None or "://" not in (file.get("path") or ""):
        return file
    return {"bytes": content_of(file), "path": os.path.basename(file["path"].partition("::")[0])}


class _Refusal(ValueError):
    """Says in one line what to do."""


def _no_space(name: str, folder: str) -> str:
    return (
        f"{name} is a stream that does not fit on the disk of {os.path.dirname(folder)}, where its rows are written; cut it with "
        ".take(n), or set HF_DATASETS_CACHE to a folder on a larger disk."
    )


def _reason(name: str, error: BaseException, folder: str) -> str:
    """One line that says why a stream could not be written."""
    if isinstance(error, _Refusal):
        return str(error)
    if isinstance(error, OSError) and shutil.disk_usage(folder).free < LEFT_FREE:
        return _no_space(name, folder)
    said = (str(error) or type(error).__name__).strip().splitlines()[0]
    return f"{name} is a stream that breaks off ({type(error).__name__}: {said}); nothing of it was kept."


def _format_of(dataset) -> str | None:
    """In what its rows come: those of torch's streams in tensors."""
    if isinstance(dataset, datasets.IterableDataset):
        return getattr(getattr(dataset, "_formatting", None), "format_type", None)
    return "torch"
