"""What a simple head may read of each row: mean tokens, places of a picture, tokens of a text."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from ..inference import hidden_of, pooled, predict
from ..mean_tokens import DIRECTIONS, projected
from ..models import blocks_of, input_kind
from ..pattern_tokens import block_input
from .trimmed import linear_margins, quadratic_margins

GRID = 4  # a picture's places: so many rows of so many
PLACE_WIDTH = 64  # features of a place
PLACE_DIRECTIONS = 512  # principal components of all places
MOST_TOKENS = 1024  # the most frequent ones that are looked for
RARE = 0.01  # share of the texts: a token in fewer, or that is missing in fewer, tells of too few rows


class Look(NamedTuple):
    """Features of the training rows ``[n, d]`` and of unseen ones ``[m, d]``, the head that reads them,
    `trimmed.quadratic_margins` or `trimmed.linear_margins`, and after how many of the model's blocks it does."""

    x: np.ndarray
    unseen: np.ndarray
    margins_of: Callable
    blocks: int = 0


def looks(model: nn.Module, train, unseen=None, processing_class=None, batch_size: int = 256) -> dict[str, Look]:
    """All that is looked at, by name, from one pass of the model over the rows of both sets. What is looked for is chosen by the
    training rows alone.

    ``input`` and ``block 1``, ``block 2``, ...: means over the tokens of what enters the encoder's first block, and of what each
    block of its first half gives, which a Gaussian for each class reads. ``places``: of pictures, what enters the first block in
    each of 4 x 4 places. ``tokens``: of texts, which tokens they have. Both are wide, so a linear head reads them.

    Raises:
        ValueError: the model has no list of blocks.
    """
    sets = {"Reading the training set": train} | ({"Reading the unseen rows": unseen} if unseen is not None else {})
    means, places, texts = rows_read(model, sets, processing_class, batch_size)
    if texts and any(sum(map(len, parts)) != len(texts) for parts in means.values()):
        means = {}  # its blocks do not take rows first, as XLNet's

    def components(parts: list[np.ndarray], most: int) -> tuple[np.ndarray, np.ndarray]:
        features = np.concatenate(parts)
        return projected(features[: len(train)], features[len(train) :], most)

    found = {
        name: Look(*components(parts, DIRECTIONS), quadratic_margins, blocks)
        for blocks, (name, parts) in enumerate(means.items())
    }
    if places:
        found["places"] = Look(*components(places, PLACE_DIRECTIONS), linear_margins)
    if texts and len(telling := telling_tokens(texts[: len(train)])):
        x = present(texts, telling)
        x -= x[: len(train)].mean(0)
        found["tokens"] = Look(x[: len(train)], x[len(train) :], linear_margins)
    return found


def rows_read(
    model: nn.Module, sets: dict[str, Any], processing_class, batch_size: int
) -> tuple[dict[str, list[np.ndarray]], list[np.ndarray], list[np.ndarray]]:
    """Of the rows of all sets, one after the other: means by depth, places of pictures, in batches, and tokens of texts, by row.
    Of a model of texts that has no list of blocks there are tokens alone.

    Args:
        sets: by what the progress bar says.
    """
    blocks, kind = blocks_of(model), input_kind(model)
    if not blocks and kind != "text":
        raise ValueError(f"{type(model).__name__} has no list of blocks, whose inputs discover looks at.")
    watched = dict(list(blocks.items())[: (len(blocks) + 1) // 2])
    means: dict[str, list[np.ndarray]] = {name: [] for name in ("input", *watched) if watched}
    places: list[np.ndarray] = []
    texts: list[np.ndarray] = []
    mask: Any = None
    sides = (1, 1)

    def note(batch):
        nonlocal mask, sides
        mask = batch.get("attention_mask")
        if (pixels := batch.get("pixel_values")) is not None and pixels.ndim == 4:
            sides = pixels.shape[2:]
        if kind == "text" and "input_ids" in batch:
            texts.extend(tokens_of(batch["input_ids"].cpu().numpy(), None if mask is None else mask.cpu().numpy()))
        return batch

    def keep(name, hidden):
        means[name].append(pooled(hidden, mask).cpu().numpy())

    def on_input(module, args, named):
        hidden = block_input(args, named)
        keep("input", hidden)
        if kind == "image" and hidden.ndim > 2:
            places.append(by_place(hidden, *sides).cpu().numpy())

    def on_block(name):
        return lambda module, inputs, output: keep(name, hidden_of(output))

    handles = [module.register_forward_hook(on_block(name)) for name, module in watched.items()]
    if (first := next(iter(blocks.values()), None)) is not None:
        handles.append(first.register_forward_pre_hook(on_input, with_kwargs=True))
    try:
        for title, rows in sets.items():
            predict(model, rows, processing_class, batch_size, title, note=note)
    finally:
        for handle in handles:
            handle.remove()
    return means, places, texts


@torch.no_grad()
def by_place(hidden: Tensor, high: int = 1, wide: int = 1) -> Tensor:
    """A picture's tokens ``[n, tokens, width]``, or its channels ``[n, width, h, w]``, as means over `GRID` x `GRID` places:
    ``[n, places * features]``. A projection that is drawn at random, always the same, makes `PLACE_WIDTH` features of more.
    Tokens before the picture's, such as the class token, do not count.

    Args:
        high, wide: of the picture, or in the same proportion.
    """
    hidden = hidden.float()
    if hidden.ndim == 3:
        rows = max(1, int((hidden.shape[1] * high / wide) ** 0.5 + 1e-6))
        across = max(1, min(rows * wide // high, hidden.shape[1] // rows))
        hidden = hidden[:, -rows * across :].mT.unflatten(-1, (rows, across))
    width, sides = hidden.shape[1], (min(GRID, hidden.shape[2]), min(GRID, hidden.shape[3]))
    hidden = adaptive_avg_pool2d(hidden, sides).flatten(2)
    if width > PLACE_WIDTH:
        drawn = torch.randn(PLACE_WIDTH, width, generator=torch.Generator().manual_seed(0)) / width**0.5
        hidden = drawn.to(hidden.device) @ hidden
    return hidden.flatten(1)


def tokens_of(ids: np.ndarray, mask: np.ndarray | None) -> list[np.ndarray]:
    """The tokens that each row has, once each; padding is none."""
    mask = np.ones(ids.shape, dtype=bool) if mask is None or mask.shape != ids.shape else mask.astype(bool)
    return [np.unique(row[there]) for row, there in zip(ids, mask, strict=True)]


def telling_tokens(texts: list[np.ndarray]) -> np.ndarray:
    """The most frequent tokens that are neither rare nor rarely missing.

    >>> telling_tokens([np.array([1, 5])] * 2 + [np.array([1, 6])] * 2).tolist()
    [5, 6]
    """
    tokens, counts = np.unique(np.concatenate(texts), return_counts=True)
    telling = np.flatnonzero((counts >= RARE * len(texts)) & (counts <= (1 - RARE) * len(texts)))
    return tokens[telling[np.argsort(-counts[telling], kind="stable")[:MOST_TOKENS]]]


def present(texts: list[np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """1 where a row has a token, ``[n, tokens]``."""
    x, column = np.zeros((len(texts), len(tokens))), {token: i for i, token in enumerate(tokens)}
    for row, mine in zip(x, texts, strict=True):
        row[[column[token] for token in mine if token in column]] = 1
    return x
