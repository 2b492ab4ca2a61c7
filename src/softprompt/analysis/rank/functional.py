"""Functional rank: to what rank a finished prompt can be cut before its task's score suffers."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.analysis.rank.bench import Part, RankScorer, Truncation
from softprompt.analysis.rank.spectrum import best_part
from softprompt.analysis.rank.subject import LoadedPrompt, views
from softprompt.evaluation.significance import Drop, drop
from softprompt.prompts import Folded
from softprompt.tasks import METRICS, Score
from softprompt.training.callbacks import NullCallback, TrainingCallback


@final
@dataclass(frozen=True, kw_only=True)
class Cut:
    """The score of a prompt that was cut to a rank."""

    rank: int
    score: Score
    drop: Drop
    """What is lost from the full prompt's score, on the same rows."""


@final
@dataclass(frozen=True, kw_only=True)
class Functional:
    """A prompt's score at every rank that was tried."""

    task: str
    """The task's name."""
    backbone: str
    """What scored it."""
    part: Part
    split: str
    full: Score
    cuts: tuple[Cut, ...]
    """By rank, rising."""

    @property
    def smallest(self) -> int | None:
        """The smallest rank tried whose score is within the full score's 95 % interval, or above it."""
        return next((cut.rank for cut in self.cuts if cut.score.value >= self.full.ci_low), None)

    @property
    def paired(self) -> int | None:
        """The smallest rank tried from which on no cut shows a loss on the same rows; none if the last one does.

        Stricter than `smallest` twice: it counts the rows that go wrong by the cut alone, and one lucky rank below
        others that lose is not taken.
        """
        found = None
        for cut in reversed(self.cuts):
            if cut.drop.significant:
                break
            found = cut.rank
        return found

    @property
    def above_majority(self) -> bool:
        """Whether the full score's interval lies above the majority score: else there is nothing that a rank does."""
        return self.full.ci_low > self.full.majority


def ranks_up_to(most: int) -> list[int]:
    """Every rank up to 8, then four for each doubling, and `most` itself.

    >>> ranks_up_to(40)
    [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40]
    """
    found, step, rank = list(range(1, min(most, 8) + 1)), 2, 8
    while rank + step < most:
        rank += step
        found.append(rank)
        if rank >= 8 * step:
            step *= 2
    return found if found and found[-1] == most else [*found, most]


def functional_rank(
    subject: LoadedPrompt,
    cutting: Truncation = Truncation(),  # noqa: B008  (a frozen value)
    *,
    watch: TrainingCallback | None = None,
) -> Functional:
    """The task's score of `subject` when its matrix is cut to its best rank-k part, for several k.

    A method that also shifts the input's own embeddings keeps that shift whole, and of a deep prompt each layer's
    matrix is cut. Costs one evaluation a rank.

    Args:
        subject: the prompt.
        cutting: what is cut, to which ranks, and which rows score it.
        watch: receives progress, rank by rank.

    Raises:
        ValueError: a rank that the matrix cannot have, a split without rows, or a prompt that cannot be cut or scored.
    """
    watch = watch or NullCallback()
    start, tried = _start(subject, cutting.part), _ranks(subject, cutting)
    matrix = subject.matrix if start is None else subject.matrix - start
    bench = RankScorer.of(subject, cutting)
    full, answers = bench.score(subject.prompt)
    watch.on_note(f"{subject.name}: full prompt, {full.metric} {full.value:.3f} on {full.n} {bench.rows_of} rows")
    cuts = []
    for rank in tried:
        kept = torch.cat([best_part(layer, rank) for layer in matrix.chunk(subject.prompt.depth)])
        found, given = bench.score(_with_matrix(subject.prompt, kept if start is None else start + kept))
        lost = drop(METRICS[full.metric], answers, given)
        watch.on_note(f"{subject.name}: rank {rank}, {found.metric} {found.value:.3f}")
        cuts.append(Cut(rank=rank, score=found, drop=lost))
    return Functional(
        task=bench.task.name,
        backbone=bench.prompted.backbone.source,
        part=cutting.part,
        split=bench.rows_of,
        full=full,
        cuts=tuple(cuts),
    )


def _start(subject: LoadedPrompt, part: Part) -> Float[Tensor, "prompt dim"] | None:
    if part == "prompt":
        return None
    if subject.start is None:
        raise ValueError(
            f"what {subject.name} learned cannot be cut, since its first prompt is not known; cut the prompt itself"
        )
    return subject.start


def _ranks(subject: LoadedPrompt, cutting: Truncation) -> list[int]:
    least = 0 if cutting.part == "update" else 1
    if wrong := [rank for rank in cutting.ranks if not least <= rank <= subject.most]:
        raise ValueError(f"rank {wrong[0]} cannot be tried on {subject.name}; choose from {least} to {subject.most}")
    if cutting.ranks:
        return sorted(set(cutting.ranks))
    spectra = views(subject.matrix, subject.start, subject.prompt.depth)
    own = max(found.numerical for name, found in spectra.items() if name.startswith(cutting.part))
    found = ranks_up_to(max(own, 1))
    return [0, *found] if cutting.part == "update" else found


def _with_matrix(prompt: Folded, matrix: Float[Tensor, "prompt dim"]) -> Folded:
    return Folded(matrix, prompt.position_table, prompt.input_table, prompt.beyond, prompt.depth)
