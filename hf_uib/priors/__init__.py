"""The slot R^(l): priors over the adapter that carry the change in the data distribution."""

from .base import Prior
from .calibrated import CalibratedPrior
from .none import NoPrior

PRIORS = {"calibrated": CalibratedPrior, "none": NoPrior}

__all__ = ["PRIORS", "CalibratedPrior", "NoPrior", "Prior"]
