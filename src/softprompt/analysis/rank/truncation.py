"""Functional rank: the rank to which a trained prompt can be truncated before its task's score suffers."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.analysis.rank.loaded_prompt import LoadedPrompt, spectra
from softprompt.analysis.rank.scorer import Part, RankScorer, Truncation
from softprompt.analysis.rank.spectrum import truncated_svd
from softprompt.evaluation.significance import Drop, drop
from softprompt.prompts import Folded
from softprompt.tasks import METRICS, Score
from softprompt.training.callbacks import NullCallback, TrainingCallback


@final
@dataclass(frozen=True, kw_only=True)
class TruncatedScore:
    """The score of a prompt truncated to a rank."""

    rank: int
    score: Score
    drop: Drop
    """The loss against the full prompt's score on the same rows."""


@final
@dataclass(frozen=True, kw_only=True)
class FunctionalRank:
    """A prompt's score at every rank that was tried."""

    task: str
    """The task's name."""
    backbone: str
    """The backbone that scored it."""
    part: Part
    """What was truncated."""
    split: str
    """The split that scored it, or `file` for the rows of a file."""
    full: Score
    """The score of the prompt as it was trained."""
    truncations: tuple[TruncatedScore, ...]
    """By rank, ascending."""

    @property
    def rank_by_interval(self) -> int | None:
        """The smallest rank tried whose score is within the full score's 95 % interval, or above it."""
        return next(
            (truncated.rank for truncated in self.truncations if truncated.score.value >= self.full.ci_low), None
        )

    @property
    def rank_by_significance(self) -> int | None:
        """The smallest rank tried such that it and every larger one lose nothing significant; None if the last does.

        Stricter than `rank_by_interval` in two ways: the test is paired by row, and a rank that scores well by luck
        while larger ranks lose is not taken.
        """
        smallest = None
        for truncated in reversed(self.truncations):
            if truncated.drop.significant:
                break
            smallest = truncated.rank
        return smallest

    @property
    def above_majority(self) -> bool:
        """Whether the full score's interval lies above the majority score; if not, its ranks mean little."""
        return self.full.ci_low > self.full.majority


def ranks_up_to(most: int) -> list[int]:
    """Every rank up to 8, then four per doubling, and `most` itself.

    >>> ranks_up_to(40)
    [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40]
    """
    ranks, step, rank = list(range(1, min(most, 8) + 1)), 2, 8
    while rank + step < most:
        rank += step
        ranks.append(rank)
        if rank >= 8 * step:
            step *= 2
    return ranks if ranks and ranks[-1] == most else [*ranks, most]


def functional_rank(
    loaded: LoadedPrompt,
    truncation: Truncation = Truncation(),  # noqa: B008  (a frozen value)
    *,
    callback: TrainingCallback | None = None,
) -> FunctionalRank:
    """Score a prompt with its matrix replaced by its best rank-k approximation, for several k.

    With `part="update"` the score at rank k is that of `P0 + truncated_svd(P - P0, k)`; at rank 0 that is the initial
    prompt. A method that also shifts the input's own embeddings keeps the trained shift in full. Each layer of a deep
    prompt is truncated by itself. Costs one evaluation per rank.

    Args:
        loaded: the prompt.
        truncation: what is truncated, to which ranks, and which rows score it.
        callback: receives progress, rank by rank.

    Raises:
        ValueError: a rank that the matrix cannot have, an unknown initial prompt with `part="update"`, a split without
            rows, or a prompt that cannot be scored.
    """
    callback = callback or NullCallback()
    start, ranks = _start(loaded, truncation.part), _ranks(loaded, truncation)
    matrix = loaded.matrix if start is None else loaded.matrix - start
    scorer = RankScorer.of(loaded, truncation)
    full, full_answers = scorer.score(loaded.prompt)
    callback.on_note(f"{loaded.name}: full prompt, {full.metric} {full.value:.3f} on {full.n} {scorer.rows_name} rows")
    truncations = []
    for rank in ranks:
        truncated = torch.cat([truncated_svd(part, rank) for part in matrix.chunk(loaded.prompt.num_matrices)])
        score, answers = scorer.score(_with_matrix(loaded.prompt, truncated if start is None else start + truncated))
        loss = drop(METRICS[full.metric], full_answers, answers)
        callback.on_note(f"{loaded.name}: rank {rank} of the {truncation.part}, {score.metric} {score.value:.3f}")
        truncations.append(TruncatedScore(rank=rank, score=score, drop=loss))
    return FunctionalRank(
        task=scorer.task.name,
        backbone=scorer.prompted.backbone.source,
        part=truncation.part,
        split=scorer.rows_name,
        full=full,
        truncations=tuple(truncations),
    )


def _start(loaded: LoadedPrompt, part: Part) -> Float[Tensor, "prompt dim"] | None:
    if part == "prompt":
        return None
    if loaded.start is None:
        raise ValueError(
            f"the update of {loaded.name} cannot be truncated, since its initial prompt P0 is not known "
            f"({loaded.start_missing}); truncate the prompt itself with --part prompt"
        )
    return loaded.start


def _ranks(loaded: LoadedPrompt, truncation: Truncation) -> list[int]:
    least = 0 if truncation.part == "update" else 1
    if impossible := [rank for rank in truncation.ranks if not least <= rank <= loaded.max_rank]:
        raise ValueError(
            f"rank {impossible[0]} cannot be tried on {loaded.name}; choose from {least} to {loaded.max_rank}"
        )
    if truncation.ranks:
        return sorted(set(truncation.ranks))
    by_view = spectra(loaded.matrix, loaded.start, loaded.prompt.num_matrices)
    numerical = max(spectrum.numerical for view, spectrum in by_view.items() if view.startswith(truncation.part))
    ranks = ranks_up_to(max(numerical, 1))
    return [0, *ranks] if truncation.part == "update" else ranks


def _with_matrix(prompt: Folded, matrix: Float[Tensor, "prompt dim"]) -> Folded:
    return Folded(matrix, prompt.position_table, prompt.input_table, prompt.beyond, prompt.num_matrices)
