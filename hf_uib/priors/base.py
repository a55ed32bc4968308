"""What a prior is."""

from collections.abc import Callable

from torch import Tensor


class Prior:
    r"""A factor ``exp(-gamma * evidence)`` that multiplies the Gaussian ``N(theta; mu_{k-1}, Sigma)`` of the bound.

    A prior of your own needs one method, [`evidence`], and is passed as ``UIBTrainer(..., prior=MyPrior())``. Autograd
    turns it into the natural-parameter shift of every layer: to first order the prior's mean moves by
    ``-gamma * Lambda_l^-1 * d evidence / d theta_l``.
    """

    uses_forget_batches = True
    """Whether the trainer has to add forget examples to the batches."""

    systematic = False
    """Set by the trainer: whether the forget set carries a pattern, which the noise channel then closes."""

    def evidence(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is to be divided out, on a batch of the forget set.

        Args:
            logits: ``[n, classes]`` of the model being trained.
            labels: ``[n]``, as they stand in the forget set.

        Returns:
            Scalar, mean over the batch, in nats per forget example. Zero means: nothing left to forget.
        """
        raise NotImplementedError

    def refresh(self, forget_margins: Callable[[], Tensor], calibration_margins: Callable[[], Tensor | None]) -> None:
        """Called before the first step and every ``prior_update_steps``, under the running mean.

        Both arguments measure margins, ``[n]`` in nats, when called: of a sample of the forget set, and of data the
        checkpoint never saw (None where there is none). A prior that does not need them does nothing here.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
