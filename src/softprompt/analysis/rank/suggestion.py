"""Suggest a rank for DPT from prompts that are already trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from softprompt.analysis.rank.loaded_prompt import LoadedPrompt
from softprompt.analysis.rank.scorer import Part
from softprompt.analysis.rank.truncation import FunctionalRank

Scored = tuple[LoadedPrompt, FunctionalRank]


@final
@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A rank for DPT for one task on one backbone, and its evidence."""

    rank: int | None
    """None where no prompt beats the majority answer, or no rank tried was enough for one that does."""
    task: str
    backbone: str
    method: str
    length: int
    """Virtual tokens; in a deep prompt, of each matrix."""
    num_matrices: int
    """1, or the number of a deep prompt's matrices."""
    part: Part
    """What was truncated: the `update` for a DPT around an anchor, the whole `prompt` for one without."""
    evidence: Mapping[str, int | None]
    """The functional rank of each prompt by name; None: it does not beat the majority, or no rank tried was enough."""
    sentence: str
    """The suggestion and its evidence in words."""


def suggest_rank(scored: Sequence[Scored]) -> list[Suggestion]:
    """For each task, backbone, method, size and part: the largest `FunctionalRank.rank_by_significance` of its prompts.

    The largest over seeds, since the rank must suffice for the seed that needs most; at least 1, and never more than
    the prompt's shape allows. The update of a DPT has up to twice its rank, and yet that rank suffices for it, so no
    more is suggested. A prompt that does not beat the majority answer is ignored. Where one does beat it and loses at
    every rank that was tried, no rank is suggested.
    """
    groups: dict[tuple[str, str, str, int, int, Part], list[Scored]] = {}
    for loaded, functional in scored:
        method = "unknown" if loaded.run is None else loaded.run.experiment.method
        count = loaded.prompt.num_matrices
        key = (functional.task, functional.backbone, method, loaded.matrix.shape[0] // count, count, functional.part)
        groups.setdefault(key, []).append((loaded, functional))
    return [_suggestion(*key, members) for key, members in groups.items()]


def _suggestion(
    task: str, backbone: str, method: str, length: int, num_matrices: int, part: Part, members: Sequence[Scored]
) -> Suggestion:
    evidence = {
        loaded.name: functional.rank_by_significance if functional.above_majority else None
        for loaded, functional in members
    }
    counted = [(loaded, functional) for loaded, functional in members if functional.above_majority]
    needed = [
        min(max(functional.rank_by_significance, 1), _most(loaded, part))
        for loaded, functional in counted
        if functional.rank_by_significance is not None
    ]
    insufficient = [loaded.name for loaded, functional in counted if functional.rank_by_significance is None]
    # A prompt that loses at every rank tried needs a larger one than all the others.
    rank = max(needed) if needed and not insufficient else None
    return Suggestion(
        rank=rank,
        task=task,
        backbone=backbone,
        method=method,
        length=length,
        num_matrices=num_matrices,
        part=part,
        evidence=evidence,
        sentence=_too_small(insufficient, counted) if insufficient else _sentence(rank, members, counted),
    )


def _most(loaded: LoadedPrompt, part: Part) -> int:
    """The rank that a DPT with an anchor was trained with, for its update; else the largest of the prompt's shape."""
    update_rank = loaded.run.experiment.prompt.update_rank if loaded.run and part == "update" else None
    return loaded.max_rank if update_rank is None else update_rank


def _too_small(names: Sequence[str], members: Sequence[Scored]) -> str:
    insufficient = [functional for loaded, functional in members if loaded.name in names]
    largest = max(truncated.rank for functional in insufficient for truncated in functional.truncations)
    return (
        f"No rank can be suggested: {', '.join(names)} still loses at rank {largest}, the largest that was tried; "
        "try larger ones."
    )


def _sentence(rank: int | None, members: Sequence[Scored], counted: Sequence[Scored]) -> str:
    split, part, total, count = members[0][1].split, members[0][1].part, len(members), len(counted)
    if rank is None:
        return (
            f"No rank can be suggested: none of {total} prompts beats the majority answer on its {split} rows; "
            "train longer, or score more rows."
        )
    rows = min(functional.full.n for _, functional in counted)
    truncations = [truncated for _, functional in counted for truncated in functional.truncations]
    largest_tried = max(truncated.rank for truncated in truncations)
    losses = [truncated.drop.ci_high for truncated in truncations if truncated.rank == rank]
    flags = f"--rank {rank}" if part == "update" else f"--anchor none --rank {rank}"
    sentence = (
        f"Try {flags}: the largest, over {count} of {total} prompts, of each prompt's smallest rank at and above which "
        f"no truncation loses significantly (one-sided paired test, 2.5 %; {rows} {split} rows)."
    )
    if losses:
        sentence += f" At that rank a loss of up to {max(0.0, *losses):.3f} is not ruled out."
    if any((functional.rank_by_significance or 0) > _most(loaded, part) for loaded, functional in counted):
        sentence += f" Truncations of the {part} needed more, but the rank that a DPT was trained with suffices for it."
    if rank == largest_tried:
        sentence += " No larger rank was tried: more might help; train with the method plain, and truncate that."
    if count < 3:
        sentence += f" {count} prompt{'s are' if count > 1 else ' is'} little evidence: train three seeds."
    return sentence
