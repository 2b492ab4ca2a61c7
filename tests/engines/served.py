"""What the engine tests share: finished runs with their live answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from softprompt import Backbone, Run

ROWS = 50
Start = Callable[..., Any]
"""Starts a server: a context manager that gives its URL."""


@dataclass(frozen=True)
class Served:
    """Finished runs, the rows that each is asked about, and the live answers."""

    runs: Mapping[str, Run]
    texts: Mapping[str, list[str]]
    live: Mapping[str, list[Any]]
    backbone: Backbone
