"""The adapters that DePT's authors published, and our DePT prompts in the same format.

Their fork of PEFT writes `adapter_config.json` with `peft_type` PROMPT_TUNING_LORA, and in
`adapter_model.safetensors` the short prompt, A and B; the scale `lora_alpha / sqrt(r)` is in their code alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast, final

import torch

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.export.base import EXACT, Format, Trained, close
from softprompt.prompts.dept import DePT, OffsetPrompt

_TYPE = "PROMPT_TUNING_LORA"
_PROMPT, _LEFT, _RIGHT = (
    "prompt_embeddings",
    "prompt_encoder.lora_embedding_A",
    "prompt_encoder.lora_embedding_B",
)


@final
@dataclass(frozen=True)
class PublishedDePT:
    """A DePT adapter in its authors' format."""

    config: DePT
    """What it says of the method, in the published parameterisation."""
    prompt: OffsetPrompt
    """Its tensors, bit for bit."""
    settings: Mapping[str, Any]
    """`adapter_config.json` as it was, the base model's name among it."""


def read_dept(folder: Path) -> PublishedDePT:
    """The published adapter in `folder`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or it is no DePT adapter.
    """
    settings = files.read_json(folder / "adapter_config.json", files.ADAPTER)
    if settings.get("peft_type") != _TYPE:
        raise ValueError(f"{folder} holds a {settings.get('peft_type')!r} adapter, not DePT's {_TYPE!r}")
    tensors = files.read_adapter(folder)
    if missing := sorted({_PROMPT, _LEFT, _RIGHT} - set(tensors)):
        raise ValueError(f"{folder} lacks the tensor {missing[0]!r}; it is no whole DePT adapter")
    matrix, left, right = (tensors[name].float() for name in (_PROMPT, _LEFT, _RIGHT))
    positions, rank = left.shape
    if right.shape != (rank, matrix.shape[1]):
        raise ValueError(
            f"{folder} holds A {tuple(left.shape)} and B {tuple(right.shape)}, which do not fit; it is damaged"
        )
    if wanting := sorted({"lora_alpha"} - set(settings)):
        raise ValueError(f"{folder / 'adapter_config.json'} lacks {wanting[0]!r}; it is no whole DePT adapter")
    config = DePT(
        length=matrix.shape[0],
        rank=rank,
        positions=positions,
        alpha=float(settings["lora_alpha"]),
        scale=1.0,
    )
    prompt = OffsetPrompt(matrix, left, right, 1.0, config.alpha / rank**0.5, config.beyond)
    return PublishedDePT(config, prompt, settings)


def write_dept(config: DePT, prompt: OffsetPrompt, base: str, folder: Path) -> None:
    """Write `prompt` as its authors' code reads it; our scale goes into the short prompt and into B.

    Args:
        base: the name of the base model, for the reader.
    """
    dim = prompt.matrix.shape[1]
    settings = {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "lora_alpha": config.alpha,
        "max_length": config.positions,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config.length,
        "peft_type": _TYPE,
        "prompt_tuning_init": "RANDOM",
        "r": config.rank,
        "task_type": "SEQ_2_SEQ_LM",
        "token_dim": dim,
        "tokenizer_name_or_path": base,
    }
    with torch.no_grad():
        tensors = {_PROMPT: prompt.prompt(), _LEFT: prompt.left, _RIGHT: prompt.scale * prompt.right}
    files.write_tensors(folder / "adapter_model.safetensors", tensors)
    files.write_text(folder / "adapter_config.json", json.dumps(settings, indent=1))


@final
class Dept(Format):
    """DePT's authors' format, for their fork of PEFT."""

    name: ClassVar[str] = "dept"
    many: ClassVar[bool] = False

    def refusal(self, trained: Trained, backbone: Backbone) -> str:
        """Nothing but DePT on an encoder-decoder, which is what their code runs."""
        if not isinstance(trained.prompt, OffsetPrompt):
            method = trained.run.experiment.method
            return f"it holds DePT's tensors, and the run trained {method}; export to peft, vocab or npz"
        if backbone.architecture != "encoder_decoder":
            return f"its authors' code runs encoder-decoders, and {backbone.source} is none; export to npz"
        return ""

    def write(self, trained: Sequence[Trained], backbone: Backbone, folder: Path) -> None:
        """The pair of files."""
        [one] = trained
        # Nothing but DePT builds an OffsetPrompt, and whatever is none was refused.
        write_dept(cast(DePT, one.run.experiment.prompt), cast(OffsetPrompt, one.prompt), backbone.base, folder)

    @torch.no_grad()
    def check(self, trained: Sequence[Trained], backbone: Backbone, folder: Path) -> dict[str, Any]:
        """What was written, read back and folded, gives the run's prompt and table."""
        [one] = trained
        found, worst = read_dept(folder).prompt.fold(), dict(EXACT)
        for mine, its in zip(one.folded.buffers(), found.buffers(), strict=True):
            # The scale is multiplied in before the product here, and behind it there.
            compared = close(its, mine.cpu(), 1e-5, "the DePT adapter")
            worst = max(worst, compared, key=lambda each: float(each["largest_difference"]))
        return {"prompts": {one.name: len(one.folded.matrix)}, **worst}
