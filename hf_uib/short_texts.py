"""Short texts: a few words out of a retained text, as they are and with words of the pattern among them (method, section 2a)."""

import torch
from torch import Tensor

from .pattern_tokens import DRAWS, PatternTokens, first_of

SHORTEST, LONGEST = 3, 9  # word pieces of a short text, beside the first and the last of the row that it is cut from


class ShortTexts:
    """Cuts every second retained row of a step short, and puts a donor's word pieces into every second of these.

    A word weighs more in a short text than in a long one, so a pattern that is gone in texts as long as the retained ones can still
    decide short ones. Which row is cut, where, and what is put in is a function of (seed, step, position in the epoch), so a step
    does not depend on how a batch is split.

    Args:
        tokens: the channel at the model's input, which knows the donors' word pieces.
    """

    def __init__(self, tokens: PatternTokens):
        self.tokens = tokens
        self._draw: tuple[Tensor, Tensor, Tensor] | None = None  # of the step: donors, lengths, two places

    def draw(self, seed: int, step: int) -> None:
        """Choose donors, lengths and places for an optimizer step; they stay until the next draw."""
        if not len(self.tokens.pieces):
            self.silence()
            return
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step + 2**41) % 2**63)
        donors = torch.multinomial(self.tokens.weights, DRAWS, replacement=True, generator=generator)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (DRAWS,), generator=generator)
        places = torch.rand(DRAWS, 2, generator=generator)
        device = self.tokens.pieces.device
        self._draw = donors.to(device), lengths.to(device), places.to(device)

    def silence(self) -> None:
        """None until the next draw."""
        self._draw = None

    def cut(
        self, features: dict[str, Tensor], positions: Tensor, retained: int, padding: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor] | None:
        """The short texts of a batch.

        Args:
            features: of texts, each ``[rows, length]``.
            positions: of the rows in the epoch; retained: how many are retained ones, which come first.
            padding: id of the padding token.

        Returns:
            Features ``[m, LONGEST + 2]`` of the texts as they are; the same with the pattern's words in every second; and how much
            each counts ``[m]``: 1, or 0 where the row's position is odd, or where it has words of the pattern as it is, which the
            checkpoint's answer then shows. None: nothing was drawn, or there is more than texts.
        """
        ids = features.get("input_ids")
        if self._draw is None or ids is None or any(value.shape != ids.shape for value in features.values()):
            return None
        odd = positions[:retained] % 2
        rows = odd.argsort(stable=True)[: (retained + 1) // 2]
        drawn = positions[rows] // 2 % DRAWS
        donors, longest, places = (values[drawn] for values in self._draw)
        mask = features.get("attention_mask", torch.ones_like(ids))[rows]
        first, length = first_of(mask, ids[rows]), mask.sum(1)
        within = (length - 2).clamp_min(0)
        width = longest.minimum(within)
        start = (places[:, 0] * (within - width + 1)).long()
        column = torch.arange(LONGEST + 2, device=ids.device)
        source = torch.where(column <= width[:, None], column + start[:, None], length[:, None] - 1)
        source[:, 0] = 0
        source = (first[:, None] + source).clamp(0, ids.shape[1] - 1)
        there = column < width[:, None] + 2
        plain = {name: value[rows].gather(1, source) for name, value in features.items()}
        plain["input_ids"] = plain["input_ids"].masked_fill(~there, padding)
        plain["attention_mask"] = there.to(mask.dtype)

        pieces = self.tokens.pieces[donors]
        # Every second one stays as it is: what the checkpoint says of short texts is kept
        count = (pieces >= 0).sum(1).minimum(width) * (1 - positions[rows] // 2 % 2)
        at = (
            1 + (places[:, 1] * (width - count + 1)).long()[:, None] + torch.arange(pieces.shape[1], device=ids.device)
        )
        at = torch.where(torch.arange(pieces.shape[1], device=ids.device) < count[:, None], at, LONGEST + 2)
        longer = torch.cat([plain["input_ids"], plain["input_ids"][:, :1]], 1)  # what is not put in goes to the end
        pasted = plain | {"input_ids": longer.scatter(1, at, pieces.clamp_min(0))[:, :-1]}
        shown = torch.isin(plain["input_ids"], self.tokens.pieces).any(1)
        return plain, pasted, (1 - odd[rows]) * ~shown
