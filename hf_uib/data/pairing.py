"""Pairing: the forget rows that go into a step beside the retained ones."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    default_data_collator,
)
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor


class PairedRow(dict):
    """A retained row with its ``position`` in the epoch and the forget rows beside it. A kind of its own, since the user's rows may
    have columns of any name."""


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
            PairedRow(position=position, retain=row, forget=[next(forget) for _ in many])
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
        epoch_of: the epoch that begins or continues. (accelerate's ``set_epoch`` does not reach the sampler where the
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
        available = self.available or []
        replacement = endless_permutations(len(available), self.seed + epoch + 2**32)
        given = 0
        for position in range(len(self.dataset)):
            row = next(retain)
            many: tuple[int, ...] = ()
            if self.prior_is_on(epoch, position):
                due = int((position + 1) * self.forget_per_retain)
                many = tuple(next(forget) for _ in range(due - given))
                given = due
                if row in self.held_out:
                    row = available[next(replacement)]
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


class UnlearningBatch(dict):
    """A training batch: retained rows first, then forget rows, so that one forward serves both.

    A dictionary, so that Trainer and accelerate move it as they move any batch.
    """

    @property
    def features(self) -> dict:
        """What the model's forward takes, and the ``labels``."""
        return self["features"]

    @property
    def retained(self) -> int:
        """How many rows are retained ones."""
        return self["retained"]

    @property
    def positions(self) -> Tensor:
        """Each row's place in the epoch, ``[n]``: it says which draw of the channel noise the row gets."""
        return self["positions"]


class SoundCollator:
    """Pads sounds to the longest of a batch; the rest is stacked.

    Args:
        extractor: feature extractor.
    """

    def __init__(self, extractor: Any):
        self.extractor = extractor

    def __call__(self, rows: list[dict]) -> dict:
        name, *others = self.extractor.model_input_names
        if len({np.shape(row[name]) for row in rows}) == 1 and "attention_mask" not in others:
            return default_data_collator(rows)
        padded = self.extractor.pad([{name: np.asarray(row[name])} for row in rows], return_tensors="pt")
        rest = [{k: v for k, v in row.items() if k != name} for row in rows]
        return {**padded, **(default_data_collator(rest) if rest[0] else {})}


class UIBCollator:
    """Makes an `UnlearningBatch` of paired rows, and a plain batch of plain rows (evaluation).

    Columns that the model does not take are dropped.

    Args:
        collator: the user's, or Transformers' default.
        columns: what the model's forward takes, and the label names.
        renames: a column ``label`` becomes ``labels``; a collator of the user's gets it as Trainer would give it.
    """

    def __init__(self, collator: Callable, columns: set[str], renames: bool = True):
        self.collator, self.columns, self.names = collator, columns, {"label": "labels"} if renames else {}

    def __call__(self, features: list[dict]) -> dict:
        if not isinstance(features[0], PairedRow):
            return self.collate(features)
        forget = [(f["position"] + j, row) for f in features for j, row in enumerate(f["forget"])]
        batch = self.collate([f["retain"] for f in features] + [row for _, row in forget])
        positions = torch.tensor([f["position"] for f in features] + [position for position, _ in forget])
        return UnlearningBatch(features=batch, retained=len(features), positions=positions)

    def collate(self, rows: list[dict]) -> dict:
        """Drop the columns the model does not take and collate the rest."""
        return self.collator([{self.names.get(k, k): v for k, v in row.items() if k in self.columns} for row in rows])


def collator_for(
    columns: set[str], processing_class, collator: Callable | None = None, of_tokens: bool = False
) -> UIBCollator:
    """The user's collator, else padding for texts and sounds and plain stacking for the rest, for the ``columns`` a model takes.

    Args:
        of_tokens: labels are padded too.
    """
    own = collator is None
    if collator is None:
        collator = default_data_collator
        if isinstance(processing_class, PreTrainedTokenizerBase):
            padding = DataCollatorForTokenClassification if of_tokens else DataCollatorWithPadding
            collator = padding(processing_class)
        elif isinstance(processing_class, SequenceFeatureExtractor):
            collator = SoundCollator(processing_class)
    return UIBCollator(collator, columns, renames=own)


class Subset(Dataset):
    """Some rows of a map-style dataset, fetched in one call where it can."""

    def __init__(self, dataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict:
        return self.dataset[self.indices[i]]

    def __getitems__(self, positions: list[int]) -> list[dict]:
        """Fetch a batch with one call."""
        return fetch(self.dataset, [self.indices[i] for i in positions])


def sample_indices(length: int, count: int, seed: int) -> list[int]:
    """At most ``count`` of ``range(length)``, drawn without replacement."""
    if length <= count:
        return list(range(length))
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:count].tolist()
