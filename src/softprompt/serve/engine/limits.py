"""Bounds on what an engine accepts."""

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on batches, the queue and requests."""

    max_batch: int = 32
    """Rows per forward pass, and texts generated at the same time."""
    max_wait: float = 5.0
    """Milliseconds that a classification may wait for others to share its batch."""
    max_queued: int = 256
    """Rows in the queue; requests beyond it are refused with 429."""
    max_input_tokens: int = 2048
    """Tokens per input."""
    max_new_tokens: int = 1024
    """Largest `max_tokens` that a request may ask for."""
    timeout: float = 120.0
    """Seconds that a request may take."""
    max_prompts: int = 1000
    """Prompts served at the same time."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queued", "max_input_tokens", "max_new_tokens", "max_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.max_wait <= 60_000:
            raise ValueError(f"max_wait is {self.max_wait}; it must be from 0 to 60000 milliseconds")
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}; it must be above 0 seconds")
