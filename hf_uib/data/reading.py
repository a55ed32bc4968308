"""From a raw data set to one that a model takes: the one place where columns, labels and inputs are decided."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import datasets
import numpy as np
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.image_processing_utils import BaseImageProcessor

from .columns import (
    Columns,
    audio_column,
    image_column,
    is_list,
    is_raw,
    is_string,
    label_column,
    names_of,
    text_columns,
    undecoded,
    values_of,
    words_column,
)
from .labels import (
    NOT_LABELLED,
    class_ids,
    has_labels,
    lists_labels,
    model_names,
    several_labels,
    transform_of,
    with_label_vectors,
)
from .transforms import AudioInput, PictureInput, RowTransform, TextInput, WordsInput, range_of, waveform

# Models whose positions are counted from the padding token's id on
AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "data2vec-text", "xlm-roberta-xl")


@dataclass(frozen=True)
class Reader:
    """Reads raw sets for one model; sets that are encoded already are left alone.

    Attributes:
        config: of the model.
        main_input: what the model calls its input.
        processing_class: image processor, feature extractor or tokenizer; None leaves the input alone.
        columns: names that are not the usual ones.
        max_length: truncation length of texts, in tokens.
        of_tokens: the model labels tokens: a text is a list of words, and a row's labels are a list.
        listed: where the labels of a set could be a list of those that a row has, or a number for each, they are such a list.
    """

    config: Any
    main_input: str
    processing_class: Any = None
    columns: Columns = Columns()
    max_length: int | None = None
    of_tokens: bool = False
    listed: bool = False

    def __call__(self, dataset, name: str = "the data"):
        """The encoded set; ``name`` is what a message calls it.

        Raises:
            ValueError: a column cannot be found, a row lacks its input or label, or a label is no class of the model.
        """
        if not isinstance(dataset, datasets.Dataset) or transform_of(dataset) is not None or len(dataset) == 0:
            return dataset
        dataset = with_label_vectors(self._with_files(dataset), self.config, self.columns)
        missing = self.incomplete_rows(dataset)
        if missing:
            row, what = next(iter(missing.items()))
            if what.startswith("no label") and sum(w.startswith("no label") for w in missing.values()) == len(dataset):
                raise ValueError(f"No row of {name} has a label; give a set with labels, or leave it out.")
            more = f" ({len(missing)} such rows)" if len(missing) > 1 else ""
            raise ValueError(
                f"Row {row} of {name} has {what}{more}; fill it, or leave it out (`hf-uib unlearn`, `hf-uib discover` "
                "and `hf-uib audit` have --drop_incomplete_rows)."
            )
        label, ids, several = None, None, None
        if has_labels(dataset, self.columns):
            label, listed = label_column(dataset, self.columns), self._lists_labels(dataset)
            listed = self.listed if listed is None else listed
            ids = class_ids(dataset, self.config, self.columns, name, self.of_tokens, listed)
            several = len(model_names(self.config)) if listed else None
        make_input = self._input_of(dataset)
        ready = label is None or (ids is None and several is None and label in ("label", "labels"))
        if make_input is None and ready:
            return dataset
        return dataset.with_transform(RowTransform(make_input, label, ids, several))

    def _with_files(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """A column of paths that was named as the picture's or the sound's holds these."""
        if self.columns.image is not None and is_string(dataset.features.get(self.columns.image)):
            return dataset.cast_column(self.columns.image, datasets.Image())
        for name, feature in (dataset.features or {}).items():
            named = name == self.columns.audio and is_string(feature)
            if (
                named or isinstance(feature, datasets.Audio) and feature.decode
            ):  # `datasets` needs torchcodec to decode them
                dataset = dataset.cast_column(name, datasets.Audio(decode=False))
        return dataset

    def _lists_labels(self, dataset) -> bool | None:
        """Whether the rows of a set list the labels that they have; see `lists_labels`."""
        if not several_labels(self.config) or self.of_tokens or not has_labels(dataset, self.columns):
            return False
        return lists_labels(dataset, label_column(dataset, self.columns), self.config)

    def of_sets(self, sets: Iterable) -> "Reader":
        """The same for sets that belong together: where one lists the labels of a row, so do those that could."""
        raw = [one for one in sets if isinstance(one, datasets.Dataset) and transform_of(one) is None and len(one)]
        return replace(self, listed=any(self._lists_labels(one) for one in raw))

    def settled(self, dataset) -> "Reader":
        """The same for further sets of the same data: the columns that were found in ``dataset`` are the ones."""
        if not isinstance(dataset, datasets.Dataset) or transform_of(dataset) is not None:
            return self
        given, columns = self._input_of(self._with_files(dataset)), self.columns
        if isinstance(given, TextInput):
            columns = replace(columns, text=given.columns)
        elif isinstance(given, PictureInput):
            columns = replace(columns, image=given.column)
        elif isinstance(given, AudioInput):
            columns = replace(columns, audio=given.column)
        return replace(self, columns=columns)

    def _input_of(self, dataset: datasets.Dataset) -> PictureInput | AudioInput | TextInput | None:
        if self.processing_class is None:
            return None
        if self.main_input in dataset.column_names and not is_raw((dataset.features or {}).get(self.main_input)):
            return None
        if isinstance(self.processing_class, BaseImageProcessor):
            column = image_column(dataset, self.columns)
            channels = getattr(self.config, "num_channels", None)
            return None if column is None else PictureInput(self.processing_class, column, channels)
        if isinstance(self.processing_class, SequenceFeatureExtractor):
            column = audio_column(dataset, self.columns)
            return None if column is None else AudioInput(self.processing_class, column, self.main_input)
        if isinstance(self.processing_class, PreTrainedTokenizerBase) and self.of_tokens:
            words = words_column(dataset, self.columns)
            label = label_column(dataset, self.columns) if has_labels(dataset, self.columns) else None
            return None if words is None else WordsInput(self.processing_class, words, label, self.longest())
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            columns = text_columns(dataset, self.columns)
            return TextInput(self.processing_class, columns, self.longest()) if columns else None
        return None

    def longest(self) -> int | None:
        """Truncation length of texts: as given, or what the model has positions for; None: the tokenizer's own."""
        positions = getattr(self.config, "max_position_embeddings", None) or 0
        if self.max_length is not None or positions <= 0 or self.processing_class.model_max_length <= positions:
            return self.max_length
        first = (self.config.pad_token_id or 0) + 1 if self.config.model_type in AFTER_PADDING else 0
        return positions - first

    def incomplete_rows(self, dataset: datasets.Dataset) -> dict[int, str]:
        """Rows without a label or an input that can be read, in their order, and what is wrong with each."""
        found: dict[int, str] = {}
        dataset = self._with_files(dataset)
        raw, given = dataset.with_format(None), self._input_of(dataset)
        if has_labels(dataset, self.columns):
            column = label_column(dataset, self.columns)
            found |= {
                i: f"no label (column '{column}')"
                for i, v in enumerate(values_of(raw, column))
                if is_missing(v) or v == -1
            }
            if self.of_tokens:
                found |= {
                    i: f"no labelled token (column '{column}')"
                    for i, v in enumerate(values_of(raw, column))
                    if isinstance(v, list) and all(one in NOT_LABELLED for one in v)
                }
        for column in given.columns if isinstance(given, TextInput) else ():
            found |= {i: f"no text (column '{column}')" for i, v in enumerate(values_of(raw, column)) if v is None}
        if isinstance(given, WordsInput) and is_list(raw.features.get(given.label)):
            pairs = zip(values_of(raw, given.columns[0]), values_of(raw, cast(str, given.label)), strict=True)
            found |= {
                i: f"{len(labels)} labels for {len(words)} words"
                for i, (words, labels) in enumerate(pairs)
                if words is not None and labels is not None and len(words) != len(labels)
            }
        if isinstance(given, PictureInput):
            encoded = raw.cast_column(given.column, undecoded(raw.features[given.column])).select_columns(
                [given.column]
            )
            rows = tqdm(encoded, "Checking pictures", delay=2, leave=False)
            for i, row in enumerate(rows):
                frames = row[given.column] if isinstance(row[given.column], list) else [row[given.column]]
                if (fault := next(filter(None, map(fault_of, frames or [None])), None)) is not None:
                    found[i] = f"{fault} (column '{given.column}')"
        if isinstance(given, AudioInput):
            sounds = tqdm(raw.select_columns([given.column]), "Checking sounds", delay=2, leave=False)
            for i, row in enumerate(sounds):
                if (fault := fault_of_sound(row[given.column], given.extractor.sampling_rate)) is not None:
                    found[i] = f"{fault} (column '{given.column}')"
        return dict(sorted(found.items()))


def is_missing(value) -> bool:
    """None, NaN, or an empty text."""
    return (
        value is None
        or (isinstance(value, float) and value != value)
        or (isinstance(value, str) and not value.strip())
    )


def fault_of(picture: dict | None) -> str | None:
    """What is wrong with an encoded picture (``bytes`` or ``path``), if anything; it is decoded to the end."""
    if picture is None or (picture["bytes"] is None and not picture["path"]):
        return "no picture"
    try:
        source = picture["path"] if picture["bytes"] is None else io.BytesIO(picture["bytes"])
        with Image.open(source) as opened:
            opened.draft(
                "RGB", (opened.width // 8 or 1, opened.height // 8 or 1)
            )  # of a JPEG: all of the file, fewer pixels
            opened.load()
            if opened.mode.startswith("I") or opened.mode == "F":
                values = np.asarray(opened)
                low, high = float(values.min()), float(values.max())
                if not (low >= 0 and high <= range_of(opened)):  # NaN too
                    return f"a picture of mode {opened.mode} whose values are not between 0 and {range_of(opened):g}"
    except Exception as error:  # whatever PIL and its decoders say of a file
        said = str(getattr(error, "strerror", None) or error).partition("\n")[0]
        file = "image file" in said or bool(picture["path"]) and picture["path"] in said
        return (
            f"a picture that cannot be read ({said if said and not file else type(error).__name__})"  # no file's name
        )
    return None


def fault_of_sound(sound: Any, rate: int) -> str | None:
    """What is wrong with a sound, if anything; it is decoded to the end.

    Raises:
        ValueError: soundfile is not installed.
    """
    if (
        sound is None
        or isinstance(sound, dict)
        and not any(sound.get(k) is not None for k in ("array", "bytes", "path"))
    ):
        return "no sound"
    try:
        wave = waveform(sound, rate)
    except ImportError as error:
        raise ValueError(
            'Sounds in files are decoded with soundfile, which is not installed; pip install "soundfile>=0.12".'
        ) from error
    except Exception as error:  # whatever libsndfile says of a file
        return f"a sound that cannot be read ({type(error).__name__})"
    if wave.ndim != 1 or not len(wave):
        return "an empty sound" if not wave.size else "a sound that is no waveform"
    return None if np.isfinite(wave).all() else "a sound with values that are not finite"


def encode(dataset, processing_class, main_input: str, max_length: int | None = None):
    """As `Reader`, of a set whose labels are class ids: pictures through the image processor, texts through the tokenizer.

    Args:
        processing_class: image processor or tokenizer; None leaves the data alone.
        main_input: ``model.main_input_name``.
        max_length: truncation length of texts, in tokens.
    """
    if not isinstance(dataset, datasets.Dataset) or transform_of(dataset) is not None:
        return dataset
    make_input = Reader(None, main_input, processing_class, max_length=max_length)._input_of(dataset)
    return dataset if make_input is None else dataset.with_transform(RowTransform(make_input))


def check_inputs(name: str, dataset, read: Reader) -> None:
    """Refuse rows that the model cannot take; ``name`` is what the message calls the set."""
    if dataset is None or {read.main_input, "inputs_embeds"} & set(dataset[0]):
        return
    has = f"{name} has no {read.main_input} among {', '.join(names_of(dataset))}"
    kinds: dict[type, tuple[str, str]] = {
        BaseImageProcessor: ("image", "pictures (datasets.Image), or of their paths"),
        SequenceFeatureExtractor: ("audio", "sounds (datasets.Audio), of their paths or of waveforms"),
        PreTrainedTokenizerBase: ("text", "texts"),
    }
    flag, what = next((v for kind, v in kinds.items() if isinstance(read.processing_class, kind)), ("", ""))
    if not flag:
        raise ValueError(f"{has}; encode it, or give this model's processing_class.")
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"{has}; encode it, or give a datasets.Dataset (select, from_list), whose rows are then encoded."
        )
    raise ValueError(
        f"{has}, and no column of {what}; name one: --{flag}_column NAME, in Python columns=Columns({flag}=...), or give this "
        "model's processing_class."
    )
