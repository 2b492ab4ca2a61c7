"""The frozen model: loads it from a hub id, a folder, a .gguf file or an asset, and tells its facts."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final, get_args

import torch
import transformers

from softprompt import assets, files
from softprompt.backbones import fsdp, gguf, image_processor, loading, positions, projections, quantization, vit
from softprompt.backbones.kernels import attention
from softprompt.prompts import Host
from softprompt.types import Dtype

Architecture = Literal["causal", "encoder_decoder", "encoder", "vision"]

_LOADERS: dict[Architecture, type[Any]] = {
    "causal": transformers.AutoModelForCausalLM,
    "encoder_decoder": transformers.AutoModelForSeq2SeqLM,
    "encoder": transformers.AutoModel,
    "vision": transformers.AutoModel,
}


@final
@dataclass(frozen=True)
class Backbone:
    """A frozen transformers model with its tokenizer: no parameter wants a gradient, dropout is off."""

    model: Any
    """The transformers model."""
    tokenizer: Any
    """Its fast tokenizer (an image processor for vision)."""
    source: str
    """What the user asked for: hub id, folder, file or asset."""
    base: str
    """What a run folder names as its base model: a hub id, or a folder's path."""
    architecture: Architecture
    """Which attachment fits."""
    quantized: str = ""
    """How its linear layers hold their weights, one of `quantization.KINDS`; empty: as `dtype` says."""
    note: str = ""
    """What a reader of a result should know of these weights; empty for most."""
    images: torch.Tensor | None = field(default=None, repr=False, compare=False)
    """Pixels of images that a vision model's input vectors are sampled from; none: noise."""

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        self.model.eval()
        attention.install(self.model)

    @property
    def dim(self) -> int:
        """Width of the input embeddings (not `hidden_size`: OPT-350m, for one, projects in between)."""
        if self.architecture == "vision":  # whose input embeddings are no table
            return int(self.model.config.hidden_size)
        return int(self._table.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next(self.model.parameters()).dtype

    @property
    def precision(self) -> str:
        """What `load` was told as `dtype`, and `auto` came to."""
        return self.quantized or str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @cached_property
    def vocabulary(self) -> int:
        """Ids that have an embedding: those from 0 on; a tokenizer may know more."""
        return int(self._table.shape[0])

    @cached_property
    def max_positions(self) -> int | None:
        """Tokens that a row may have, prompt included; none where the model sets no limit."""
        return positions.usable(self.model)

    @cached_property
    def max_answer_positions(self) -> int | None:
        """Tokens that an encoder-decoder's answer may have, by itself; none where the model sets no limit."""
        return positions.usable(self.model, "decoder") if self.architecture == "encoder_decoder" else None

    @property
    def masked_lm(self) -> bool:
        """Whether this is an encoder with a head that gives words at masks."""
        return self.architecture == "encoder" and self.model.get_output_embeddings() is not None

    @property
    def layers(self) -> int:
        """Layers that a deep prompt stands in; 1 where a prompt enters with the input alone."""
        return len(vit.layers(self.model)) if self.architecture == "vision" else 1

    @cached_property
    def _table(self) -> torch.Tensor:
        embeddings = self.model.get_input_embeddings()
        if type(embeddings) is torch.nn.Embedding:
            return embeddings.weight.detach().cpu()  # no copy where it lies there already
        with torch.no_grad():  # through the module: Gemma and BART scale inside the embedding
            ids = torch.arange(embeddings.weight.shape[0], device=embeddings.weight.device)
            return embeddings(ids).detach().cpu()

    @cached_property
    def hash(self) -> str:
        """sha256 over every weight's name, shape and bits at the time of the first look."""
        return self.checksum()

    def checksum(self) -> str:
        """sha256 over every weight's name, shape and bits now: equal before and after training."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat: Any = fsdp.whole(tensor.detach()).contiguous().cpu().reshape(-1).view(torch.uint8)
            digest.update(memoryview(flat.numpy()))
        return digest.hexdigest()

    @contextmanager
    def dropout(self, on: bool) -> Iterator[None]:
        """The model's own dropout switched on for a while, if `on`; nothing else about it changes."""
        self.model.train(on)
        try:
            yield
        finally:
            self.model.eval()

    def host(self, label_words: tuple[str, ...] = (), start: torch.Tensor | None = None) -> Host:
        """The facts that a prompt method may know.

        Args:
            words: the task's answers, where it has any.
            start: a trained prompt to start from, in a warm start.
        """
        if self.architecture == "vision":
            return self.hosts(1, label_words, start)[0]
        return Host(
            start=start,
            embedding=self._table,
            encode=lambda text: list(self.tokenizer(text, add_special_tokens=False)["input_ids"]),
            label_words=label_words,
            special=frozenset(int(i) for i in self.tokenizer.all_special_ids),
            query_key=projections.product_of(self.model),
        )

    def hosts(self, depth: int, label_words: tuple[str, ...] = (), start: torch.Tensor | None = None) -> list[Host]:
        """The facts of the first `depth` layers, a host each: of one, `host` alone.

        Raises:
            ValueError: the model has fewer layers that a prompt can stand in.
        """
        if not 1 <= depth <= self.layers:
            raise ValueError(
                f"a prompt of depth {depth} does not fit {self.source}, where one stands in at most {self.layers} "
                "layers; deep prompts are for vision models"
            )
        if self.architecture != "vision":
            return [self.host(label_words, start)]
        return vit.hosts(self.model, self.images, depth, label_words, start)

    def with_sample_images(self, images: torch.Tensor) -> "Backbone":
        """The same model, whose input vectors are sampled from `images`: pixels as its processor makes them."""
        return dataclasses.replace(self, images=images)


def load(source: str, *, dtype: Dtype = "auto", device: str = "auto") -> Backbone:
    """A frozen backbone from a hub id, a local folder, a `.gguf` file or an asset's name.

    A `.gguf` file is dequantised once (about twenty seconds for 135M weights) and kept in the cache folder.

    Args:
        source: where the weights are.
        dtype: `auto` takes bfloat16 where the device multiplies it faster than float32, measured once.
        device: `auto` takes the first GPU, else the CPU.

    Raises:
        FileNotFoundError: nothing is at `source`.
        ValueError: the model cannot take embeddings instead of ids, or dtype and model do not fit.
        ModuleNotFoundError: `nf4` without the extra `quantize`.
    """
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype is {dtype!r}; it must be {', '.join(get_args(Dtype))}")
    place = _device(device)
    folder, base, note = _locate(source)
    config = _config(folder, source)
    architecture = _architecture(config)
    quantized = dtype if dtype in quantization.KINDS else ""
    quantization.refuse_other(config, dtype, source)
    kind = torch.bfloat16 if quantized else measured_dtype(place) if dtype == "auto" else getattr(torch, dtype)
    if kind is torch.float16 and config.model_type in ("t5", "mt5", "umt5", "longt5"):
        raise ValueError(f"{source} is a T5, which overflows in float16; use bfloat16 or float32")
    loader = _loader(architecture, config)
    given: dict[str, Any] = {"config": config, "dtype": kind}
    if loading.is_multimodal(config):
        given |= loading.text_model(config, source)
    elif architecture == "vision":
        given |= vit.without_pooler(config)
    given |= quantization.loading(dtype, place, config) if quantized else {}
    model = loading.pretrained(loader, folder, source, **given)
    model = quantization.with_fixed_weights(model) if quantized else model.to(place)
    if architecture == "vision":
        vit.refuse_unknown(model, source)
        return Backbone(model, image_processor.processor(folder, config), source, base, architecture, quantized, note)
    rows = int(model.get_input_embeddings().weight.shape[0])
    tokenizer = loading.tokenizer(folder, source, config, rows)
    backbone = Backbone(model, tokenizer, source, base, architecture, quantized, note)
    _check_embeddings(backbone)
    return backbone


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not here; use auto, cpu or a device that torch lists") from error
    return device


def _locate(source: str) -> tuple[str, str, str]:
    """Folder or hub id to load from, the base name for run folders, and a note on the weights."""
    if not source.strip():
        raise ValueError(f"the backbone is {source!r}; give a hub id, a folder, a .gguf file or an asset")
    if source in assets.ASSETS:
        asset = assets.ASSETS[source]
        if asset.kind != "model":
            raise ValueError(f"asset {source!r} is data, not a model; models are {', '.join(_models())}")
        path = assets.fetch(source)
        folder = gguf.converted(path, asset.sha256) if path.suffix == ".gguf" else path
        return str(folder), asset.base, asset.note
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"backbone {source!r} is not there; give the path of a .gguf file")
        return str(gguf.converted(path)), str(path.resolve()), "dequantised from a GGUF file"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"folder {source!r} has no config.json; give a folder that transformers can load")
        return str(path.resolve()), str(path.resolve()), ""
    return source, source, ""


def _models() -> list[str]:
    return [name for name, asset in assets.ASSETS.items() if asset.kind == "model"]


def _config(folder: str, source: str) -> Any:
    try:
        return loading.config(folder, source)
    except OSError as error:
        if Path(folder).is_dir():
            raise ValueError(f"the config.json of {source} cannot be read ({error})") from error
        raise FileNotFoundError(
            f"backbone {source!r} is neither a folder, a .gguf file, an asset ({', '.join(_models())}) nor a hub id "
            "that can be reached or is in the hub's cache; check the name, or fetch the model first"
        ) from error


def _architecture(config: Any) -> Architecture:
    if config.is_encoder_decoder:
        return "encoder_decoder"
    if loading.is_multimodal(config):
        return "causal"  # what its text model is
    names = config.architectures or []
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "causal"
    return "encoder" if hasattr(config, "vocab_size") else "vision"


def _loader(architecture: Architecture, config: Any) -> type[Any]:
    """An encoder's vocabulary head is loaded where the checkpoint has one, and never made up."""
    if architecture == "encoder" and any(name.endswith("ForMaskedLM") for name in config.architectures or []):
        return transformers.AutoModelForMaskedLM
    return _LOADERS[architecture]


@torch.no_grad()
def _check_embeddings(backbone: Backbone) -> None:
    """Ids and their embeddings must give the same output, else no prompt means what it says."""
    model = backbone.model
    ids = torch.arange(5, 11, device=backbone.device)[None] % backbone.model.get_input_embeddings().weight.shape[0]
    extra = {"decoder_input_ids": ids} if backbone.architecture == "encoder_decoder" else {}
    try:
        by_ids = model(input_ids=ids, **extra)[0]
        by_embeds = model(inputs_embeds=model.get_input_embeddings()(ids), **extra)[0]
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{backbone.source} ({model.config.model_type}) does not take inputs_embeds ({error}), so no prompt can be "
            "put in front of its input; choose another backbone"
        ) from error
    gap = float((by_ids.float() - by_embeds.float()).abs().max())
    if not gap <= 1e-3 * max(1.0, float(by_ids.float().abs().max())):
        raise ValueError(
            f"{backbone.source} ({model.config.model_type}) gives other outputs for embeddings than for their ids "
            f"(largest difference {gap:.2g}): it treats the two differently, so a prompt would not mean what it says; "
            "choose another backbone"
        )


def measured_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` multiplies it faster than float32, else float32.

    Measured once on this machine (a tenth of a second) and remembered in the cache folder.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    key = f"{device.type}/{name}/torch {torch.__version__}/{torch.get_num_threads()} threads"
    file = assets.cache_folder() / "dtype.json"
    try:
        known: Mapping[str, str] = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    if known.get(key) not in ("float32", "bfloat16"):
        times = {kind: _matmul_seconds(device, getattr(torch, kind)) for kind in ("float32", "bfloat16")}
        known = {**known, key: min(times, key=lambda kind: times[kind])}
        with suppress(OSError):  # a cache that cannot be written costs a tenth of a second, no more
            files.write_text(file, json.dumps(known, indent=1))
    return torch.bfloat16 if known[key] == "bfloat16" else torch.float32


def fitting_dtype(dtype: Dtype) -> Dtype:
    """`dtype`, or what `auto` comes to on the first GPU, else on the CPU; also for a model that is elsewhere first."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if measured_dtype(_device("auto")) is torch.bfloat16 else "float32"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:12]


def _matmul_seconds(device: torch.device, dtype: torch.dtype) -> float:
    left, right = (torch.randn(512, 512, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        (left @ right).sum().item()
        best = min(best, time.perf_counter() - start)
    return best
