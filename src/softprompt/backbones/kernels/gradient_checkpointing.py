"""Gradient checkpointing: layers computed again in the backward pass, in place of keeping what it needs.

transformers' own switch works in training mode alone, in which a frozen model would also drop out.
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

_ON: ContextVar[bool] = ContextVar("recompute", default=False)


@contextmanager
def gradient_checkpointing(model: Any, on: bool) -> Iterator[None]:
    """While it lasts, and if `on`, the layers of `model` keep their inputs alone; the backward pass belongs inside.

    Layers that write to a cache are left as they are: computed again they would write again.
    """
    if not on:
        yield
        return
    before, own = _ON.set(True), [(layer, layer.__dict__.get("forward")) for layer in layers(model)]
    for layer, _ in own:
        layer.forward = partial(through, layer.forward)
    try:
        yield
    finally:
        for layer, forward in own:
            del layer.forward  # the class's own again
            if forward is not None:  # accelerate, for one, gives a layer its own
                layer.forward = forward
        _ON.reset(before)


def layers(model: Any) -> list[Any]:
    """The layers of `model`, as transformers marks them: they can be computed again. One within another is after it."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def through(layer: Callable[..., T], *given: Any, **also: Any) -> T:
    """What `layer` gives; where layers are recomputed, without what its backward pass needs."""
    writes = any(isinstance(one, Cache) for one in (*given, *also.values()))
    if not _ON.get() or writes or not torch.is_grad_enabled():
        return layer(*given, **also)
    found: T = checkpoint(layer, *given, use_reentrant=False, **also)
    return found
