"""Training progress on stderr: a progress bar on a terminal, plain lines elsewhere."""

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

_MAX_SILENCE = 10.0
"""Seconds after which a line is printed although there was no evaluation."""

__all__ = ["Terminal", "console", "show_table"]


@final
class Terminal:
    """A `TrainingCallback` that shows loss, metric, rows per second and remaining time."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._dev = ""
        """The latest development score and its step, for the bar."""
        self._first: tuple[int, float] | None = None
        """The first step and its time, from which the remaining time is estimated."""
        self._printed = 0.0

    def on_stage(self, text: str) -> None:
        """Close the bar, if there is one, and print the stage that begins."""
        self.close()
        console.print(f"{text} ...")

    def on_note(self, text: str) -> None:
        """Print a note."""
        console.print(f"note: {text}")

    def on_step(self, progress: Step) -> None:
        """Advance the bar; without a terminal, print the first step, each evaluation and a line now and then."""
        dev = "" if progress.dev is None else f"  dev {progress.dev.metric} {progress.dev.value:.3f}"
        text = f"loss {progress.loss:.3f}{{}}  {progress.rows_per_second:.1f} rows/s"
        if not console.is_terminal:
            now = time.monotonic()
            first = self._first is None
            self._first = self._first or (progress.step, now)
            last = progress.step == progress.steps
            if first or last or dev or progress.step % 25 == 0 or now - self._printed >= _MAX_SILENCE:
                self._printed = now
                left = "" if first or last else self._left(progress, now)
                console.print(f"step {progress.step}/{progress.steps}  {text.format(dev)}{left}")
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
        self._bar.update(self._task, completed=progress.step, description=text.format(self._dev))

    def _left(self, progress: Step, now: float) -> str:
        """The remaining time at the speed since the first step."""
        assert self._first is not None
        step, start = self._first
        seconds = (now - start) / max(progress.step - step, 1) * (progress.steps - progress.step)
        return f"  {seconds / 60:.0f} min left" if seconds >= 90 else f"  {seconds:.0f} s left"

    def close(self) -> None:
        """Stop the bar and leave it on the terminal."""
        self._first, self._dev = None, ""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
