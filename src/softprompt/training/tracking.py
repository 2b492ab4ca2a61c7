"""Experiment trackers (TensorBoard, Weights & Biases, ...) through accelerate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from accelerate import Accelerator

from softprompt.files import one_line

_PACKAGES = {"comet_ml": "comet-ml"}
"""The package of a tracker, if its name differs from the tracker's."""


class TrackerFailed(RuntimeError):
    """An installed tracker did not start."""


def check_tracker(name: str | None) -> None:
    """Check that the tracker `name` is known and installed; accelerate would silently log nothing.

    Raises:
        ValueError: accelerate has no tracker of that name.
        ModuleNotFoundError: the tracker's package is not installed.
    """
    if name is None:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(LOGGER_TYPE_TO_CLASS)
    if name not in known:
        raise ValueError(f"log_with is {name!r}, which is not a tracker; choose one of {', '.join(known)}, or omit it")
    if name not in {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}:
        package = _PACKAGES.get(name, name)
        raise ModuleNotFoundError(
            f"log_with is {name!r}, but its package is not installed; install it with: pip install {package}"
        )


@final
class Tracker:
    """Sends a run's settings and metrics to the tracker `name`; without a name it does nothing.

    Raises:
        TrackerFailed: the tracker does not start (no login, no server); the message has its own reason.
    """

    def __init__(self, name: str | None, folder: Path, settings: Mapping[str, Any], *, cpu: bool) -> None:
        self._accelerator: Any = None
        if name is None:
            return
        self._accelerator = Accelerator(log_with=name, project_dir=folder, cpu=cpu)
        try:
            self._accelerator.init_trackers("softprompt", config=_flatten(settings))
        except Exception as error:  # every tracker has its own error types
            raise TrackerFailed(
                f"the tracker {name} does not start ({one_line(error)[:300]}); configure it first, or omit log_with"
            ) from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of one step."""
        if self._accelerator is not None:
            self._accelerator.log(dict(metrics), step=step)

    def finish(self) -> None:
        """Close the trackers without `end_training`, which would also end the process group."""
        for tracker in self._accelerator.trackers if self._accelerator is not None else ():
            tracker.finish()


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names such as `prompt.rank`, since some trackers accept no nesting."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
