"""What was found: the two sets, how sure, what the rows of each have in common."""

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..checkpointing import atomic_directory, write_json
from ..data.fingerprints import ordered_fingerprint, row_hashes
from ..data.labels import model_names, transform_of
from ..data.transforms import PictureInput, TextInput
from ..serialization import MARK
from .trimmed import distance_ratio
from .words import telling_words

ROWS = "rows.parquet"
SURE = 0.05  # largest p-value
FULL_MEMBERS = 0.85  # smallest ratio of distances: 1 is that of rows which look just like those of another class
FEWEST_SHARE = 0.01  # of the rows that contradict: fewer cannot be told from wrong labels
SHOWN_CLASSES, SHOWN_PICTURES = 10, 6


class Depth(NamedTuple):
    """What a simple head finds at a depth of the model, or in other features.

    Attributes:
        name: one of those of `looks.looks`.
        ratio: `trimmed.distance_ratio`; None where the head misreads more than a third of the rows, or half of a class.
        misread: share of the rows.
    """

    name: str
    ratio: float | None
    misread: float | None


def teaching_counts(looks: np.ndarray, sizes: np.ndarray) -> list[int]:
    """How many rows of each class that teach the shortcut are to be retained beside those that contradict it, so that label and
    look are as independent as they can be: the diagonal of the table of rank one that fits the others (quasi-independence,
    Goodman, 1968). A class that no row contradicts gets what its share of the training set is of all that are retained.

    Args:
        looks: ``[classes, classes]``, rows that contradict, by label and by the class they look like; nothing on the diagonal.
        sizes: ``[classes]``, rows of the training set.
    """
    rows, columns, elsewhere = np.ones(len(looks)), np.ones(len(looks)), 1 - np.eye(len(looks))
    for _ in range(200):  # iterative proportional fitting
        rows = looks.sum(1) / np.maximum(elsewhere @ columns, 1e-12)
        columns = looks.sum(0) / np.maximum(rows @ elsewhere, 1e-12)
    counts = rows * columns
    without = looks.sum(1) == 0
    share = sizes[without].sum() / sizes.sum()
    counts[without] = sizes[without] / sizes.sum() * (looks.sum() + counts.sum()) / max(1 - share, 1e-12)
    return [int(count + 0.5) for count in counts]


@dataclass
class Discovery:
    """Rows that teach a shortcut, and rows that contradict it.

    Attributes:
        train: as it was given; encoded: as the model takes it; config: of the model.
        labels: ``[n]``.
        scores: ``[n]``, how much a row teaches the shortcut, in nats: by how much more likely its features are in its own class
            than in the next one. Below 0 the row contradicts it. 0 in classes of few rows that the head cannot tell.
        looks_like: ``[n]``, the most likely other class.
        p_value: that a random mask with as many rows of each class is as much of a pattern (`trimmed.mask_p_value`).
        depth: where it was found; None where the head misreads too many rows everywhere.
        depths: all that were looked at.
        unseen_looks: ``[m]``, the class that each unseen row looks like; None where none are given, or no depth serves.
        seed: of what is drawn.
    """

    train: datasets.Dataset = field(repr=False)
    encoded: datasets.Dataset = field(repr=False)
    config: Any = field(repr=False)
    labels: np.ndarray = field(repr=False)
    scores: np.ndarray = field(repr=False)
    looks_like: np.ndarray = field(repr=False)
    p_value: float
    depth: str | None
    depths: list[Depth]
    unseen_looks: np.ndarray | None = field(default=None, repr=False)
    seed: int = 0

    @property
    def contradicts(self) -> np.ndarray:
        """``[n]`` booleans: the rows that the simple head misreads, whether or not that is enough to be found."""
        return self.scores < 0

    @property
    def looks(self) -> np.ndarray:
        """``[n]``, the class that each row looks like by the shortcut: its own where it teaches it."""
        return np.where(self.contradicts, self.looks_like, self.labels)

    @property
    def ratio(self) -> float:
        """`trimmed.distance_ratio`, at `depth`."""
        return 0.0 if self.depth is None else distance_ratio(self.scores)

    @property
    def found(self) -> bool:
        """Whether the rows that contradict are no random ones, are full members of another class by what the head reads, and are
        more than a hundredth of all; and whether there is a row to forget."""
        enough = self.contradicts.mean() >= FEWEST_SHARE
        telling = self.p_value <= SURE and self.ratio >= FULL_MEMBERS and enough
        return bool(telling and not self._drawn.all())

    @property
    def retained(self) -> np.ndarray:
        """``[n]`` booleans: the rows that contradict, and some of those that teach; none where none was found. The former alone
        would teach the opposite, with two classes without an exception: of each class they show every look but its own. How many
        of a class are added says `teaching_counts`; they are drawn at random. Rows of the same content stay together."""
        return self._drawn & self.found

    @cached_property
    def _drawn(self) -> np.ndarray:
        """`retained`, whether or not there is enough to be found."""
        rng = np.random.default_rng(self.seed)
        chosen, content = self.contradicts.copy(), row_hashes(self.train)
        _, first, copy_of = np.unique(content, axis=0, return_index=True, return_inverse=True)
        copy_of = copy_of.reshape(-1)  # numpy 2.0 gives a column
        distinct = np.zeros(len(chosen), dtype=bool)
        distinct[first] = True
        chosen = np.isin(copy_of, copy_of[chosen])
        classes, codes = np.unique(self.labels, return_inverse=True)
        looks = np.zeros((len(classes), len(classes)))
        against = chosen & distinct
        np.add.at(looks, (codes[against], np.searchsorted(classes, self.looks_like[against])), 1)
        for code, count in enumerate(teaching_counts(looks, np.bincount(codes))):
            chosen[rng.permutation(np.flatnonzero((codes == code) & distinct & ~chosen))[:count]] = True
        return np.isin(copy_of, copy_of[chosen])

    @property
    def forget(self) -> datasets.Dataset:
        """The rows that are not `retained`, all of which teach the shortcut; none where none was found."""
        return self.train.select(np.flatnonzero(self.found & ~self.retained))

    @property
    def retain(self) -> datasets.Dataset:
        """The rows that are `retained`; none where none was found."""
        return self.train.select(np.flatnonzero(self.retained))

    def name(self, label: int) -> str:
        """Of a class."""
        return model_names(self.config).get(int(label), str(label))

    # ---- What the rows have in common ----

    def texts(self) -> list[str] | None:
        """The texts of the rows, pairs as one; None where they are none."""
        given = self._input()
        if not isinstance(given, TextInput):
            return None
        parts = self.train.with_format(None).select_columns(list(given.columns))[:]
        return [" ".join(words) for words in zip(*parts.values(), strict=True)]

    def words(self, count: int = 10) -> dict[str, dict[str, list[tuple[str, float]]]]:
        """Words and z-values by class: ``teach``, by which rows that teach differ from all rows of other classes, and
        ``contradict``, by which rows that contradict differ from the other rows of the class. Empty where there are no texts."""
        texts = self.texts()
        if texts is None:
            return {}
        of = lambda rows: [texts[i] for i in np.flatnonzero(rows)]
        found = {}
        for label in np.unique(self.labels):
            mine = self.labels == label
            teach, against = mine & ~self.contradicts, mine & self.contradicts
            found[self.name(label)] = {
                "teach": telling_words(of(teach), of(~mine), count),
                "contradict": telling_words(of(against), of(teach), count),
            }
        return found

    def _input(self) -> Any:
        return getattr(transform_of(self.encoded), "make_input", None)

    # ---- Showing and saving ----

    @property
    def verdict(self) -> str:
        """One sentence."""
        against = int(self.contradicts.sum())
        if self.depth is None:
            return (
                "None found: a simple head misreads more than a third of the rows, or half of a class, at every depth."
            )
        facts = f"p = {self.p_value:.3f}; distance ratio {self.ratio:.2f}, at {self.depth}"
        if self.found:
            return f"Found: {against} of {len(self.labels)} rows contradict what the others teach ({facts})."
        if self.contradicts.mean() < FEWEST_SHARE:
            return f"None found: {against} of {len(self.labels)} rows stand out, too few to be told from wrong labels."
        if self.p_value > SURE:
            return (
                f"None found: the {against} rows that stand out are no more of a pattern than random rows ({facts})."
            )
        if self.ratio >= FULL_MEMBERS:
            return f"None found: {against} rows contradict, but the others are copies of rows that are retained ({facts})."
        return f"None found: the {against} rows that stand out look hard, not like full members of another class ({facts})."

    def __str__(self) -> str:
        classes = np.unique(self.labels)
        order = sorted(classes, key=lambda label: -int((self.contradicts & (self.labels == label)).sum()))
        width = max(5, *(len(self.name(label)) for label in classes))
        proposed = [f"{len(self.forget)} rows to forget, {len(self.retain)} to retain."] if self.found else []
        rare = [self.name(label) for label in classes if self.depth and not self.scores[self.labels == label].any()]
        if rare:
            proposed.append(
                f"Not looked at, since their few rows have nothing in common that tells them: {', '.join(rare)}."
            )
        lines = [self.verdict, *proposed, "", f"{'class':{width}}  teach  contradict  and look like"]
        for label in order:
            mine = self.labels == label
            against = mine & self.contradicts
            others, counts = np.unique(self.looks_like[against], return_counts=True)
            most = ", ".join(self.name(others[i]) for i in np.argsort(-counts, kind="stable")[:3])
            lines.append(
                f"{self.name(label):{width}}  {(mine & ~against).sum():5}  {against.sum():10}  {most}".rstrip()
            )
        for name, sides in self.words().items():
            for side, words in sides.items():
                if words:
                    lines.append(f"{name}, rows that {side}: {', '.join(word for word, _ in words)}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> None:
        """Contact sheet of both sides: pictures, words, or else the scores. It shows rows of the training set: keep it local."""
        from matplotlib.figure import Figure  # without pyplot, whose backend is the user's

        given = self._input()
        counts = {label: int((self.contradicts & (self.labels == label)).sum()) for label in np.unique(self.labels)}
        classes = sorted(counts, key=lambda label: -counts[label])[:SHOWN_CLASSES]
        if isinstance(given, PictureInput):
            figure = Figure(figsize=(9, 0.9 * len(classes) + 0.6), layout="constrained")
            self._draw_pictures(figure, classes, given.column)
        elif isinstance(given, TextInput):
            figure = Figure(figsize=(9, 2.4 * len(classes) + 0.4), layout="constrained")
            self._draw_words(figure, classes)
        else:
            figure = Figure(figsize=(6, 3), layout="constrained")
            axis = figure.subplots()
            axis.hist(np.clip(self.scores, *np.quantile(self.scores, (0.01, 0.99))), bins=60)
            axis.set_xlabel("how much a row teaches the shortcut (nats)")
        figure.savefig(path, dpi=130)

    def _draw_pictures(self, figure: Any, classes: list, column: str) -> None:
        axes = figure.subplots(len(classes), 2 * SHOWN_PICTURES + 1, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        axes[0, 0].set_title("teach", fontsize=9, loc="left")
        axes[0, SHOWN_PICTURES + 1].set_title("contradict", fontsize=9, loc="left")
        raw = self.encoded.with_format(None)  # where a column of paths holds pictures
        for line, label in zip(axes, classes, strict=True):
            mine = np.flatnonzero(self.labels == label)
            order = mine[np.argsort(-self.scores[mine], kind="stable")]
            teach = order[~self.contradicts[order]]
            middle = max(0, (len(teach) - SHOWN_PICTURES) // 2)  # rows as they usually are
            against = order[self.contradicts[order]][::-1][:SHOWN_PICTURES]
            chosen = [*zip(line, teach[middle : middle + SHOWN_PICTURES])]
            chosen += [*zip(line[SHOWN_PICTURES + 1 :], against)]
            line[SHOWN_PICTURES].text(
                0.5, 0.5, self.name(label), fontsize=8, ha="center", va="center", parse_math=False
            )
            for axis, row in chosen:
                picture = raw[int(row)][column]
                axis.imshow(picture[0] if isinstance(picture, list) else picture, interpolation="nearest", cmap="gray")

    def _draw_words(self, figure: Any, classes: list) -> None:
        axes, words = figure.subplots(len(classes), 2, squeeze=False), self.words()
        for line, label in zip(axes, classes, strict=True):
            for axis, (side, found) in zip(line, words[self.name(label)].items(), strict=True):
                axis.barh([word for word, _ in found], [z for _, z in found])
                axis.invert_yaxis()
                axis.tick_params(labelsize=7)
                axis.set_title(f"{self.name(label)}, rows that {side} (z)", fontsize=8, parse_math=False)

    def save(
        self, folder: str | os.PathLike, split: datasets.Dataset | None = None, rows: np.ndarray | None = None
    ) -> None:
        """Write ``rows.parquet`` (row, score, set: ``forget``, ``retain`` or, where none was found, empty), ``discovery.json`` and
        ``found.png``. They tell of training rows: nothing of hf_uib uploads them.

        Args:
            split: what the file's row numbers belong to; by default the training set.
            rows: ``[n]``, the numbers there of the rows that were looked at; by default all.
        """
        folder = os.fspath(folder)
        split = self.train if split is None else split
        rows = np.arange(len(split)) if rows is None else rows
        sets = np.where(self.retained, "retain", "forget") if self.found else np.full(len(self.labels), "")
        table = pa.table({"row": rows, "score": self.scores, "set": sets.tolist()})
        origin = json.dumps({"fingerprint": ordered_fingerprint(split), "rows": len(split)})
        content = {
            MARK: "discovery",
            "found": self.found,
            "verdict": self.verdict,
            "p_value": self.p_value,
            "ratio": self.ratio,
            "depth": self.depth,
            "depths": [depth._asdict() for depth in self.depths],
            "forget_rows": len(self.forget),
            "retain_rows": len(self.retain),
            "words": self.words(),
        }
        with atomic_directory(folder) as unfinished:
            pq.write_table(table.replace_schema_metadata({MARK: origin}), os.path.join(unfinished, ROWS))
            write_json(content, os.path.join(unfinished, "discovery.json"))
            self.plot(os.path.join(unfinished, "found.png"))
