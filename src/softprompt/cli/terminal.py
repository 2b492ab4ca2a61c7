"""What a person sees of a training: a progress bar on a terminal, plain lines elsewhere, all on stderr."""

import time
from typing import final

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from softprompt.cli.console import console, show_table
from softprompt.training.callbacks import Progress as Step

_QUIET = 10.0
"""Seconds after which a line is printed even though nothing happened but further steps."""

__all__ = ["Terminal", "console", "show_table"]


@final
class Terminal:
    """A `TrainingCallback` that shows loss, metric, rows a second and the time left."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._dev = ""
        """The latest development score with the step that it is of, for the bar."""
        self._first: tuple[int, float] | None = None
        """The first step that was seen, and when: what the time left is reckoned from."""
        self._printed = 0.0

    def on_stage(self, text: str) -> None:
        """Close the bar, if there is one, and say what begins."""
        self.close()
        console.print(f"{text} ...")

    def on_note(self, text: str) -> None:
        """Say it."""
        console.print(f"note: {text}")

    def on_step(self, progress: Step) -> None:
        """Move the bar; where stderr is no terminal, print the first step, each evaluation, and a line now and then."""
        dev = "" if progress.dev is None else f"  dev {progress.dev.metric} {progress.dev.value:.3f}"
        words = f"loss {progress.loss:.3f}{{}}  {progress.rows_per_second:.1f} rows/s"
        if not console.is_terminal:
            now = time.monotonic()
            first = self._first is None
            self._first = self._first or (progress.step, now)
            last = progress.step == progress.steps
            if first or last or dev or progress.step % 25 == 0 or now - self._printed >= _QUIET:
                self._printed = now
                left = "" if first or last else self._left(progress, now)
                console.print(f"step {progress.step}/{progress.steps}  {words.format(dev)}{left}")
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=progress.steps, completed=progress.step - 1)
        if dev:
            self._dev = f"{dev} (step {progress.step})"
        self._bar.update(self._task, completed=progress.step, description=words.format(self._dev))

    def _left(self, progress: Step, now: float) -> str:
        """The time left at the pace since the first step."""
        assert self._first is not None
        step, start = self._first
        seconds = (now - start) / max(progress.step - step, 1) * (progress.steps - progress.step)
        return f"  {seconds / 60:.0f} min left" if seconds >= 90 else f"  {seconds:.0f} s left"

    def close(self) -> None:
        """Leave the bar as it is and go on below it."""
        self._first, self._dev = None, ""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
