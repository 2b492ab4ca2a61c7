"""`softprompt push`: a run's prompt on the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from softprompt.cli.console import console


def push_(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="USER/NAME")],
    private: bool = False,
    base_model: str | None = None,
    datasets: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Upload a run's prompt to the Hugging Face Hub, as a PEFT folder with a model card.

    The token is that of HF_TOKEN or of `hf auth login`. Rows, predictions and the run's record are not uploaded.

    Args:
        run: The run's folder.
        name: Its name on the Hub; created unless it exists.
        private: Create it for yourself only.
        base_model: The Hub id of the run's backbone; None: the recorded one.
        datasets: Hub ids of the data that it was trained on, for the model card.
    """
    from softprompt import runs
    from softprompt.export.hub import push_run

    url = push_run(runs.open_run(run), name, private=private, base_model=base_model, datasets=datasets)
    console.print(f"uploaded; use it as hub:{name}")
    return {"command": "push", "run": str(run), "name": name, "url": url}
