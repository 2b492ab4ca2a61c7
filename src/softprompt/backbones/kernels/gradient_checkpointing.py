"""Gradient checkpointing: recompute layers in the backward pass instead of storing their activations.

transformers' own switch works only in training mode, in which a frozen model would also apply dropout.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

T = TypeVar("T")

_enabled: ContextVar[bool] = ContextVar("gradient_checkpointing", default=False)


@contextmanager
def gradient_checkpointing(model: Any, on: bool) -> Iterator[None]:
    """Within the block, and if `on`, the layers of `model` store only their inputs; call `backward` inside the block.

    A layer that writes to a cache is not checkpointed: recomputing it would write again.
    """
    if not on:
        yield
        return
    token = _enabled.set(True)
    # accelerate, for example, sets `forward` on the instance.
    instance_forwards = [(layer, layer.__dict__.get("forward")) for layer in layers(model)]
    for layer, _ in instance_forwards:
        layer.forward = partial(checkpointed, layer.forward)
    try:
        yield
    finally:
        for layer, forward in instance_forwards:
            del layer.forward
            if forward is not None:
                layer.forward = forward
        _enabled.reset(token)


def is_hooked(module: Any) -> bool:
    """Whether calling `module` does something else than its class's forward, but for what this module does itself."""
    attributes = vars(module)  # much faster than the module's attributes
    forward = attributes.get("forward")
    is_replaced = forward is not None and getattr(forward, "func", None) is not checkpointed
    return is_replaced or any(attributes[kind] for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"))


def layers(model: Any) -> list[Any]:
    """The layers of `model` that transformers marks as checkpointable; a nested layer follows the one it is in."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpointed(layer: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """`layer(*args, **kwargs)`, recomputed in the backward pass where gradient checkpointing is on."""
    writes_cache = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
    if not _enabled.get() or writes_cache or not torch.is_grad_enabled():
        return layer(*args, **kwargs)
    output: T = checkpoint(layer, *args, use_reentrant=False, **kwargs)
    return output
