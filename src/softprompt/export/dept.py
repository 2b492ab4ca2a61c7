"""The adapter format of DePT's authors: reads what they published, writes our DePT prompts.

Their fork of PEFT writes `adapter_config.json` with `peft_type` PROMPT_TUNING_LORA, and in `adapter_model.safetensors`
the short prompt, A and B; the scale `lora_alpha / sqrt(r)` is only in their code.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast, final

import torch

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.export.base import EXACT, ExportedPrompt, Format, check_close
from softprompt.models.peft_folder import CONFIG, PROMPT, WEIGHTS, read_peft_folder
from softprompt.prompts.dept import DePT, OffsetPrompt

_TYPE = "PROMPT_TUNING_LORA"
_LEFT, _RIGHT = "prompt_encoder.lora_embedding_A", "prompt_encoder.lora_embedding_B"


@final
@dataclass(frozen=True)
class PublishedDePT:
    """A DePT adapter in its authors' format."""

    config: DePT
    """The method's settings, in the published parameterization."""
    prompt: OffsetPrompt
    """Its tensors, bit for bit."""
    settings: Mapping[str, Any]
    """The content of `adapter_config.json`, such as the base model's name."""


def read_dept(folder: Path) -> PublishedDePT:
    """The published adapter in `folder`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or it is not a DePT adapter.
    """
    adapter = read_peft_folder(folder)
    settings = adapter.settings
    if adapter.peft_type != _TYPE:
        raise ValueError(f"{folder} holds a {adapter.peft_type!r} adapter, not DePT's {_TYPE!r}")
    if missing := sorted({PROMPT, _LEFT, _RIGHT} - set(adapter.tensors)):
        raise ValueError(f"{folder} lacks the tensor {missing[0]!r}; it is not a complete DePT adapter")
    matrix, left, right = (adapter.tensor(name) for name in (PROMPT, _LEFT, _RIGHT))
    positions, rank = left.shape
    if right.shape != (rank, matrix.shape[1]):
        raise ValueError(
            f"{folder} holds A {tuple(left.shape)} and B {tuple(right.shape)}, which do not fit; it is damaged"
        )
    if wanting := sorted({"lora_alpha"} - set(settings)):
        raise ValueError(f"{folder / CONFIG} lacks {wanting[0]!r}; it is not a complete DePT adapter")
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
    """Write `prompt` as the authors' code reads it, with our scale multiplied into the short prompt and B.

    Args:
        config: the method's settings.
        prompt: the trained prompt.
        base: the name of the base model.
        folder: gets the pair of files.
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
        tensors = {PROMPT: prompt.prompt(), _LEFT: prompt.left, _RIGHT: prompt.scale * prompt.right}
    files.write_tensors(folder / WEIGHTS, tensors)
    files.write_text(folder / CONFIG, json.dumps(settings, indent=1))


@final
class Dept(Format):
    """DePT's authors' format, for their fork of PEFT."""

    name: ClassVar[str] = "dept"
    multi_prompt: ClassVar[bool] = False

    def refusal(self, trained: ExportedPrompt, backbone: Backbone) -> str:
        """Only DePT on an encoder-decoder, which is what the authors' code runs."""
        if not isinstance(trained.prompt, OffsetPrompt):
            method = trained.run.experiment.method
            return f"it holds DePT's tensors, but the run trained {method}; export to peft, vocab or npz"
        if not backbone.model.config.is_encoder_decoder:
            return f"its authors' code runs encoder-decoders only, but {backbone.source} is not one; export to npz"
        return ""

    def write(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> None:
        """The pair of files."""
        [item] = trained
        # Only DePT builds an OffsetPrompt, and `refusal` let no other prompt pass.
        write_dept(cast(DePT, item.run.experiment.prompt), cast(OffsetPrompt, item.prompt), backbone.base, folder)

    @torch.no_grad()
    def check(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> dict[str, Any]:
        """The adapter, read back and folded, against the run's prompt and table."""
        [item] = trained
        folded, worst = read_dept(folder).prompt.fold(), dict(EXACT)
        for expected, actual in zip(item.folded.buffers(), folded.buffers(), strict=True):
            # The scale is multiplied in before the product in one and after it in the other.
            compared = check_close(actual, expected.cpu(), 1e-5, "the DePT adapter")
            worst = max(worst, compared, key=lambda result: float(result["largest_difference"]))
        return {"prompts": {item.name: len(item.folded.matrix)}, **worst}
