"""The slot R^(l): priors over the adapter that carry the change in the data distribution."""

from .base import PRIORS, Prior, PriorContext, build_prior, prior_class, register_prior
from .calibrated import CalibratedPrior
from .hosted import AscentPrior, RandomLabelPrior, SaliencyPrior
from .influence import InfluencePrior
from .none import NoPrior

__all__ = [
    "PRIORS",
    "AscentPrior",
    "CalibratedPrior",
    "InfluencePrior",
    "NoPrior",
    "Prior",
    "PriorContext",
    "RandomLabelPrior",
    "SaliencyPrior",
    "build_prior",
    "prior_class",
    "register_prior",
]
