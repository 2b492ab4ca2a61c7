"""All that was asked of some prompts' ranks, as one value each."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from softprompt.analysis.rank.bench import Truncation
from softprompt.analysis.rank.functional import Functional, functional_rank
from softprompt.analysis.rank.spectrum import Spectrum
from softprompt.analysis.rank.subject import LoadedPrompt, subjects, views
from softprompt.training.callbacks import TrainingCallback


@final
@dataclass(frozen=True, kw_only=True)
class Measured:
    """One prompt's ranks."""

    subject: LoadedPrompt
    ranks: Mapping[str, Spectrum]
    """Of the finished prompt, by view; see `views`."""
    course: Mapping[int, Mapping[str, Spectrum]]
    """The same at each checkpoint, by step; empty unless asked for."""
    functional: Functional | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        length, dim = self.subject.matrix.shape
        values: dict[str, Any] = {
            "name": self.subject.name,
            "length": length // self.subject.prompt.depth,
            "depth": self.subject.prompt.depth,
            "dim": dim,
            "note": self.subject.note,
            "ranks": {name: _ranks_json(found) | {"values": list(found.values)} for name, found in self.ranks.items()},
        }
        if self.course:
            values["course"] = [
                {"step": step, **{name: _ranks_json(found) for name, found in at.items()}}
                for step, at in self.course.items()
            ]
        if self.functional is not None:
            values["functional"] = _functional_json(self.functional)
        return values


def measure(
    folder: str | Path,
    *,
    checkpoints: bool = False,
    functional: Truncation | None = None,
    backbone: str | None = None,
    watch: TrainingCallback | None = None,
) -> list[Measured]:
    """The ranks of a run, a PEFT folder, or every finished run in a folder of runs.

    Args:
        folder: one of these.
        checkpoints: also over the course of training.
        functional: also score cuts of the prompt, in this way.
        backbone: where the runs' backbone lies now; none: as `functional` says, else where they had it.
        watch: receives progress.

    Raises:
        FileNotFoundError, ValueError: as `subjects` and `functional_rank`.
    """
    backbone = backbone or (functional.backbone if functional else None)
    found = []
    for subject in subjects(folder, checkpoints=checkpoints, backbone=backbone, watch=watch):
        if subject.run is None and backbone and functional is None:
            raise ValueError(f"{subject.folder} is no run, and --backbone does nothing to it without --functional")
        found.append(
            Measured(
                # Without the backbone: else those of a whole folder of runs would stay in memory.
                subject=dataclasses.replace(subject, backbone=None),
                ranks=views(subject.matrix, subject.start, subject.prompt.depth),
                course={
                    step: views(matrix, subject.start, subject.prompt.depth) for step, matrix in subject.course.items()
                },
                functional=None if functional is None else functional_rank(subject, functional, watch=watch),
            )
        )
    return found


def _ranks_json(found: Spectrum) -> dict[str, Any]:
    return {"numerical": found.numerical, "stable": found.stable, "effective": found.effective}


def _functional_json(found: Functional) -> dict[str, Any]:
    return {
        "task": found.task,
        "backbone": found.backbone,
        "part": found.part,
        "split": found.split,
        "smallest": found.smallest,
        "paired": found.paired,
        "above_majority": found.above_majority,
        "full": dataclasses.asdict(found.full),
        "cuts": [
            {"rank": cut.rank, "score": cut.score.value, "ci_low": cut.score.ci_low, "ci_high": cut.score.ci_high}
            | {"drop": dataclasses.asdict(cut.drop)}
            for cut in found.cuts
        ],
    }
