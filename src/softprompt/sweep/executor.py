"""Where a sweep's trials run: in this process, or as tasks of a Ray cluster."""

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

from softprompt.config import Experiment
from softprompt.files import one_line
from softprompt.sweep.trial import BackboneCache, trial_name
from softprompt.training.callbacks import NamedCallback, NullCallback, TrainingCallback
from softprompt.training.concurrent import run_concurrently
from softprompt.training.step import Differentiate, differentiate

ExecutorName = Literal["local", "ray"]
"""`local`: this process; `ray`: a Ray cluster, with a task for each trial."""

R = TypeVar("R")
Job = Callable[[Experiment, BackboneCache, TrainingCallback, Differentiate], R]
"""What is done with one experiment; Ray workers import it by name."""
Executor = Callable[[Job[Any], Sequence[Experiment], Callable[[Experiment, str], Any]], Iterator[Any]]
"""Runs the job on every experiment, sorted by `sharing_key`, and yields the results as they come.

The last argument makes the result of an experiment whose worker died, given the reason.
"""

_WORKER_CACHE = BackboneCache()
"""The cache of a Ray worker, whose process runs one task after another."""


@contextmanager
def open_executor(
    name: ExecutorName,
    callback: TrainingCallback,
    *,
    concurrent: int = 1,
    ray_address: str | None = None,
    cpus: int | float = 1,
    gpus: int | float = 0,
) -> Iterator[Executor]:
    """Yield an executor, which can be used until the block ends.

    Args:
        callback: receives the progress of runs in this process.
        concurrent: the number of concurrent runs in this process.
        ray_address: the address of a Ray cluster; None: a local one for the duration of the block.
        cpus: CPUs per trial, for Ray.
        gpus: GPUs per trial, for Ray.

    Raises:
        ModuleNotFoundError: Ray is requested without the extra `sweep`.
        ConnectionError: there is no cluster at `ray_address`.
    """
    if name == "local":
        yield _local_executor(callback, concurrent)
        return
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError(
            "the executor ray needs Ray; install it in softprompt's clone with: pip install '.[sweep]'"
        )
    with _ray_cluster(ray_address) as ray:
        yield _ray_executor(ray, cpus, gpus)


def _local_executor(callback: TrainingCallback, concurrent: int) -> Executor:
    cache = BackboneCache()

    def execute(job: Job[R], experiments: Sequence[Experiment], on_lost: Callable[[Experiment, str], R]) -> Iterator[R]:
        for (*_, is_baseline), group in itertools.groupby(experiments, key=sharing_key):
            # A baseline has its own copy of the backbone, so baselines are trained one by one.
            count = 1 if is_baseline else concurrent
            jobs = (
                partial(job, item, cache, callback if count == 1 else NamedCallback(trial_name(item), callback))
                for item in group
            )
            yield from run_concurrently(jobs, count, callback.on_note)

    return execute


def sharing_key(experiment: Experiment) -> tuple[str, str, bool]:
    """Experiments with equal keys share a loaded backbone, and may run concurrently."""
    return experiment.backbone, experiment.backbone_dtype, experiment.baseline != "none"


@contextmanager
def _ray_cluster(ray_address: str | None) -> Iterator[Any]:
    """Yield Ray, connected; a connection that already existed stays open."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # sends no usage statistics
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # with --gpus 0 a worker sees the user's GPUs
    import ray

    if ray.is_initialized():
        yield ray
        return
    try:
        local = {} if ray_address else {"include_dashboard": False}
        ray.init(address=ray_address or "local", log_to_driver=False, logging_level="error", **local)
    except Exception as error:
        where = f"at {ray_address}; give the --ray-address of a running one" if ray_address else "on this machine"
        raise ConnectionError(f"Ray cannot be used {where} ({one_line(error)})") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _ray_executor(ray: Any, cpus: int | float, gpus: int | float) -> Executor:
    # Ray restarts a task whose worker died; its run then resumes from its last checkpoint.
    remote = ray.remote(_run_in_worker).options(num_cpus=cpus, num_gpus=gpus, max_retries=2)

    def execute(job: Job[R], experiments: Sequence[Experiment], on_lost: Callable[[Experiment, str], R]) -> Iterator[R]:
        pending = {remote.remote(job, experiment): experiment for experiment in experiments}
        try:
            while pending:
                [ready], _ = ray.wait(list(pending), num_returns=1)
                experiment = pending.pop(ready)
                try:
                    result = ray.get(ready)
                except ray.exceptions.RayError as error:
                    lines = str(error).strip().splitlines() or [type(error).__name__]
                    result = on_lost(experiment, f"its worker is lost: {lines[-1]}")
                yield result
        finally:
            for task in pending:  # after an interrupt
                ray.cancel(task, force=True)

    return execute


def _run_in_worker(job: Job[R], experiment: Experiment) -> R:
    return job(experiment, _WORKER_CACHE, NullCallback(), differentiate)
