"""What kind of labels a model gives: the one place where the loss and the margin of training are decided."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from .data.checks import check_label_vectors, check_labels, check_token_labels
from .data.labels import IGNORED, several_labels
from .models import labels_tokens, num_labels_of
from .objective import margin, other_classes_kl

TASK_TYPES: list[type["UnlearningTask"]] = []
# Endings of the names of models that are no classifiers
NO_CLASSIFIERS = {
    "ForQuestionAnswering": "answers questions",
    "ForMaskedLM": "predicts tokens",
    "LMHeadModel": "generates; for those see OpenUnlearning",
    "ForCausalLM": "generates; for those see OpenUnlearning",
    "ForConditionalGeneration": "generates; for those see OpenUnlearning",
}


class UnlearningTask:
    """A task type: how logits and labels become the terms of the objective.

    Subclass it, decorate the class with [`register_task_type`], and `UIBTrainer` takes it for the models that it `matches`.

    Attributes:
        noise_share: how much of `ChannelSettings.noise_to_signal` is drawn where there is a pattern.
    """

    noise_share: float = 1.0

    @classmethod
    def matches(cls, model: PreTrainedModel) -> bool:
        """Whether this is the task of a model."""
        raise NotImplementedError

    def check_labels(self, name: str, dataset, model: PreTrainedModel) -> np.ndarray:
        """All labels of a set, ``[n, ...]``; ``name`` is what a message calls the set.

        Raises:
            ValueError: the model has no such label.
        """
        raise NotImplementedError

    def fit_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Fit term of the objective on retained rows: scalar, mean over the batch, in nats."""
        raise NotImplementedError

    def fit_without_retained_data(self, logits: Tensor, reference_logits: Tensor, labels: Tensor) -> Tensor:
        """Fit term on forget rows alone, against the checkpoint's own logits: scalar, in nats."""
        raise NotImplementedError

    def margin(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Log-odds of the given label, ``[n]`` in nats."""
        raise NotImplementedError

    def divergence(self, logits: Tensor, reference_logits: Tensor) -> Tensor:
        """KL(reference || model) of each row's labels, ``[n]`` in nats; left out where a row has no label of its own."""
        raise NotImplementedError

    @property
    def compares_rows(self) -> bool:
        """Whether there is a `divergence`."""
        return type(self).divergence is not UnlearningTask.divergence

    def guess_nats(self, num_labels: int) -> float:
        """The fit term of a model that gives every class the same probability, in nats."""
        return math.log(num_labels)

    def labels_given(self, labels: Tensor, retained: bool = True) -> Tensor:
        """How many labels of a batch the fit term is the mean of: a step's mean is over all of its labels, however its rows are
        split. Here one a row.

        Args:
            labels: of the batch.
            retained: the fit term is `fit_loss`, else `fit_without_retained_data`.
        """
        return torch.tensor(len(labels), device=labels.device)

    def without_replaced(self, labels: Tensor, replaced: Tensor | None) -> Tensor:
        """What the labels of a batch still say where the ``replaced [n, tokens]`` are another row's tokens: as much as before."""
        return labels


def register_task_type(cls: type[UnlearningTask]) -> type[UnlearningTask]:
    """Class decorator: `UIBTrainer` asks the latest task type first."""
    TASK_TYPES.insert(0, cls)
    return cls


def task_of(model: PreTrainedModel) -> UnlearningTask:
    """The task of a model.

    Raises:
        ValueError: it is no classifier, or no task type matches it.
    """
    base = type(model.get_base_model() if isinstance(model, PeftModel) else model)
    name = base.__name__
    for ending, what in NO_CLASSIFIERS.items():
        if name.endswith(ending):
            raise ValueError(f"UIBTrainer unlearns classifiers; {name} {what}.")
    if base.__module__.startswith("transformers.") and "Classification" not in name:
        raise ValueError(
            f"UIBTrainer unlearns classifiers; {name} has no head that gives classes. Give the model that was fine-tuned with one "
            "(a class of your own, where Transformers has none)."
        )
    for kind in TASK_TYPES:
        if kind.matches(model):
            return kind()
    raise ValueError(
        f"UIBTrainer unlearns classifiers of rows or of tokens; the model's problem_type is {model.config.problem_type}."
    )


@register_task_type
class SingleLabel(UnlearningTask):
    """One class per example: logits ``[n, classes]``, labels ``[n]`` class ids."""

    @classmethod
    def matches(cls, model: PreTrainedModel) -> bool:
        """`problem_type` is single-label classification, or not set."""
        return getattr(model.config, "problem_type", None) in (None, "single_label_classification")

    def check_labels(self, name: str, dataset, model: PreTrainedModel) -> np.ndarray:
        """Class ids, ``[n]``."""
        return check_labels(name, dataset, num_labels_of(model))

    def fit_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(logits, labels)

    def fit_without_retained_data(self, logits: Tensor, reference_logits: Tensor, labels: Tensor) -> Tensor:
        """Divergence from the checkpoint's predictions over the classes other than the label."""
        return other_classes_kl(logits, reference_logits, labels)

    def margin(self, logits: Tensor, labels: Tensor) -> Tensor:
        """``log p(y|x) - log(1 - p(y|x))``."""
        return margin(logits, labels)

    def divergence(self, logits: Tensor, reference_logits: Tensor) -> Tensor:
        """Over the classes."""
        given, wanted = logits.log_softmax(-1), reference_logits.log_softmax(-1)
        return F.kl_div(given, wanted, log_target=True, reduction="none").sum(-1)


@register_task_type
class MultiLabel(UnlearningTask):
    """Several labels per example: logits ``[n, labels]``, labels ``[n, labels]`` of 0 and 1; -1 or NaN: not given."""

    @classmethod
    def matches(cls, model: PreTrainedModel) -> bool:
        """`problem_type` is multi-label classification."""
        return several_labels(model.config)

    def check_labels(self, name: str, dataset, model: PreTrainedModel) -> np.ndarray:
        """Label vectors, ``[n, labels]``; -1 where a label is not given."""
        return check_label_vectors(name, dataset, num_labels_of(model))

    def guess_nats(self, num_labels: int) -> float:
        """Of each label."""
        return math.log(2)

    def fit_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy, mean over the labels that are given."""
        given = is_given(labels).to(logits.dtype)
        nats = F.binary_cross_entropy_with_logits(logits, given_or_zero(labels), weight=given)
        return nats * (given.numel() / given.sum().clamp_min(1))

    def fit_without_retained_data(self, logits: Tensor, reference_logits: Tensor, labels: Tensor) -> Tensor:
        """Divergence from the checkpoint's predictions on the labels that a row does not have."""
        others = is_other(labels).to(logits.dtype)
        return (binary_kl(logits, reference_logits) * others).sum() / others.sum().clamp_min(1)

    def margin(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over the given labels of their log-odds, ``[n]``."""
        signs = (2 * given_or_zero(labels).to(logits.dtype) - 1) * is_given(labels)
        return (signs * logits).sum(-1)

    def divergence(self, logits: Tensor, reference_logits: Tensor) -> Tensor:
        """Mean over the labels."""
        return binary_kl(logits, reference_logits).mean(-1)

    def labels_given(self, labels: Tensor, retained: bool = True) -> Tensor:
        """Labels that are given; those that a row does not have, without retained data."""
        return (is_given(labels) if retained else is_other(labels)).sum()


@register_task_type
class TokenLabels(UnlearningTask):
    """One class per token: logits ``[n, length, classes]``, labels ``[n, length]`` class ids; -100: the token has no label.

    The labelled tokens of a forget row are what is to be forgotten in it, so a row may be in the forget set with some of its words
    labelled and in the retained set with others. Half as much noise as elsewhere keeps more.
    """

    noise_share = 0.5

    @classmethod
    def matches(cls, model: PreTrainedModel) -> bool:
        """The model's class is one of Transformers' for token classification."""
        return labels_tokens(model)

    def check_labels(self, name: str, dataset, model: PreTrainedModel) -> np.ndarray:
        """Which classes the tokens of each row have, ``[n, classes]`` booleans."""
        return check_token_labels(name, dataset, num_labels_of(model))

    def fit_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, mean over the labelled tokens of the batch."""
        nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return nats / (labels != IGNORED).sum().clamp_min(1)

    def fit_without_retained_data(self, logits: Tensor, reference_logits: Tensor, labels: Tensor) -> Tensor:
        """Divergence from the checkpoint's predictions over the classes other than the token's label."""
        given = labels != IGNORED
        return other_classes_kl(logits[given], reference_logits[given], labels[given])

    def margin(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over a row's labelled tokens of ``log p(y|x) - log(1 - p(y|x))``, ``[n]``; 0 for a row without any."""
        given = labels != IGNORED
        return (margin(logits, labels.clamp_min(0)) * given).sum(1) / given.sum(1).clamp_min(1)

    def labels_given(self, labels: Tensor, retained: bool = True) -> Tensor:
        """Labelled tokens."""
        return (labels != IGNORED).sum()

    def without_replaced(self, labels: Tensor, replaced: Tensor | None) -> Tensor:
        """A token that is another row's has no label."""
        return labels if replaced is None or replaced.shape != labels.shape else labels.masked_fill(replaced, IGNORED)


def binary_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(reference || model) of each label that is there or not, in nats."""
    p = reference_logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(reference_logits, p, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, p, reduction="none") - entropy


def is_given(labels: Tensor) -> Tensor:
    """Which labels of a row are 0 or 1, and neither -1 nor NaN."""
    return labels >= 0


def is_other(labels: Tensor) -> Tensor:
    """Which labels a row does not have: 0, or not given."""
    return given_or_zero(labels) < 0.5


def given_or_zero(labels: Tensor) -> Tensor:
    """Labels as floats, 0 where none is given."""
    return torch.where(is_given(labels), labels, torch.zeros_like(labels)).float()
