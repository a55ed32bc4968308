"""What is measured on the data, before the first step and at every refresh of the prior."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import cycle, islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from .config import UIBConfig
from .contrast import CHUNKS, PROBE_ROWS, ContrastStatistics, measure_contrast
from .data.labels import IGNORED
from .data.pairing import sample_indices
from .data.sets import UnlearningSets
from .inference import SharedInference, batches_of
from .lora import AdaptedLayer, adapter_name, is_fresh
from .mean_tokens import DIFFERENT_Z, MeanTokens
from .models import blocks_of, input_kind
from .objective import margin
from .pattern_tokens import CERTAIN_Z, PatternTokens
from .short_texts import TEXTS, ShortTexts
from .unlearning_task import UnlearningTask

MARGIN_OF_Z = 0.5  # over the threshold: a pattern that is seen so clearly at one of the looks is none of chance


@dataclass
class Measurements:
    """Samples of the sets, passed through the model as it is now.

    Attributes:
        sets: forget, retained and calibration rows.
        held_out: retained rows that stand in for calibration rows.
        task: gives the margins.
        inference: passes rows through the model.
        args: seed and the kind of subspace.
        samples: rows of a set that are measured, at most.
        statistics: what was measured so far, by name: ``pattern_z``, ``token_z`` (see `PatternTokens.find`),
            ``mean_token_z`` and ``mean_token_effect_z`` (z-values, where the two do not show a pattern; see `MeanTokens`),
            ``noise_to_signal``, ``swap_fraction``, ``pattern_tokens`` (of a donor, on average), ``pattern_effect`` and, after
            training, ``pattern_effect_left`` (nats; see `pattern_effect`), ``prior_strength``, ``calibration_margin`` (nats),
            ``kept_fraction`` (of the change, after over-unlearning).
    """

    sets: UnlearningSets
    held_out: set[int]
    task: UnlearningTask
    inference: SharedInference
    args: UIBConfig
    samples: int
    statistics: dict[str, float] = field(default_factory=dict)

    def contrast(
        self, model: nn.Module, layers: dict[str, AdaptedLayer], tokens: PatternTokens | None = None
    ) -> ContrastStatistics:
        """Subspaces and scales of the adapted layers (`measure_contrast`), and under a pattern the donors of ``tokens``."""
        classifier = self.inference.accelerator.unwrap_model(model)
        if tokens is not None and self.seeks_pattern:
            self.statistics["token_z"] = self._find(tokens, classifier)
        certain = self.statistics.get("token_z", 0.0) >= CERTAIN_Z
        threshold = self.args.channel.pattern_z
        fresh = is_fresh(layers, adapter_name(classifier))  # B A = 0, and need not be computed
        with classifier.disable_adapter() if fresh else nullcontext():
            found = measure_contrast(
                model,
                layers,
                self._contrast_batches,
                partial(self.inference.forward, self.sets.forget, self.probe_rows()),
                rank=self.args.subspace_rank,
                compared=self.compared,
                margin=self.task.margin,
                random=self.args.prior_subspace == "random",
                seed=self.args.seed,
                min_relative_scale=self.args.channel.min_relative_scale,
                blocks=blocks_of(model).values() if self.args.gradient_checkpointing else (),
                looks=self._looks,
                undecided=lambda z: not certain and 0 < z < threshold + MARGIN_OF_Z,
                sum_over_processes=self.inference.sum,
            )
        self.statistics["pattern_z"] = found.pattern_z
        if tokens is not None:
            if not self.contrast_found and not certain:
                tokens.forget_donors()
            self.fill(tokens, model)
        return found

    def _find(self, tokens: PatternTokens, classifier: Any) -> float:
        """See `PatternTokens.find`. Word pieces of texts are only counted, which takes hardly any time: in more rows."""
        text = input_kind(classifier) == "text"
        forget, kept = self._rows_to_compare(self.args.contrast_samples if text else self.samples)
        rows = self._told_apart(self.sets.forget, forget), self._told_apart(self.sets.retain, kept)
        return tokens.find(classifier, *rows, forget)

    def compare_means(self, tokens: PatternTokens, model: nn.Module) -> None:
        """Mean tokens of both sets (`MeanTokens`). Rows are passed up to the first block alone, so more of them."""
        if not self.seeks_pattern:
            return
        forget, kept = self._rows_to_compare(self.args.contrast_samples)
        classifier = self.inference.accelerator.unwrap_model(model)
        mine = tokens.means(classifier, self._told_apart(self.sets.forget, forget))
        theirs = tokens.means(classifier, self._told_apart(self.sets.retain, kept))
        if mine is None or theirs is None:
            return
        means = MeanTokens(mine, theirs)
        self.statistics["mean_token_z"] = self._agreed(means.z(self.args.seed))
        if self.statistics["mean_token_z"] >= DIFFERENT_Z:
            logits, labels = self.inference.forward(self.sets.retain, kept)
            margins = self.task.margin(logits, self._of_compared_classes(labels))
            self.statistics["mean_token_effect_z"] = self._agreed(means.effect_z(margins))

    def _agreed(self, value: float) -> float:
        """The mean over the processes: to the bit the same on each, since what comes next depends on it."""
        shared = torch.tensor([value], device=self.inference.accelerator.device)
        self.inference.sum([shared])
        return shared.item() / self.inference.accelerator.num_processes

    @property
    def compared(self) -> bool:
        """Whether forget and retained rows are compared, so that ``pattern_z`` is one."""
        return self.sets.retain is not None and self.args.prior_subspace == "contrast"

    @property
    def seeks_pattern(self) -> bool:
        """Whether it is asked what tells the sets apart: of whole classes it is the label."""
        return self.compared and not self.sets.removed_classes

    @property
    def contrast_found(self) -> bool:
        """Whether the margin gradients of forget and retained rows differ by more than chance."""
        return self.statistics.get("pattern_z", -math.inf) >= self.args.channel.pattern_z

    @property
    def pattern_found(self) -> bool:
        """Whether the sets differ by more than chance: in their margin gradients, or in tokens that the checkpoint reads."""
        return self.contrast_found or self.tokens_found or self.means_found

    @property
    def tokens_found(self) -> bool:
        """Whether there are tokens of the pattern, and the checkpoint reads them."""
        return self.statistics.get("pattern_effect", -math.inf) >= self.args.channel.pattern_effect

    @property
    def means_found(self) -> bool:
        """Whether the rows' mean tokens differ, label by label, and the checkpoint goes by them."""
        differ = self.statistics.get("mean_token_z", -math.inf) >= DIFFERENT_Z
        return differ and self.statistics["mean_token_effect_z"] >= self.args.channel.pattern_z

    def fill(self, tokens: PatternTokens, model: nn.Module) -> None:
        """Read the donors' tokens."""
        rows = self._told_apart(self.sets.forget, tokens.donors.tolist())
        tokens.fill(self.inference.accelerator.unwrap_model(model), rows)

    def read_short_texts(self, texts: ShortTexts, tokens: PatternTokens, model: nn.Module, left: bool) -> None:
        """Cut short texts and ask the model about them, several of a row where there are fewer rows.

        Args:
            left: whether padding comes before a text.
        """
        retained, shared = cast(Any, self.sets.retain), self.inference
        drawn = sample_indices(len(retained), TEXTS + len(self.held_out), self.args.seed)
        kept = [row for row in drawn if row not in self.held_out][:TEXTS]
        rows = list(islice(cycle(kept), TEXTS))
        classifier = shared.accelerator.unwrap_model(model)
        padding = getattr(classifier.config.get_text_config(), "pad_token_id", None) or 0
        texts.read(self._all(retained, rows), tokens, max(padding, 0), left, self.args.seed)
        with shared.context():
            texts.ask(classifier, 8 * shared.batch_size)  # they are short
        shared.examples += len(texts)

    @torch.no_grad()
    def pattern_effect(self, tokens: PatternTokens, model: nn.Module) -> float:
        """How far the pattern's tokens move the margins of unseen rows towards the label they come with, on average, in nats.

        Calibration rows where there are any, else retained ones. What the model reads of the pattern elsewhere is not seen. Where
        tokens are labelled: the margins of those of the compared classes, for the donor's class.
        """
        dataset: Any = self.sets.retain if self.sets.calibration is None else self.sets.calibration
        rows = sample_indices(len(dataset), min(PROBE_ROWS, self.samples), self.args.seed + 3)
        generator = torch.Generator().manual_seed(self.args.seed)
        donors = torch.multinomial(tokens.weights, len(rows), replacement=True, generator=generator)
        classifier = self.inference.accelerator.unwrap_model(model)
        training, moved, counted, done = classifier.training, 0.0, 0, 0
        classifier.eval()
        for inputs in self._all(dataset, rows):
            features = {name: value for name, value in inputs.items() if name != "labels"}
            mine = donors[done : done + len(inputs["labels"])].to(tokens.positions.device)
            done += len(mine)
            plain = classifier(**features).logits
            with tokens.pasting(mine, features.get("attention_mask")):
                pasted = classifier(**features).logits
            labels = self._with_labels_of_donors(inputs["labels"], tokens.labels[mine])
            labels = self.task.without_replaced(labels, tokens.replaced)
            counted += int((labels != IGNORED).view(len(labels), -1).any(1).sum())
            moved += (self.task.margin(pasted, labels) - self.task.margin(plain, labels)).sum().item()
        classifier.train(training)
        self.inference.examples += 2 * len(rows)
        return moved / max(counted, 1)

    def _with_labels_of_donors(self, labels: Tensor, donors: Tensor) -> Tensor:
        """Labels of rows as those of their donors: where tokens are labelled, each of a compared class gets the first of these."""
        if not self.sets.compared_classes:
            return donors
        classes = torch.tensor(self.sets.compared_classes, device=labels.device)
        wanted = classes[donors.int().argmax(1)]
        return torch.where(torch.isin(labels, classes), wanted[:, None], IGNORED)

    def _all(self, dataset, rows: list[int]) -> Iterator[dict[str, Tensor]]:
        """Batches of the rows; every process reads all."""
        shared = self.inference
        return batches_of(dataset, rows, shared.collator, shared.move, batch_size=shared.batch_size, quiet=True)

    def _told_apart(self, dataset, rows: list[int]) -> Iterator[dict[str, Tensor]]:
        """As `_all`, with labels of rows: where tokens are labelled, which compared classes a row's have, ``[n, classes]``."""
        for inputs in self._all(dataset, rows):
            if self.sets.compared_classes:
                has = [(inputs["labels"] == one).any(1) for one in self.sets.compared_classes]
                inputs["labels"] = torch.stack(has, 1)
            yield inputs

    @cached_property
    def _looks(self) -> int:
        """How many looks the sets have rows for, if `pattern_z` leaves open whether there is a pattern."""
        if not self.seeks_pattern:
            return 1
        rows = min(len(self.sets.forget), len(self.sets.comparable))
        return max(1, min(self.args.contrast_samples, rows - 1) // self.samples)

    @cached_property
    def _compared_rows(self) -> tuple[list[int], list[int]]:
        """Numbers of the forget and of the retained rows whose margin gradients are compared, look after look."""
        return self._rows_to_compare(self._looks * self.samples)

    def _rows_to_compare(self, most: int) -> tuple[list[int], list[int]]:
        sample = lambda rows: sample_indices(len(rows), most, self.args.seed)
        kept = sample(self.sets.comparable) if self.compared else []
        return sample(self.sets.forget), self.sets.comparable[kept].tolist()

    def _contrast_batches(self, chunk: int) -> Iterator[tuple[dict[str, Tensor], float]]:
        look, within = divmod(chunk, CHUNKS)
        for dataset, all_rows, sign in zip(
            (self.sets.forget, self.sets.retain), self._compared_rows, (1.0, -1.0), strict=True
        ):
            rows = all_rows[look * self.samples : (look + 1) * self.samples]
            if rows:
                for inputs in self.inference.batches(dataset, rows[within::CHUNKS], "Contrast"):
                    yield inputs | {"labels": self._of_compared_classes(inputs["labels"])}, sign / len(rows)

    def _of_compared_classes(self, labels: Tensor) -> Tensor:
        """Where tokens are labelled, the labels of those of other classes than `UnlearningSets.compared_classes` are left out."""
        if not self.sets.compared_classes:
            return labels
        classes = torch.tensor(self.sets.compared_classes, device=labels.device)
        return torch.where(torch.isin(labels, classes), labels, IGNORED)

    def _sample(self, dataset, offset: int = 0) -> list[int]:
        return sample_indices(len(dataset), self.samples, self.args.seed + offset)

    def probe_rows(self) -> list[int]:
        """A smaller sample of the forget set."""
        return sample_indices(len(self.sets.forget), min(PROBE_ROWS, self.samples), self.args.seed + 1)

    def batches(self, dataset) -> Iterator[dict[str, Tensor]]:
        """This process's part of a sample of a set, inputs with ``labels``."""
        return self.inference.batches(dataset, self._sample(dataset))

    def forget_margins(self) -> Tensor:
        """Margins of a sample of the forget set, ``[n]`` in nats."""
        return self.task.margin(*self.inference.forward(self.sets.forget, self._sample(self.sets.forget, 2)))

    def calibration_margins(self) -> Tensor | None:
        """Margins of rows that the checkpoint never saw, ``[n]`` in nats; None where there are none.

        Where whole classes go, no unseen row of theirs tells a level; what the other rows get of them does.
        """
        if self.sets.calibration is not None:
            dataset, rows = self.sets.calibration, self._sample(self.sets.calibration)
        elif self.held_out:
            dataset, rows = self.sets.retain, sorted(self.held_out)[: self.samples]
        else:
            return None
        logits, labels = self.inference.forward(dataset, rows)
        if self.sets.removed_classes:
            removed = torch.tensor(self.sets.removed_classes, device=labels.device)
            logits = logits[~torch.isin(labels, removed) & (labels != IGNORED)]  # of rows, or of tokens
            margins = torch.cat([margin(logits, label.expand(len(logits))) for label in removed])
        else:
            compared = self._of_compared_classes(labels)
            margins = self.task.margin(logits, compared)
            if self.sets.compared_classes:  # rows without such a token say nothing
                there = (compared != IGNORED).any(1)
                margins = margins[there] if there.any() else self.task.margin(logits, labels)
        self.statistics["calibration_margin"] = margins.mean().item()
        return margins
