"""Measure the ranks of one prompt or many, as plain values."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from softprompt.analysis.rank.loaded_prompt import LoadedPrompt, load_prompts, spectra
from softprompt.analysis.rank.scorer import Truncation
from softprompt.analysis.rank.spectrum import Spectrum
from softprompt.analysis.rank.truncation import FunctionalRank, functional_rank
from softprompt.training.callbacks import NullCallback, TrainingCallback


@final
@dataclass(frozen=True, kw_only=True)
class PromptRanks:
    """The ranks of one prompt."""

    loaded: LoadedPrompt
    """Without its backbone."""
    spectra: Mapping[str, Spectrum]
    """Of the trained prompt, by view; see the function `spectra`."""
    history: Mapping[int, Mapping[str, Spectrum]]
    """The same at each checkpoint, by step; empty unless asked for."""
    functional: FunctionalRank | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        length, dim = self.loaded.matrix.shape
        values: dict[str, Any] = {
            "name": self.loaded.name,
            "length": length // self.loaded.prompt.num_matrices,
            "num_matrices": self.loaded.prompt.num_matrices,
            "dim": dim,
            "note": self.loaded.note,
            "ranks": {
                view: _spectrum_json(spectrum) | {"values": list(spectrum.values)}
                for view, spectrum in self.spectra.items()
            },
        }
        if self.history:
            values["history"] = [
                {"step": step, **{view: _spectrum_json(spectrum) for view, spectrum in by_view.items()}}
                for step, by_view in self.history.items()
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
    callback: TrainingCallback | None = None,
) -> list[PromptRanks]:
    """The ranks of a run, a PEFT folder, or every finished run in a folder of runs.

    Args:
        folder: one of these.
        checkpoints: also measure at each checkpoint.
        functional: also score the prompt truncated in this way.
        backbone: where the runs' backbone is now; None: as `functional` says, else where it was during training.
        callback: receives progress.

    Raises:
        FileNotFoundError, ValueError: as `load_prompts` and `functional_rank`.
    """
    backbone = backbone or (functional.backbone if functional else None)
    measured = []
    for loaded in load_prompts(folder, checkpoints=checkpoints, backbone=backbone, callback=callback):
        if loaded.run is None and backbone and functional is None:
            raise ValueError(f"{loaded.folder} is not a run, so --backbone has no effect without --functional")
        if loaded.adapter is not None and backbone and (note := loaded.adapter.base_note(backbone)):
            (callback or NullCallback()).on_note(note)
        num_matrices = loaded.prompt.num_matrices
        measured.append(
            PromptRanks(
                loaded=dataclasses.replace(loaded, backbone=None),  # else every run's backbone would stay in memory
                spectra=spectra(loaded.matrix, loaded.start, num_matrices),
                history={step: spectra(matrix, loaded.start, num_matrices) for step, matrix in loaded.history.items()},
                functional=None if functional is None else functional_rank(loaded, functional, callback=callback),
            )
        )
    return measured


def _spectrum_json(spectrum: Spectrum) -> dict[str, Any]:
    return {"numerical": spectrum.numerical, "stable": spectrum.stable, "effective": spectrum.effective}


def _functional_json(functional: FunctionalRank) -> dict[str, Any]:
    return {
        "task": functional.task,
        "backbone": functional.backbone,
        "part": functional.part,
        "split": functional.split,
        "rank_by_interval": functional.rank_by_interval,
        "rank_by_significance": functional.rank_by_significance,
        "above_majority": functional.above_majority,
        "full": dataclasses.asdict(functional.full),
        "truncations": [
            {
                "rank": truncated.rank,
                "score": truncated.score.value,
                "ci_low": truncated.score.ci_low,
                "ci_high": truncated.score.ci_high,
            }
            | {"drop": dataclasses.asdict(truncated.drop)}
            for truncated in functional.truncations
        ],
    }
