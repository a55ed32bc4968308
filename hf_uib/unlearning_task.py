"""What kind of labels a model gives: the one place where the loss and the margin of training are decided."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .data.checks import check_labels
from .models import num_labels_of
from .objective import margin, other_classes_kl

TASK_TYPES: list[type["UnlearningTask"]] = []


class UnlearningTask:
    """A task type: how logits and labels become the terms of the objective.

    Subclass it, decorate the class with [`register_task_type`], and `UIBTrainer` takes it for the models that it `matches`.
    """

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


def register_task_type(cls: type[UnlearningTask]) -> type[UnlearningTask]:
    """Class decorator: `UIBTrainer` asks the latest task type first."""
    TASK_TYPES.insert(0, cls)
    return cls


def task_of(model: PreTrainedModel) -> UnlearningTask:
    """The task of a model.

    Raises:
        ValueError: no task type matches it.
    """
    for kind in TASK_TYPES:
        if kind.matches(model):
            return kind()
    raise ValueError(
        f"UIBTrainer unlearns single-label classifiers; the model's problem_type is {model.config.problem_type}."
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
