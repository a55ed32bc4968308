"""FSDP2: the frozen base is sharded over the processes, block by block; the adapter is whole on each.

What is trained is small, so that optimizer, noise, divergence and checkpoints see plain weights, as under data parallel training.
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
BEFORE = "before_sharding"  # attribute of a sharded model: itself without its weights


def fsdp_plugin(args: Any) -> FullyShardedDataParallelPlugin | None:
    """Accelerate's settings of FSDP, from ``args.fsdp`` or `accelerate launch`; None where it was not asked for."""
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return FullyShardedDataParallelPlugin(**(getattr(args, "fsdp_plugin_args", None) or {}))
    return None


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called with the model."""
    return BEFORE in model.__dict__


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    whole_weights: set[nn.Parameter],
    accelerator: Accelerator,
    plugin: FullyShardedDataParallelPlugin,
) -> None:
    """Shard a model in place and move it to this process's device. Its weights are `DTensor` s then, outside of a pass.

    Args:
        blocks: are gathered one at a time; the rest of the model is gathered as one.
        whole_weights: of the model, which are not sharded.
        accelerator: on CPUs it takes FSDP for data parallel training; it is told.
        plugin: its precision is taken.
    """
    from torch.distributed.device_mesh import init_device_mesh  # some builds of torch have none of these
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    state: Any = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
    model.__dict__[BEFORE] = _without_weights(model)
    for weight in whole_weights:
        weight.data = weight.data.to(accelerator.device)
    policy = state.fsdp_plugin.mixed_precision_policy or MixedPrecisionPolicy()
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "ignored_params": whole_weights,
        "reshard_after_forward": True,  # what is registered between two passes is then the base's own weight, unrounded
    }
    for block in blocks:
        fully_shard(block, mp_policy=policy, **settings)
    fully_shard(model, mp_policy=dataclasses.replace(policy, output_dtype=torch.float32), **settings)


def _without_weights(model: Any) -> Any:
    """A copy on the `meta` device that shares the model's configs."""
    configs = [model.peft_config, *(m.config for m in model.modules() if hasattr(m, "config"))]
    shared: dict[int, Any] = {id(config): config for config in configs}
    empty = {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, shared | empty)


def whole(weight: Tensor) -> Tensor:
    """A sharded weight, gathered from all processes, which have to call this together; another one as it is."""
    gathered: Callable[[], Tensor] | None = getattr(weight, "full_tensor", None)  # a `DTensor` has it
    return weight if gathered is None else gathered()


def copy_of(model: M) -> M:
    """A copy; of a sharded model a plain one on the CPU, gathered weight by weight, for which all processes call this together."""
    if not is_sharded(model):
        return copy.deepcopy(model)
    empty: M = model.__dict__[BEFORE]
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    filled: dict[int, Any] = {
        id(p): nn.Parameter(whole(weights[name].detach()).cpu().clone(), requires_grad=weights[name].requires_grad)
        for name, p in empty.named_parameters()
    }
    filled |= {id(b): buffers[name].cpu().clone() for name, b in empty.named_buffers()}
    return copy.deepcopy(empty, filled)


def average_gradients(weights: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace the gradients of weights that are whole on every process by their mean over the processes, in one message."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if gradients:
        means: Any = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
