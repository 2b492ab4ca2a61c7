"""Which device and dtype `auto` means on this machine."""

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from softprompt import assets, files
from softprompt.types import Dtype


def resolve_device(name: str) -> torch.device:
    """The device of that name; `auto` is the first GPU, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available; use auto, cpu or a device that torch lists") from error
    return device


def measured_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` multiplies it faster than float32, else float32.

    Measured once per machine (a tenth of a second) and kept in the cache folder.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_fingerprint()
    key = f"{device.type}/{name}/torch {torch.__version__}/{torch.get_num_threads()} threads"
    file = assets.cache_folder() / "dtype.json"
    try:
        measured: Mapping[str, str] = json.loads(file.read_text())
    except (OSError, ValueError):
        measured = {}
    if measured.get(key) not in ("float32", "bfloat16"):
        seconds = {dtype: _matmul_seconds(device, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
        measured = {**measured, key: min(seconds, key=lambda dtype: seconds[dtype])}
        with suppress(OSError):  # without a cache it is measured again
            files.write_text(file, json.dumps(measured, indent=1))
    return torch.bfloat16 if measured[key] == "bfloat16" else torch.float32


def resolve_dtype(dtype: Dtype) -> Dtype:
    """`dtype` with `auto` resolved for the first GPU, or the CPU without one, wherever a model is now."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if measured_dtype(resolve_device("auto")) is torch.bfloat16 else "float32"


def _cpu_fingerprint() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    identifying = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(identifying).encode()).hexdigest()[:12]


def _matmul_seconds(device: torch.device, dtype: torch.dtype) -> float:
    left, right = (torch.randn(512, 512, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        (left @ right).sum().item()
        best = min(best, time.perf_counter() - start)
    return best
