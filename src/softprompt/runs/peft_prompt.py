"""A stock PEFT prompt folder with a task, used like a finished run."""

from dataclasses import dataclass
from pathlib import Path
from typing import final

from softprompt.assets.hub import local_folder
from softprompt.backbones import Backbone, load
from softprompt.config import Experiment
from softprompt.models import PromptedModel, attach
from softprompt.models.peft_folder import PeftFolder, read_peft_folder
from softprompt.prompts import Folded
from softprompt.prompts.plain import Plain
from softprompt.runs.run import Run, open_run, prompt_kind
from softprompt.tasks import Task
from softprompt.tasks.user import load_task


@final
@dataclass(frozen=True)
class PeftPrompt:
    """A prompt that PEFT trained, and the task that it is used for."""

    folder: Path
    """The folder that PEFT saved."""
    adapter: PeftFolder
    """Its content."""
    experiment: Experiment
    """A plain prompt on the base model and the task, everything else at its default."""
    task: Task

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def load_backbone(self, source: Backbone | str | None = None) -> Backbone:
        """Load the backbone.

        Args:
            source: a loaded backbone, returned as it is; a source of the weights, for `load_backbone`; None: the base
                model that the folder names.

        Raises:
            FileNotFoundError: the backbone is not there.
            ValueError: neither the folder nor `source` names one.
        """
        if isinstance(source, Backbone):
            return source
        if source is not None:
            return load(source, dtype=self.experiment.backbone_dtype)
        if not self.adapter.base:
            raise ValueError(f"{self.folder} names no base model; give it with --backbone")
        try:
            return load(self.adapter.base, dtype=self.experiment.backbone_dtype)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.folder} names the base model {self.adapter.base}, which cannot be loaded ({error}); if it is "
                "elsewhere, give its current path with --backbone"
            ) from error

    def prompt(self, backbone: Backbone) -> Folded:
        """The prompt, for `backbone`.

        Raises:
            ValueError: a folded prompt cannot express the adapter, or it is for another backbone.
        """
        return self.adapter.prompt(backbone)

    def prompted(self, backbone: Backbone) -> PromptedModel:
        """Attach the prompt to `backbone`; raises as `prompt` and `attach`."""
        return attach(backbone, self.prompt(backbone).to(backbone.device))


def open_peft_prompt(folder: str | Path, task: str | None) -> PeftPrompt:
    """Read the PEFT folder `folder`, to use its prompt for `task`.

    Args:
        task: a built-in task's name or a TOML file.

    Raises:
        FileNotFoundError: `folder` has no adapter.
        ValueError: no task is given, the adapter is damaged, or a folded prompt cannot express it.
    """
    path = Path(folder).expanduser()
    adapter = read_peft_folder(path)
    folded = adapter.folded()
    if task is None:
        raise ValueError(f"{folder} is a PEFT prompt and names no task; say which one it is for with --task")
    experiment = Experiment(
        backbone=adapter.base,
        task=task,
        prompt=Plain(length=len(folded.prompt()) // folded.num_matrices),
        depth="deep" if folded.is_deep else "shallow",
    )
    return PeftPrompt(path, adapter, experiment, load_task(task))


def resolve_prompt(source: Run | PeftPrompt | str | Path, task: str | None = None) -> Run | PeftPrompt:
    """Return `source`, or open the run or the PEFT folder that it names; `hub:USER/NAME` is one on the Hub.

    Args:
        task: the task of a PEFT folder, which names none; not used for a run.

    Raises:
        TypeError: `source` is not one of these.
        FileNotFoundError, NotADirectoryError, ValueError: as `assets.hub.local_folder`, `prompt_kind`, `open_run` and
            `open_peft_prompt`.
    """
    if isinstance(source, Run | PeftPrompt):
        return source
    if not isinstance(source, str | Path):
        raise TypeError(f"the run is a {type(source).__name__}; give a Run (softprompt.open_run) or its folder")
    path = local_folder(source)
    return open_run(path) if prompt_kind(path) == "run" else open_peft_prompt(path, task)


def check_has_own_task(source: Run | PeftPrompt, task: str | None) -> None:
    """Refuse a task for a run, which has its own.

    Raises:
        ValueError: naming the run.
    """
    if isinstance(source, Run) and task is not None:
        raise ValueError(f"{source.folder} is a run and has its own task; leave --task out")
