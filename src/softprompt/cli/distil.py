"""`softprompt distil`: a short trained prompt takes the place of a long text in front of every request."""

from pathlib import Path
from typing import Any

from softprompt.cli import command_arguments
from softprompt.cli.console import console, show_table
from softprompt.cli.train import Prompt, show_result
from softprompt.config import Experiment
from softprompt.prompts.dpt import DPT


def distil_(
    queries: Path | None = None,
    self_study: int = 0,
    template: str = "",
    messages: str = "",
    experiment: Experiment = Experiment(),  # noqa: B008  (a frozen value)
    prompt: Prompt = DPT(),  # noqa: B008
    out: Path = Path("runs"),
    name: str | None = None,
) -> dict[str, Any]:
    """Train a prompt that makes the model answer as if it had read a text.

    Args:
        queries: A table of requests (CSV, TSV, JSON, JSONL or Parquet); no answers are needed. None: --self-study only.
        self_study: Let the model write this many requests itself, about parts of the text; they fill the template's one
            column, or are the user's message of a conversation.
        template: The input's text, with the table's columns in braces, as in "Question: {question} Answer:".
        messages: Instead of a template, the column of conversations (lists of messages in OpenAI's format); the text is
            then their system message.
        experiment: What to train, and how; --context names the text.
        prompt: The method.
        out: Folder that holds the runs.
        name: Name of the run's folder in it; None: made from the table's name, method and seed.
    """
    from softprompt.cli.terminal import Terminal
    from softprompt.training.distil import distil

    for flag in ("--task", "--data"):
        if any(argument.partition("=")[0] == flag for argument in command_arguments()):
            raise ValueError(f"{flag} is given, but distil makes its task of the queries; leave it out")
    terminal = Terminal()
    try:
        experiment = experiment.replace(prompt=prompt)
        run = distil(
            experiment,
            queries,
            template,
            messages=messages,
            self_study=self_study,
            out=out,
            name=name,
            callback=terminal,
        )
    finally:
        terminal.close()
    show_result(run)
    results = dict(run.results or {})
    show_distillation(results["distillation"])
    return {"command": "distil", "run": str(run.folder), "backbone": run.experiment.backbone, **results}


def show_distillation(results: dict[str, Any]) -> None:
    """Print how close the prompt, no context, and a context cut to the prompt's length are to the teacher."""
    names = {
        "teacher": f"the whole context, {results['context_tokens']} tokens",
        "prompt": f"the distilled prompt, {results['prompt_tokens']} vectors",
        "no_context": "no context",
        "context_start": f"the context's first {results['prompt_tokens']} tokens",
        "context_end": f"the context's last {results['prompt_tokens']} tokens",
    }
    console.print("on the test rows, against the model that reads the whole context:")
    show_table(
        [
            {
                "": label,
                "KL": f"{results[name]['kl']:.3f}",
                "same answer": f"{results[name]['agreement']:.3f}",
                "score": f"{results[name]['score']:.3f}",
            }
            for name, label in names.items()
            if name in results
        ]
    )
