"""Trainings of several processes: `python several.py JOBS.json` forks each job's processes and waits for them.

A job has a `name`, a `count` of processes, and either `arguments` of the command line, an `experiment` to train, which
it does under each of the names in `more` too, or the name of a run to `resume`. Its `fault` names a kind, the process
it happens to, and the step before whose end it does:

    raise     an error in the process's own part of a step,
    kill      kill -9,
    stop      Ctrl-C in that process alone,
    full      the checkpoint of that step finds no room,
    dtype     (at loading) bfloat16 is measured as the faster one there, float32 in the others,
    start     (at the start) its prompt's first values come out otherwise.

Each process leaves `NAME-INDEX.json`: its error's text, empty where it ended well; and what it wrote to stdout and
stderr. Prints the exit codes by name.
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
from softprompt.training.step import TrainingStep

SECONDS = 60
"""After which a process that waits for one that is not there is ended."""


def arm(kind: str, at: int) -> None:
    """Make it happen in this process before the end of step `at`."""
    losses, save, start, calls = TrainingStep.losses, checkpoint.save, runs.build_prompted_model, [0]

    def spoilt(self: Any, *given: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "stop":
                os.kill(os.getpid(), signal.SIGINT)
            if kind == "raise":
                raise ValueError("its memory is full")
        return losses(self, *given)

    def no_room(run: Path, saved: Any) -> None:
        if saved.step == at:
            raise OSError(errno.ENOSPC, "there is no room")
        save(run, saved)

    def elsewhere(*given: Any, **also: Any) -> Any:
        prompted = start(*given, **also)
        with torch.no_grad():
            for parameter in prompted.parameters():
                parameter.neg_()
        return prompted

    if kind == "start":
        runs.build_prompted_model = elsewhere
    elif kind == "full":
        checkpoint.save = no_room
    elif kind == "dtype":
        backbones.backbone.measured_dtype = lambda _: torch.bfloat16
    else:
        TrainingStep.losses = spoilt  # type: ignore[method-assign]


def work(job: dict[str, Any], out: Path, loaded: Backbone) -> int:
    """The job's part in this process; its exit code."""
    if "arguments" in job:
        return cli.main(job["arguments"])
    if "resume" in job:
        resume(out / job["resume"], backbone=loaded)
    else:
        own = None if "dtype" in job.get("fault", ()) else loaded
        for name in (job["name"], *job.get("more", ())):
            train(Experiment.from_json(job["experiment"]), out=out, name=name, backbone=own)
    return 0


def child(job: dict[str, Any], index: int, port: int, out: Path, loaded: Backbone) -> None:
    """One process of the job, which never returns."""
    signal.alarm(SECONDS)
    # A fork leaves torch's thread pool to be made anew by whoever asks first; of several threads, such as those that
    # load a model's weights, one may find none. So ask while there is one thread.
    torch.set_num_threads(1)
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": job["count"], "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    if job["count"] > 1:  # as torchrun does
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(out / f"{job['name']}-{index}.{stream}", os.O_WRONLY | os.O_CREAT), number)
    backbones.backbone.measured_dtype = lambda _: torch.float32
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
    """Each job's processes, one job after another."""
    # Once for all forks; not the command line's modules, which look at import which process they are in.
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
