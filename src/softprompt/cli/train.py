"""`softprompt train`: a prompt is trained, or an unfinished run goes on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import tyro

from softprompt.cli import typed
from softprompt.cli.console import console, show_table
from softprompt.config import Experiment
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
        resume_: Go on with this unfinished run instead; its settings are in its folder. Its backbone may be given
            beside it where it lies elsewhere now.
        show: How many of the test rows that it got wrong are shown.
        log_with: A tracker that accelerate knows: tensorboard, wandb, mlflow and others.
    """
    # Not above: what trains takes seconds to import, which the help need not wait for.
    from softprompt.cli.terminal import Terminal
    from softprompt.training.trainer import resume, train

    terminal = Terminal()
    try:
        if resume_ is not None:
            flags = _flags(typed())
            _refuse_settings(resume_, flags)
            moved = experiment.backbone if "--backbone" in flags else None
            run = resume(resume_, memory_options_of=experiment, backbone=moved, callback=terminal, log_with=log_with)
        else:
            whole = experiment.replace(prompt=prompt)
            run = train(whole, out=out, name=name, callback=terminal, log_with=log_with)
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


_BESIDE_RESUME = {"--resume", "--backbone", "--show", "--log-with", "--gradient-checkpointing", "--shard"}
"""What may be said beside a run that is resumed: none of it changes the run's numbers, and a backbone has to be the
run's own at another place."""


def _flags(words: Sequence[str]) -> list[str]:
    return [word.partition("=")[0].replace("_", "-") for word in words]


def _refuse_settings(run: Path, flags: Sequence[str]) -> None:
    """Refuse every flag that `run` has its own value for, also one that is typed at its default.

    Raises:
        ValueError: naming the first of them.
    """
    for position, flag in enumerate(flags):
        is_method = flag in METHODS and (position == 0 or not flags[position - 1].startswith("--"))
        is_setting = flag.startswith("--") and flag.replace("--no-", "--", 1) not in _BESIDE_RESUME
        if is_method or is_setting:
            raise ValueError(
                f"{flag} is given beside --resume {run}, and a resumed run keeps every setting of its own; leave it "
                f"out, or start a new run from its prompt: softprompt train --init-prompt {run} ..."
            )


def show_result(run: "Run") -> None:
    """Every metric of the test rows, beside what the majority answer (and the zero-shot model) would score."""
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
    console.print(f"kept in {run.folder}", soft_wrap=True)


def _show_mistakes(run: "Run", count: int) -> None:
    from softprompt.evaluation.evaluate import is_correct, run_splits
    from softprompt.tasks import row_number

    rows = {row_number(row, place): row for place, row in enumerate(run_splits(run).test)}
    wrong = [line for line in run.predictions() if not is_correct(run.task, line["answer"], line["gold"])]
    console.print(f"{min(count, len(wrong))} of {len(wrong)} test rows it got wrong:")
    for line in wrong[:count]:
        gold = line["gold"] if isinstance(line["gold"], str) else " or ".join(line["gold"])
        text = run.task.render(rows[line["row"]])
        console.print(f"- row {line['row']}: said {line['answer']}, is {gold}: {text!r}", soft_wrap=True)
