"""Killed training runs: `python killed.py JOBS.json` trains each job in a fork, which kills itself with kill -9.

A job is a kind, a name and a count. The fork dies at the `count`-th call for a file whose name contains `name`:

    replace    before a finished draft is renamed,
    replaced   just after it was renamed,
    tensors    when half of a safetensors file is written,
    step       after an optimizer step, before anything is written (the name is empty).

Prints the exit code of each child.
"""

import importlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from softprompt import Experiment, load_backbone, train


def _die_at(
    job: tuple[str, int], before: Callable[..., None], call: Callable[..., Any], after: Callable[..., None]
) -> Any:
    name, count = job
    calls = itertools.count(1)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        is_match = name in Path(str(args[-1])).name and next(calls) == count
        if is_match:
            before(*args)
        result = call(*args, **kwargs)
        if is_match:
            after(*args)
        return result

    return replacement


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _nothing(*_: Any) -> None:
    pass


def _halve_and_die(_: Any, draft: Path, **__: Any) -> None:
    os.truncate(draft, draft.stat().st_size // 2)
    _die()


def arm(kind: str, name: str, count: int) -> None:
    """Make this process die at the `count`-th event of that kind."""
    job = (name, count)
    if kind == "replace":
        Path.replace = _die_at(job, _die, Path.replace, _nothing)  # type: ignore[method-assign]
    elif kind == "replaced":
        Path.replace = _die_at(job, _nothing, Path.replace, _die)  # type: ignore[method-assign]
    elif kind == "tensors":
        safetensors.torch.save_file = _die_at(job, _nothing, safetensors.torch.save_file, _halve_and_die)
    elif kind == "step":
        torch.optim.AdamW.step = _die_at(job, _nothing, torch.optim.AdamW.step, _die)
    else:
        raise ValueError(f"there is no kind {kind!r}")


def main(jobs: dict[str, Any]) -> None:
    """Fork once per job; the parent only loads, on one thread, since threads do not survive a fork."""
    for slow in ("matplotlib.figure", "scipy.stats", "sklearn.metrics", "torch._dynamo"):
        importlib.import_module(slow)  # once for all forks
    experiment = Experiment.from_json(jobs["experiment"])
    backbone = load_backbone(experiment.backbone, dtype=experiment.dtype)
    ends = []
    for number, (kind, name, count) in enumerate(jobs["kills"]):
        child = os.fork()
        if child == 0:
            arm(kind, name, count)
            train(experiment, out=jobs["out"], name=f"run-{number}", backbone=backbone)
            os._exit(0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()))
