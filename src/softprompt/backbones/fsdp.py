"""Frozen layers shared out among processes: each holds its part of every layer, which is whole while it runs.

torch's `fully_shard` (FSDP2) gathers a layer's weights at its call and again in the backward pass. Every call is so a
meeting of all processes, which must all make the same ones. Embeddings, norms outside of layers and heads stay whole.
"""

from typing import Any
from weakref import WeakSet

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.cache_utils import DynamicCache

from softprompt.backbones.kernels.gradient_checkpointing import layers

_sharded: WeakSet[Any] = WeakSet()


def shard(model: Any, device: str) -> None:
    """Keep this process's part of each layer of `model`, on its `device` (cpu, cuda): a meeting of all processes."""
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for layer in reversed(layers(model)):  # inner ones first
        # A table in a layer (T5's relative bias) is looked at from outside.
        inner = [module for module in layer.modules() if isinstance(module, nn.Embedding)]
        tables = {weights for module in inner for weights in module.parameters()}
        # Each is a root of its own: attachments call layers one by one, and parts of the model.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=tables)
        layer.register_forward_hook(_watch_cache, with_kwargs=True)
    _sharded.add(model)


def _watch_cache(layer: Any, given: tuple[Any, ...], also: dict[str, Any], output: Any) -> None:
    """Gather the layer for the gradient of keys and values that it wrote to a cache, as is done for its output's."""
    for cache in (one for one in (*given, *also.values()) if isinstance(one, DynamicCache)):
        places = {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")}
        for part in (cache.layers[place] for place in places if place < len(cache.layers)):  # some share another's
            for states in (part.keys, part.values):
                if states.requires_grad:
                    states.register_hook(lambda _: layer.unshard())


def is_sharded(model: Any) -> bool:
    """Whether its every pass is a meeting."""
    return model in _sharded


def whole(tensor: Tensor) -> Tensor:
    """A weight of which processes may hold parts, put together; a meeting where they do."""
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found


def all_done(model: Any, done: Tensor) -> bool:
    """Whether every row is done; where `model` is sharded, those of all processes, which then stop together."""
    every = done.all().int()
    if model in _sharded:
        torch.distributed.all_reduce(every, torch.distributed.ReduceOp.MIN)
    return bool(every)


def largest(model: Any, count: int) -> int:
    """`count`, or where `model` is sharded the largest of all processes: so they plan as many passes."""
    if model not in _sharded:
        return count
    # Where the weights are, since that is what the processes talk over.
    most = torch.tensor(count, device=next(model.parameters()).device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)
