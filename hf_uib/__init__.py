"""hf_uib: fine-tuned Transformers models unlearn, under the Unlearning Information Bottleneck."""

from typing import TYPE_CHECKING

__version__ = "0.2.0.dev0"
__all__ = [
    "AuditReport",
    "Discovery",
    "Prior",
    "UIBConfig",
    "UIBTrainer",
    "audit_model",
    "discover",
    "load_classifier",
    "register_prior",
    "retrain",
    "undo",
]

if TYPE_CHECKING:
    from .audit.oracle import retrain
    from .audit.report import AuditReport, audit_model
    from .config import UIBConfig
    from .discovery.find import discover
    from .discovery.report import Discovery
    from .models import load_classifier
    from .priors import Prior, register_prior
    from .provenance import undo
    from .trainer import UIBTrainer

_HOME = {
    "AuditReport": ".audit.report",
    "Discovery": ".discovery.report",
    "Prior": ".priors",
    "UIBConfig": ".config",
    "UIBTrainer": ".trainer",
    "audit_model": ".audit.report",
    "discover": ".discovery.find",
    "load_classifier": ".models",
    "register_prior": ".priors",
    "retrain": ".audit.oracle",
    "undo": ".provenance",
}


def __getattr__(name: str):
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
