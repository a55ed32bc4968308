"""One way to pass rows through a model: logits, labels and features of its blocks."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from .data.columns import Columns
from .data.labels import IGNORED, several_labels
from .data.pairing import Subset, UIBCollator, collator_for
from .data.reading import Reader
from .models import blocks_of, forward_columns, input_kind, labels_tokens, num_labels_of
from .processes import processes
from .quantised import keep_codes
from .sharding import is_sharded


def collator_of(model: nn.Module, processing_class=None, collator: Callable | None = None) -> UIBCollator:
    """What makes encoded rows a batch for a model: see `collator_for`."""
    return collator_for(forward_columns(model), part_for(model, processing_class), collator, labels_tokens(model))


def reader_of(model: Any, processing_class=None, columns: Columns = Columns()) -> Reader:  # noqa: B008
    """What makes raw sets ready for a model: see `Reader`. A config that names no padding token gets the tokenizer's, as Trainer
    would set it."""
    main_input, part = getattr(model, "main_input_name", "input_ids"), part_for(model, processing_class)
    if getattr(model.config, "pad_token_id", 0) is None and (pad := getattr(part, "pad_token_id", None)) is not None:
        model.config.pad_token_id = pad
    return Reader(model.config, main_input, part, columns, of_tokens=labels_tokens(model))


def part_for(model: Any, processing_class: Any) -> Any:
    """What a processor of several kinds of input, as CLIP's, has for those of a model; others as they are."""
    part = {"text": "tokenizer", "audio": "feature_extractor"}.get(input_kind(model), "image_processor")
    return getattr(processing_class, part, None) if isinstance(processing_class, ProcessorMixin) else processing_class


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are; an exported file, which has none, runs on the CPU."""
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


def batcher(model: nn.Module, processing_class=None) -> Callable[[list[dict]], tuple[dict, torch.Tensor]]:
    """Makes encoded rows one batch on the model's device: what its forward takes, and the labels ``[n]``."""
    collator, device = collator_of(model, processing_class), device_of(model)

    def batch(rows: list[dict]) -> tuple[dict, torch.Tensor]:
        inputs = {name: value.to(device) for name, value in collator(rows).items()}
        return inputs, inputs.pop("labels")

    return batch


def batches_of(
    dataset,
    rows: Sequence[int],
    collator: Callable[[list[dict]], dict],
    move: Callable[[dict], dict],
    *,
    batch_size: int,
    num_workers: int = 0,
    description: str = "Evaluating",
    quiet: bool = False,
) -> Iterator[dict]:
    """Batches of some encoded rows in their order.

    Args:
        collator: makes rows a batch; move: brings a batch to the model's device.
        description, quiet: of the progress bar, which short passes do not show.
    """
    loader = DataLoader(
        Subset(dataset, rows),
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=num_workers,
        generator=torch.Generator(),  # leaves the global one, and so the dropout of a run, alone
    )
    for batch in tqdm(loader, desc=description, leave=False, disable=quiet or len(loader) < 8):
        yield move(batch)


@torch.no_grad()
def forward(
    model: nn.Module, batches: Iterable[dict], context: Callable[[], AbstractContextManager] = nullcontext
) -> tuple[Tensor, Tensor]:
    """Logits ``[n, classes]`` in float32 and labels ``[n]`` of all batches, in eval mode; the model's mode is restored. Without
    labels these are -100.

    Of a model that labels tokens: ``[n, length, classes]`` and ``[n, length]``, padded to the longest row (-100).

    Args:
        context: entered around each forward, for autocast.
    """
    training = model.training
    model.eval()
    logits, labels = [], []
    for inputs in batches:
        given = inputs.pop("labels", None)
        with context():
            logits.append(model(**inputs).logits.float())
        labels.append(torch.full((len(logits[-1]),), IGNORED) if given is None else given)
    model.train(training)
    if not logits:  # no row is this process's
        device, config = device_of(model), getattr(model, "config", None)
        none = torch.zeros(0, getattr(config, "num_labels", 1), device=device)
        if labels_tokens(model):
            return none[:, None], torch.zeros(0, 1, dtype=torch.long, device=device)
        return none, none.clone() if several_labels(config) else torch.zeros(0, dtype=torch.long, device=device)
    if logits[0].ndim == 3:
        longest = max(batch.shape[1] for batch in logits)
        logits = [F.pad(batch, (0, 0, 0, longest - batch.shape[1])) for batch in logits]
        labels = [F.pad(batch, (0, longest - batch.shape[1]), value=IGNORED) for batch in labels]
    return torch.cat(logits), torch.cat(labels)


@dataclass
class SharedInference:
    """Passes rows through a trainer's model; every process takes its part of them.

    Attributes:
        model: is put in eval mode for the pass.
        collator, move, batch_size, num_workers: see `batches_of`.
        accelerator: of the trainer.
        context: see `forward`.
        quiet: no progress bars.
        examples: how many were passed so far, by all processes.
    """

    model: nn.Module
    collator: Callable[[list[dict]], dict]
    move: Callable[[dict], dict]
    accelerator: Accelerator
    batch_size: int
    num_workers: int
    context: Callable[[], AbstractContextManager]
    quiet: bool
    examples: int = 0

    def batches(self, dataset, rows: Sequence[int], description: str = "") -> Iterator[dict]:
        """Batches of this process's part of the rows."""
        processes = self.accelerator.num_processes
        mine = rows[self.accelerator.process_index :: processes]
        self.examples += len(rows)
        batches = partial(
            batches_of,
            dataset,
            collator=self.collator,
            move=self.move,
            num_workers=self.num_workers,
            description=description,
            quiet=self.quiet or not description or not self.accelerator.is_main_process,
        )
        if not is_sharded(self.model):
            return batches(mine, batch_size=self.batch_size)
        # Each pass gathers weights from all processes, so that they need equally many
        count = math.ceil(math.ceil(len(rows) / processes) / self.batch_size)
        if len(rows) // processes < count:
            raise ValueError(
                f"A set is too small: {len(rows)} of its rows are measured at a time, by {processes} processes that share the base "
                "(FSDP) and need equally many batches. Take fewer processes."
            )
        parts = [part.tolist() for part in np.array_split(mine, count)]
        return chain.from_iterable(batches(part, batch_size=len(part)) for part in parts)

    def forward(self, dataset, rows: Sequence[int], description: str = "") -> tuple[Tensor, Tensor]:
        """Logits ``[n, classes]`` and labels ``[n, ...]`` of all the rows, in their order, on every process."""
        pair = forward(self.model, self.batches(dataset, rows, description), self.context)
        if self.accelerator.num_processes > 1:
            there = torch.ones(len(pair[0]), dtype=torch.long, device=pair[0].device)
            if pair[0].ndim == 3:
                pair = self.accelerator.pad_across_processes(pair, dim=1, pad_index=IGNORED)
            padded = self.accelerator.pad_across_processes((*pair, there), dim=0)
            logits, labels, there = self.accelerator.gather(padded)
            processes = self.accelerator.num_processes
            order = torch.cat([torch.arange(len(rows))[first::processes] for first in range(processes)]).argsort()
            return logits[there == 1][order], labels[there == 1][order]
        return pair

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over the processes, in place."""
        if self.accelerator.num_processes > 1:
            for tensor in tensors:
                tensor.copy_(self.accelerator.reduce(tensor.to(self.accelerator.device), "sum"))


def predict(
    model: nn.Module,
    dataset,
    processing_class=None,
    batch_size: int = 256,
    description: str = "Evaluating",
    rows: Sequence[int] | None = None,
    quiet: bool = False,
    note: Callable[[dict], dict] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``[n, classes]`` and labels ``[n]`` of encoded rows (all, or some), in eval mode; the model's mode is restored.

    Of a model that labels tokens see `forward`. ``note`` gets each batch before it is passed, and gives it back.
    """
    keep_codes(model)
    rows = range(len(dataset)) if rows is None else rows
    collator, device = collator_of(model, processing_class), device_of(model)
    move = lambda batch: {name: value.to(device) for name, value in batch.items()}
    batches = batches_of(dataset, rows, collator, move, batch_size=batch_size, description=description, quiet=quiet)
    logits, labels = forward(model, batches if note is None else map(note, batches))
    return logits.cpu().numpy(), labels.cpu().numpy()


@dataclass
class ModelOutputs:
    """Of one model on one set of rows. Where tokens are labelled, each labelled token is an example.

    Attributes:
        logits: ``[n, classes]``; labels: ``[n]``.
        features: mean over the tokens of each watched block's output, ``[n, width]``, by name; ``head`` is what the last
            layer gets. Of a labelled token its own.
        rows: ``[n]``, the row of each token; None where rows are labelled.
    """

    logits: np.ndarray
    labels: np.ndarray
    features: dict[str, np.ndarray] = field(default_factory=dict)
    rows: np.ndarray | None = None

    @property
    def predictions(self) -> np.ndarray:
        """``[n]``, the most probable class."""
        return self.logits.argmax(-1)

    @property
    def margins(self) -> np.ndarray:
        """``[n]``, log-odds of the label, in nats."""
        from .objective import margin

        return margin(torch.from_numpy(self.logits).double(), torch.from_numpy(self.labels)).numpy()

    @property
    def row_margins(self) -> np.ndarray:
        """``[rows]``, the margins; of labelled tokens their mean in each row."""
        if self.rows is None:
            return self.margins
        return np.bincount(self.rows, self.margins) / np.bincount(self.rows)

    @property
    def probabilities(self) -> np.ndarray:
        """``[n, classes]``."""
        return torch.from_numpy(self.logits).double().softmax(-1).numpy()


def has_weights(model: nn.Module) -> bool:
    """Whether there is more of a model than its logits; there is not of an exported file."""
    return next(model.parameters(), None) is not None


def head_of(model: Any) -> nn.Module:
    """The last layer: the last linear one with as many outputs as the model has classes.

    Raises:
        ValueError: there is none.
    """
    count = num_labels_of(model)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == count]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layer with {count} outputs; the audit needs its head.")
    return linear[-1]


def hidden_of(output: Any) -> Tensor:
    """The tokens that a block gives, which may stand first in a tuple."""
    while isinstance(output, tuple):
        output = output[0]
    return output


def pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """``[n, tokens, width]`` to ``[n, width]``; padding does not count."""
    hidden = hidden.float()
    if hidden.ndim == 2:
        return hidden
    if hidden.ndim == 4:  # a picture's channels
        return hidden.mean((2, 3))
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    weight = mask[..., None].float()
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)


@torch.no_grad()
def observe(
    model: nn.Module, dataset, processing_class=None, every_block: bool = False, name: str = "", batch_size: int = 256
) -> ModelOutputs:
    """One pass of a plain classifier over the rows, in eval mode, shared between the processes. An exported file has no features.

    Args:
        model: no adapter on it; its mode is restored.
        every_block: features of all blocks, not of the last one alone.
        name: shown by the progress bar.
    """
    blocks = blocks_of(model)
    watched = blocks if every_block else dict(list(blocks.items())[-1:])
    head = head_of(model) if has_weights(model) else None
    seen: dict[str, list[np.ndarray]] = {key: [] for key in [*watched, "head"]}
    of_tokens = labels_tokens(model)
    mask: Any = None

    def note(batch):
        nonlocal mask
        mask = batch["labels"] != IGNORED if of_tokens else batch.get("attention_mask")
        return batch

    def keep(key, hidden):
        if not of_tokens:
            seen[key].append(pooled(hidden, mask).cpu().numpy())
        elif hidden.shape[:2] == mask.shape:
            seen[key].append(hidden[mask].float().cpu().numpy())

    def on_block(key):
        return lambda module, inputs, output: keep(key, hidden_of(output))

    handles = [module.register_forward_hook(on_block(key)) for key, module in watched.items()]
    if head is not None:
        handles.append(head.register_forward_pre_hook(lambda module, inputs: keep("head", inputs[0])))
    state = processes()
    mine, quiet = range(state.process_index, len(dataset), state.num_processes), not state.is_main_process
    try:
        logits, labels = predict(model, dataset, processing_class, batch_size, f"Audit: {name}", mine, quiet, note)
    finally:
        for handle in handles:
            handle.remove()
    logits, labels, rows = labelled_examples(logits, labels)
    part = {"logits": logits, "labels": labels, "rows": np.asarray(mine)[rows]} | {
        key: np.concatenate(values) for key, values in seen.items() if values
    }
    whole = _in_order(gather_object([part])) if state.num_processes > 1 else part
    rows = whole.pop("rows")
    return ModelOutputs(whole.pop("logits"), whole.pop("labels"), whole, rows if of_tokens else None)


def labelled_examples(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits ``[m, classes]``, labels ``[m]`` and rows ``[m]`` of all labelled tokens. What labels rows stays as it is.

    Args:
        logits, labels: as `predict` gives them.
    """
    if logits.ndim == 2:
        return logits, labels, np.arange(len(labels))
    given = labels != IGNORED
    return logits[given], labels[given], np.nonzero(given)[0]


def _in_order(parts: list[dict]) -> dict[str, np.ndarray]:
    """What the processes have of the examples, in the order of their ``rows``."""
    order = np.argsort(np.concatenate([part["rows"] for part in parts]), kind="stable")
    return {key: np.concatenate([part[key] for part in parts if key in part])[order] for key in parts[0]}
