"""hf_uib: fine-tuned Transformers models unlearn, under the Unlearning Information Bottleneck."""

__version__ = "0.2.0.dev0"
__all__ = ["AuditReport", "UIBConfig", "UIBTrainer", "audit_model", "retrain", "undo"]

_HOME = {
    "AuditReport": ".audit.report",
    "UIBConfig": ".config",
    "UIBTrainer": ".trainer",
    "audit_model": ".audit.report",
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
