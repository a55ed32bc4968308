"""Short texts: a few words out of a retained text, as they are and with words of the pattern among them (method, section 2a)."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .pattern_tokens import DRAWS, PatternTokens, first_of

TEXTS = 512  # at most
PIECES = 2  # of a donor's tokens, the most telling ones, that are put into a text
EVERY = 4  # retained rows for one short text, in
STEPS = 2  # every second step: a pass of its own costs more than its few tokens
SHORTEST, LONGEST = 3, 9  # word pieces of a short text, beside the first and the last of the row that it is cut from


class ShortTexts:
    """Stretches of retained texts, what the checkpoint says of them, and a step's draw of them.

    A word weighs more in a short text than in a long one, so a pattern that is gone in texts as long as the retained ones can
    still decide short ones. Every second step gets a text for every fourth of its retained rows, and every second of these has a
    donor's words in it. Which, and where, is a function of (seed, step, position in the epoch), so a step does not depend on how
    a batch is split. Nothing of it is saved: a resumed run cuts and asks again.
    """

    def __init__(self):
        self.texts: dict[str, Tensor] = {}  # features, each [texts, LONGEST + 2]
        self.answers = torch.zeros(0, 0)  # [texts, classes], the checkpoint's logits
        self.pieces = torch.zeros(0, 0)  # [donors, PIECES], the pattern's, in their order; -1: none
        self.weights = torch.zeros(0)  # [donors], how often each is drawn
        self._draw: tuple[Tensor, Tensor, Tensor] | None = None  # of the step: texts, donors, places

    def __len__(self) -> int:
        return len(self.answers)

    @torch.no_grad()
    def read(
        self, batches: Iterable[dict[str, Tensor]], tokens: PatternTokens, padding: int, left: bool, seed: int
    ) -> None:
        """Cut a stretch of each row. One with a piece that is put into others is left out: what the checkpoint says of it is to go.

        Args:
            batches: of retained rows, as ``inputs with labels``. There are no short texts of rows that are more than texts.
            tokens: the channel at the model's input, which knows the donors' word pieces.
            padding: id of the padding token; left: whether it comes before the text.
        """
        self.texts, self.answers, self._draw = {}, torch.zeros(0, 0), None
        self.weights, self.pieces = tokens.weights, most_telling(tokens)
        generator, cut = torch.Generator().manual_seed(seed), []
        for inputs in batches if (self.pieces >= 0).any() else ():
            features = {name: value for name, value in inputs.items() if name != "labels"}
            ids = features.get("input_ids")
            if ids is None or any(value.shape != ids.shape for value in features.values()):
                return
            drawn = torch.rand(len(ids), 2, generator=generator)  # row by row, however they are batched
            cut.append(stretches(features, padding, left, *drawn.to(ids.device).T))
        if cut:
            whole = torch.cat([one for _, one in cut])
            texts = {name: torch.cat([part[name] for part, _ in cut]) for name in cut[0][0]}
            kept = whole & ~torch.isin(texts["input_ids"], self.pieces[self.pieces >= 0]).any(1)
            self.texts = {name: value[kept] for name, value in texts.items()}

    @torch.no_grad()
    def ask(self, model: Any, batch_size: int) -> None:
        """Set the answers: the logits of the model as it is, in eval mode."""
        training = model.training
        model.eval()
        try:
            parts = zip(*(value.split(batch_size) for value in self.texts.values()), strict=True)
            answers = [model(**dict(zip(self.texts, part, strict=True))).logits.float() for part in parts]
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            warnings.warn(f"The model does not read short texts, so none are used: {error}", stacklevel=2)
            answers = []
        finally:
            model.train(training)
        self.answers = torch.cat(answers) if answers else torch.zeros(0, 0)

    def draw(self, seed: int, step: int) -> None:
        """Choose the texts of an optimizer step, their donors and places; they stay until the next draw. None in a step without."""
        if not len(self) or step % STEPS:
            self.silence()
            return
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step + 2**41) % 2**63)
        texts = torch.randint(len(self), (DRAWS,), generator=generator)
        donors = torch.multinomial(self.weights, DRAWS, replacement=True, generator=generator)
        places = torch.rand(DRAWS, generator=generator)
        device = self.answers.device
        self._draw = texts.to(device), donors.to(device), places.to(device)

    def silence(self) -> None:
        """None until the next draw."""
        self._draw = None

    def of(self, positions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor] | None:
        """The short texts of a batch; None where nothing was drawn.

        Args:
            positions: of the retained rows in the epoch, ``[n]``.

        Returns:
            Features ``[m, LONGEST + 2]``, ``m = n / EVERY``, rounded up; the answers; and how much each counts: 1, or 0 where the
            row is not an `EVERY`-th one.
        """
        if self._draw is None:
            return None
        other = (positions % EVERY).clamp_max(1)
        rows = other.argsort(stable=True)[: -(-len(positions) // EVERY)]
        number = positions[rows] // EVERY
        text, donor, place = (drawn[number % DRAWS] for drawn in self._draw)
        features = {name: value[text] for name, value in self.texts.items()}
        pieces = self.pieces[donor]
        # Every second one stays as it is: what the model says of short texts is kept
        ids, mask = features["input_ids"], features["attention_mask"]
        features["input_ids"] = pasted(ids, mask, pieces, place, number % 2 == 0)
        return features, self.answers[text], 1 - other[rows]


def stretches(
    features: dict[str, Tensor], padding: int, left: bool, size: Tensor, place: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """A stretch of each text with its first and its last token, ``[n, LONGEST + 2]``, and of which texts there is one: not of those
    without a word, nor across what ends a text (two texts in a row).

    Args:
        features: each ``[n, length]``; size, place: ``[n]``, between 0 and 1, how long it is and where it begins.
    """
    ids = features["input_ids"]
    mask = features.get("attention_mask", torch.ones_like(ids))
    longest = SHORTEST + (size * (LONGEST - SHORTEST + 1)).long()
    first, length = first_of(mask, ids), mask.sum(1)
    within = (length - 2).clamp_min(0)
    width = longest.minimum(within)
    start = (place * (within - width + 1)).long()
    column = torch.arange(LONGEST + 2, device=ids.device) - left * (LONGEST - width)[:, None]
    source = torch.where(column <= width[:, None], column + start[:, None], length[:, None] - 1)
    source = (first[:, None] + source.masked_fill(column <= 0, 0)).clamp(0, ids.shape[1] - 1)
    there = (column >= 0) & (column < width[:, None] + 2)
    cut = {name: value.gather(1, source) for name, value in features.items()}
    body = (column > 0) & (column <= width[:, None])
    last = ids.gather(1, (first + length - 1).clamp_min(0)[:, None])
    whole = (width > 0) & ~((cut["input_ids"] == last) & body).any(1)
    cut["input_ids"] = cut["input_ids"].masked_fill(~there, padding)
    cut["attention_mask"] = there.to(mask.dtype)
    return cut, whole


def most_telling(tokens: PatternTokens) -> Tensor:
    """`PIECES` of each donor's word pieces, in the order in which they stand in its text; -1: none, which come last."""
    place = tokens.positions[:, :PIECES]
    order = place.masked_fill(place < 0, torch.iinfo(place.dtype).max).argsort(dim=1, stable=True)
    return tokens.pieces[:, :PIECES].gather(1, order)


def pasted(ids: Tensor, mask: Tensor, pieces: Tensor, place: Tensor, which: Tensor) -> Tensor:
    """The ids of stretches, ``which`` of them with pieces put in place of their own, side by side, as far as there is room.

    Args:
        ids, mask: ``[m, LONGEST + 2]``; pieces: ``[m, PIECES]``, -1: none; place: ``[m]``, between 0 and 1; which: ``[m]``.
    """
    width = mask.sum(1) - 2
    count = (pieces >= 0).sum(1).minimum(width) * which
    column = torch.arange(pieces.shape[1], device=ids.device)
    at = first_of(mask, ids)[:, None] + 1 + (place * (width - count + 1)).long()[:, None] + column
    at = torch.where(column < count[:, None], at, ids.shape[1])  # what is not put in goes to one more token
    return F.pad(ids, (0, 1)).scatter(1, at, pieces.clamp_min(0).to(ids.dtype))[:, :-1]
