"""Killed sweeps: `python killed_sweep.py JOBS.json` forks a process per job, which runs a sweep and kills itself.

A job is a file, a folder, and a kind, name and count as in `killed.py` (or null: it survives). Prints the exit code of
each child, and its failed trials on stderr. Every finished run appends its folder to `finished.log`, next to the jobs
file.
"""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from killed import arm

from softprompt.runs import Run
from softprompt.sweep import sweep


def count_finished(log: Path) -> None:
    """Log every run that finishes."""
    finish = Run.finish

    def counted(run: Run, trained: Any, results: Mapping[str, Any]) -> Run:
        with log.open("a") as stream:
            stream.write(f"{run.folder}\n")
        return finish(run, trained, results)

    Run.finish = counted  # type: ignore[method-assign]


def main(jobs: list[dict[str, Any]], log: Path) -> None:
    for slow in ("matplotlib.figure", "scipy.stats", "sklearn.metrics", "torch._dynamo", "optuna"):
        importlib.import_module(slow)  # once for all forks
    count_finished(log)
    ends = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # see multi_process.py
            if job["kill"]:
                arm(*job["kill"])
            try:
                failed = [f"{trial.name}: {trial.problem}" for trial in sweep(job["file"], out=job["out"]).failed]
            except BaseException:  # a fork must not continue with its parent's code
                failed = [traceback.format_exc()]
            print(*failed, sep="\n", file=sys.stderr, flush=True)
            os._exit(1 if failed else 0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs_file = Path(sys.argv[1])
    main(json.loads(jobs_file.read_text()), jobs_file.with_name("finished.log"))
