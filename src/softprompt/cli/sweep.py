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
        out: Folder that holds the runs; those finished there are skipped, those begun go on.
        data: The folder in which the file's relative `data` begins; none: the file's own.
        dry_run: Only list the trials, and what is there of each.
        executor: This process, or a Ray cluster, where each trial is a task (extra sweep).
        concurrent: Trainings at a time in this process: one pass over the rows of all, each with its own everything.
        ray_address: The cluster's, as ray.init takes it; none: one on this machine.
        cpus: Processors a trial, of Ray.
        gpus: Graphics processors a trial, of Ray; with 0 a trial is not counted on any.
    """
    if dry_run:
        plan = read(file, data)
        rows = [{"trial": name, "state": state} for name, state in trial_status(plan, out)]
        show_table(rows)
        console.print(f"{len(rows)} trials" + (f", after {plan.search.trials} for each choice" if plan.search else ""))
        return {"command": "sweep", "out": str(out), "trials": rows}
    terminal = Terminal()
    engines: dict[str, Any] = {
        "executor": executor,
        "concurrent": concurrent,
        "ray_address": ray_address,
        "cpus": cpus,
        "gpus": gpus,
    }
    try:
        swept = sweep(file, out=out, data=data, callback=terminal, **engines)
    finally:
        terminal.close()
    result = _listed(swept, out)
    if swept.failed:
        for trial in swept.failed:
            console.print(f"failed: {trial.name}: {trial.problem}")
        # The listing is the result even so; only the exit status tells of the failure.
        print(json.dumps(result))
        raise SystemExit(1)
    return result


def _listed(swept: SweepResult, out: Path) -> dict[str, Any]:
    show_table([_row(trial) for trial in swept.trials])
    names = {state: [trial.name for trial in swept.trials if trial.state == state] for state in ("done", "skipped")}
    failed = [{"trial": trial.name, "problem": trial.problem} for trial in swept.failed]
    chosen = [
        {
            "study": found.study,
            "trials": len(found.trials),
            "pruned": sum(trial.state == "pruned" for trial in found.trials),
            "values": None if found.values is None else dict(found.values),
            "dev": found.dev,
        }
        for found in swept.searches
    ]
    return {"command": "sweep", "out": str(out), **names, "failed": failed, **({"chosen": chosen} if chosen else {})}


def _row(trial: TrialResult) -> dict[str, Any]:
    scores = {key: f"{trial.results[key]:.3f}" for key in ("dev", "test", "majority") if key in trial.results}
    return {"trial": trial.name, "state": trial.state, **scores}
