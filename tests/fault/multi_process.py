"""Training in several processes: `python multi_process.py JOBS.json` forks each job's processes and waits for them.

A job has a `name`, a `count` of processes, and either command line `arguments`, an `experiment` to train (again under
each of the names in `more`), or the name of a run to `resume`. Its `fault` is a kind, a process and a step:

    raise     an error in the process's own part of the step,
    kill      kill -9 in the step,
    stop      Ctrl-C in the step, in that process only,
    full      the disk is full at the step's checkpoint,
    dtype     (at loading) bfloat16 is measured as faster in that process, float32 in the others,
    start     (before the first step) the prompt's initial values differ in that process.

Each process writes its error to `NAME-INDEX.json` (empty if there was none), and its stdout and stderr to files.
Prints the exit codes by name.
"""

import errno
import importlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from softprompt import Backbone, Experiment, backbones, cli, resume, runs, train
from softprompt.training import checkpoint
from softprompt.training.objective import Objective

SECONDS = 60
"""Time limit of a process that waits for a missing one."""


def arm(kind: str, at: int) -> None:
    """Arm the fault in this process."""
    losses, save, start, calls = Objective.losses, checkpoint.save, runs.build_prompted_model, [0]

    def losses_with_fault(self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "stop":
                os.kill(os.getpid(), signal.SIGINT)
            if kind == "raise":
                raise ValueError("its memory is full")
        return losses(self, *args)

    def save_on_full_disk(run: Path, saved: Any) -> None:
        if saved.step == at:
            raise OSError(errno.ENOSPC, "there is no room")
        save(run, saved)

    def negated(*args: Any, **kwargs: Any) -> Any:
        prompted = start(*args, **kwargs)
        with torch.no_grad():
            for parameter in prompted.parameters():
                parameter.neg_()
        return prompted

    if kind == "start":
        runs.build_prompted_model = negated
    elif kind == "full":
        checkpoint.save = save_on_full_disk
    elif kind == "dtype":
        backbones.precision.measured_dtype = lambda _: torch.bfloat16
    else:
        Objective.losses = losses_with_fault  # type: ignore[method-assign]


def work(job: dict[str, Any], out: Path, loaded: Backbone) -> int:
    """Do the job in this process and return its exit code."""
    if "arguments" in job:
        return cli.main(job["arguments"])
    if "resume" in job:
        resume(out / job["resume"], backbone=loaded)
    else:
        loaded_backbone = None if "dtype" in job.get("fault", ()) else loaded
        for name in (job["name"], *job.get("more", ())):
            train(Experiment.from_json(job["experiment"]), out=out, name=name, backbone=loaded_backbone)
    return 0


def child(job: dict[str, Any], index: int, port: int, out: Path, loaded: Backbone) -> None:
    """Run one process of the job; never returns."""
    signal.alarm(SECONDS)
    # After a fork, torch's thread pool is created on first use, which is not thread-safe; so use it while there is
    # only one thread.
    torch.set_num_threads(1)
    variables = {
        "RANK": index,
        "LOCAL_RANK": index,
        "WORLD_SIZE": job["count"],
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    if job["count"] > 1:  # as torchrun does
        os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(out / f"{job['name']}-{index}.{stream}", os.O_WRONLY | os.O_CREAT), number)
    backbones.precision.measured_dtype = lambda _: torch.float32
    kind, process, at = job.get("fault", ("", -1, 0))
    if process == index:
        arm(kind, at)
    error, code = "", 1
    try:
        code = work(job, out, loaded)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    (out / f"{job['name']}-{index}.json").write_text(json.dumps(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(jobs: list[dict[str, Any]], out: Path) -> None:
    """Run the jobs one after another."""
    # Once for all forks; except the command line's modules, which check their process when imported.
    for slow in ("matplotlib.figure", "scipy.stats", "sklearn.metrics", "torch._dynamo", "tyro", "softprompt.export"):
        importlib.import_module(slow)
    loaded = backbones.load(next(job["experiment"]["backbone"] for job in jobs if "experiment" in job), dtype="float32")
    ends: dict[str, list[int]] = {}
    for job in jobs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for index in range(job["count"]):
            if (process := os.fork()) == 0:
                child(job, index, port, out, loaded)
            children.append(process)
        ends[job["name"]] = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in children]
    print(json.dumps(ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).parent)
