"""What a prior is, and the names that `UIBConfig(prior=...)` knows."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from ..unlearning_task import SingleLabel, UnlearningTask

if TYPE_CHECKING:
    from ..config import UIBConfig

PRIORS: dict[str, type["Prior"]] = {}
P = TypeVar("P", bound="type[Prior]")


def register_prior(name: str) -> Callable[[P], P]:
    """Class decorator: ``UIBConfig(prior=name)`` then takes the prior."""

    def decorator(cls: P) -> P:
        if not (isinstance(cls, type) and issubclass(cls, Prior)):
            raise ValueError(f"register_prior('{name}') takes a subclass of hf_uib.Prior, not {cls!r}.")
        if name in PRIORS and PRIORS[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"There is a prior '{name}' already: {PRIORS[name].__name__}; choose another name.")
        PRIORS[name] = cls
        return cls

    return decorator


def prior_class(name: str) -> type["Prior"]:
    """The prior of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRIORS:
        raise ValueError(f"prior is {name!r}; choose one of {', '.join(PRIORS)}, or register it with register_prior.")
    return PRIORS[name]


@dataclass(frozen=True)
class PriorContext:
    """What a prior may look at.

    Attributes:
        model: with its adapter; the trainable weights are the adapter's.
        forget, retain: give batches of a sample of each set when called, inputs with ``labels``; with several processes this
            process's share. ``retain`` is None without retained data.
        sizes: examples in the forget and in the retained set.
        reduce: sums tensors over the processes, in place.
        task: gives margins and losses of logits.
        strength: gamma.
        pattern_detected: whether the forget set carries a pattern, whose channel noise or swapped tokens then close.
        calibration_seen_in_training: whether the calibration rows are a fold of the retained data, which the checkpoint has fitted.
        one_label: whether all forget rows have one label. Unlearning what goes with it then makes them wrong, whatever it was.
    """

    model: nn.Module
    forget: Callable[[], Iterable[dict[str, Tensor]]]
    retain: Callable[[], Iterable[dict[str, Tensor]]] | None
    sizes: tuple[int, int]
    reduce: Callable[[list[Tensor]], None]
    task: UnlearningTask = SingleLabel()
    strength: float = 1.0
    pattern_detected: bool = False
    calibration_seen_in_training: bool = False
    one_label: bool = False

    def retained_batches(self) -> Iterable[dict[str, Tensor]]:
        """``retain()``.

        Raises:
            ValueError: there is no retained data.
        """
        if self.retain is None:
            raise ValueError("This prior needs retained data; give a retain_dataset.")
        return self.retain()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's trainable weights by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


class Prior:
    r"""A factor ``exp(-gamma * forget_loss)`` that multiplies the Gaussian ``N(theta; mu_{k-1}, Sigma)`` of the bound.

    A prior of your own needs one method, [`forget_loss`]. Pass it as ``UIBTrainer(..., prior=MyPrior())``, or give it a name with
    [`register_prior`]. Autograd turns it into the natural-parameter shift of every layer: to first order the prior's mean moves by
    ``-gamma * Lambda_l^-1 * d forget_loss / d theta_l``. docs/extending.md writes one.
    """

    needs_forget_batches = True
    """Whether the trainer has to add forget examples to the batches."""

    needs_calibration_margins = False
    """Whether `refresh` needs margins of unseen rows. Without a ``calibration_dataset`` some retained rows are then held out."""

    needs_retained_data = False
    """Whether the prior forgets through the retained data alone."""

    # Set by `attach`
    task: UnlearningTask = SingleLabel()
    strength = 1.0
    pattern_detected = False
    calibration_seen_in_training = False

    keep_forget_batches = False
    """Whether forget batches come to the last step, whatever ``prior_fraction`` says. Read as training goes; a prior that finds
    out by itself has to know by its third `refresh`."""

    watches = False
    """Whether `refresh` is called although no forget batches come."""

    masks: Mapping[str, Tensor] = MappingProxyType({})
    """By name of a trainable weight: which of its entries may move (with ``weight_decay`` 0, the default). Weights without a mask
    move freely. A prior that sets them does so in `prepare`."""

    @classmethod
    def from_config(cls, args: "UIBConfig") -> "Prior":
        """The prior that a name stands for."""
        return cls()

    def identity(self) -> dict[str, str]:
        """What a resumed run has to share, as text: the plain attributes that the prior was made with."""
        plain = (bool, int, float, str, type(None))
        found = {name: value for name, value in vars(self).items() if isinstance(value, plain) or is_dataclass(value)}
        return {f"prior.{name}": str(value) for name, value in sorted(found.items()) if not name.startswith("_")}

    def default_strength(self, noised: bool) -> float:
        """gamma where ``prior_strength`` is not set: with the channel closed by noise, or without."""
        return 0.1 if noised else 0.3

    def attach(self, context: PriorContext) -> None:
        """Called at the start of every run, before `prepare` or `load_state_dict`: nothing of an earlier run stays."""
        self.task, self.strength = context.task, context.strength
        self.pattern_detected = context.pattern_detected
        self.calibration_seen_in_training = context.calibration_seen_in_training
        self.keep_forget_batches = type(self).keep_forget_batches
        self.masks = {}

    def prepare(self, context: PriorContext) -> None:
        """Called at the start of a fresh run, before the first step and in eval mode. May set `masks` and move the adapter: the
        prior's first mean is where it then stands. A prior that keeps state starts it here."""

    def forget_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is to be forgotten, on a batch of the forget set.

        Args:
            logits: of the model being trained, ``[n, classes]``; of labelled tokens ``[n, length, classes]``.
            labels: as they stand in the forget set, ``[n]``, ``[n, labels]`` or ``[n, length]`` (-100: none); ``task.margin``
                reads all.

        Returns:
            Scalar, mean over the batch, in nats per forget example. Zero means: nothing left to forget.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no method forget_loss(logits, labels); a prior needs it."
        )

    def refresh(self, forget_margins: Callable[[], Tensor], calibration_margins: Callable[[], Tensor | None]) -> None:
        """Called before the first step and every ``prior_update_steps`` while forget batches come, under the running mean.

        Both arguments measure margins, ``[n]`` in nats, when called: of a sample of the forget set, and of unseen rows (None where
        there are none). A prior that does not need them does nothing here.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs; `masks` are kept by the trainer."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""


def single_label_only(prior: Prior, context: PriorContext) -> None:
    """For priors whose formulas are those of one class per example.

    Raises:
        ValueError: the task is another.
    """
    if not isinstance(context.task, SingleLabel):
        raise ValueError(
            f"{type(prior).__name__} is for single-label classifiers; for {type(context.task).__name__} take calibrated or none."
        )


def build_prior(prior: Prior | None, args: "UIBConfig", retained: bool) -> Prior:
    """The prior of a run: the user's own, or the one that ``args.prior`` names.

    Args:
        retained: whether there is retained data.

    Raises:
        ValueError: the prior needs retained data, or a setting that it does not take was given.
    """
    if prior is None:
        prior = prior_class(args.prior).from_config(args)
    elif not isinstance(prior, Prior):
        raise ValueError(
            f"prior is {prior!r}; give an object of a subclass of hf_uib.Prior, or a name as UIBConfig(prior=...)."
        )
    elif args.forget_target is not None:
        raise ValueError(
            "forget_target is read by the named priors; give it to your prior object, and leave it out of UIBConfig."
        )
    if not retained:
        if prior.needs_retained_data:
            raise ValueError(
                f"prior {type(prior).__name__} forgets through the retained data alone; give a retain_dataset, or take another "
                "prior."
            )
        warnings.warn(
            "No retain_dataset: what the model knows is kept only through its own predictions on the forget set, and the "
            "level to forget to is a guess unless calibration_dataset or forget_target is given. Expect to lose accuracy.",
            stacklevel=3,
        )
    return prior
