"""The slot R^(l): priors over the adapter that carry the change in the data distribution."""

from .base import Prior, PriorContext
from .calibrated import CalibratedPrior
from .hosted import AscentPrior, RandomLabelPrior, SaliencyPrior
from .influence import InfluencePrior
from .none import NoPrior

PRIORS: dict[str, type[Prior]] = {
    "calibrated": CalibratedPrior,
    "influence": InfluencePrior,
    "ascent": AscentPrior,
    "random_label": RandomLabelPrior,
    "saliency": SaliencyPrior,
    "none": NoPrior,
}

__all__ = [
    "PRIORS",
    "AscentPrior",
    "CalibratedPrior",
    "InfluencePrior",
    "NoPrior",
    "Prior",
    "RandomLabelPrior",
    "SaliencyPrior",
    "PriorContext",
]
