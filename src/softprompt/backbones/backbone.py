"""The frozen model, loaded from a Hub id, a folder, a .gguf file or an asset."""

import dataclasses
import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final, get_args

import torch

from softprompt.backbones import (
    fsdp,
    image_processor,
    loading,
    positions,
    precision,
    projections,
    quantization,
    vit,
)
from softprompt.backbones.checkpoint import Checkpoint
from softprompt.backbones.kernels import attention, llama, packed_linear
from softprompt.backbones.kernels.packed_linear import PackedWeights
from softprompt.backbones.kv_layout import KVLayout, kv_layout
from softprompt.backbones.source import Architecture, architecture_of, auto_class_of, locate, read_config
from softprompt.prompts import Host
from softprompt.types import DecodeWeights, Dtype


@final
@dataclass(frozen=True)
class Backbone:
    """A transformers model with its tokenizer, frozen: no parameter requires a gradient, and dropout is off."""

    model: Any
    """The transformers model."""
    tokenizer: Any
    """Its fast tokenizer; for vision, its image processor."""
    source: str
    """The Hub id, folder, file or asset that the user gave."""
    base: str
    """The base model that a run folder records: a Hub id, or a folder's path."""
    architecture: Architecture
    """Which prompted model fits it."""
    quantized: str = ""
    """The format of its linear layers' weights, one of `quantization.KINDS`; empty if they are not quantized."""
    note: str = ""
    """What a reader of results should know about these weights; usually empty."""
    images: torch.Tensor | None = field(default=None, repr=False, compare=False)
    """Pixels `[count, 3, side, side]` from which a vision model's input vectors are sampled; None for noise."""
    decode_weights: DecodeWeights = "auto"
    """The weights that decoding reads; see `with_decode_weights`."""
    checkpoint: Checkpoint | None = field(default=None, repr=False, compare=False)
    """The weights on disk, where only the embedding table is in memory because the model runs elsewhere."""

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        self.model.eval()
        attention.install(self.model)

    @property
    def dim(self) -> int:
        """Width of the input embeddings, which may differ from `hidden_size` (OPT-350m projects in between)."""
        if self.architecture == "vision":  # no embedding table
            return int(self.model.config.hidden_size)
        return int(self._embedding_table.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return next(self.model.parameters()).dtype

    @property
    def precision(self) -> str:
        """The `dtype` that `load` was given, with `auto` resolved."""
        return self.quantized or str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """The model's device; the CPU where only the embedding table is in memory."""
        return torch.device("cpu") if self.embeddings_only else next(self.model.parameters()).device

    @cached_property
    def packed(self) -> PackedWeights | None:
        """Copies of the weights that decoding reads; None to decode with the weights themselves."""
        if self.decode_weights == "auto":
            small = packed_linear.packed_size(self.model) <= packed_linear.AUTO_LIMIT
            return PackedWeights(self.model, "prepacked") if small and self._can_prepack else None
        return None if self.decode_weights == "original" else PackedWeights(self.model, self.decode_weights)

    @cached_property
    def vocab_size(self) -> int:
        """The number of rows in the embedding table; a tokenizer may have ids beyond it."""
        return int(self._embedding_table.shape[0])

    @cached_property
    def max_positions(self) -> int | None:
        """The most tokens that a row may have, prompt included; None without a limit."""
        return positions.max_positions(self.model)

    @cached_property
    def max_answer_positions(self) -> int | None:
        """The most tokens that an encoder-decoder's answer may have; None without a limit."""
        return positions.max_positions(self.model, "decoder") if self.architecture == "encoder_decoder" else None

    @cached_property
    def forward_arguments(self) -> frozenset[str]:
        """The names of the arguments that the model's forward takes."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    @property
    def embeddings_only(self) -> bool:
        """Whether only the embedding table is in memory, so that nothing can run here."""
        return self.checkpoint is not None

    @property
    def takes_images(self) -> bool:
        """Whether the model reads pixels instead of tokens; its `tokenizer` is then an image processor."""
        return self.architecture == "vision"

    @property
    def masked_lm(self) -> bool:
        """Whether this is an encoder with a masked-LM head."""
        return self.architecture == "encoder" and self.model.get_output_embeddings() is not None

    @cached_property
    def kv_layout(self) -> KVLayout | None:
        """The keys and values that a deep prompt of a decoder has; None for other models, or where layers differ.

        Raises:
            ValueError: only the embedding table is in memory.
        """
        if self.embeddings_only:
            raise ValueError(
                f"a deep prompt has keys and values in every layer, but {self.source} runs elsewhere and takes only "
                "vectors before the text; use --engine local"
            )
        return kv_layout(self.model) if self.architecture == "causal" else None

    @property
    def max_matrices(self) -> int:
        """The most matrices that a deep prompt can have; 1 where a prompt enters with the input only.

        A vision model takes one for each of its layers, a decoder one for each layer's keys and one for its values.
        """
        if self.architecture == "vision":
            return len(vit.layers(self.model))
        return 1 if self.kv_layout is None else 2 * self.kv_layout.num_layers

    def prompt_dim(self, num_matrices: int) -> int:
        """The width of a prompt of that many matrices."""
        return self.dim if num_matrices == 1 or self.kv_layout is None else self.kv_layout.width

    @cached_property
    def _embedding_table(self) -> torch.Tensor:
        embeddings = self.model.get_input_embeddings()
        if type(embeddings) is torch.nn.Embedding:
            return embeddings.weight.detach().cpu()
        with torch.no_grad():  # called as a module, since Gemma and BART scale inside it
            ids = torch.arange(embeddings.weight.shape[0], device=embeddings.weight.device)
            return embeddings(ids).detach().cpu()

    @cached_property
    def hash(self) -> str:
        """`checksum`, computed at the first access and then kept."""
        return self.checksum()

    def hash_as(self, dtype: torch.dtype) -> str:
        """`hash` as it would be had these weights been loaded in a narrower dtype; empty where that is not known."""
        unrounded = getattr(self.model, "_keep_in_fp32_modules_strict", None)  # which loading would not have rounded
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        floats = {name: tensor for name, tensor in self.model.state_dict().items() if tensor.is_floating_point()}
        rounded = self.dtype is torch.float32 and dtype.itemsize == 2 and not (self.quantized or unrounded)
        if not rounded or floats.keys() - parameters.keys() or any(x.dtype != self.dtype for x in floats.values()):
            return ""
        hashes: dict[torch.dtype, str] = self.__dict__.setdefault("_hashes", {})  # kept, as cached properties are
        return hashes.get(dtype) or hashes.setdefault(dtype, self.checksum(dtype))

    def checksum(self, dtype: torch.dtype | None = None) -> str:
        """sha256 over every weight's name, shape and bits; equal before and after training.

        Args:
            dtype: round the weights to it first.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            if self.checkpoint is not None and tensor.is_meta:
                tensor = self.checkpoint.tensor(name).to(tensor.dtype)
            flat: Any = fsdp.full_tensor(tensor.detach()).contiguous().cpu().reshape(-1).view(torch.uint8)
            digest.update(memoryview(flat.numpy()))
        return digest.hexdigest()

    @contextmanager
    def dropout(self, on: bool) -> Iterator[None]:
        """Within the block, and if `on`, apply the model's own dropout."""
        self.model.train(on)
        try:
            yield
        finally:
            self.model.eval()

    def host(self, label_words: tuple[str, ...] = (), start: torch.Tensor | None = None) -> Host:
        """What a prompt method may know about the model.

        Args:
            label_words: the task's label words, if it has any.
            start: a trained prompt to initialize from, `[length, dim]`.
        """
        if self.architecture == "vision":
            return self.hosts(1, label_words, start)[0]
        return Host(
            start=start,
            embedding=self._embedding_table,
            encode=lambda text: list(self.tokenizer(text, add_special_tokens=False)["input_ids"]),
            label_words=label_words,
            special=frozenset(int(i) for i in self.tokenizer.all_special_ids),
            query_key=projections.lazy_product(self.model),
        )

    def hosts(
        self, num_matrices: int, label_words: tuple[str, ...] = (), start: torch.Tensor | None = None
    ) -> list[Host]:
        """One host for each matrix of a prompt; for a single one, `host` alone.

        Args:
            label_words: the task's label words, if it has any.
            start: a trained prompt to initialize from, `[num_matrices * length, prompt_dim]`; a deep prompt of a
                decoder needs one (`models.as_deep`).

        Raises:
            ValueError: the model takes no prompt of that many matrices.
        """
        if num_matrices == 1 and self.architecture != "vision":
            return [self.host(label_words, start)]
        if not self._takes_matrices(num_matrices):
            raise ValueError(
                f"a prompt of {num_matrices} matrices does not fit {self.source}, which takes {self._allowed_prompts}; "
                "deep prompts are for vision models, and for decoders whose layers have keys and values of one size"
            )
        if self.architecture != "vision":
            if start is None:
                raise ValueError("a deep prompt of a decoder starts from keys and values; give them as start")
            # A unit is the size of the layer's own keys or values, as it is the embeddings' for a shallow prompt.
            parts = [part.clone() for part in start.chunk(num_matrices)]
            return [Host(embedding=part, encode=_no_tokens, label_words=label_words, start=part) for part in parts]
        return vit.hosts(self.model, self.images, num_matrices, label_words, start)

    def check_prompt(self, matrix: torch.Tensor, num_matrices: int) -> None:
        """Check that a prompt of that many matrices, `[num_matrices * length, prompt_dim]`, fits the model.

        Raises:
            ValueError: it was trained for another backbone, or is deep where only shallow prompts fit.
        """
        if num_matrices > 1 and not self._takes_matrices(num_matrices):
            raise ValueError(
                f"the prompt is deep, of {num_matrices} matrices, but {self.source} takes {self._allowed_prompts}; it "
                "was trained for another backbone"
            )
        if matrix.shape[1] != self.prompt_dim(num_matrices):
            what = "embeds in" if num_matrices == 1 or self.kv_layout is None else "has keys of"
            raise ValueError(
                f"the prompt is {matrix.shape[1]} wide, but {self.source} {what} {self.prompt_dim(num_matrices)}; it "
                "was trained for another backbone"
            )

    def _takes_matrices(self, num_matrices: int) -> bool:
        if self.architecture == "vision":
            return 1 <= num_matrices <= self.max_matrices
        return num_matrices in (1, self.max_matrices)

    @property
    def _allowed_prompts(self) -> str:
        """The prompts that fit, in words."""
        if self.max_matrices == 1:
            return "shallow prompts only"
        if self.architecture == "vision":
            return f"prompts of 1 to {self.max_matrices} matrices"
        return f"shallow prompts, and deep ones of {self.max_matrices} matrices"

    def with_sample_images(self, images: torch.Tensor) -> "Backbone":
        """The same model with input vectors sampled from processed `images`, `[count, 3, side, side]`."""
        return dataclasses.replace(self, images=images)

    def with_decode_weights(self, decode_weights: DecodeWeights) -> "Backbone":
        """The same model, which decodes with these weights.

        Copies are made when they are first used: as many bytes as the linear layers for `prepacked`, 1 byte for each
        weight for `int8`, and 5/8 for `int4`.

        Raises:
            ValueError: the model does not have Llama's layers or is not on a CPU, a layer has an adapter, a hook or a
                size that does not fit, or the model's dtype is not bfloat16 (`prepacked`: nor float32).
        """
        if decode_weights not in get_args(DecodeWeights):
            raise ValueError(f"decode_weights is {decode_weights!r}; it must be {', '.join(get_args(DecodeWeights))}")
        if decode_weights != "auto" and decode_weights != "original":
            exact = decode_weights == "prepacked"
            if not (self._can_prepack if exact else self._decodes_fused and self.precision == "bfloat16"):
                raise ValueError(
                    f"decode_weights is {decode_weights!r}, but {self.source} is a {self.model.config.model_type} in "
                    f"{self.precision} on {self.device}; packed weights are for Llama, Mistral and Qwen2 in "
                    f"{'float32 or ' if exact else ''}bfloat16 on a CPU that oneDNN supports, so leave it out"
                )
            if not exact:
                packed_linear.check_packable(self.model, decode_weights)
        return dataclasses.replace(self, decode_weights=decode_weights)

    @property
    def _decodes_fused(self) -> bool:
        return self.architecture == "causal" and not self.embeddings_only and llama.is_supported(self.model)

    @property
    def _can_prepack(self) -> bool:
        return self._decodes_fused and not self.quantized and packed_linear.can_prepack(self.model, self.dtype)


def _no_tokens(text: str) -> list[int]:
    raise ValueError(
        f"keys and values cannot be initialized from the text {text!r}; initialize the shallow prompt from it"
    )


def load(source: str, *, dtype: Dtype = "auto", device: str = "auto") -> Backbone:
    """Load a frozen backbone.

    A `.gguf` file is dequantized once (about twenty seconds for 135M weights) and kept in the cache folder.

    Args:
        source: a Hub id, a local folder, a `.gguf` file or an asset's name.
        dtype: `auto` is bfloat16 where the device multiplies it faster than float32 (measured once), else float32.
        device: `auto` is the first GPU, else the CPU.

    Raises:
        FileNotFoundError: there is no model at `source`.
        ValueError: the model does not accept embeddings instead of ids, or does not support `dtype`.
        ModuleNotFoundError: `nf4` without the extra `quantize`.
    """
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype is {dtype!r}; it must be {', '.join(get_args(Dtype))}")
    torch_device = precision.resolve_device(device)
    folder, base, note = locate(source)
    config = read_config(folder, source)
    architecture = architecture_of(config)
    quantized = dtype if dtype in quantization.KINDS else ""
    quantization.check_checkpoint(config, dtype, source)
    if quantized:
        torch_dtype = torch.bfloat16
    else:
        torch_dtype = precision.measured_dtype(torch_device) if dtype == "auto" else getattr(torch, dtype)
    if torch_dtype is torch.float16 and config.model_type in ("t5", "mt5", "umt5", "longt5"):
        raise ValueError(f"{source} is a T5, which overflows in float16; use bfloat16 or float32")
    arguments: dict[str, Any] = {"config": config, "dtype": torch_dtype}
    if loading.is_multimodal(config):
        arguments |= loading.text_model_arguments(config, source)
    elif architecture == "vision":
        arguments |= vit.loading_arguments(config)
    if quantized:
        arguments |= quantization.loading_arguments(dtype, torch_device, config)
    model = loading.load_model(auto_class_of(architecture, config), folder, source, **arguments)
    if quantized:
        quantization.disable_repacking(model)
    else:
        model = model.to(torch_device)
    if architecture == "vision":
        vit.check_supported(model, source)
        processor = image_processor.load_processor(folder, config)
        return Backbone(model, processor, source, base, architecture, quantized, note)
    tokenizer = loading.load_tokenizer(folder, source, config, loading.vocab_size_of(model, source))
    backbone = Backbone(model, tokenizer, source, base, architecture, quantized, note)
    _check_embeddings(backbone)
    return backbone


@torch.no_grad()
def _check_embeddings(backbone: Backbone) -> None:
    """Check that ids and their embeddings give the same output; otherwise a prompt would not act as tokens do."""
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
            f"(largest difference {gap:.2g}), so a prompt would not act as tokens do; choose another backbone"
        )
