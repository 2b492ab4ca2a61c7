"""Experiment trackers (tensorboard, wandb, ...) as accelerate knows them, checked before there is a run to track."""

from typing import Any

_PACKAGES = {"comet_ml": "comet-ml"}
"""What a tracker's package is called where that is not the tracker's own name."""


class TrackerFailed(RuntimeError):
    """A tracker that is installed did not start."""


def check_tracker(name: str | None) -> None:
    """Refuse a tracker that is unknown or not installed, with which accelerate would log nothing and go on.

    Raises:
        ValueError: accelerate knows no tracker of that name.
        ModuleNotFoundError: its package is not installed.
    """
    if name is None:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(LOGGER_TYPE_TO_CLASS)
    if name not in known:
        raise ValueError(
            f"log_with is {name!r}, which is no tracker; choose one of {', '.join(known)}, or leave it out"
        )
    if name not in {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}:
        package = _PACKAGES.get(name, name)
        raise ModuleNotFoundError(
            f"log_with is {name!r}, and its package is not installed; install it with: pip install {package}"
        )


def start_tracker(accelerator: Any, name: str | None, config: dict[str, Any]) -> None:
    """Start the tracker that `accelerator` was made with.

    Raises:
        TrackerFailed: it does not start (no login, no server); its own reason is in the message.
    """
    if name is None:
        return
    try:
        accelerator.init_trackers("softprompt", config=config)
    except Exception as error:  # each tracker has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TrackerFailed(
            f"the tracker {name} does not start ({reason[:300]}); configure it first, or leave log_with out"
        ) from error
