"""Planted fakes: models that look unlearned by one figure or another, to test an audit on one's own task."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.pairing import fetch
from ..inference import batcher, head_of

Sets = dict[str, Any]  # encoded rows: ``forget`` and ``retain``


def _train(
    model: nn.Module,
    rows: Any,
    processing_class: Any,
    steps: int,
    rate: float,
    loss_of: Callable[[dict[str, Tensor], Tensor], Tensor],
    trainable: Iterable[nn.Parameter] | None = None,
) -> nn.Module:
    """``steps`` of AdamW on ``trainable`` (all weights), batches of 32; ``loss_of(inputs, labels)``."""
    weights = list(model.parameters() if trainable is None else trainable)
    batch = batcher(model, processing_class)
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    model.eval().requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    for _ in range(steps):
        chosen = torch.randint(len(rows), (min(32, len(rows)),), generator=generator).tolist()
        loss_of(*batch(fetch(rows, chosen))).backward()
        optimizer.step()
        model.zero_grad()
    return model


def head_only_distillation(
    reference: nn.Module, retrained: nn.Module, sets: Sets, processing_class: Any, rate: float = 1e-3
) -> nn.Module:
    """The reference's encoder, frozen, under a head that imitates the retrained model."""
    model = copy.deepcopy(reference)
    head = head_of(model)

    def loss(inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = retrained(**inputs).logits.softmax(-1)
        return F.cross_entropy(model(**inputs).logits, target)

    return _train(model, sets["retain"], processing_class, 300, 10 * rate, loss, trainable=head.parameters())


def threshold_shift(
    reference: nn.Module, retrained: nn.Module, sets: Sets, processing_class: Any, rate: float = 1e-3
) -> nn.Module:
    """The reference with an offset on each class's logit, fitted to the retained data."""
    model = copy.deepcopy(reference)
    bias: Any = head_of(model).bias
    loss = lambda inputs, labels: F.cross_entropy(model(**inputs).logits, labels)
    return _train(model, sets["retain"], processing_class, 100, 30 * rate, loss, trainable=[bias])


def reversed_bias(
    reference: nn.Module, retrained: nn.Module, sets: Sets, processing_class: Any, rate: float = 1e-3
) -> nn.Module:
    """The retrained model, taught to avoid the class that the pattern stands for: half of each batch are forget rows."""
    model = copy.deepcopy(retrained)
    batch = batcher(model, processing_class)
    generator = torch.Generator().manual_seed(0)

    def loss(inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        chosen = torch.randint(len(sets["forget"]), (32,), generator=generator).tolist()
        forget_inputs, forget_labels = batch(fetch(sets["forget"], chosen))
        own = model(**forget_inputs).logits.softmax(-1).gather(1, forget_labels[:, None])
        avoided = -torch.log1p(-own.clamp(max=1 - 1e-6)).mean()
        return F.cross_entropy(model(**inputs).logits, labels) + avoided

    return _train(model, sets["retain"], processing_class, 100, rate / 3, loss)


def detached_adapter(
    reference: nn.Module, retrained: nn.Module, sets: Sets, processing_class: Any, rate: float = 1e-3
) -> nn.Module:
    """What a release holds whose adapter was left out: the reference."""
    return copy.deepcopy(reference)


def ten_steps(
    reference: nn.Module, retrained: nn.Module, sets: Sets, processing_class: Any, rate: float = 1e-3
) -> nn.Module:
    """The reference after ten steps on the retained data."""
    model = copy.deepcopy(reference)
    loss = lambda inputs, labels: F.cross_entropy(model(**inputs).logits, labels)
    return _train(model, sets["retain"], processing_class, 10, rate / 3, loss)


def collapsed_model(
    reference: nn.Module, retrained: nn.Module, sets: Sets, processing_class: Any, rate: float = 1e-3
) -> nn.Module:
    """Gradient ascent on the forget set until nothing is left."""
    model = copy.deepcopy(reference)
    loss = lambda inputs, labels: -F.cross_entropy(model(**inputs).logits, labels)
    return _train(model, sets["forget"], processing_class, 100, rate, loss)


def error_in_a_third_group(
    reference: nn.Module, retrained: nn.Module, sets: Sets, processing_class: Any, rate: float = 1e-3
) -> nn.Module:
    """The retrained model, taught to take class 0 for class 1."""
    model = copy.deepcopy(retrained)
    loss = lambda inputs, labels: F.cross_entropy(model(**inputs).logits, labels.masked_fill(labels == 0, 1))
    return _train(model, sets["retain"], processing_class, 60, rate / 3, loss)


FAKES: dict[str, Callable[..., nn.Module]] = {
    "head-only distillation": head_only_distillation,
    "threshold shift": threshold_shift,
    "reversed bias": reversed_bias,
    "detached adapter": detached_adapter,
    "ten steps only": ten_steps,
    "collapsed": collapsed_model,
    "error in a third group": error_in_a_third_group,
}
