"""FSDP: the frozen layers sharded over processes, each of which holds a part of every layer.

torch's `fully_shard` (FSDP2) gathers a layer's weights for its forward pass and again for its backward pass. Every call
of a layer is therefore a collective, and all ranks must make the same calls. Embeddings, heads and the norms outside of
layers are not sharded.
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
    """Shard each layer of `model` over all ranks (a collective).

    Args:
        device: the device type, cpu or cuda.
    """
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for layer in reversed(layers(model)):  # nested layers first
        # An embedding table inside a layer (T5's relative bias) is also read from outside the layer.
        embeddings = [module for module in layer.modules() if isinstance(module, nn.Embedding)]
        tables = {weight for module in embeddings for weight in module.parameters()}
        # Each layer is its own root, since prompted models also call single layers and parts of the model.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=tables)
        layer.register_forward_hook(_unshard_for_cache_gradient, with_kwargs=True)
    _sharded.add(model)


def _unshard_for_cache_gradient(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Gather the layer for the gradient of the keys and values that it wrote to a cache.

    FSDP does so for the gradient of the layer's output only.
    """
    for cache in (value for value in (*args, *kwargs.values()) if isinstance(value, DynamicCache)):
        indices = {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")}
        # Some models' last layers share the cache of an earlier one.
        for cache_layer in (cache.layers[index] for index in indices if index < len(cache.layers)):
            for states in (cache_layer.keys, cache_layer.values):
                if states.requires_grad:
                    states.register_hook(lambda _: layer.unshard())


def is_sharded(model: Any) -> bool:
    """Whether `model` is sharded, so that each of its forward passes is a collective."""
    return model in _sharded


def full_tensor(tensor: Tensor) -> Tensor:
    """The full weight (a collective if it is sharded)."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


def all_done(model: Any, done: Tensor) -> bool:
    """Whether every row is done; if `model` is sharded, every row of all ranks, so that they stop together."""
    result = done.all().int()
    if model in _sharded:
        torch.distributed.all_reduce(result, torch.distributed.ReduceOp.MIN)
    return bool(result)


def max_over_ranks(model: Any, count: int) -> int:
    """`count`, or its maximum over all ranks if `model` is sharded, so that they plan equally many forward passes."""
    if model not in _sharded:
        return count
    # On the weights' device, which the process group's backend supports.
    maximum = torch.tensor(count, device=next(model.parameters()).device)
    torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX)
    return int(maximum)
