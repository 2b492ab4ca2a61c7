"""What rank to give to DPT, from prompts that were trained already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from softprompt.analysis.rank.functional import Functional
from softprompt.analysis.rank.subject import LoadedPrompt


@final
@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A rank for DPT, for one task on one backbone, and what it rests on."""

    rank: int | None
    """None where no prompt beats the majority answer, or no rank tried was enough for one that does."""
    task: str
    backbone: str
    method: str
    length: int
    """Rows of the prompt, of each layer's in a deep one."""
    depth: int
    """Layers that have a prompt of their own."""
    evidence: Mapping[str, int | None]
    """The functional rank of each prompt by name; none: it does not beat the majority, or no rank tried was enough."""
    sentence: str
    """How it was found."""


def suggest_rank(measured: Sequence[tuple[LoadedPrompt, Functional]]) -> list[Suggestion]:
    """For each task, backbone, method and size: the largest functional rank (`Functional.paired`) over its prompts.

    The largest over seeds, since a rank has to do for the seed that needs most; at least 1, and never more than the
    prompt's shape allows. A prompt that does not beat the majority answer says nothing and is left out;
    where one does, and loses at every rank that was tried, no rank is suggested.

    Raises:
        ValueError: it was not the prompt itself that was cut.
    """
    groups: dict[tuple[str, str, str, int, int], list[tuple[LoadedPrompt, Functional]]] = {}
    for subject, found in measured:
        if found.part != "prompt":
            raise ValueError(f"a rank for DPT is that of the whole prompt, and {found.part} was cut; cut the prompt")
        method = "unknown" if subject.run is None else subject.run.experiment.method
        depth = subject.prompt.depth
        key = (found.task, found.backbone, method, subject.matrix.shape[0] // depth, depth)
        groups.setdefault(key, []).append((subject, found))
    return [_suggestion(*key, members) for key, members in groups.items()]


def _suggestion(
    task: str, backbone: str, method: str, length: int, depth: int, members: Sequence[tuple[LoadedPrompt, Functional]]
) -> Suggestion:
    evidence = {subject.name: found.paired if found.above_majority else None for subject, found in members}
    needed = [max(rank, 1) for rank in evidence.values() if rank is not None]
    short = [subject.name for subject, found in members if found.above_majority and found.paired is None]
    most = min(subject.most for subject, _ in members)
    # One that needs more than was tried needs the most of all; the others' ranks are too small for it.
    rank = min(max(needed), most) if needed and not short else None
    return Suggestion(
        rank=rank,
        task=task,
        backbone=backbone,
        method=method,
        length=length,
        depth=depth,
        evidence=evidence,
        sentence=_too_few(short, members) if short else _sentence(rank, len(needed), members),
    )


def _too_few(short: Sequence[str], members: Sequence[tuple[LoadedPrompt, Functional]]) -> str:
    tried = max(cut.rank for subject, found in members if subject.name in short for cut in found.cuts)
    return (
        f"No rank can be suggested: {', '.join(short)} still loses at rank {tried}, the largest that was tried; "
        "try larger ones."
    )


def _sentence(rank: int | None, count: int, members: Sequence[tuple[LoadedPrompt, Functional]]) -> str:
    split, total = members[0][1].split, len(members)
    if rank is None:
        return (
            f"No rank can be suggested: none of {total} prompts beats the majority answer on its {split} rows; "
            "train longer, or score more rows."
        )
    rows = min(found.full.n for _, found in members)
    tops = [max(cut.rank for cut in found.cuts) for _, found in members]
    losses = [cut.drop.ci_high for _, found in members for cut in found.cuts if cut.rank == rank]
    words = (
        f"Try --rank {rank}: the largest, over {count} of {total} prompts, of the smallest rank from which on no cut "
        f"shows a loss (one-sided paired test at 2.5 %) on {rows} {split} rows."
    )
    if losses:
        words += f" At that rank a loss of up to {max(0.0, *losses):.3f} is not ruled out."
    if rank == max(tops):
        words += " No larger rank was tried: more might help; train with the method plain, and cut that."
    if count < 3:
        words += f" {count} prompt{'s are' if count > 1 else ' is'} little evidence: train three seeds."
    return words
