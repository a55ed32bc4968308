"""The channel at the model's input: tokens that carry the pattern come from forget rows, whatever the label (method, section 2).

A token is what enters the first block of the encoder: a word piece, a patch, a place of a feature map.
"""

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn

from .lora import base_of
from .models import blocks_of

SHARE = 0.5  # of the row's highest score, from which on a token belongs to the pattern
MOST = 32  # tokens of a donor
DONORS = 256  # forget rows that are kept
ORDINARY = 64  # retained rows whose tokens are compared with theirs
ALIKE = 4  # power of the cosine of two tokens: those of one word are alike
DRAWS = 1024  # rows of a step that draw for themselves


class PatternTokens(nn.Module):
    """Puts the pattern's tokens of a forget row into some of the retained rows of each training step; their labels stay.

    In what the retained rows then show, the pattern tells nothing about the label: the model can fit them only by not reading it.
    A token's score is the part of the row's margin gradient along the contrast that goes through it, in the linear layers of the
    first block. A row of the epoch at position i takes draw i of (seed, step), so a step does not depend on how a batch is split.

    The state holds which rows of the forget set are donors and where their tokens stand, never the tokens: `fill` reads them off
    the rows again, so that nothing of a forget row is saved or published.

    Args:
        model: the classifier, with or without an adapter.
        layers: the adapted layers; those of the first block are `layers` of this object.
    """

    values: Tensor  # [donors, tokens, d]
    positions: Tensor  # [donors, tokens], counted from the row's first token that is no padding; -1: no token
    donors: Tensor  # [donors], their numbers in the forget set

    def __init__(self, model: nn.Module, layers: Mapping[str, Any]):
        super().__init__()
        block = next(iter(blocks_of(model).values()), None)
        inside = {id(module) for module in block.modules()} if block is not None else set()
        self._block = [] if block is None else [block]  # in a list: not a part of this module
        self.layers = {name: layer for name, layer in layers.items() if id(layer) in inside}
        device = next(model.parameters()).device
        self.register_buffer("values", torch.zeros(0, 1, 1, device=device), persistent=False)
        self.register_buffer("positions", torch.full((0, 1), -1, device=device))
        self.register_buffer("donors", torch.zeros(0, dtype=torch.long))
        # Of forget rows: number, places, scores and tokens; of retained rows: number and tokens
        self._found: list[tuple[Any, ...]] = []
        self._ordinary: list[tuple[int, Tensor]] = []
        self._draw: tuple[Tensor, Tensor] | None = None  # of the step: which rows, which donors
        self.retained: int = 0  # rows of the next forward that may get tokens: the first so many
        self.rows: Tensor | None = None  # positions in the epoch of all its rows
        self.attention_mask: Tensor | None = None
        self._handle: Any = None  # of the hook, which is there from a draw to the next silence

    # ---- Finding them ----

    @contextmanager
    def recording(self, directions: Mapping[str, Tensor], numbers: list[int], attention_mask: Tensor | None = None):
        """Take the rows of the forward and backward pass inside as donors.

        Args:
            directions: the contrast of each layer, ``[d_out, d_in]`` or sketched.
            numbers: of the rows in the forget set.
            attention_mask: ``[n, tokens]``; other tokens are no candidates.
        """
        store: dict[str, Tensor] = {}
        scores: list[Tensor] = []

        def keep(module, args, kwargs):
            if (tokens := tokens_of(_input_of(args, kwargs))) is not None:
                store["input"] = tokens.detach()

        def hook_of(layer, direction: Tensor):
            def hook(module, inputs, output):
                x = inputs[0].detach().float()
                if (
                    len(x) != len(numbers)
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
        if found is None or not scores:
            return
        score = torch.stack(scores).sum(0)
        if attention_mask is not None and attention_mask.shape == score.shape:
            score = score.masked_fill(attention_mask == 0, -torch.inf)
        score, index = score.topk(min(MOST, score.shape[1]), dim=1)
        rows = found.gather(1, index[..., None].expand(-1, -1, found.shape[-1]))
        lacking = MOST - score.shape[1]  # batches of texts have lengths of their own
        score, index = F.pad(score, (0, lacking), value=-torch.inf), F.pad(index, (0, lacking))
        rows = F.pad(rows, (0, 0, 0, lacking))
        index = index - first_of(attention_mask, found)[:, None]
        self._found += zip(numbers, index.cpu(), score.cpu(), rows.float().cpu(), strict=True)

    @contextmanager
    def seeing(self, numbers: list[int], attention_mask: Tensor | None = None):
        """Take the tokens of the retained rows that are passed inside as ordinary ones."""

        def keep(module, args, kwargs):
            tokens = tokens_of(_input_of(args, kwargs))
            if tokens is None or len(tokens) != len(numbers):
                return
            tokens, mask = tokens.detach().float(), attention_mask
            if mask is None or mask.shape != tokens.shape[:2]:
                mask = torch.ones(tokens.shape[:2], device=tokens.device)
            self._ordinary += [(o, t[m > 0].cpu()) for o, t, m in zip(numbers, tokens, mask, strict=True)]

        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in self._block]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def settle(self, processes: int = 1) -> None:
        """Choose the tokens of each donor, from what all processes recorded; `fill` then has to read their values."""
        first = lambda entry: entry[0]
        found = sorted(gather_object(self._found) if processes > 1 else self._found, key=first)[:DONORS]
        ordinary = sorted(gather_object(self._ordinary) if processes > 1 else self._ordinary, key=first)[:ORDINARY]
        self._found, self._ordinary = [], []
        if not found:
            return
        index, score, tokens = (torch.stack([entry[i] for entry in found]) for i in (1, 2, 3))
        score = score * novelty(tokens, [t for _, t in ordinary])
        best = score.amax(1, keepdim=True)
        chosen = (score >= SHARE * best) & (best > 0)
        donors, width = chosen.any(1), int(chosen.sum(1).max())
        if not width:
            return
        order = score.masked_fill(~chosen, -torch.inf).topk(width, dim=1).indices[donors]
        positions = torch.where(chosen[donors].gather(1, order), index[donors].gather(1, order), -1)
        self.positions = positions.to(self.positions.device)
        self.donors = torch.tensor([entry[0] for entry in found])[donors]

    @torch.no_grad()
    def fill(self, model: Any, batches: Iterable[dict[str, Tensor]]) -> None:
        """Read the values of the donors' tokens off the donors.

        Args:
            model: a `PeftModel`; its adapter is switched off for the time of it, so that a resumed run finds the same.
            batches: the rows `donors` of the forget set, in their order, as ``inputs with labels``.
        """
        seen: list[Any] = []
        keep = lambda module, args, kwargs: seen.append(tokens_of(_input_of(args, kwargs)))
        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in self._block]
        training, values, done = model.training, [], 0
        model.eval()
        try:
            with model.disable_adapter():
                for inputs in batches:
                    model(**{name: value for name, value in inputs.items() if name != "labels"})
                    tokens = seen.pop()
                    at = self.positions[done : done + len(tokens)]
                    done += len(tokens)
                    at = at.clamp_min(0) + first_of(inputs.get("attention_mask"), tokens)[:, None]
                    at = at.clamp(0, tokens.shape[1] - 1)[..., None].expand(-1, -1, tokens.shape[-1])
                    values.append(tokens.float().gather(1, at))
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()
        if values:
            self.values = torch.cat(values)

    @property
    def tokens_per_row(self) -> float:
        """Tokens of a donor, on average; 0 without donors."""
        return (self.positions >= 0).sum(1).float().mean().item() if len(self.positions) else 0.0

    # ---- Using them ----

    def draw(self, share: float, seed: int, step: int) -> None:
        """Choose the rows of an optimizer step that get tokens, each with probability ``share``, and their donors. They stay until
        the next draw."""
        if not len(self.values) or share <= 0:
            self.silence()
            return
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step + 2**40) % 2**63)
        taken = torch.rand(DRAWS, generator=generator) < share
        donors = torch.randint(len(self.positions), (DRAWS,), generator=generator)
        self._draw = (taken.to(self.positions.device), donors.to(self.positions.device))
        if self._handle is None:
            self._handle = self._block[0].register_forward_pre_hook(self._swap, with_kwargs=True)

    def silence(self) -> None:
        """No tokens until the next draw, and no hook on the model."""
        self._draw = self.rows = self.attention_mask = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _swap(self, module, args, kwargs):
        if self._draw is None or not module.training:
            return None
        hidden = _input_of(args, kwargs)
        tokens = tokens_of(hidden)
        if tokens is None:
            return None
        n, length, _ = tokens.shape
        rows = torch.arange(n, device=tokens.device) if self.rows is None or len(self.rows) != n else self.rows
        taken, donors = (drawn[rows % DRAWS] for drawn in self._draw)
        at = self.positions[donors]  # [n, m]
        valid = taken[:, None] & (at >= 0)
        at = at + first_of(self.attention_mask, tokens)[:, None]
        valid &= at < length
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


def novelty(tokens: Tensor, ordinary: list[Tensor]) -> Tensor:
    """``1 / (1 + how many ordinary tokens are like it)`` of each token; 1 without ordinary ones.

    Args:
        tokens: ``[n, m, d]``; ordinary: of each row ``[tokens, d]``.
    """
    if not ordinary:
        return torch.ones(tokens.shape[:2])
    others = torch.cat(ordinary)
    mean = others.mean(0)
    unit = lambda t: F.normalize(t - mean, dim=-1)
    return 1 / (1 + (unit(tokens) @ unit(others).T).clamp_min(0).pow(ALIKE).sum(-1))


def first_of(attention_mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Where each row's first token stands that is no padding, ``[n]``."""
    if attention_mask is None or attention_mask.shape != tokens.shape[:2]:
        return torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    return attention_mask.to(tokens.device).argmax(1)


def tokens_of(hidden: Any) -> Tensor | None:
    """What enters a block, as ``[n, tokens, d]``; of a feature map ``[n, d, h, w]`` each place is a token. None: it is neither."""
    if not torch.is_tensor(hidden) or hidden.ndim not in (3, 4):
        return None
    return hidden.flatten(2).mT if hidden.ndim == 4 else hidden


def _input_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")
