"""Learning curves of a group: mean and spread over its seeds at the steps that all of them have."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from softprompt.analysis.report.groups import Group
from softprompt.analysis.report.read import Result


@final
@dataclass(frozen=True, kw_only=True)
class Curve:
    """A mean over seeds by step, with the standard deviation where there are several seeds."""

    steps: tuple[int, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]


def development(group: Group) -> Curve:
    """The development score."""
    return _curve([{point.step: point.dev for point in one.curve if point.dev is not None} for one in group.results])


def loss(group: Group, window: int) -> Curve:
    """The training loss, a point for each `window` steps: their mean."""
    return _curve([_smoothed(one, window) for one in group.results])


def window(groups: Sequence[Group]) -> int:
    """A thirtieth of the longest run: a step's loss is that of one batch."""
    return max(1, max((len(one.curve) for group in groups for one in group.results), default=0) // 30)


def _smoothed(result: Result, window: int) -> Mapping[int, float]:
    losses = [point.loss for point in result.curve]
    ends = range(window, len(losses) + 1, window)
    return {result.curve[end - 1].step: statistics.fmean(losses[end - window : end]) for end in ends}


def _curve(seeds: Sequence[Mapping[int, float]]) -> Curve:
    # A step that only some seeds reached would bend the mean by who is left.
    steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
    several = [[seed[step] for seed in seeds] for step in steps]
    return Curve(
        steps=tuple(steps),
        means=tuple(map(statistics.fmean, several)),
        deviations=tuple(statistics.stdev(values) if len(values) > 1 else 0.0 for values in several),
    )
