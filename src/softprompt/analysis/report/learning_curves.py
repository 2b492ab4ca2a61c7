"""Learning curves of a group: mean and deviation over seeds, at the steps that every seed has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import final

from softprompt.analysis.report.groups import Group
from softprompt.analysis.report.read import Result


@final
@dataclass(frozen=True, kw_only=True)
class Curve:
    """The mean over seeds by step, and the standard deviation (0 for a single seed)."""

    steps: tuple[int, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]


def development_curve(group: Group) -> Curve:
    """The development score by step."""
    return _curve(
        [{point.step: point.dev for point in result.curve if point.dev is not None} for result in group.results]
    )


def loss_curve(group: Group, window: int) -> Curve:
    """The training loss, averaged over every `window` steps."""
    return _curve([_smoothed(result, window) for result in group.results])


def smoothing_window(groups: Sequence[Group]) -> int:
    """A thirtieth of the longest run, since the loss of one step is that of one batch."""
    return max(1, max((len(result.curve) for group in groups for result in group.results), default=0) // 30)


def _smoothed(result: Result, window: int) -> Mapping[int, float]:
    losses = [point.loss for point in result.curve]
    ends = range(window, len(losses) + 1, window)
    return {result.curve[end - 1].step: fmean(losses[end - window : end]) for end in ends}


def _curve(seeds: Sequence[Mapping[int, float]]) -> Curve:
    # Where a seed stopped early, the mean of the remaining ones would jump.
    steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
    values_by_step = [[seed[step] for seed in seeds] for step in steps]
    return Curve(
        steps=tuple(steps),
        means=tuple(map(fmean, values_by_step)),
        deviations=tuple(stdev(values) if len(values) > 1 else 0.0 for values in values_by_step),
    )
