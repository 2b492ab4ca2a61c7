"""Upload a run to the Hugging Face Hub: its PEFT folder and a model card that the Hub can read."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id  # type: ignore[attr-defined]  # httpx or httpx2

from softprompt import files
from softprompt.models.peft_folder import CONFIG, WEIGHTS
from softprompt.runs import HEAD, Run

_OPTIONAL = (HEAD, "curve.png")
_PIPELINES = {"causal": "text-generation", "encoder_decoder": "text2text-generation"}


def push_run(
    run: Run, name: str, *, private: bool = False, base_model: str | None = None, datasets: Sequence[str] = ()
) -> str:
    """Upload the PEFT folder of a finished run as one commit; returns its address.

    Records, predictions and rows stay here. The token is huggingface_hub's: `HF_TOKEN`, or that of `hf auth login`.

    Args:
        name: `USER/NAME` on the Hub; created unless it exists.
        private: create it for yourself only; False: as the owner's default is, public unless changed.
        base_model: the Hub id of the run's backbone; None: the recorded one.
        datasets: Hub ids of the training data, for the card.

    Raises:
        ValueError: the run is unfinished or has no PEFT files, or a name cannot be one of the Hub's.
        PermissionError: the Hub refuses the token.
        ConnectionError: the Hub cannot be reached.
    """
    if run.results is None:
        raise ValueError(f"run {run.folder} is not finished; continue with: softprompt train --resume {run.folder}")
    if not (run.folder / WEIGHTS).is_file():
        raise ValueError(
            f"run {run.folder} has no PEFT files (its README.md says why); push a run whose prompt PEFT can express"
        )
    base = base_model or str(run.record["backbone"]["base"])
    if base_model is None and Path(base).is_absolute():
        raise ValueError(
            f"the backbone of run {run.folder} is {base} on this machine; give --base-model the Hub id of these weights"
        )
    for value, flag in ((name, "the name"), (base, "the base model"), *((data, "a data set") for data in datasets)):
        _check_id(value, flag)
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(
            "HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it where the hub can be reached"
        )
    with tempfile.TemporaryDirectory() as draft, _hub_errors(name):
        folder = Path(draft)
        _write(run, folder, base, datasets)
        api = HfApi()
        api.create_repo(name, private=private or None, exist_ok=True)  # None: as the owner's default is
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {run.name}")
    return str(commit.commit_url)


def model_card(run: Run, base_model: str, datasets: Sequence[str] = ()) -> ModelCard:
    """The run's README with the Hub's metadata: tags, base model, and the test score as `model-index`."""
    assert run.results is not None
    task, results, recorded = run.task, run.results, run.record["backbone"]
    pipeline = "text-classification" if task.is_classification else _PIPELINES.get(recorded["architecture"])
    result: dict[str, Any] = {
        "task_type": pipeline or "other",
        "task_name": task.name,
        "dataset_type": datasets[0] if datasets else task.name,
        "dataset_name": task.name,
        "dataset_split": "test",
    }
    scores = {results["metric"]: results["test"], **results.get("extra_metrics", {})}
    data = ModelCardData(
        base_model=base_model,
        library_name="peft",
        tags=["softprompt", "prompt-tuning", run.experiment.method, f"base_model:adapter:{base_model}"],
        pipeline_tag=pipeline,
        datasets=list(datasets) or None,
        metrics=list(scores),
        model_name=run.name,
        eval_results=[
            EvalResult(metric_type=metric, metric_name=metric, metric_value=round(float(value), 6), **result)
            for metric, value in scores.items()
        ],
    )
    text = (run.folder / "README.md").read_text(encoding="utf-8").replace(str(recorded["base"]), base_model)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _write(run: Run, folder: Path, base_model: str, datasets: Sequence[str]) -> None:
    files.write_text(folder / "README.md", str(model_card(run, base_model, datasets)))
    config: dict[str, Any] = {**files.read_json(run.folder / CONFIG), "base_model_name_or_path": base_model}
    files.write_text(folder / CONFIG, json.dumps(config, indent=1))
    for file in (WEIGHTS, *_OPTIONAL):
        if (run.folder / file).is_file():
            shutil.copyfile(run.folder / file, folder / file)


def _check_id(value: str, what: str) -> None:
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise ValueError(f"{what} is {value!r}, which is not an id on the Hub; write USER/NAME") from error


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """The hub's errors in one sentence."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(
                f"the hub refuses the upload to {name} ({status}); set HF_TOKEN to a token that may write there"
            ) from error
        raise ConnectionError(f"the hub failed on the upload to {name} ({status}); try again later") from error
    except (httpx.TransportError, ConnectionError) as error:
        raise ConnectionError(
            f"{constants.ENDPOINT} cannot be reached, so nothing was uploaded; try again where there is a network"
        ) from error
