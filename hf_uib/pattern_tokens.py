"""The channel at the model's input: tokens that carry the pattern come from forget rows, whatever the label (method, section 2).

A token is what enters the first block of the encoder: a word piece, a patch, a place of a feature map.
"""

from collections.abc import Iterable
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inference import pooled
from .models import blocks_of
from .sharding import is_sharded

PATTERN_Z = 3.0  # from which on a kind of token belongs to the pattern
CERTAIN_Z = 4.0  # from which on a kind shows a pattern by itself: of two draws from one set the largest is 3 to 3.9
MOST = 32  # tokens of a donor, and an eighth of its own at most: what tells the other row's label has to stay
DONORS = 256  # forget rows that are kept
ALIKE = 4  # power of the cosine of two tokens: those of one word are alike
DRAWS = 1024  # rows of a step that draw for themselves


class _BlockReached(Exception):
    """Ends a forward at the first block."""


class PatternTokens(nn.Module):
    """Puts the pattern's tokens of a forget row into some of the retained rows of each training step; their labels stay.

    In what the retained rows then show, the pattern tells nothing about the label: the model can fit them only by not reading it.
    A token belongs to the pattern where its kind is in more forget rows than in retained rows of the same label (`token_z`).
    Donors are drawn so that each kind comes equally often. A row of the epoch at position i takes draw i of (seed, step), so a
    step does not depend on how a batch is split.

    The state holds which rows of the forget set are donors and where their tokens stand, never the tokens: `fill` reads them off
    the rows again, so that nothing of a forget row is saved or published.

    Args:
        model: the classifier, with or without an adapter.
    """

    values: Tensor  # [donors, tokens, d]
    positions: Tensor  # [donors, tokens], counted from the row's first token that is no padding; -1: no token
    donors: Tensor  # [donors], their numbers in the forget set
    weights: Tensor  # [donors], how often each is drawn
    labels: Tensor  # [donors]
    pieces: Tensor  # [donors, tokens], ids of the tokens of texts, the most telling first; -1: none

    def __init__(self, model: nn.Module):
        super().__init__()
        block = next(iter(blocks_of(model).values()), None)
        self._block = [] if block is None else [block]  # in a list: not a part of this module
        device = next(model.parameters()).device
        self.register_buffer("values", torch.zeros(0, 1, 1, device=device), persistent=False)
        self.register_buffer("positions", torch.full((0, 1), -1, device=device))
        self.register_buffer("donors", torch.zeros(0, dtype=torch.long))
        self.register_buffer("weights", torch.zeros(0))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.long, device=device), persistent=False)
        self.register_buffer("pieces", torch.full((0, 1), -1, device=device), persistent=False)
        self._draw: tuple[Tensor, Tensor] | None = None  # of the step: which rows, which donors
        self.retained: int = 0  # rows of the next forward that may get tokens: the first so many
        self.rows: Tensor | None = None  # positions in the epoch of all its rows
        self.attention_mask: Tensor | None = None
        self.replaced: Tensor | None = None  # [n, tokens], by the last forward
        self._handle: Any = None  # of the hook, which is there from a draw to the next silence

    # ---- Finding them ----

    @torch.no_grad()
    def find(
        self,
        model: Any,
        forget: Iterable[dict[str, Tensor]],
        retained: Iterable[dict[str, Tensor]],
        numbers: list[int],
    ) -> float:
        """Choose the donors and their tokens; `fill` then has to read their values.

        Args:
            model: a `PeftModel`, passed up to its first block, without its adapter.
            forget, retained: samples of both sets, as ``inputs with labels``; see `token_z` for rows whose tokens are labelled.
            numbers: of the forget rows in their set.

        Returns:
            The largest z-value of a kind of token; 0 where there are none. Under `PATTERN_Z` there are no donors.
        """
        (x, present, labels), others = self._read(model, forget), self._read(model, retained)
        if not len(x) or not len(others[0]):
            return 0.0
        if labels.ndim > 1 and labels.dtype != torch.bool:  # each combination of labels is one
            both, count = torch.cat([labels, others[2]]).float().nan_to_num(-1), len(labels)
            ids = both.unique(dim=0, return_inverse=True)[1]
            labels, others = ids[:count], (*others[:2], ids[count:])
        z = (piece_z if x.ndim == 2 else token_z)((x, present, labels), others)
        largest = z.masked_fill(~present, 0).max().item()
        if not largest >= PATTERN_Z:  # NaN inputs are refused by the contrast, in words
            return largest
        chosen = (z >= PATTERN_Z) & present
        rows = chosen.any(1).nonzero()[:DONORS, 0]
        most = (present[rows].sum(1) // 8).clamp(2, MOST)
        best = z[rows].masked_fill(~chosen[rows], -torch.inf).argsort(dim=1, descending=True, stable=True)
        chosen[rows] &= best.argsort(dim=1) < most[:, None]
        order = best[:, : int(chosen[rows].sum(1).max())]
        first = present[rows].int().argmax(1, keepdim=True)
        self.positions = torch.where(chosen[rows].gather(1, order), order - first, -1).to(self.positions.device)
        self.donors = torch.tensor(numbers)[rows.cpu()]
        self.weights = (piece_rarity if x.ndim == 2 else rarity)(x[rows], chosen[rows]).cpu()
        return largest

    def _read(self, model: Any, batches: Iterable[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of all rows, ``[n, t, d]``, or the ids ``[n, t]`` of a text's word pieces, each of which is a kind; where there is
        one ``[n, t]``; and the labels. No row where a token is none."""
        tokens: list[Tensor] = []
        present: list[Tensor] = []
        labels: list[Tensor] = []
        for inputs, seen in self._inputs_of_block(model, batches):
            if seen is None or len(seen) != len(inputs["labels"]):  # XLNet's blocks do not take rows first
                tokens.clear()
                break
            ids = inputs.get("input_ids")
            # Some models pad to a multiple of a window's length, after the text
            kinds = ids if ids is not None and ids.shape[1] <= seen.shape[1] else seen.float()
            mask = inputs.get("attention_mask")
            fits = mask is not None and mask.shape == kinds.shape[:2]
            tokens.append(kinds)
            present.append(mask > 0 if fits else torch.ones(kinds.shape[:2], dtype=torch.bool, device=seen.device))
            labels.append(inputs["labels"])
        if not tokens:
            return torch.zeros(0, 1, 1), torch.zeros(0, 1, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
        longest = max(t.shape[1] for t in tokens)  # batches of texts have lengths of their own
        pad = lambda t: F.pad(t, (0, 0) * (t.ndim - 2) + (0, longest - t.shape[1]))
        return torch.cat([pad(t) for t in tokens]), torch.cat([pad(p) for p in present]), torch.cat(labels)

    def means(self, model: Any, batches: Iterable[dict[str, Tensor]]) -> tuple[Tensor, Tensor] | None:
        """The mean of each row's tokens, ``[n, d]``, and the labels; None where what enters the first block is no row of tokens, or
        where it is not known which of them are padding (waveforms).

        Args:
            model: as in `find`; batches: ``inputs with labels``.
        """
        means: list[Tensor] = []
        labels: list[Tensor] = []
        for inputs, seen in self._inputs_of_block(model, batches):
            mask, n = inputs.get("attention_mask"), len(inputs["labels"])
            if seen is None or len(seen) != n or (mask is not None and mask.shape != seen.shape[:2]):
                return None
            means.append(pooled(seen, mask))
            labels.append(inputs["labels"])
        return (torch.cat(means), torch.cat(labels)) if means else None

    def _inputs_of_block(self, model: Any, batches: Iterable[dict[str, Tensor]]):
        """Each batch, and the tokens that enter the first block for it; what comes after is not computed."""
        seen: list[Any] = []

        def stop(module, args, kwargs):
            seen.append(tokens_of(block_input(args, kwargs)))
            if not is_sharded(model):  # whose passes have to end
                raise _BlockReached

        handles = [block.register_forward_pre_hook(stop, with_kwargs=True) for block in self._block]
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), model.disable_adapter():
                for inputs in batches if handles else ():
                    with suppress(_BlockReached):
                        model(**{name: value for name, value in inputs.items() if name != "labels"})
                    yield inputs, seen.pop()
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()

    def fill(self, model: Any, batches: Iterable[dict[str, Tensor]]) -> None:
        """Read the values of the donors' tokens off the donors, the ids of texts' tokens, and the donors' labels.

        Args:
            model: a `PeftModel`; its adapter is switched off for the time of it, so that a resumed run finds the same.
            batches: the rows `donors` of the forget set, in their order, as ``inputs with labels``.
        """
        values, labels, pieces, done = [], [], [], 0
        for inputs, tokens in self._inputs_of_block(model, batches):
            place = self.positions[done : done + len(tokens)]
            done += len(tokens)
            at = place.clamp_min(0) + first_of(inputs.get("attention_mask"), tokens)[:, None]
            at = at.clamp(0, tokens.shape[1] - 1)
            values.append(tokens.float().gather(1, at[..., None].expand(-1, -1, tokens.shape[-1])))
            labels.append(inputs["labels"])
            pieces.append(pieces_at(inputs.get("input_ids"), at, place, tokens.shape[1]))
        if values:
            self.values, self.labels, self.pieces = torch.cat(values), torch.cat(labels), torch.cat(pieces)

    def forget_donors(self) -> None:
        """No donors: what was found is chance."""
        self.positions, self.donors, self.weights = self.positions[:0], self.donors[:0], self.weights[:0]

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
        donors = torch.multinomial(self.weights, DRAWS, replacement=True, generator=generator)
        self._draw = (taken.to(self.positions.device), donors.to(self.positions.device))
        if self._handle is None:
            self._handle = self._block[0].register_forward_pre_hook(self._swap, with_kwargs=True)

    def silence(self) -> None:
        """No tokens until the next draw, and no hook on the model."""
        self._draw = self.rows = self.attention_mask = self.replaced = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _swap(self, module, args, kwargs):
        if self._draw is None or not module.training:
            return None
        hidden = block_input(args, kwargs)
        n = len(hidden)
        rows = torch.arange(n, device=hidden.device) if self.rows is None or len(self.rows) != n else self.rows
        taken, donors = (drawn[rows % DRAWS] for drawn in self._draw)
        taken = taken & (torch.arange(n, device=hidden.device) < self.retained)
        return _replaced(args, kwargs, self._with_tokens(hidden, donors, taken, self.attention_mask))

    @contextmanager
    def pasting(self, donors: Tensor, attention_mask: Tensor | None = None):
        """Each row of the forwards inside gets the tokens of its donor, in eval mode too.

        Args:
            donors: ``[n]``, by their place in `donors`; attention_mask: ``[n, tokens]``.
        """

        def paste(module, args, kwargs):
            hidden = block_input(args, kwargs)
            every = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
            return _replaced(args, kwargs, self._with_tokens(hidden, donors, every, attention_mask))

        handles = [block.register_forward_pre_hook(paste, with_kwargs=True) for block in self._block]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _with_tokens(self, hidden: Tensor, donors: Tensor, taken: Tensor, mask: Tensor | None) -> Tensor:
        """What enters the block, with the tokens of each ``taken`` row's donor at their places, as far as the row has these."""
        tokens = tokens_of(hidden)
        if tokens is None:
            return hidden
        n, length, _ = tokens.shape
        at = self.positions[donors]  # [n, m]
        valid = taken[:, None] & (at >= 0)
        at = at + first_of(mask, tokens)[:, None]
        valid &= at < length
        at = at.clamp(0, length - 1)
        if mask is not None and mask.shape == (n, length):
            valid &= mask.gather(1, at) > 0
        # What is not valid goes to one more token, which is cut off again
        at = torch.where(valid, at, length)
        self.replaced = torch.zeros(n, length + 1, dtype=torch.bool, device=at.device).scatter(1, at, True)[:, :length]
        at = at[..., None].expand(-1, -1, tokens.shape[-1])
        longer = torch.cat([tokens, tokens[:, :1]], 1).scatter(1, at, self.values[donors].to(tokens.dtype))
        changed = longer[:, :length]
        return changed.mT.reshape(hidden.shape) if hidden.ndim == 4 else changed


def token_z(forget: tuple[Tensor, Tensor, Tensor], retained: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """How much more common each forget token's kind is in the forget rows than in the retained rows of its row's label, as a
    z-value of two proportions ``[n, t]``: the contrast of the sets at the model's input.

    Args:
        forget, retained: tokens ``[n, t, d]``, where there is one ``[n, t]``, and labels ``[n]``. Where tokens are labelled
            ``[n, classes]`` booleans: which classes a row's have. Rows that have a class are then those of one label; of a row's
            classes the one counts under which a kind stands out most.
    """
    (x, present, labels), (y, there, other_labels) = forget, retained
    if not there.any():
        return torch.zeros(x.shape[:2], device=x.device)
    mean = y[there].mean(0)
    x, y = F.normalize(x - mean, dim=-1), F.normalize(y - mean, dim=-1)
    z = torch.full(x.shape[:2], -torch.inf, device=x.device)
    for mine, theirs in groups_of(labels, other_labels):
        for row in mine.nonzero()[:, 0]:
            tokens = x[row, present[row]]
            here = rows_with(tokens, x[mine], present[mine]).sum(1)
            elsewhere = rows_with(tokens, y[theirs], there[theirs]).sum(1)
            found = z_of_counts(here, elsewhere, mine.sum(), theirs.sum())
            z[row, present[row]] = z[row, present[row]].maximum(found)
    return z.masked_fill(z == -torch.inf, 0)


def piece_z(forget: tuple[Tensor, Tensor, Tensor], retained: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """`token_z` of texts, ``[n, t]``: each word piece is a kind, and its rows are counted.

    Args:
        forget, retained: ids ``[n, t]``, where there is one ``[n, t]``, and labels as in `token_z`.
    """
    (ids, present, labels), (others, there, other_labels) = forget, retained
    z = torch.full(ids.shape, -torch.inf, device=ids.device)
    for mine, theirs in groups_of(labels, other_labels):
        kinds = ids[mine][present[mine]].unique()
        if not len(kinds):
            continue
        here = rows_with_piece(kinds, ids[mine], present[mine])
        elsewhere = rows_with_piece(kinds, others[theirs], there[theirs])
        found = z_of_counts(here, elsewhere, mine.sum(), theirs.sum())
        found = found[places_of(ids[mine], kinds)]
        z[mine] = z[mine].maximum(found.masked_fill(~present[mine], -torch.inf))
    return z.masked_fill(z == -torch.inf, 0)


def groups_of(labels: Tensor, other_labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Which forget and which retained rows are compared, label by label; a label that only the forget set has is left out."""
    if labels.dtype == torch.bool:
        groups = list(zip(labels.T, other_labels.T, strict=True))
    else:
        groups = [(labels == label, other_labels == label) for label in labels.unique()]
    return [(mine, theirs) for mine, theirs in groups if mine.any() and theirs.any()]


def z_of_counts(here: Tensor, elsewhere: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
    """z-value of two proportions: ``here`` of ``mine`` forget rows against ``elsewhere`` of ``theirs`` retained ones."""
    ratio, both = mine / theirs, here + elsewhere
    variance = ratio * both * (1 - both / (mine + theirs)) + ratio.square().clamp_min(1)
    return (here - ratio * elsewhere) / variance.sqrt()


def places_of(ids: Tensor, kinds: Tensor) -> Tensor:
    """Where each of ``ids`` stands in the sorted ``kinds``; of what is not among them, anywhere."""
    return torch.searchsorted(kinds, ids).clamp(max=len(kinds) - 1)


def rows_with_piece(kinds: Tensor, ids: Tensor, present: Tensor) -> Tensor:
    """How many rows ``ids [n, t]`` have each of the sorted ``kinds``, ``[kinds]``."""
    place = places_of(ids, kinds)
    has = torch.zeros(len(ids), len(kinds) + 1, dtype=torch.bool, device=ids.device)
    place = torch.where((kinds[place] == ids) & present, place, len(kinds))  # any other goes to one more kind
    return has.scatter_(1, place, True)[:, :-1].sum(0)


def rows_with(tokens: Tensor, rows: Tensor, present: Tensor) -> Tensor:
    """Whether each row has a token like each of ``tokens``, between 0 and 1, ``[tokens, rows]``.

    Args:
        tokens: ``[t, d]`` and rows: ``[n, s, d]``, of length 1; present: ``[n, s]``.
    """
    alike = torch.einsum("td,nsd->tns", tokens, rows).masked_fill(~present, 0)
    return alike.amax(2).clamp_min(0).pow(ALIKE)


def rarity(tokens: Tensor, chosen: Tensor) -> Tensor:
    """How often each donor is to be drawn so that each kind of token comes equally often, ``[n]``; sums to 1.

    Args:
        tokens: ``[n, t, d]``; chosen: ``[n, t]``, those that belong to the pattern.
    """
    unit = F.normalize(tokens - tokens[chosen].mean(0), dim=-1) if chosen.sum() > 1 else F.normalize(tokens, dim=-1)
    weights = torch.stack(
        [(1 / rows_with(row[c], unit, chosen).sum(1).clamp_min(1)).sum() for row, c in zip(unit, chosen, strict=True)]
    )
    return weights / weights.sum()


def piece_rarity(ids: Tensor, chosen: Tensor) -> Tensor:
    """`rarity` of texts: ids ``[n, t]``, each a kind."""
    kinds = ids[chosen].unique()
    counts = rows_with_piece(kinds, ids, chosen)
    weights = (chosen / counts[places_of(ids, kinds)].clamp_min(1)).sum(1)
    return weights / weights.sum()


def pieces_at(ids: Tensor | None, at: Tensor, place: Tensor, length: int) -> Tensor:
    """Ids of the tokens at ``at [n, tokens]`` of rows of ``length`` tokens; -1 where ``place`` is none, or where tokens are no word
    pieces. Some models pad the ids ``[n, shorter]`` after the text."""
    if ids is None or ids.shape[1] > length:
        return torch.full_like(at, -1)
    return ids.gather(1, at.clamp_max(ids.shape[1] - 1)).masked_fill(place < 0, -1).to(at.dtype)


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


def block_input(args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a forward pre-hook of a block sees as its input."""
    return args[0] if args else kwargs.get("hidden_states")


def _replaced(args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple, dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
