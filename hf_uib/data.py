"""Forget and retained examples: pairing, collation, checks."""

import hashlib
from collections.abc import Callable, Iterator

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
from transformers.image_processing_utils import BaseImageProcessor


class PairedDataset(Dataset):
    """Retained rows, each with the forget rows that go into the same step; indexed by ``(position, retain, (forget, ...))``."""

    def __init__(self, retain_dataset, forget_dataset, length: int):
        self.retain, self.forget, self.length = retain_dataset, forget_dataset, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: tuple[int, int, tuple[int, ...]]) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[tuple[int, int, tuple[int, ...]]]) -> list[dict]:
        """Fetch a batch with one call per set."""
        retain = fetch(self.retain, [r for _, r, _ in indices])
        forget = iter(fetch(self.forget, [f for _, _, many in indices for f in many]))
        return [
            {"position": position, "retain": row, "forget": [next(forget) for _ in many]}
            for row, (position, _, many) in zip(retain, indices, strict=True)
        ]


class PairingSampler(Sampler):
    """The order of the paired rows, a function of (seed, epoch, position) alone.

    Retained rows come in the order of Transformers' own sampler; a shorter set is gone through again, in a new order, until
    the longer one has been seen. Only while ``prior_is_on(epoch, position)`` do forget rows come along, and are held-out
    retained rows replaced by others.

    Args:
        dataset: the paired rows.
        seed: the data seed.
        forget_per_retain: forget rows per retained row.
        held_out: retained rows held out while the prior is on.
        prior_is_on: whether the prior acts at a position of an epoch.
        epoch_of: the epoch that begins, or that is gone on with. (accelerate's ``set_epoch`` does not reach the sampler where the
            first batches of an epoch are skipped under several processes.)
    """

    def __init__(
        self,
        dataset: PairedDataset,
        seed: int,
        forget_per_retain: float,
        held_out: set[int],
        prior_is_on: Callable[[int, int], bool],
        epoch_of: Callable[[], int],
    ):
        self.dataset, self.seed, self.forget_per_retain = dataset, seed, forget_per_retain
        self.prior_is_on, self.epoch_of = prior_is_on, epoch_of
        self.held_out = held_out
        self.available = [i for i in range(len(dataset.retain)) if i not in held_out] if held_out else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        epoch = self.epoch_of()
        retain = endless_permutations(len(self.dataset.retain), self.seed + epoch)
        forget = endless_permutations(len(self.dataset.forget), self.seed + epoch + 2**31)
        replacement = endless_permutations(len(self.available), self.seed + epoch + 2**32) if self.available else None
        given = 0
        for position in range(len(self.dataset)):
            row = next(retain)
            many: tuple[int, ...] = ()
            if self.prior_is_on(epoch, position):
                due = int((position + 1) * self.forget_per_retain)
                many = tuple(next(forget) for _ in range(due - given))
                given = due
                if row in self.held_out:
                    row = self.available[next(replacement)]
            else:
                given = int((position + 1) * self.forget_per_retain)
            yield position, row, many


def endless_permutations(length: int, seed: int) -> Iterator[int]:
    """Permutations of ``range(length)``, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    while length:
        yield from torch.randperm(length, generator=generator).tolist()


def fetch(dataset, indices: list[int]) -> list[dict]:
    """Rows of a map-style dataset, in one call where it can."""
    if not indices:
        return []
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(indices)
    return [dataset[i] for i in indices]


class UIBCollator:
    """Makes one batch of paired rows: the retained ones first, then the forget ones, so that one forward serves both.

    ``positions [n]``, in the epoch, say which draw of the channel noise a row gets.

    Plain rows (evaluation) go to the same collator without pairing. Columns that the model does not take are dropped.

    Args:
        collator: the user's, or Transformers' default.
        columns: what the model's forward takes, and the label names.
    """

    def __init__(self, collator: Callable, columns: set[str]):
        self.collator, self.columns = collator, columns

    def __call__(self, features: list[dict]) -> dict:
        if "retain" not in features[0]:
            return self.collate(features)
        forget = [(f["position"] + j, row) for f in features for j, row in enumerate(f["forget"])]
        batch = self.collate([f["retain"] for f in features] + [row for _, row in forget])
        positions = torch.tensor([f["position"] for f in features] + [position for position, _ in forget])
        return {"inputs": batch, "n_retain": len(features), "positions": positions}

    def collate(self, rows: list[dict]) -> dict:
        """Drop the columns the model does not take and collate the rest."""
        batch = self.collator([{k: v for k, v in row.items() if k in self.columns} for row in rows])
        if "label" in batch:
            batch["labels"] = batch.pop("label")
        return batch


def collator_for(columns: set[str], processing_class, collator: Callable | None = None) -> UIBCollator:
    """The user's collator, else padding for texts and plain stacking for the rest, for the ``columns`` a model takes."""
    if collator is None:
        text = isinstance(processing_class, PreTrainedTokenizerBase)
        collator = DataCollatorWithPadding(processing_class) if text else default_data_collator
    return UIBCollator(collator, columns)


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


def removed_classes(forget_labels: np.ndarray, retain_labels: np.ndarray | None) -> list[int]:
    """The classes of the forget set, if none of them occurs in the retained data: whole classes are to go. Else none."""
    if retain_labels is None:
        return []
    forgotten, kept = set(forget_labels.tolist()), set(retain_labels.tolist())
    return [] if forgotten & kept else sorted(forgotten)


def row_hashes(dataset) -> np.ndarray:
    """A hash per row of everything in it, pictures by their encoded bytes: ``[n, 2]`` unsigned 64-bit, in one streaming pass."""
    if isinstance(dataset, datasets.Dataset):
        raw = dataset.with_format(None)
        for name, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                raw = raw.cast_column(name, datasets.Image(decode=False))
        rows = (
            _without_paths(dict(zip(batch, values, strict=True)))
            for batch in raw.iter(100)
            for values in zip(*batch.values(), strict=True)
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


def _without_paths(row: dict) -> dict:
    picture = lambda v: isinstance(v, dict) and v.get("bytes") is not None  # noqa: E731
    return {k: v["bytes"] if picture(v) else v for k, v in row.items()}


def _bytes_of(value) -> bytes:
    if isinstance(value, dict):
        return b"".join(k.encode() + b"=" + _bytes_of(value[k]) + b";" for k in sorted(value))
    if isinstance(value, bytes):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return np.asarray(value).tobytes()
    if hasattr(value, "tobytes"):
        return value.tobytes()
    return repr(value).encode()


def fingerprint(dataset) -> str:
    """A hash of a dataset's rows, whatever their order; names a data set without showing any of it."""
    return fingerprint_of(row_hashes(dataset))


def fingerprint_of(rows: np.ndarray) -> str:
    """As `fingerprint`, from the rows' hashes."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(rows[np.lexsort((rows[:, 1], rows[:, 0]))].tobytes())
    return digest.hexdigest()


def check_labels(name: str, dataset, num_labels: int) -> np.ndarray:
    """All labels, ``[n]``; refuses those that are no class ids of the model. ``name`` is what the message calls the set."""
    labels = labels_of(dataset)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"The labels of {name} are not integers; encode them as class ids (ClassLabel).")
    if labels.min() < 0 or labels.max() >= num_labels:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(
            f"{name} has label {wrong}, outside the model's {num_labels} classes; map labels to 0..{num_labels - 1}."
        )
    return labels


def check_inputs(name: str, dataset, main_input: str) -> None:
    """Refuse rows that the model cannot take; ``name`` is what the message calls the set."""
    if dataset is not None and not {main_input, "inputs_embeds"} & set(dataset[0]):
        raise ValueError(
            f"{name} has no {main_input} among {', '.join(dataset[0])}; encode it, or give the processing_class of this model."
        )


def check_sets(
    forget_dataset, retain_dataset, num_labels: int, calibration_dataset=None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The labels and the fingerprint of every set that is given, by name; refuses what cannot be unlearned.

    Raises:
        ValueError: an empty set, rows that are in two sets, or a label outside the model's classes.
    """
    sets = {
        "forget_dataset": forget_dataset,
        "retain_dataset": retain_dataset,
        "calibration_dataset": calibration_dataset,
    }
    labels = {}
    for name, dataset in sets.items():
        if dataset is None:
            continue
        if len(dataset) == 0:
            raise ValueError(f"{name} has no examples; check the condition that selects it.")
        labels[name] = check_labels(name, dataset, num_labels)
    hashes = {name: row_hashes(sets[name]) for name in labels}
    pairs = (
        ("forget_dataset", "retain_dataset"),
        ("calibration_dataset", "forget_dataset"),
        ("calibration_dataset", "retain_dataset"),
    )
    for first, second in pairs:
        if first in hashes and second in hashes:
            common = rows_in_common(hashes[first], hashes[second])
            if common:
                raise ValueError(f"{common} rows of {first} are in {second} too; take them out of one of the two.")
    return labels, {name: fingerprint_of(rows) for name, rows in hashes.items()}


def sample_indices(length: int, count: int, seed: int) -> list[int]:
    """At most ``count`` of ``range(length)``, drawn without replacement."""
    if length <= count:
        return list(range(length))
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:count].tolist()
