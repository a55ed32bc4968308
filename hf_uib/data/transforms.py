"""From raw rows to what a model takes. Module-level classes, so that loader workers of every kind can be sent them."""

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from .labels import IGNORED, NOT_LABELLED


def to_channels(picture: Image.Image, channels: int | None) -> Image.Image:
    """A picture with as many channels as the model takes (1 or 3), in 8 bits.

    16-bit and 32-bit pictures are scaled by the range of 16 bits, 65,535; floats have the range from 0 to 1.

    Args:
        channels: of the model; None keeps grey pictures grey.
    """
    if picture.mode.startswith("I") or picture.mode == "F":
        values, full = np.asarray(picture).astype(np.float64), range_of(picture)
        picture = Image.fromarray((values / full * 255).round().clip(0, 255).astype(np.uint8))
    if channels == 1:
        return picture.convert("L")
    if channels == 3:
        return picture.convert("RGB")
    return picture if picture.mode in ("RGB", "L") else picture.convert("RGB")


def range_of(picture: Image.Image) -> float:
    """White, in a picture of more than 8 bits."""
    return 1.0 if picture.mode == "F" else 65535.0


class PictureInput:
    """Pictures, or the frames of videos, through an image processor. All that it gives for a picture comes along: SigLIP 2 takes
    the pixels, their shape and a mask.

    Args:
        processor: image processor.
        column: of the pictures, which does not stay.
        channels: see `to_channels`.
    """

    def __init__(self, processor, column: str, channels: int | None = None):
        self.processor, self.column, self.channels = processor, column, channels

    def __call__(self, batch: dict) -> dict:
        pictures = [
            [to_channels(frame, self.channels) for frame in given]
            if isinstance(given, list)
            else to_channels(given, self.channels)
            for given in batch[self.column]
        ]
        rest = {k: v for k, v in batch.items() if k != self.column}
        given = self.processor(pictures, return_tensors="pt")
        return {**rest, **{name: values for name, values in given.items() if len(values) == len(pictures)}}


class AudioInput:
    """Sounds through a feature extractor, at its sampling rate.

    Args:
        extractor: feature extractor.
        column: of the sounds, which does not stay: encoded ones (``bytes`` or ``path``), or waveforms at the extractor's rate.
        main_input: what the model calls its input.
    """

    def __init__(self, extractor, column: str, main_input: str):
        self.extractor, self.column, self.main_input = extractor, column, main_input

    def __call__(self, batch: dict) -> dict:
        rate = self.extractor.sampling_rate
        waves = [waveform(sound, rate) for sound in batch[self.column]]
        rest = {k: v for k, v in batch.items() if k != self.column}
        return {**rest, self.main_input: list(self.extractor(waves, sampling_rate=rate)[self.main_input])}


def waveform(sound, rate: int) -> np.ndarray:
    """A sound as numbers, ``[n]`` in float32 at ``rate``; channels are averaged.

    Args:
        sound: ``{"bytes": ..., "path": ...}`` of an audio file, ``{"array": ..., "sampling_rate": ...}``, or the numbers
            themselves.

    Raises:
        ImportError: soundfile is not installed.
    """
    if not isinstance(sound, dict):
        return np.asarray(sound, dtype=np.float32)
    if sound.get("array") is not None:
        values, own = np.asarray(sound["array"], dtype=np.float32), sound.get("sampling_rate") or rate
    else:
        import soundfile

        source = sound["path"] if sound.get("bytes") is None else io.BytesIO(sound["bytes"])
        values, own = soundfile.read(source, dtype="float32", always_2d=True)
        values = values.mean(1)
    if own == rate:
        return values
    from scipy.signal import resample_poly

    common = math.gcd(own, rate)
    return resample_poly(values, rate // common, own // common).astype(np.float32)


class TextInput:
    """Texts, or pairs of texts, through a tokenizer; the texts stay.

    Args:
        tokenizer: of the model.
        columns: one name, or two of a pair.
        max_length: truncation length in tokens; None is the tokenizer's own.
    """

    def __init__(self, tokenizer, columns: tuple[str, ...], max_length: int | None = None):
        self.tokenizer, self.columns, self.max_length = tokenizer, columns, max_length

    def __call__(self, batch: dict) -> dict:
        texts = [list(batch[name]) for name in self.columns]
        return {**batch, **self.tokenizer(*texts, truncation=True, max_length=self.max_length)}


class WordsInput(TextInput):
    """Lists of words through a tokenizer; the label of a word goes to its first token, the others have none.

    Args:
        tokenizer: of the model.
        column: of the lists.
        label: column of the labels, one for each word; None where there is none.
        max_length: truncation length in tokens; None is the tokenizer's own.

    Raises:
        ValueError: the tokenizer does not know which word a token is of, or takes words in a list for a word without spaces.
    """

    def __init__(self, tokenizer, column: str, label: str | None, max_length: int | None = None):
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say which word a token is of; give a fast tokenizer, or encoded rows."
            )
        if tokenizer(["a", "a"], is_split_into_words=True)["input_ids"] != tokenizer("a a")["input_ids"]:
            raise ValueError(
                f"{type(tokenizer).__name__} reads a list of words as if there were no space between them; load it with "
                "add_prefix_space=True, or give encoded rows."
            )
        super().__init__(tokenizer, (column,), max_length)
        self.label = label

    def __call__(self, batch: dict) -> dict:
        words = list(batch[self.columns[0]])
        encoded = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.max_length)
        rest = {name: values for name, values in batch.items() if name not in ("label", "labels")}
        if self.label in batch:
            rest[self.label] = [
                labels_of_tokens(encoded.word_ids(i), labels) for i, labels in enumerate(batch[self.label])
            ]
        return {**rest, **encoded}


def labels_of_tokens(words: list[int | None], labels: list) -> list:
    """A label for each token: that of its word for the word's first token, else `IGNORED`.

    Args:
        words: the number of each token's word, None of a mark.
        labels: of the words.
    """
    found = []
    for word, before in zip(words, [None, *words[:-1]], strict=True):
        label = None if word is None or word == before else labels[word]
        found.append(IGNORED if label in NOT_LABELLED else label)
    return found


class RowTransform:
    """What `datasets.Dataset.with_transform` is given: the input, and the labels as class ids. Nothing is cached on disk.

    Args:
        make_input: `PictureInput`, `AudioInput`, `TextInput` or `WordsInput`; None leaves the columns as they are.
        label: the label's column, if there is one.
        ids: class ids by label; None where the labels are ids already.
        several: how many labels there are where a row lists those that it has; it then gets a number for each, 0 or 1.
    """

    def __init__(
        self,
        make_input: Callable[[dict], dict] | None,
        label: str | None = None,
        ids: dict | None = None,
        several: int | None = None,
    ):
        self.make_input, self.label, self.ids, self.several = make_input, label, ids, several

    def __deepcopy__(self, memo: dict) -> "RowTransform":
        """Itself: `datasets` copies a set for each view of it, and a tokenizer is large."""
        return self

    def labels(self, values: list) -> list:
        """Class ids of raw labels, or of lists of them; of listed labels a number for each label there is."""
        if self.several is not None:
            ids = self.ids or {}
            return [
                np.isin(range(self.several), [ids.get(v, v) for v in value]).astype(float).tolist() for value in values
            ]
        if self.ids is None:
            return list(values)
        return [
            [IGNORED if v in NOT_LABELLED else self.ids[v] for v in value]
            if isinstance(value, list)
            else self.ids[value]
            for value in values
        ]

    def __call__(self, batch: dict) -> dict:
        if self.make_input is not None:
            batch = self.make_input(batch)
        if self.label is None or self.label not in batch:
            return batch
        rest = {name: values for name, values in batch.items() if name not in ("label", "labels")}
        return {**rest, "labels": self.labels(batch[self.label])}
