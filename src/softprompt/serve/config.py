"""The configuration of the service: what it serves, where it listens, and who may use it."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, final, get_args

import tyro

from softprompt.assets.hub import hub_name, is_hub_prompt, local_folder
from softprompt.models.peft_folder import base_of_peft_folder
from softprompt.runs import open_run, prompt_kind
from softprompt.serve.api.auth import AuthConfig
from softprompt.serve.engine.limits import Limits
from softprompt.serve.prompts.entry import check_prompt_name
from softprompt.types import DecodeWeights, Dtype

EngineKind = Literal["local", "ray", "vllm"]


@final
@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """The replicas of `--engine ray`."""

    replicas: int = 2
    """Number of replicas, each with its own copy of the backbone."""
    cpus: float = 1.0
    """CPU cores per replica."""
    gpus: float = 0.0
    """GPUs per replica."""
    ray_address: str | None = None
    """Address of a running Ray cluster; None: start one on this machine."""

    def __post_init__(self) -> None:
        if self.replicas < 1 or not self.cpus > 0 or not self.gpus >= 0:
            raise ValueError(
                f"replicas is {self.replicas}, cpus {self.cpus} and gpus {self.gpus}; they must be at least 1, above 0 "
                "and at least 0"
            )


@final
@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The configuration of a service (immutable)."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME=]FOLDER")] = ()
    """Folders of runs or PEFT prompts, each served under its folder's name or the name before `=`; `hub:USER/NAME` is
    one on the Hugging Face Hub."""
    backbone: str | None = None
    """Hub id, folder, .gguf file or asset; None: the first run's backbone, or the first PEFT folder's base model."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines can reach requires a token."""
    port: int = 8000
    """Port to listen on; 0: a free one."""
    prompts: Path | None = None
    """Folder that keeps uploaded prompts; the prompts in it are served too."""
    token_file: Path | None = None
    """File with the tokens that may send requests, one per line; None: those in SOFTPROMPT_TOKEN, if set."""
    admin_token_file: Path | None = None
    """File with the tokens that may change prompts; None: SOFTPROMPT_ADMIN_TOKEN, else whoever may send requests."""
    engine: EngineKind = "local"
    """An engine in this process, replicas behind Ray Serve that share the folder of prompts, or a vLLM server that runs
    already."""
    engine_url: str | None = None
    """With `--engine vllm`: the root of the server, started with --enable-prompt-embeds, as in http://localhost:8000.
    Its API key, if it asks for one, is taken from VLLM_API_KEY."""
    dtype: Dtype = "auto"
    """What the backbone computes in; with `--engine vllm` the dtype of the vectors that are sent, where `auto` is the
    checkpoint's own."""
    decode_weights: DecodeWeights = "auto"
    """The weights that generation reads on a CPU: the model's own (original), a copy of them in the order that suits
    the CPU (prepacked: the same up to rounding), or one of 8 or 4 bits per weight (faster for few rows at a time, and
    texts may differ); auto: prepacked where the copy takes at most 1 GiB, else original."""
    device: str = "auto"
    """`auto` takes the first GPU, else the CPU."""
    grace: float = 30.0
    """Seconds in which running requests may finish when the service is stopped."""
    log_texts: bool = False
    """Log the texts that users send."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The replicas of `--engine ray`."""
    limits: Limits = field(default_factory=Limits)
    """Bounds on batches, the queue and requests."""

    def __post_init__(self) -> None:
        if self.engine not in get_args(EngineKind):
            raise ValueError(f"engine is {self.engine!r}; it must be {' or '.join(get_args(EngineKind))}")
        if not 0 <= self.grace < math.inf:
            raise ValueError(f"grace is {self.grace}; it must be 0 or more seconds")
        self._check_engine_url()
        self.names()

    def _check_engine_url(self) -> None:
        if self.engine != "vllm":
            if self.engine_url is not None:
                raise ValueError(f"engine_url is given but engine is {self.engine!r}; leave it out, or use engine vllm")
            return
        if not re.fullmatch(r"https?://[^/\s]+(/.*)?", self.engine_url or ""):
            raise ValueError(
                f"engine_url is {self.engine_url!r}; with engine vllm it must be the URL of a running server, as in "
                "http://localhost:8000"
            )
        settings = {"device": self.device, "max_wait": self.limits.max_wait, "decode_weights": self.decode_weights}
        defaults = {"device": "auto", "max_wait": Limits().max_wait, "decode_weights": "auto"}
        for name, value in settings.items():
            if value != defaults[name]:
                raise ValueError(f"{name} is {value!r}, which has no effect where vLLM runs the model; leave it out")

    def names(self) -> list[str]:
        """The name of each source.

        Raises:
            ValueError: it cannot be a prompt's.
        """
        return [name for name, _ in self._named_sources()]

    def folders(self) -> list[tuple[str, Path]]:
        """The name and folder of each source; those on the Hub are downloaded.

        Raises:
            ValueError: a name cannot be a prompt's.
            FileNotFoundError: a prompt on the Hub cannot be downloaded.

        >>> ServeConfig(sources=("reviews=runs/sentiment-dpt-0",)).folders()
        [('reviews', PosixPath('runs/sentiment-dpt-0'))]
        """
        return [(name, local_folder(source)) for name, source in self._named_sources()]

    def _named_sources(self) -> list[tuple[str, str]]:
        sources = []
        for source in self.sources:
            name, equals, folder = source.partition("=")
            if not equals:
                folder = source
                name = hub_name(source) if is_hub_prompt(source) else Path(source).expanduser().resolve().name
            sources.append((check_prompt_name(name), folder))
        return sources

    def backbone_source(self) -> str:
        """The backbone's Hub id, folder, file or asset; also checks the sources' folders.

        Raises:
            FileNotFoundError, NotADirectoryError: a source is not a folder of a run or of a PEFT prompt.
            ValueError: it is not set, and no source names one.
        """
        kinds = [(folder, prompt_kind(folder)) for _, folder in self.folders()]
        if self.backbone:
            return self.backbone
        for folder, kind in kinds:
            if kind == "run":
                return open_run(folder).experiment.backbone
        for folder, _ in kinds:
            if base := base_of_peft_folder(folder):
                return base
        reason = f"no folder names its backbone ({', '.join(self.sources)})" if kinds else "no prompt is given"
        raise ValueError(f"{reason}; give --backbone, or the folder of a run")

    def auth(self) -> AuthConfig:
        """The tokens of the files and environment variables.

        Raises:
            ValueError: a file holds no token, or there is none and other machines can reach the host.
        """
        auth = AuthConfig.load(self.token_file, self.admin_token_file)
        auth.check_host(self.host)
        return auth
