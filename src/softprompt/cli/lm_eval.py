"""`softprompt lm-eval`: a run's scores in lm-evaluation-harness."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import tyro

from softprompt.cli.console import show_table


def lm_eval_(
    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None,
    tasks: tuple[str, ...] = (),
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    backbone: str | None = None,
) -> dict[str, Any]:
    """Score a run in lm-evaluation-harness, with its tasks, wordings and metrics.

    Args:
        run: A run, a PEFT prompt-tuning folder or `hub:USER/NAME`; None: the backbone alone, zero-shot.
        tasks: Names of the harness's tasks, such as arc_easy piqa boolq.
        include_path: A folder with YAML files of tasks of your own.
        num_fewshot: Examples in front of each row; None: the task's default.
        limit: Number of rows per task; None: all.
        batch_size: Rows per forward pass.
        backbone: Where the backbone is now, as in train; None: where it was during training.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError(
            "lm-eval needs the extra `eval`; install it in softprompt's clone with: pip install '.[eval]'"
        )
    if not tasks:
        raise ValueError("no task is given; name at least one with --tasks, such as arc_easy")
    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(
            f"there is no folder {include_path}; give the one with your YAML files as --include-path"
        )
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from softprompt.evaluation.lm_eval import SoftPromptLM

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise ValueError(
            f"lm-evaluation-harness has no task {unknown[0]!r}; correct the name, or give the folder with its YAML "
            "file as --include-path"
        )
    model = SoftPromptLM(run=run, backbone=backbone, batch_size=batch_size)
    results = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=0,
    )["results"]
    scores = {
        task: {key: value for key, value in values.items() if isinstance(value, float)}
        for task, values in results.items()
    }
    show_table(
        [{"task": task, "metric": key, "value": value} for task, row in scores.items() for key, value in row.items()]
    )
    return {"command": "lm-eval", "run": run, "results": scores}
