"""`softprompt sweep`: many experiments from one file."""

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from softprompt.cli.console import console, show_table
from softprompt.cli.terminal import Terminal
from softprompt.sweep import ExecutorName, SweepResult, TrialResult, read, sweep, trial_status

SweepFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]


def sweep_(
    file: SweepFile,
    out: Path = Path("runs"),
    data: Path | None = None,
    dry_run: bool = False,
    executor: ExecutorName = "local",
    concurrent: int = 1,
    ray_address: str | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> dict[str, Any]:
    """Run many experiments.

    Args:
        file: The sweep's TOML file.
        out: Folder that holds the runs; finished ones are skipped, unfinished ones resumed.
        data: The folder that relative `data` paths in the file refer to; None: the file's folder.
        dry_run: Only list the trials and their state.
        executor: Run in this process, or on a Ray cluster with a task per trial (needs the extra `sweep`).
        concurrent: Number of runs to train concurrently in this process over one backbone; each keeps its own
            optimizer, schedule and random state.
        ray_address: Address of the Ray cluster, as ray.init takes it; None: start one on this machine.
        cpus: CPUs per trial, with Ray.
        gpus: GPUs per trial, with Ray; 0: trials reserve none.
    """
    if dry_run:
        plan = read(file, data)
        rows = [{"trial": name, "state": state} for name, state in trial_status(plan, out)]
        show_table(rows)
        console.print(f"{len(rows)} trials" + (f", after {plan.search.trials} for each choice" if plan.search else ""))
        return {"command": "sweep", "out": str(out), "trials": rows}
    terminal = Terminal()
    options: dict[str, Any] = {
        "executor": executor,
        "concurrent": concurrent,
        "ray_address": ray_address,
        "cpus": cpus,
        "gpus": gpus,
    }
    try:
        sweep_result = sweep(file, out=out, data=data, callback=terminal, **options)
    finally:
        terminal.close()
    result = _to_json(sweep_result, out)
    show_table([_row(trial) for trial in sweep_result.trials])
    if sweep_result.failed:
        for trial in sweep_result.failed:
            console.print(f"failed: {trial.name}: {trial.problem}")
        # The result is printed although the exit status is 1: the other trials are done.
        print(json.dumps(result))
        raise SystemExit(1)
    return result


def _to_json(sweep_result: SweepResult, out: Path) -> dict[str, Any]:
    trials = sweep_result.trials
    names = {state: [trial.name for trial in trials if trial.state == state] for state in ("done", "skipped")}
    failed = [{"trial": trial.name, "problem": trial.problem} for trial in sweep_result.failed]
    searches = [
        {
            "study": search.study,
            "trials": len(search.trials),
            "pruned": sum(trial.state == "pruned" for trial in search.trials),
            "values": None if search.values is None else dict(search.values),
            "dev": search.dev,
        }
        for search in sweep_result.searches
    ]
    searched = {"chosen": searches} if searches else {}
    return {"command": "sweep", "out": str(out), **names, "failed": failed, **searched}


def _row(trial: TrialResult) -> dict[str, Any]:
    scores = {key: f"{trial.results[key]:.3f}" for key in ("dev", "test", "majority") if key in trial.results}
    return {"trial": trial.name, "state": trial.state, **scores}
