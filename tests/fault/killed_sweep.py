"""Sweeps that die: `python killed_sweep.py JOBS.json` forks a process a job, which sweeps a file and kills itself.

A job is a file, a folder, and one of `killed.py`'s kinds, names and counts (none: it lives). Prints how each child
ended, and on stderr what failed in it. Every finished training leaves a line with its folder in `finished.log`, beside
the jobs.
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
    """Write down every training that comes to its end."""
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
            torch.set_num_threads(1)  # torch's pool, made anew while there is one thread (several.py)
            if job["kill"]:
                arm(*job["kill"])
            try:
                failed = [f"{trial.name}: {trial.problem}" for trial in sweep(job["file"], out=job["out"]).failed]
            except BaseException:  # of a fork, which must not come back to what its parent does
                failed = [traceback.format_exc()]
            print(*failed, sep="\n", file=sys.stderr, flush=True)
            os._exit(1 if failed else 0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = Path(sys.argv[1])
    main(json.loads(given.read_text()), given.with_name("finished.log"))
