"""Which column of a data set is the text, the picture, the sound and the label."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import datasets
import fsspec

PAIRS = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"),
    ("question", "passage"), ("text", "text_pair"),
)  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are not the usual ones; what is None is found.

    Attributes:
        text: of the text, or of both texts of a pair.
        image: of the picture.
        label: of the label.
        bias: of the bias attribute: it is never the input.
        other: further columns that are never the input, as those of a condition.
        audio: of the sound.
    """

    text: str | tuple[str, ...] | list[str] | None = None
    image: str | None = None
    label: str | None = None
    bias: str | None = None
    other: tuple[str, ...] = ()
    audio: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The names in `text`."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text or ())


def names_of(dataset) -> list[str]:
    """A data set's columns, those of its first row where it does not list them."""
    return getattr(dataset, "column_names", None) or list(dataset[0])


def rows_refused(name: str, row) -> str:
    """What is said of a set whose rows are no dictionaries."""
    return f"The rows of {name} are {type(row).__name__}s; give dictionaries, with columns by name."


def present(dataset, name: str, what: str) -> str:
    """``name``, if the data set has it.

    Raises:
        ValueError: it has not; ``what`` is what the column was to be.
    """
    if name not in names_of(dataset):
        raise ValueError(f"The {what} column '{name}' is not among {', '.join(names_of(dataset))}.")
    return name


def label_column(dataset, columns: Columns = Columns()) -> str:
    """The label's column: as given, ``labels``, ``label``, the only one of class names, or ``ner_tags``.

    Raises:
        ValueError: there is none, or more than one candidate.
    """
    if columns.label is not None:
        return present(dataset, columns.label, "label")
    names = names_of(dataset)
    usual = [name for name in ("labels", "label") if name in names]
    if len(usual) > 1:
        raise ValueError("There are columns 'labels' and 'label'; say which it is: --label_column NAME, in Python "
                         "columns=Columns(label=...).")  # fmt: skip
    if usual:
        return usual[0]
    kinds = getattr(dataset, "features", None) or {}
    classes = [k for k, v in kinds.items() if isinstance(v, datasets.ClassLabel) and k not in _never(columns)]
    if len(classes) == 1:
        return classes[0]
    if not classes and "ner_tags" in names:
        return "ner_tags"
    found = f"more than one column of classes ({', '.join(classes)})" if classes else f"none of {', '.join(names)}"
    raise ValueError(
        f"No column 'label' or 'labels', but {found}; say which it is: --label_column NAME, in Python columns=Columns(label=...)."
    )


def image_column(dataset: datasets.Dataset, columns: Columns = Columns()) -> str | None:
    """The picture's column, or that of a video's frames: as given, or the only one of pictures; None where there is none.

    Raises:
        ValueError: there is more than one candidate.
    """
    if columns.image is not None:
        return present(dataset, columns.image, "image")
    found = [k for k, v in dataset.features.items() if holds_pictures(v) and k not in _never(columns)]
    return _only(found, "pictures", "image")


def audio_column(dataset: datasets.Dataset, columns: Columns = Columns()) -> str | None:
    """The sound's column: as given (a waveform as a list of numbers too), or the only one of sounds; None where there is none.

    Raises:
        ValueError: there is more than one candidate.
    """
    if columns.audio is not None:
        return present(dataset, columns.audio, "audio")
    found = [k for k, v in dataset.features.items() if isinstance(v, datasets.Audio) and k not in _never(columns)]
    return _only(found, "sounds", "audio")


def text_columns(dataset: datasets.Dataset, columns: Columns = Columns()) -> tuple[str, ...]:
    """The text's column or both of a pair: as given, the usual names, or the only one of strings; empty where there is none.

    The label, the bias attribute and the columns of conditions are never the text.

    Raises:
        ValueError: there is more than one candidate.
    """
    if len(columns.texts) > 2 or {columns.label, columns.bias} & set(columns.texts):
        raise ValueError(
            f"The text is one column, or two of a pair, and neither label nor bias attribute; {', '.join(columns.texts)} was given."
        )
    if columns.texts:
        return tuple(present(dataset, name, "text") for name in columns.texts)
    never = _never(columns) | {"label", "labels"}
    strings = [k for k, v in dataset.features.items() if is_string(v) and k not in never]
    hidden = [name for name in ("text", "sentence") if name in columns.other and name in dataset.column_names]
    if hidden:
        raise ValueError(
            f"Column '{hidden[0]}' is used in a condition, so say which column is the input: --text_column NAME."
        )
    for usual in (*PAIRS, ("text",), ("sentence",)):
        if set(usual) <= set(strings):
            return usual
    only = _only(strings, "text", "text")
    return () if only is None else (only,)


def words_column(dataset: datasets.Dataset, columns: Columns = Columns()) -> str | None:
    """The column of texts that are lists of words: as given, ``tokens``, or the only one of such lists; None where there is none.

    Raises:
        ValueError: there is more than one candidate.
    """
    if len(columns.texts) > 1:
        raise ValueError(f"The words of a row are one column; {', '.join(columns.texts)} was given.")
    if columns.texts:
        return present(dataset, columns.texts[0], "text")
    never = _never(columns) | {"label", "labels", "ner_tags"}
    lists = [k for k, v in dataset.features.items() if is_string(getattr(v, "feature", None)) and k not in never]
    return "tokens" if "tokens" in lists else _only(lists, "words", "text")


def holds_pictures(feature) -> bool:
    """Whether a column holds pictures, or lists of them: the frames of a video."""
    return isinstance(getattr(feature, "feature", feature), datasets.Image)


def is_raw(feature) -> bool:
    """Whether a column holds what a processor still has to encode: pictures, sounds or strings."""
    return holds_pictures(feature) or isinstance(feature, datasets.Audio) or is_string(feature)


def undecoded(feature):
    """The feature under which a column of files gives their bytes; None where it holds none."""
    if is_list(feature):
        inner = undecoded(feature.feature)
        return None if inner is None else datasets.List(inner)
    return type(feature)(decode=False) if isinstance(feature, (datasets.Image, datasets.Audio)) else None


def content_of(file: dict) -> bytes | None:
    """Bytes of an undecoded file, read from its path where it holds none; None where there is no file.

    Raises:
        OSError: it cannot be read.
    """
    if file.get("bytes") is not None or not file.get("path"):
        return file.get("bytes")
    with fsspec.open(file["path"], "rb") as opened:
        return opened.read()


def values_of(dataset: datasets.Dataset, column: str) -> Iterator:
    """The raw values of a column, some at a time."""
    for batch in dataset.with_format(None).select_columns([column]).iter(1000):
        yield from batch[column]


def is_list(feature) -> bool:
    """Whether a column holds lists."""
    return isinstance(feature, (datasets.List, datasets.LargeList))


def is_string(feature) -> bool:
    """Whether a column holds strings."""
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "string_view")


def _never(columns: Columns) -> set[str]:
    return {name for name in (columns.bias, columns.label, *columns.other) if name is not None}


def _only(found: Iterable[str], what: str, flag: str) -> str | None:
    found = list(found)
    if len(found) > 1:
        raise ValueError(
            f"More than one column of {what}: {', '.join(found)}; say which is the input: --{flag}_column NAME, in Python "
            f"columns=Columns({flag}=...)."
        )
    return found[0] if found else None
