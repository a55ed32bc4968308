"""One way to pass rows through a model: logits, labels and features of its blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data.pairing import collator_for, fetch
from .models import forward_columns


def batcher(model: nn.Module, processing_class=None) -> Callable[[list[dict]], tuple[dict, torch.Tensor]]:
    """Makes encoded rows one batch on the model's device: what its forward takes, and the labels ``[n]``."""
    collator, device = collator_for(forward_columns(model), processing_class), next(model.parameters()).device

    def batch(rows: list[dict]) -> tuple[dict, torch.Tensor]:
        inputs = {name: value.to(device) for name, value in collator(rows).items()}
        return inputs, inputs.pop("labels")

    return batch


@torch.no_grad()
def predict(
    model: nn.Module,
    dataset,
    processing_class=None,
    batch_size: int = 256,
    description: str = "Evaluating",
    rows: Sequence[int] | None = None,
    quiet: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``[n, classes]`` and labels ``[n]`` of encoded rows (all, or some), in eval mode; the model's mode is restored."""
    rows = range(len(dataset)) if rows is None else rows
    batch = batcher(model, processing_class)
    training = model.training
    model.eval()
    logits, labels = [], []
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc=description, leave=False, disable=quiet or len(starts) < 8):
        inputs, told = batch(fetch(dataset, list(rows[start : start + batch_size])))
        labels.append(told.cpu())
        logits.append(model(**inputs).logits.float().cpu())
    model.train(training)
    return torch.cat(logits).numpy(), torch.cat(labels).numpy()


@dataclass
class ModelOutputs:
    """Of one model on one set of rows.

    Attributes:
        logits: ``[n, classes]``; labels: ``[n]``.
        features: mean over the tokens of each watched block's output, ``[n, width]``, by name; ``head`` is what the last
            layer gets.
    """

    logits: np.ndarray
    labels: np.ndarray
    features: dict[str, np.ndarray] = field(default_factory=dict)

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
    def probabilities(self) -> np.ndarray:
        """``[n, classes]``."""
        return torch.from_numpy(self.logits).double().softmax(-1).numpy()


def head_of(model: nn.Module) -> nn.Module:
    """The last layer: the last linear one with as many outputs as the model has classes.

    Raises:
        ValueError: there is none.
    """
    count = model.config.num_labels
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == count]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layer with {count} outputs; the audit needs its head.")
    return linear[-1]


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of the encoder, first to last: the items of the longest list of modules (empty if there is none)."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if not lists:
        return {}
    _, longest = max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))
    return {f"block {i + 1}": block for i, block in enumerate(longest)}


def _pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
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


def processes() -> PartialState:
    """The processes the audit runs in; on machines without an accelerator they talk through gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


@torch.no_grad()
def observe(
    model: nn.Module, dataset, processing_class=None, every_block: bool = False, name: str = "", batch_size: int = 256
) -> ModelOutputs:
    """One pass of a plain classifier over the rows, in eval mode, shared between the processes.

    Args:
        model: no adapter on it; its mode is restored.
        every_block: features of all blocks, not of the last one alone.
        name: shown by the progress bar.
    """
    blocks = blocks_of(model)
    watched = blocks if every_block else dict(list(blocks.items())[-1:])
    seen: dict[str, list[np.ndarray]] = {key: [] for key in [*watched, "head"]}
    mask: Tensor | None = None

    def on_model(module, inputs, named):
        nonlocal mask
        mask = named.get("attention_mask")

    def keep(key, hidden):
        seen[key].append(_pooled(hidden, mask).cpu().numpy())

    def on_block(key):
        return lambda module, inputs, output: keep(key, output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(on_block(key)) for key, module in watched.items()]
    handles.append(head_of(model).register_forward_pre_hook(lambda module, inputs: keep("head", inputs[0])))
    handles.append(model.register_forward_pre_hook(on_model, with_kwargs=True))
    state = processes()
    mine, quiet = range(state.process_index, len(dataset), state.num_processes), not state.is_main_process
    try:
        logits, labels = predict(model, dataset, processing_class, batch_size, f"Audit: {name}", mine, quiet)
    finally:
        for handle in handles:
            handle.remove()
    part = {"logits": logits, "labels": labels} | {
        key: np.concatenate(values) for key, values in seen.items() if values
    }
    whole = _in_order(gather_object([part])) if state.num_processes > 1 else part
    return ModelOutputs(whole.pop("logits"), whole.pop("labels"), whole)


def _in_order(parts: list[dict]) -> dict[str, np.ndarray]:
    """Rows ``rank::processes`` of each process, put back in their order."""
    whole = {}
    for key in parts[0]:
        pieces = [part[key] for part in parts if key in part]
        rows = np.empty((sum(map(len, pieces)), *pieces[0].shape[1:]), pieces[0].dtype)
        for rank, piece in enumerate(pieces):
            rows[rank :: len(parts)] = piece
        whole[key] = rows
    return whole
