"""Threads that end: the engine's at shutdown, and those for work on tensors outside of it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")
JOIN_TIMEOUT = 5.0
"""Seconds for an engine's thread to end after shutdown; a stuck one is abandoned."""


def call_in_own_thread(function: Callable[[], Result]) -> Result:
    """The result of `function`, or its exception, from a thread that ends with it.

    On a CPU, libgomp gives each computing thread its own worker threads, which last as long as it does. Once these
    exceed the cores, all sleep between operations instead of spinning: a token that SmolLM2-135M decodes in 16 ms takes
    26 ms if another thread has computed before. So the service loads the model and prompts in short-lived threads, and
    only the engine's thread keeps its workers.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    thread = threading.Thread(target=run, name="softprompt-setup", daemon=True)
    thread.start()
    result = future.result()
    thread.join()
    return result
