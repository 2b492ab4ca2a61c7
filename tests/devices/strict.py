"""A mode in which softprompt's own code must say on which device its tensors are."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, final

import torch
from torch.overrides import TorchFunctionMode

import softprompt

SOURCE = Path(softprompt.__file__).parent
FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
        "randperm", "tensor", "tril_indices", "triu_indices", "zeros",
    )
)  # fmt: skip
ON_THE_HOST = {
    "prompts/": "a prompt is drawn and initialized on the CPU with its generator, then moved as a module",
    "models/heads.py": "drawn on the CPU, as prompts are, and copied to the device",
    "tasks/": "rows are collated on the CPU, and a batch is moved by `Batch.inputs`",
    "backbones/image_processor.py": "images are decoded on the CPU",
    "backbones/vit.py": "sample vectors and noise are drawn on the CPU",
    "models/vision.py": "the check's pixels are drawn on the CPU, the same for every device",
    "models/padding.py": "lists of ids are padded on the CPU, and the batch is moved in one copy",
    "analysis/rank/spectrum.py": "singular values are computed on the CPU in float64",
    "analysis/rank/gradient.py": "singular values are lists of numbers",
    "export/": "what was written is read back and compared on the CPU",
    "serve/api/": "scores are lists of numbers",
}
"""The files whose tensors are on the CPU by design, and why."""


@final
class StrictDevices(TorchFunctionMode):
    """Notes what would be slow or wrong on an accelerator, where softprompt's own code calls torch.

    - A factory without a device, except in `ON_THE_HOST`.
    - `.numpy()` of a tensor that is not on the CPU.
    - A list, or a tensor on the CPU, as an index into a tensor of a device: a hidden copy that the device waits for.
    - A generator of another device than the tensor that it fills.
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__()
        self.faults = faults

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        frame = sys._getframe(1)
        name = _source_name(frame.f_code.co_filename)
        if name and (fault := _fault(func, args, kwargs, name.startswith(tuple(ON_THE_HOST)))):
            self.faults.append(f"{name}:{frame.f_lineno}: {fault}")
        return func(*args, **kwargs)


@cache
def _source_name(file: str) -> str:
    """The file's path within softprompt; empty for other code, which is not checked."""
    path = Path(file)
    return str(path.relative_to(SOURCE)) if path.is_relative_to(SOURCE) else ""


def _fault(func: Any, args: Any, kwargs: dict[str, Any], on_host: bool) -> str:
    if func in FACTORIES:
        device, generator = kwargs.get("device"), kwargs.get("generator")
        if device is None and not on_host:
            return f"torch.{func.__name__} without a device"
        device = torch.device(device or "cpu")
        if generator is not None and generator.device.type != device.type:
            return f"torch.{func.__name__} on {device} with a generator on {generator.device}"
        return ""
    if func is torch.multinomial and kwargs.get("generator") is not None:
        if kwargs["generator"].device.type != args[0].device.type:
            return f"multinomial on {args[0].device} with a generator on {kwargs['generator'].device}"
        return ""
    tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
    if tensor is None or tensor.device.type == "cpu":
        return ""
    if func is torch.Tensor.numpy:
        return f".numpy() of a tensor on {tensor.device}"
    if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
        for index in args[1] if isinstance(args[1], tuple) else (args[1],):
            if isinstance(index, (list, range)):
                return f"a list as an index into a tensor on {tensor.device}"
            if isinstance(index, torch.Tensor) and index.device != tensor.device:
                return f"an index on {index.device} into a tensor on {tensor.device}"
    return ""


@contextmanager
def strict_devices() -> Iterator[list[str]]:
    """Note faults in this thread and in all that are started within the block; the list grows while it runs."""
    faults: list[str] = []
    run = threading.Thread.run

    def strict_run(thread: threading.Thread) -> None:
        with StrictDevices(faults):
            run(thread)

    threading.Thread.run = strict_run  # type: ignore[method-assign]
    try:
        with StrictDevices(faults):
            yield faults
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
