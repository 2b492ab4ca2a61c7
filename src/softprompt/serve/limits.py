"""What an engine takes on, and what it is at."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an engine takes on."""

    max_batch: int = 32
    """Rows of a pass, and rows being written at once."""
    max_wait: float = 5.0
    """Milliseconds that a choice may wait for others to share its pass."""
    max_waiting: int = 256
    """Rows in line; more are refused."""
    max_input_tokens: int = 2048
    """Tokens of an input."""
    max_new_tokens: int = 1024
    """Tokens of an answer that a request may ask for."""
    timeout: float = 120.0
    """Seconds that an answer may take."""
    max_prompts: int = 1000
    """Prompts at once."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_waiting", "max_input_tokens", "max_new_tokens", "max_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.max_wait <= 60_000 or not self.timeout > 0:
            raise ValueError(
                f"max_wait is {self.max_wait} and timeout {self.timeout}; take 0 to 60000 milliseconds, and above 0 "
                "seconds"
            )


@final
@dataclass(frozen=True, kw_only=True)
class Status:
    """What an engine is at."""

    ready: bool
    prompts: int
    waiting: int
    waiting_by_prompt: Mapping[str, int]
    writing: int
    max_batch: int


@final
@dataclass(frozen=True, kw_only=True)
class Replicas:
    """How many copies, and what each may use."""

    replicas: int = 2
    """Copies of the engine, each with the backbone in its own memory."""
    cpus: float = 1.0
    """Cores of each."""
    gpus: float = 0.0
    """GPUs of each."""
    ray_address: str | None = None
    """Address of a running Ray cluster; none: one is started on this machine."""

    def __post_init__(self) -> None:
        if self.replicas < 1 or not self.cpus > 0 or not self.gpus >= 0:
            raise ValueError(
                f"replicas is {self.replicas}, cpus {self.cpus} and gpus {self.gpus}; take at least one replica, a "
                "part of a core and no negative GPU"
            )
