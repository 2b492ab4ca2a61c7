"""Keeps the prompts of several processes in step with one shared folder."""

import logging
import threading
import time
from typing import final

import torch

from softprompt.serve.engine.base import BaseEngine
from softprompt.serve.engine.request import EngineClosed, PromptNotFound
from softprompt.serve.metrics import Metrics
from softprompt.serve.prompts.store import PromptStore

_log = logging.getLogger("softprompt.serve")
Fingerprint = tuple[tuple[str, int, int], ...]
"""Name, modification time and size of each file of a prompt; a change means another prompt."""

_TRANSIENT = (TimeoutError, MemoryError, torch.OutOfMemoryError)
"""Errors that are not the prompt's fault, after which it is tried again."""


@final
class PromptSync:
    """Polls a shared store, and adds, replaces and removes the engine's prompts accordingly.

    Args:
        metrics: those of removed prompts are removed too.
        seconds: between two polls; after a change, a process may answer with the old prompt for that long.
    """

    def __init__(self, engine: BaseEngine, store: PromptStore, metrics: Metrics, seconds: float = 1.0) -> None:
        self._engine, self._store, self._metrics, self._seconds = engine, store, metrics, seconds
        self._fingerprints: dict[str, Fingerprint] = {}
        self._from_store = set[str]()
        """The prompts that came from the store."""
        self._thread = threading.Thread(target=self._run, name="softprompt-sync", daemon=True)

    def start(self) -> None:
        """Poll once, then in a thread while the engine runs."""
        self.poll()
        self._thread.start()

    def poll(self) -> None:
        """Serve what is new or has changed, and stop serving what was deleted.

        A prompt that cannot be served is logged once; after a lack of memory or time it is tried again.
        """
        current = {name: self._fingerprint(name) for name in self._store.names()}
        for name, fingerprint in current.items():
            if fingerprint and self._fingerprints.get(name) != fingerprint:
                try:
                    self._engine.add(name, self._store.path(name), replace=True)
                    self._from_store.add(name)
                except EngineClosed:
                    raise
                except Exception as error:  # an older prompt of that name stays, and so do the others
                    _log.error("the prompt %s cannot be served: %s: %s", name, type(error).__name__, error)
                    if isinstance(error, _TRANSIENT):
                        current[name] = ()
        for name in self._from_store - current.keys():
            self._from_store.remove(name)
            try:
                self._engine.remove(name)
            except PromptNotFound:  # removed through this process
                continue
            self._metrics.remove_prompt(name)
        self._fingerprints = current

    def _run(self) -> None:
        while not self._engine.closed:
            time.sleep(self._seconds)
            try:
                self.poll()
            except EngineClosed:
                return
            except Exception:
                _log.exception("the folder of prompts cannot be read")

    def _fingerprint(self, name: str) -> Fingerprint:
        try:
            files = sorted((self._store.folder / name).iterdir())
            stats = [(file.name, file.stat()) for file in files if file.is_file() and not file.name.startswith(".")]
        except OSError:  # deleted meanwhile
            return ()
        return tuple((file_name, stat.st_mtime_ns, stat.st_size) for file_name, stat in stats)
