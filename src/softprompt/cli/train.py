"""`softprompt train`: train a prompt, or resume an unfinished run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import tyro

from softprompt.cli import command_arguments
from softprompt.cli.console import console, show_table
from softprompt.config import MEMORY_OPTIONS, Experiment
from softprompt.prompts import METHODS
from softprompt.prompts.dpt import DPT

if TYPE_CHECKING:
    from softprompt.runs import Run

Prompt: Any = Union[  # noqa: UP007  (built from the registered methods)
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
        experiment: What to train, and how.
        prompt: The method.
        out: Folder that holds the runs.
        name: Name of the run's folder in it; None: made from task, method and seed.
        resume_: Resume this unfinished run instead, with its own settings; --backbone may say where its backbone is
            now.
        show: Number of wrongly answered test rows to print.
        log_with: A tracker that accelerate supports: tensorboard, wandb, mlflow and others.
    """
    # Imported here so that --help does not wait seconds for the training code.
    from softprompt.cli.terminal import Terminal
    from softprompt.training.trainer import resume, train

    terminal = Terminal()
    try:
        if resume_ is not None:
            flags = _flags(command_arguments())
            _check_no_settings(resume_, flags)
            backbone = experiment.backbone if "--backbone" in flags else None
            run = resume(resume_, memory_options_of=experiment, backbone=backbone, callback=terminal, log_with=log_with)
        else:
            experiment = experiment.replace(prompt=prompt)
            run = train(experiment, out=out, name=name, callback=terminal, log_with=log_with)
    finally:
        terminal.close()
    show_result(run)
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


_ALLOWED_WITH_RESUME = {"--resume", "--backbone", "--show", "--log-with", "--gradient-checkpointing", "--shard"}
"""Flags that do not change the results of a resumed run; the weights of a --backbone must be the run's own."""


def _flags(arguments: Sequence[str]) -> list[str]:
    return [argument.partition("=")[0].replace("_", "-") for argument in arguments]


def _check_no_settings(run: Path, flags: Sequence[str]) -> None:
    """Check that no flag sets what `run` has its own value for, even at its default.

    Raises:
        ValueError: naming the first such flag.
    """
    from softprompt.runs import open_run

    for position, flag in enumerate(flags):
        is_method = flag in METHODS and (position == 0 or not flags[position - 1].startswith("--"))
        is_setting = flag.startswith("--") and flag.replace("--no-", "--", 1) not in _ALLOWED_WITH_RESUME
        if is_method or is_setting:
            raise ValueError(
                f"{flag} is given with --resume {run}, but a resumed run keeps its own settings; leave it out, "
                f"or start a new run from its prompt: softprompt train --init-prompt {run} ..."
            )
    training = open_run(run).experiment.training
    for option in MEMORY_OPTIONS:
        flag = f"--no-{option.replace('_', '-')}"
        if flag in flags and getattr(training, option):
            raise ValueError(f"{flag} is given, but run {run} has it on, which a resumed run keeps; leave it out")


def show_result(run: "Run") -> None:
    """Print every metric of the test rows below the majority (and zero-shot) score."""
    results = run.results or {}
    metric, extra_metrics = results["metric"], results["extra_metrics"]
    row: dict[str, Any] = {"": f"{run.experiment.method}, {results['trainable']:,} trainable parameters"}
    row |= {metric: f"{results['test']:.3f}"} | {name: f"{value:.3f}" for name, value in extra_metrics.items()}
    rows = [row]
    if "zero_shot" in results:
        rows.insert(0, {"": "zero-shot, same template", metric: f"{results['zero_shot']:.3f}"})
    constant = f"always {results['majority_answer'][:40]!r}, the best constant answer ({results['majority_source']})"
    rows.insert(0, {"": constant, metric: f"{results['majority']:.3f}"})
    interval = f"{results['ci_low']:.3f} to {results['ci_high']:.3f}"
    console.print(f"test: {results['n_test']} rows, {metric} with the 95% interval {interval}")
    show_table(rows)
    if warning := results.get("warning"):
        console.print(f"note: {warning}", soft_wrap=True)
    console.print(f"saved in {run.folder}", soft_wrap=True)


def _show_mistakes(run: "Run", count: int) -> None:
    from softprompt.evaluation.evaluate import is_correct, run_splits
    from softprompt.tasks.data.tabular import row_number

    rows = {row_number(row, index): row for index, row in enumerate(run_splits(run).test)}
    wrong = [line for line in run.predictions() if not is_correct(run.task, line["answer"], line["gold"])]
    console.print(f"{min(count, len(wrong))} of {len(wrong)} test rows answered wrongly:")
    for line in wrong[:count]:
        gold = line["gold"] if isinstance(line["gold"], str) else " or ".join(line["gold"])
        text = run.task.render(rows[line["row"]])
        console.print(f"- row {line['row']}: answered {line['answer']}, correct is {gold}: {text!r}", soft_wrap=True)
