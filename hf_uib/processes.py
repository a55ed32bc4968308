"""How many processes there are: asked in one place, for the first who asks decides."""

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """The processes that run this; on machines without an accelerator they talk through gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())
