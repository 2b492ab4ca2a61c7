"""The run folder: written atomically, never overwritten, read without executing code."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt import files
from softprompt.assets.hub import local_folder
from softprompt.backbones import Backbone, load
from softprompt.config import Experiment
from softprompt.models import PromptedModel, attach, fresh_head
from softprompt.models.baselines import tune
from softprompt.models.deep_kv import as_deep
from softprompt.models.peft_folder import WEIGHTS, is_peft_folder, read_peft_folder
from softprompt.prompts import SoftPrompt
from softprompt.prompts.deep import build
from softprompt.tasks import Task

Gradient = Callable[[Float[Tensor, "length dim"], int], Float[Tensor, "length dim"]]
"""Computes the mean gradient of the loss at a prompt over the first N batches of training rows."""
RECORD = "softprompt.json"
"""Experiment, versions, backbone and results."""
TENSORS = "softprompt.safetensors"
"""The prompt's parameters."""
HEAD = "head.safetensors"
"""The trained head of an encoder or vision model."""
TUNED = "tuned.safetensors"
"""The trained weights of a baseline."""
METRICS = "metrics.jsonl"
"""Loss, rate and development score by step."""
PREDICTIONS = "predictions.jsonl"
"""The answer to each test row."""
CONTEXT = "context.txt"
"""The text that a distilled prompt stands for; only in the folder of a distillation."""
FORMAT = 1
"""The version of the record's format."""
_GIVE_RUN = "give the folder of a run; see softprompt list runs"
_GIVE_PROMPT = "give the folder of a run or of a PEFT prompt; see softprompt list runs"


@final
@dataclass(frozen=True)
class Run:
    """The folder of one training run."""

    folder: Path
    experiment: Experiment
    task: Task
    record: Mapping[str, Any]
    """`softprompt.json`: `experiment`, `task`, `data`, `context`, `backbone`, `versions`, `created`, `results`, ..."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def results(self) -> Mapping[str, Any] | None:
        """`test`, `ci_low`, `ci_high`, `dev`, `seconds` and so on (see `evaluate_final`); None until finished."""
        return self.record.get("results")

    def finish(self, trained: PromptedModel, results: Mapping[str, Any]) -> "Run":
        """Write the trained tensors and then the results, so that a run with results is complete."""
        for file, part in ((TENSORS, trained.prompt), (HEAD, trained.head), (TUNED, trained.tuned)):
            if part is not None:
                files.write_tensors(self.folder / file, part.state_dict())
        record = {**self.record, "results": dict(results)}
        files.write_text(self.folder / RECORD, json.dumps(record, indent=1))
        return Run(self.folder, self.experiment, self.task, record)

    def load_backbone(self, source: Backbone | str | None = None) -> Backbone:
        """Load the backbone that this run was trained on.

        Args:
            source: a loaded backbone, returned as it is; or the current source of the weights, for `load_backbone`.
                They are loaded in the run's dtype and compared with those it was trained on.

        Raises:
            FileNotFoundError: the backbone is not at `source`, or not where the run recorded it.
            ValueError: the weights at `source` are not the run's, or as `load_backbone` raises.
        """
        if isinstance(source, Backbone):
            return source
        if source is not None:
            backbone = load(source, dtype=self.record["backbone"]["dtype"])
            self._check_backbone(backbone)
            return backbone
        recorded = self.experiment.backbone
        try:
            return load(recorded, dtype=self.experiment.backbone_dtype)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"run {self.folder} recorded the backbone {recorded}, which cannot be loaded ({error}); if it was "
                "moved, give its current path with --backbone"
            ) from error

    def prompt(self, backbone: Backbone) -> SoftPrompt:
        """Load the trained prompt, for `backbone`.

        Raises:
            ValueError: the run is unfinished or damaged, has no prompt, or was trained on another backbone.
        """
        self._check_usable(backbone)
        if self.experiment.baseline != "none":
            raise ValueError(f"run {self.folder} is the baseline {self.experiment.baseline} and has no prompt")
        prompt = build_prompt(self.experiment, self.task, backbone, initialize=False)
        files.load_tensors(prompt, files.read_tensors(self.folder / TENSORS), str(self.folder / TENSORS))
        return prompt

    def _check_usable(self, backbone: Backbone) -> None:
        """Check that the run is finished and was trained on `backbone`."""
        if self.results is None:
            raise ValueError(
                f"run {self.folder} is not finished; continue with: softprompt train --resume {self.folder}"
            )
        self._check_backbone(backbone)

    def _check_backbone(self, backbone: Backbone) -> None:
        """Check that `backbone` has the run's hidden size and, as far as its dtype shows, the run's weights."""
        recorded = self.record["backbone"]
        if recorded["dim"] != backbone.dim:
            raise ValueError(
                f"run {self.folder} was trained on {self.experiment.backbone} (hidden size {recorded['dim']}), but "
                f"{backbone.source} has hidden size {backbone.dim}; use the backbone it was trained on"
            )
        # The run's weights as they would be in the backbone's dtype, or the backbone's as they would be in the run's.
        in_dtype = {**recorded["rounded"], recorded["dtype"]: recorded["hash"]}
        if expected := in_dtype.get(backbone.precision, ""):
            actual = backbone.hash
        else:
            dtype = getattr(torch, recorded["dtype"], None)
            expected, actual = recorded["hash"], backbone.hash_as(dtype) if isinstance(dtype, torch.dtype) else ""
        if actual and expected != actual:
            raise ValueError(
                f"the weights of {backbone.source} are not those that run {self.folder} was trained on; "
                "use the backbone it was trained on"
            )

    def prompted(self, backbone: Backbone) -> PromptedModel:
        """Attach the folded trained prompt, and the head if there is one, to `backbone`; raises like `prompt`."""
        self._check_usable(backbone)
        prompted = build_prompted_model(self.experiment, self.task, backbone, initialize=False)
        for file, part in ((TENSORS, prompted.prompt), (HEAD, prompted.head), (TUNED, prompted.tuned)):
            if part is not None:
                files.load_tensors(part, files.read_tensors(self.folder / file), str(self.folder / file))
        return prompted.folded()

    def predictions(self) -> list[dict[str, Any]]:
        """The answers on the test split in its order, as `evaluate.prediction_record` formats them."""
        return [json.loads(line) for line in (self.folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()]

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl (`step`, `loss`, `lr`; `dev` after an evaluation), up to the first damaged one."""
        for line in self._metrics_lines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:  # the last line of a killed process
                return
            if not isinstance(values, dict) or "step" not in values:
                return
            yield values

    def _metrics_lines(self) -> list[str]:
        path = self.folder / METRICS
        return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []

    @property
    def context(self) -> str:
        """The text that was distilled; empty for a run that is not a distillation.

        Raises:
            ValueError: the file is missing or has been changed.
        """
        if self.record.get("context") is None:
            return ""
        path = self.folder / CONTEXT
        text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""  # its line ends as they are
        if text_hash(text) != self.record["context"]:
            raise ValueError(f"{path} is not the text that the run was started with; put it back, or start a new run")
        return text

    def rewind_metrics(self, step: int) -> None:
        """Remove the metrics after `step`, which a resumed run writes again.

        Raises:
            ValueError: a line before the last is damaged.
        """
        lines = list(self.metrics())
        if len(lines) < len(self._metrics_lines()) - 1:
            raise ValueError(f"line {len(lines) + 1} of {self.folder / METRICS} is damaged; take it out")
        files.write_text(self.folder / METRICS, "".join(json_line(line) for line in lines if line["step"] <= step))


def build_prompted_model(
    experiment: Experiment, task: Task, backbone: Backbone, *, initialize: bool, gradient: Gradient | None = None
) -> PromptedModel:
    """The prompted model before its first step: with the prompt or the baseline's weights, and the head.

    Args:
        initialize: as in `build_prompt`.
        gradient: as in `build_prompt`.

    Raises:
        ValueError: the prompt, its position or the baseline does not fit the backbone.
    """
    copied, tuned = tune(backbone, experiment.baseline, experiment.seed)
    generator = torch.Generator().manual_seed(experiment.seed)
    head = fresh_head(backbone, len(task.label_words), generator, experiment.pool)
    if experiment.baseline != "none":
        return attach(copied, head=head, tuned=tuned)
    prompt = build_prompt(experiment, task, backbone, initialize=initialize, gradient=gradient).to(backbone.device)
    return attach(
        backbone,
        prompt,
        head=head,
        prompt_position=experiment.prompt_position,
        prompt_attention=experiment.prompt_attention,
    )


def build_prompt(
    experiment: Experiment, task: Task, backbone: Backbone, *, initialize: bool, gradient: Gradient | None = None
) -> SoftPrompt:
    """The prompt before its first step.

    Args:
        initialize: from `init_prompt` or a gradient where the experiment asks for it; False for a prompt whose tensors
            will be loaded.
        gradient: the mean gradient of the loss at a prompt, for a method that initializes from it.

    Raises:
        ValueError: `init_prompt` cannot be the start of this prompt.
    """
    start, num_matrices = None, backbone.max_matrices if experiment.depth == "deep" else 1
    is_deep_kv = num_matrices > 1 and backbone.kv_layout is not None
    if initialize and experiment.init_prompt is not None:
        folded = read_prompt(local_folder(experiment.init_prompt), backbone).fold()
        if not folded.plain:
            raise ValueError(
                f"the prompt of --init-prompt {experiment.init_prompt} also changes the input's own embeddings, which "
                "a new prompt cannot start from; give one of plain, dpt, residual, ..."
            )
        if folded.num_matrices != num_matrices and not (is_deep_kv and not folded.is_deep):
            raise ValueError(
                f"the prompt of --init-prompt {experiment.init_prompt} has {folded.num_matrices} matrices and the new "
                f"one {num_matrices}; train with the --depth of the other"
            )
        start = folded.prompt().detach().cpu()
        if is_deep_kv and not folded.is_deep:
            start = as_deep(backbone, start)
    generator = torch.Generator().manual_seed(experiment.seed)
    if is_deep_kv and start is None:
        start = _initial_kv(experiment, task, backbone, initialize, generator)
    hosts = backbone.hosts(num_matrices, task.answers, start)
    if not initialize:  # the tensors are replaced by loaded ones, so any text and any matrix of the gradient's shape do
        hosts = [dataclasses.replace(host, encode=_one_token, gradient=lambda start, _: start) for host in hosts]
    elif num_matrices == 1:  # in a deep prompt, a layer's gradient depends on layers that are not built yet
        hosts = [dataclasses.replace(host, gradient=gradient) for host in hosts]
    return build(experiment.prompt, hosts, generator)


def _one_token(text: str) -> list[int]:
    return [0]


def _initial_kv(
    experiment: Experiment, task: Task, backbone: Backbone, initialize: bool, generator: torch.Generator
) -> Tensor:
    """Where a decoder's deep prompt starts: the keys and values of the shallow prompt that the method would begin with.

    Without `initialize` any values, since loaded tensors replace them.
    """
    if not initialize:
        size = backbone.max_matrices * experiment.prompt.length
        return torch.randn(size, backbone.prompt_dim(backbone.max_matrices), generator=generator, device="cpu")
    shallow = build(experiment.prompt, [backbone.host(task.answers)], generator)
    return as_deep(backbone, shallow.prompt().detach())


def open_run(folder: str | Path) -> Run:
    """Read the run in `folder`.

    Raises:
        FileNotFoundError: there is no such folder, or no run in it.
        NotADirectoryError: `folder` is a file.
        ValueError: the record is damaged or from a later version.
    """
    path = Path(folder).expanduser()
    files.check_folder(path, _GIVE_RUN)
    if not (path / RECORD).is_file():
        raise FileNotFoundError(f"{folder} is not a run: it has no {RECORD}; {_GIVE_RUN}")
    record = files.read_json(path / RECORD)
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{path / RECORD} has format {record.get('format')!r}, this version reads {FORMAT}; upgrade softprompt"
        )
    try:
        experiment, task = Experiment.from_json(record["experiment"]), Task.from_json(record["task"])
        backbone = record["backbone"]
        if not isinstance(record.get("results"), dict | None):
            raise ValueError(f"results are {type(record['results']).__name__}")
        _ = (
            *(record["data"][name] for name in ("splits", "full", "test")),
            *(backbone[name] for name in ("dim", "hash", "dtype", "rounded", "base", "note")),
        )
    except KeyError as error:
        raise ValueError(f"{path / RECORD} lacks {error}; it is damaged, train again") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path / RECORD} is invalid ({error}); it is damaged, or its method needs --prompt-module"
        ) from error
    return Run(path, experiment, task, record)


def run_folders(out: str | Path) -> list[Path]:
    """The folders in `out` that hold a run, readable or not, sorted by name."""
    return [
        record.parent
        for record in sorted(Path(out).expanduser().glob(f"*/{RECORD}"))
        if not record.parent.name.startswith(".")
    ]


def list_runs(out: str | Path) -> list[Run]:
    """Open every run in `out`, sorted by name; raises like `open_run`."""
    return [open_run(folder) for folder in run_folders(out)]


def prompt_kind(folder: Path) -> Literal["run", "peft"]:
    """Whether `folder` is a run or a PEFT prompt; nothing is read.

    Raises:
        FileNotFoundError: there is no such folder, or it holds neither.
        NotADirectoryError: it is a file.
    """
    files.check_folder(folder, _GIVE_PROMPT)
    if (folder / RECORD).is_file():
        return "run"
    if is_peft_folder(folder):
        return "peft"
    raise FileNotFoundError(f"{folder} holds neither a run ({RECORD}) nor a PEFT prompt ({WEIGHTS}); {_GIVE_PROMPT}")


def read_prompt(folder: str | Path, backbone: Backbone) -> SoftPrompt:
    """Read the prompt of a run or of a PEFT folder, for `backbone`.

    Raises:
        FileNotFoundError, NotADirectoryError: as `prompt_kind`.
        ValueError: as `Run.prompt`, or as `PeftFolder.prompt`.
    """
    path = Path(folder).expanduser()
    if prompt_kind(path) == "run":
        return open_run(path).prompt(backbone)
    return read_peft_folder(path).prompt(backbone)


def init_prompt_hash(experiment: Experiment) -> str | None:
    """The sha256 of the tensors that `init_prompt` names now; None without one.

    Raises:
        FileNotFoundError, NotADirectoryError: as `prompt_kind`.
    """
    if experiment.init_prompt is None:
        return None
    folder = local_folder(experiment.init_prompt)
    file = folder / (TENSORS if prompt_kind(folder) == "run" else WEIGHTS)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def check_init_prompt(run: Run) -> None:
    """Check that the prompt that a run starts from is still the one it was started with.

    Raises:
        FileNotFoundError, NotADirectoryError: as `prompt_kind`.
        ValueError: it has changed.
    """
    if init_prompt_hash(run.experiment) != run.record["init_prompt"]:
        raise ValueError(
            f"the prompt {run.experiment.init_prompt} is not the one that {run.folder} was started from; put it back, "
            "or start a new run"
        )


def json_line(values: Mapping[str, Any]) -> str:
    """Format one line of a JSONL file."""
    return json.dumps(values) + "\n"


def text_hash(text: str) -> str:
    """The sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
