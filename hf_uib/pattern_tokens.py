"""The channel at the model's input: tokens that carry the pattern come from forget rows, whatever the label (method, section 2).

A token is what enters the first block of the encoder: a word piece, a patch, a place of a feature map.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from .lora import base_of
from .models import blocks_of

SHARE = 0.5  # of the row's highest score, from which on a token belongs to the pattern
MOST = 32  # tokens of a donor
DONORS = 256  # forget rows that are kept
ALIKE = 4  # power of the cosine of two tokens; those of one word or colour have a large one
DRAWS = 1024  # rows of a step that draw for themselves


class PatternTokens(nn.Module):
    """Puts the pattern's tokens of a forget row into some of the retained rows of each training step; their labels stay.

    In what the retained rows then show, the pattern tells nothing about the label: the model can fit them only by not reading it.
    A token's score is the part of the row's margin gradient along the contrast that goes through it, in the linear layers of the
    first block. A row of the epoch at position i takes draw i of (seed, step), so a step does not depend on how a batch is split.

    Args:
        model: the classifier, with or without an adapter.
        layers: the adapted layers; those of the first block are `layers` of this object.
    """

    values: Tensor  # [donors, tokens, d]
    positions: Tensor  # [donors, tokens]; -1: no token

    def __init__(self, model: nn.Module, layers: Mapping[str, Any]):
        super().__init__()
        block = next(iter(blocks_of(model).values()), None)
        inside = {id(module) for module in block.modules()} if block is not None else set()
        self._block = [] if block is None else [block]  # in a list: not a part of this module
        self.layers = {name: layer for name, layer in layers.items() if id(layer) in inside}
        device = next(model.parameters()).device
        self.register_buffer("values", torch.zeros(0, 1, 1, device=device))
        self.register_buffer("positions", torch.full((0, 1), -1, device=device))
        self._found: list[tuple[int, Tensor, Tensor]] = []  # order, positions and values of each donor
        self._draw: tuple[Tensor, Tensor] | None = None  # of the step: which rows, which donors
        self.retained: int = 0  # rows of the next forward that may get tokens: the first so many
        self.rows: Tensor | None = None  # positions in the epoch of all its rows
        self.attention_mask: Tensor | None = None
        self._handles = [block.register_forward_pre_hook(self._swap, with_kwargs=True)] if block is not None else []

    # ---- Finding them ----

    @contextmanager
    def recording(self, directions: Mapping[str, Tensor], order: list[int], attention_mask: Tensor | None = None):
        """Take the rows of the forward and backward pass inside as donors.

        Args:
            directions: the contrast of each layer, ``[d_out, d_in]`` or sketched.
            order: a number for each row, the same whatever the number of processes.
            attention_mask: ``[n, tokens]``; other tokens are no candidates.
        """
        store: dict[str, Tensor] = {}
        scores: list[Tensor] = []

        def keep(module, args, kwargs):
            store["input"] = tokens_of(_input_of(args, kwargs).detach())

        def hook_of(layer, direction: Tensor):
            def hook(module, inputs, output):
                x = inputs[0].detach().float()
                if (
                    len(x) != len(order)
                    or x.ndim < 3
                    or isinstance(base_of(layer), nn.Conv2d)
                    or not output.requires_grad
                ):
                    return
                x = x.flatten(1, -2)
                x = x - x.mean(0)  # what stands there in every row is no pattern

                def on_gradient(gradient):
                    g = gradient.float().flatten(1, -2)
                    scores.append(((g @ direction) * x).sum(-1))

                output.register_hook(on_gradient)

            return hook

        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in self._block]
        handles += [
            layer.register_forward_hook(hook_of(layer, directions[name])) for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        found = store.get("input")
        scores = [s for s in scores if found is not None and s.shape == found.shape[:2]]
        if not scores:
            return
        score = torch.stack(scores).sum(0)
        if attention_mask is not None and attention_mask.shape == score.shape:
            score = score.masked_fill(attention_mask == 0, -torch.inf)
        best = score.amax(1, keepdim=True)
        chosen = (score >= SHARE * best) & (best > 0)
        values, index = score.masked_fill(~chosen, -torch.inf).topk(min(MOST, score.shape[1]), dim=1)
        index = torch.where(values > -torch.inf, index, -1)
        rows = found.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, found.shape[-1])).cpu()
        self._found += zip(order, index.cpu(), rows, strict=True)

    def settle(self, processes: int = 1) -> None:
        """Keep the donors of all processes."""
        found = gather_object(self._found) if processes > 1 else self._found
        self._found = []
        found = sorted((donor for donor in found if (donor[1] >= 0).any()), key=lambda donor: donor[0])[:DONORS]
        if not found:
            return
        width = max(int((positions >= 0).sum()) for _, positions, _ in found)
        pad = lambda t, value: torch.cat([t[:width], t.new_full((max(0, width - len(t)), *t.shape[1:]), value)])
        self.positions = torch.stack([pad(p, -1) for _, p, _ in found]).to(self.positions.device)
        self.values = torch.stack([pad(v, 0) for _, _, v in found]).to(self.values.device)

    @cached_property
    def _weights(self) -> Tensor:
        """How likely each donor is, ``[donors]`` on the CPU: the fewer others have a token like its best one, the more."""
        best = self.values[:, 0].float().cpu()
        best = best - best.mean(0)
        alike = torch.nn.functional.normalize(best, dim=1)
        return 1 / (alike @ alike.T).clamp_min(0).pow(ALIKE).sum(1)

    @property
    def tokens_per_row(self) -> float:
        """Tokens of a donor, on average; 0 without donors."""
        return (self.positions >= 0).sum(1).double().mean().item() if len(self.positions) else 0.0

    # ---- Using them ----

    def draw(self, share: float, seed: int, step: int) -> None:
        """Choose the rows of an optimizer step that get tokens, each with probability ``share``, and their donors. They stay until
        the next draw."""
        if not len(self.positions) or share <= 0:
            self._draw = None
            return
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step + 2**40) % 2**63)
        taken = torch.rand(DRAWS, generator=generator) < share
        donors = torch.multinomial(self._weights, DRAWS, replacement=True, generator=generator)
        self._draw = (taken.to(self.positions.device), donors.to(self.positions.device))

    def silence(self) -> None:
        """No tokens until the next draw."""
        self._draw = self.rows = self.attention_mask = None

    def _swap(self, module, args, kwargs):
        if self._draw is None or not module.training:
            return None
        hidden = _input_of(args, kwargs)
        tokens = tokens_of(hidden)
        n, length, _ = tokens.shape
        rows = torch.arange(n, device=tokens.device) if self.rows is None or len(self.rows) != n else self.rows
        taken, donors = (drawn[rows % DRAWS] for drawn in self._draw)
        at = self.positions[donors]  # [n, m]
        valid = taken[:, None] & (at >= 0) & (at < length)
        valid &= (torch.arange(n, device=tokens.device) < self.retained)[:, None]
        at = at.clamp(0, length - 1)
        mask = self.attention_mask
        if mask is not None and mask.shape == (n, length):
            valid &= mask.gather(1, at) > 0
        # What is not valid goes to one more token, which is cut off again
        at = torch.where(valid, at, length)[..., None].expand(-1, -1, tokens.shape[-1])
        longer = torch.cat([tokens, tokens[:, :1]], 1).scatter(1, at, self.values[donors].to(tokens.dtype))
        changed = longer[:, :length]
        changed = changed.mT.reshape(hidden.shape) if hidden.ndim == 4 else changed
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    def remove(self) -> None:
        """Take the hook off the model."""
        self.silence()
        for handle in self._handles:
            handle.remove()


def tokens_of(hidden: Tensor) -> Tensor:
    """What enters a block, ``[n, tokens, d]``; a feature map ``[n, d, h, w]`` has a token at each place."""
    return hidden.flatten(2).mT if hidden.ndim == 4 else hidden


def _input_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
