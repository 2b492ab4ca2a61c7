"""`softprompt train`: a prompt is trained, or an unfinished run goes on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import tyro

from softprompt.cli.console import console, show_table
from softprompt.experiment import Experiment
from softprompt.prompts import METHODS
from softprompt.prompts.dpt import DPT

if TYPE_CHECKING:
    from softprompt.runs import Run

Prompt: Any = Union[  # noqa: UP007  (built of every registered method)
    tuple(
        Annotated[
            config,
            tyro.conf.subcommand(name=name, description=(config.__doc__ or "").splitlines()[0], prefix_name=False),
        ]
        for name, config in sorted(METHODS.items())
    )
]
"""Every method as a subcommand: `softprompt train ... dpt --rank 10`."""


def train_(
    experiment: Experiment = Experiment(),  # noqa: B008  (a frozen value)
    prompt: Prompt = DPT(),  # noqa: B008
    out: Path = Path("runs"),
    name: str | None = None,
    resume_: Annotated[Path | None, tyro.conf.arg(name="resume")] = None,
    show: int = 0,
    log_with: str | None = None,
) -> dict[str, Any]:
    """Train a prompt.

    Args:
        experiment: What is trained.
        prompt: The method.
        out: Folder that holds the runs.
        name: The run's folder in it; none: made from task, method and seed.
        resume_: Go on with this unfinished run instead; its settings are in its folder.
        show: Show so many test rows that it got wrong.
        log_with: A tracker that accelerate knows: tensorboard, wandb, mlflow and others.
    """
    # Not above: what trains takes seconds to import, which the help need not wait for.
    from softprompt.cli.terminal import Terminal
    from softprompt.train import resume, train

    terminal = Terminal()
    try:
        if resume_ is not None:
            if experiment.replace(prompt=prompt).hash != Experiment().hash or name is not None:
                raise ValueError(
                    f"--resume {resume_} takes every setting from the run; leave the other flags out, apart from "
                    "--gradient-checkpointing and --shard"
                )
            run = resume(resume_, means_of=experiment, watch=terminal, log_with=log_with)
        else:
            whole = experiment.replace(prompt=prompt)
            run = train(whole, out=out, name=name, watch=terminal, log_with=log_with)
    finally:
        terminal.close()
    _show_result(run)
    if show:
        _show_mistakes(run, show)
    results = dict(run.results or {})
    return {
        "command": "train",
        "run": str(run.folder),
        "method": run.experiment.method,
        "task": run.task.name,
        "backbone": run.experiment.backbone,
        "seed": run.experiment.seed,
        **results,
    }


def _show_result(run: "Run") -> None:
    results = run.results or {}
    rows = [
        {
            "": f"{run.experiment.method}, {results['trainable']:,} numbers",
            results["metric"]: f"{results['test']:.3f}",
        }
    ]
    if "untouched" in results:
        rows.insert(0, {"": "untouched model, same template", results["metric"]: f"{results['untouched']:.3f}"})
    constant = f"always {results['majority_answer'][:40]!r}, the best constant answer ({results['majority_source']})"
    rows.insert(0, {"": constant, results["metric"]: f"{results['majority']:.3f}"})
    console.print(f"test: {results['n_test']} rows, 95% interval {results['low']:.3f} to {results['high']:.3f}")
    show_table(rows)
    if "warning" in results:
        console.print(f"note: {results['warning']}")
    console.print(f"kept in {run.folder}")


def _show_mistakes(run: "Run", count: int) -> None:
    from softprompt.evaluate import run_splits
    from softprompt.tasks import row_number

    rows = {row_number(row, place): row for place, row in enumerate(run_splits(run).test)}
    wrong = [found for found in run.predictions() if found["answer"] != found["gold"]][:count]
    console.print(f"{len(wrong)} of the rows it got wrong:")
    for found in wrong:
        text = run.task.render(rows[found["row"]])
        console.print(f"- row {found['row']}: said {found['answer']}, is {found['gold']}: {text!r}")
