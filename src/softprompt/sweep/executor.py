"""Where trials run: one after another in this process, or as tasks of a Ray cluster."""

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

from softprompt.config import Experiment
from softprompt.sweep.trial import BackboneCache, sentence, trial_name
from softprompt.training.callbacks import NamedCallback, NullCallback, TrainingCallback
from softprompt.training.concurrent import run_concurrently
from softprompt.training.step import Differentiate, differentiate

ExecutorName = Literal["local", "ray"]
"""`local`: this process; `ray`: a cluster, each trial a task."""

R = TypeVar("R")
Work = Callable[[Experiment, BackboneCache, TrainingCallback, Differentiate], R]
"""What is done with one experiment; it must be importable by name, to be found by the workers of a cluster."""
Executor = Callable[[Work[Any], Sequence[Experiment], Callable[[Experiment, str], Any]], Iterator[Any]]
"""Does the work on every experiment and yields what comes of it, as it comes.

The last argument makes an outcome of an experiment whose worker died, and the reason.
"""

_HELD = BackboneCache()
"""A Ray worker's own: its process takes one task after another."""


@contextmanager
def opened(
    executor: ExecutorName,
    watch: TrainingCallback,
    *,
    at_once: int = 1,
    ray_address: str | None = None,
    cpus: int | float = 1,
    gpus: int | float = 0,
) -> Iterator[Executor]:
    """An engine to work with, until the block ends.

    Args:
        executor: which.
        watch: who is told how a training in this process goes.
        at_once: trainings that go on together in this process, on one backbone.
        ray_address: of a running Ray cluster; none: one of this machine alone, for the time of the block.
        cpus: processors a trial, of Ray.
        gpus: graphics processors a trial, of Ray.

    Raises:
        ModuleNotFoundError: Ray without the extra `sweep`.
        ConnectionError: there is no cluster at `ray_address`.
    """
    if executor == "local":
        held = BackboneCache()

        def each(work: Work[R], items: Sequence[Experiment], lost: Callable[[Experiment, str], R]) -> Iterator[R]:
            # A baseline has a copy of the whole backbone, so these are trained one by one.
            ordered = sorted(items, key=_room) if at_once > 1 else items
            for (*_, baseline), group in itertools.groupby(ordered, key=_room):
                count = 1 if baseline else at_once
                told = ((one, watch if count == 1 else NamedCallback(trial_name(one), watch)) for one in group)
                works = (partial(work, one, held, watcher) for one, watcher in told)
                yield from run_concurrently(works, count, watch.note)

        yield each
        return
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("the executor ray needs Ray; install it with: pip install 'softprompt[sweep]'")
    with _cluster(ray_address) as ray:
        yield _ray_each(ray, cpus, gpus)


def _room(experiment: Experiment) -> tuple[str, str, bool]:
    """What trainings at a time have in common."""
    return experiment.backbone, experiment.backbone_dtype, experiment.baseline != "none"


@contextmanager
def _cluster(ray_address: str | None) -> Iterator[Any]:
    """Ray, connected; a cluster that was there before is left as it was."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # sends nothing anywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # with --gpus 0 a worker sees what the user sees
    import ray

    if ray.is_initialized():
        yield ray
        return
    try:
        local = {} if ray_address else {"include_dashboard": False}
        ray.init(address=ray_address or "local", log_to_driver=False, logging_level="error", **local)
    except Exception as error:
        where = f"at {ray_address}; give the --ray-address of a running one" if ray_address else "on this machine"
        raise ConnectionError(f"Ray cannot be used {where} ({sentence(error)})") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _ray_each(ray: Any, cpus: int | float, gpus: int | float) -> Executor:
    # A task whose worker dies is started again; its run then goes on from its last checkpoint.
    remote = ray.remote(_remote).options(num_cpus=cpus, num_gpus=gpus, max_retries=2)

    def each(work: Work[R], items: Sequence[Experiment], lost: Callable[[Experiment, str], R]) -> Iterator[R]:
        waiting = {remote.remote(work, item): item for item in items}
        try:
            while waiting:
                [ready], _ = ray.wait(list(waiting), num_returns=1)
                item = waiting.pop(ready)
                try:
                    outcome = ray.get(ready)
                except ray.exceptions.RayError as error:
                    said = str(error).strip().splitlines() or [type(error).__name__]
                    outcome = lost(item, f"its worker is lost: {said[-1]}")
                yield outcome
        finally:
            for task in waiting:  # of an interrupted sweep
                ray.cancel(task, force=True)

    return each


def _remote(work: Work[R], item: Experiment) -> R:
    return work(item, _HELD, NullCallback(), differentiate)
