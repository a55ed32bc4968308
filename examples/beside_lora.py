"""UIB, and LoRA fine-tuning by the same trainer, from one checkpoint on the same rows: what other examples compare."""

import copy

from torch import nn

from hf_uib import UIBConfig, UIBTrainer

# What is left of the method without its parts
SETTINGS: dict[str, dict] = {"UIB": {}, "LoRA": {"prior": "none", "beta": 0.0, "posterior": "map"}}


def train_both(original: nn.Module, settings: dict, **given) -> dict[str, UIBTrainer]:
    """The trained trainers by the names of `SETTINGS`.

    Args:
        original: the checkpoint; it stays as it is.
        settings: of `UIBConfig`.
        given: further arguments of `UIBTrainer`: the sets, the processor.
    """
    trainers = {}
    for name, setting in SETTINGS.items():
        trainers[name] = UIBTrainer(copy.deepcopy(original), UIBConfig(**settings, **setting), **given)
        trainers[name].train()
    return trainers
