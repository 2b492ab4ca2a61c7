"""Several processes, one folder of prompts: each serves what lies in it, whoever put it there."""

import logging
import threading
import time
from typing import final

import torch

from softprompt.serve.engine.engine import Engine
from softprompt.serve.engine.request import EngineClosed, PromptNotFound
from softprompt.serve.metrics import Metrics
from softprompt.serve.prompts.store import PromptStore

_log = logging.getLogger("softprompt.serve")
Mark = tuple[tuple[str, int, int], ...]
"""Name, time and size of each file of a prompt: another one is another prompt."""

_PASSES = (TimeoutError, MemoryError, torch.OutOfMemoryError)
"""Errors that say nothing of the prompt itself."""


@final
class PromptSync:
    """Keeps an engine's prompts those of a folder, looking at it every so often.

    Args:
        metrics: keep no numbers of a prompt that is gone.
        seconds: between two looks; so long after a change a process may still answer with what was there.
    """

    def __init__(self, engine: Engine, store: PromptStore, metrics: Metrics, seconds: float = 1.0) -> None:
        self._engine, self._shelf, self._metrics, self._seconds = engine, store, metrics, seconds
        self._known: dict[str, Mark] = {}
        self._thread = threading.Thread(target=self._run, name="softprompt-follower", daemon=True)

    def start(self) -> None:
        """Look once, then in a thread as long as the engine runs."""
        self.look()
        self._thread.start()

    def look(self) -> None:
        """Serve what is new or has changed, and no longer what is gone.

        What cannot be served is logged once; for want of memory or time, it is tried again at the next look.
        """
        there = {name: self._mark(name) for name in self._shelf.names()}
        for name, mark in there.items():
            if mark and self._known.get(name) != mark:
                try:
                    self._engine.add(name, self._shelf.path(name), replace=True)
                except EngineClosed:
                    raise
                except Exception as error:  # an older one of that name goes on, and so do the others
                    _log.error("the prompt %s cannot be served: %s: %s", name, type(error).__name__, error)
                    if isinstance(error, _PASSES):
                        there[name] = ()
        for name in self._known.keys() - there.keys():
            try:
                self._engine.remove(name)
            except PromptNotFound:  # removed through this process
                continue
            self._metrics.forget(name)
        self._known = there

    def _run(self) -> None:
        while not self._engine.closed:
            time.sleep(self._seconds)
            try:
                self.look()
            except EngineClosed:
                return
            except Exception:
                _log.exception("the folder of prompts cannot be read")

    def _mark(self, name: str) -> Mark:
        try:
            files = sorted((self._shelf.folder / name).iterdir())
            facts = [(file.name, file.stat()) for file in files if file.is_file() and not file.name.startswith(".")]
        except OSError:  # it went while it was looked at
            return ()
        return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in facts)
