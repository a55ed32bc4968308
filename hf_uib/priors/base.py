"""What a prior is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class PriorContext:
    """What a prior may look at before the first step.

    Attributes:
        model: with its adapter; the trainable weights are the adapter's.
        forget, retain: give batches of a sample of each set when called, inputs with ``labels``; with several processes this
            process's share. ``retain`` is None without retained data.
        sizes: examples in the forget and in the retained set.
        reduce: sums tensors over the processes, in place.
    """

    model: nn.Module
    forget: Callable[[], Iterable[dict[str, Tensor]]]
    retain: Callable[[], Iterable[dict[str, Tensor]]] | None
    sizes: tuple[int, int]
    reduce: Callable[[list[Tensor]], None]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's trainable weights by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


class Prior:
    r"""A factor ``exp(-gamma * evidence)`` that multiplies the Gaussian ``N(theta; mu_{k-1}, Sigma)`` of the bound.

    A prior of your own needs one method, [`evidence`], and is passed as ``UIBTrainer(..., prior=MyPrior())``. Autograd
    turns it into the natural-parameter shift of every layer: to first order the prior's mean moves by
    ``-gamma * Lambda_l^-1 * d evidence / d theta_l``. `examples/custom_prior.py` writes one.
    """

    uses_forget_batches = True
    """Whether the trainer has to add forget examples to the batches."""

    strengths = (0.1, 0.3)
    """gamma where ``prior_strength`` is not set: with the channel closed by noise, and without."""

    pattern_detected = False
    """Set by the trainer: whether the forget set carries a pattern, which the noise channel then closes."""

    keep_forget_batches = False
    """Whether forget batches come to the last step, whatever ``prior_fraction`` says. Read as training goes; a prior that finds
    out by itself has to know by its third `refresh`."""

    strength = 0.0
    """gamma; set by the trainer before `prepare`."""

    masks: dict[str, Tensor] = {}
    """By name of a trainable weight: which of its entries may move (with ``weight_decay`` 0, the default). Weights without a mask
    move freely."""

    def prepare(self, setting: PriorContext) -> None:
        """Called once, before the first step and in eval mode. May set `masks` and move the adapter: the prior's first
        mean is where it then stands."""

    def forget_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is to be divided out, on a batch of the forget set.

        Args:
            logits: ``[n, classes]`` of the model being trained.
            labels: ``[n]``, as they stand in the forget set.

        Returns:
            Scalar, mean over the batch, in nats per forget example. Zero means: nothing left to forget.
        """
        raise NotImplementedError

    def refresh(self, forget_margins: Callable[[], Tensor], calibration_margins: Callable[[], Tensor | None]) -> None:
        """Called before the first step and every ``prior_update_steps`` while forget batches come, under the running mean.

        Both arguments measure margins, ``[n]`` in nats, when called: of a sample of the forget set, and of data the
        checkpoint never saw (None where there is none). A prior that does not need them does nothing here.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs; `masks` are kept by the trainer."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
