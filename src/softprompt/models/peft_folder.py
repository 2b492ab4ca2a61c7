"""PEFT's adapter folders, read in one place: which files and tensors, what is checked, and the prompt that they hold.

A folder has `adapter_config.json`, whose `peft_type` names the method, and `adapter_model.safetensors` (or
`adapter_model.bin`, of which only tensors are read). Six of PEFT's methods put vectors in front of the input, or
keys and values in each layer of a decoder, and do nothing else, so a plain `Folded` is what PEFT computes:

- PROMPT_TUNING: `prompt_embeddings`.
- P_TUNING: `prompt_embeddings`; PEFT runs its MLP or LSTM when it saves, and stores the result only.
- CPT: `prompt_embeddings`; PEFT adds the trained offsets when it saves.
- MULTITASK_PROMPT_TUNING: `prompt_embeddings * (prefix_task_cols[0] @ prefix_task_rows[0])`, if it has one task.
- PREFIX_TUNING, CARTRIDGE: a deep prompt. Each row of `prompt_embeddings` has a token's `[K_1, V_1, K_2, V_2, ...]`;
  PEFT runs its projection, if there is one, when it saves.

`inference_mode` is not read: PEFT sets it when it saves and again when it loads, and stores the same either way.

Reference: PEFT 0.21.2, `peft_model.py` (`get_prompt`, `forward`) and `tuners/*/model.py`.
"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import Tensor

from softprompt import files
from softprompt.assets import ASSETS
from softprompt.backbones import Backbone
from softprompt.models import model_class
from softprompt.prompts import Folded

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPT = "prompt_embeddings"
"""The tensor with the prompt's vectors."""
_PICKLED = "adapter_model.bin"
_ADVICE = "save the adapter again, or fetch it again"
_MULTITASK = "MULTITASK_PROMPT_TUNING"
_COLS, _ROWS = "prefix_task_cols", "prefix_task_rows"
_TENSORS = {"PROMPT_TUNING": {PROMPT}, "P_TUNING": {PROMPT}, "CPT": {PROMPT}, _MULTITASK: {PROMPT, _COLS, _ROWS}}
_DEEP = ("PREFIX_TUNING", "CARTRIDGE")
"""Methods that store keys and values of every layer."""
_TENSORS |= {kind: {PROMPT} for kind in _DEEP}
"""The tensors of each method that a folded prompt expresses."""
_REFUSALS = {
    "ADAPTION_PROMPT": "trains prompts inside the layers, which no prompt expresses; use PEFT "
    "itself, or train a prompt (softprompt train)",
    "PROMPT_TUNING_LORA": "is the format of DePT's authors and not stock PEFT's; read it with "
    "softprompt.export.read_dept",
}
_CHANGES_WEIGHTS = (
    "changes the model's own weights or layers; merge it into the model where PEFT can (merge_and_unload), and give "
    "the merged model as the backbone"
)
_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
"""The dtypes of a prompt, as safetensors names them, and their size in bytes."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEADER = 100_000


@final
@dataclass(frozen=True)
class PeftFolder:
    """An adapter folder, read but not yet checked against a backbone."""

    folder: Path
    config: Mapping[str, Any] | None
    """The content of `adapter_config.json`; None for an uploaded prompt, which has no such file."""
    tensors: Mapping[str, Tensor]

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method; an adapter without a config holds a prompt's vectors."""
        return "PROMPT_TUNING" if self.config is None else str(self.config.get("peft_type"))

    @property
    def settings(self) -> Mapping[str, Any]:
        """The config, for an adapter that needs one.

        Raises:
            FileNotFoundError: there is none.
        """
        if self.config is None:
            raise FileNotFoundError(f"{self.folder / CONFIG} does not exist; {_ADVICE}")
        return self.config

    @property
    def base(self) -> str:
        """The base model's name or path; empty where the folder names none."""
        return _base(self.config or {})

    @property
    def other_tensors(self) -> list[str]:
        """The names of tensors that are not part of an embedding prompt of this type, sorted."""
        return sorted(set(self.tensors) - _TENSORS.get(self.peft_type, {PROMPT}))

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, in float32.

        Raises:
            ValueError: it is missing, of another dtype than float32, float16 or bfloat16, or not finite.
        """
        if name not in self.tensors:
            raise ValueError(
                f"{self.folder} holds {', '.join(sorted(self.tensors))} and no {name}; give a prompt-tuning adapter"
            )
        tensor = self.tensors[name]
        if tensor.dtype not in _FLOATS or not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{name} of {self.folder} is {tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}; a "
                f"prompt is a matrix of finite numbers in float32, float16 or bfloat16; {_ADVICE}"
            )
        return tensor.float()

    def matrix(self) -> Float[Tensor, "prompt dim"]:
        """`prompt_embeddings` as stored, float32; raises as `tensor`, and for what is not a matrix."""
        matrix = self.tensor(PROMPT)
        if matrix.ndim != 2 or not len(matrix):
            raise ValueError(
                f"{PROMPT} of {self.folder} is {tuple(matrix.shape)}; a prompt is a matrix of finite numbers with at "
                "least one row"
            )
        return matrix

    def folded(self) -> Folded:
        """The prompt that PEFT puts in front of the input, float32.

        Raises:
            ValueError: a folded prompt cannot express the adapter, or its tensors are not those of its type.
        """
        kind = self.peft_type
        if kind not in _TENSORS:
            raise ValueError(f"{self.folder} is a {kind} adapter, which {_REFUSALS.get(kind, _CHANGES_WEIGHTS)}")
        matrix = self.matrix()
        if others := self.other_tensors:
            raise ValueError(
                f"{self.folder} holds {', '.join(others)} besides a prompt; a PEFT prompt-tuning folder holds only "
                f"{' and '.join(sorted(_TENSORS[kind]))}, so train it without modules_to_save"
            )
        if self.config is None:
            return Folded(matrix)
        if kind in _DEEP:
            return self._deep(matrix)
        length = self._setting("num_virtual_tokens")
        self._check_shape(matrix, length * self._submodules(), self._setting("token_dim"))
        if kind == _MULTITASK:
            return Folded(self._multitask(matrix))
        # PEFT stores vectors for the decoder too, and its forward pass and generate() use the encoder's only.
        return Folded(matrix[:length])

    def prompt(self, backbone: Backbone) -> Folded:
        """The prompt, for `backbone`.

        Raises:
            ValueError: as `folded`, or the adapter is for another task type, width or number of layers.
        """
        self.check_backbone(backbone)
        folded = self.folded()
        try:
            backbone.check_prompt(folded.matrix, folded.num_matrices)
        except ValueError as error:
            raise ValueError(f"{self.folder} does not fit: {error}{self._trained_on()}") from error
        if folded.is_deep:
            heads, layout = self._setting("num_attention_heads"), backbone.kv_layout
            if layout is not None and heads != layout.num_kv_heads:
                raise ValueError(
                    f"{self.folder} holds keys of {heads} heads, but {backbone.source} has {layout.num_kv_heads}; use "
                    f"the backbone it was trained on{self._trained_on()}"
                )
        return folded

    def check_backbone(self, backbone: Backbone) -> None:
        """Check that the config's task type and number of layers are the backbone's.

        A name is not an identity, since the same weights may be anywhere: see `base_note`.

        Raises:
            ValueError: they are not.
        """
        if self.config is None or self.peft_type not in _TENSORS:  # which `folded` refuses by its name
            return
        task_type, stated = model_class(backbone).peft_task_type, self.config.get("task_type")
        if task_type is None:
            raise ValueError(
                f"{self.folder} is a PEFT prompt, which goes in front of all tokens, but {backbone.source} "
                f"({backbone.architecture}) takes its prompt after [CLS]; use a decoder or an encoder-decoder"
            )
        if stated != task_type:
            raise ValueError(
                f"{self.folder} has the task type {stated!r}, but {backbone.source} takes prompts of {task_type!r}; "
                f"use the kind of model that it was trained on{self._trained_on()}"
            )
        layers, expected = self.config.get("num_layers"), backbone.model.config.get_text_config().num_hidden_layers
        if isinstance(layers, int) and layers != expected:
            raise ValueError(
                f"{self.folder} was trained on a model of {layers} layers, but {backbone.source} has {expected}; use "
                f"the backbone it was trained on{self._trained_on()}"
            )

    def base_note(self, backbone: Backbone | str) -> str:
        """A warning that the folder names another base model than `backbone`; empty where the names agree."""
        if isinstance(backbone, Backbone):
            source, names = backbone.source, {backbone.source, backbone.base}
        else:
            source, names = backbone, {backbone, *([ASSETS[backbone].base] if backbone in ASSETS else [])}
        same = {Path(name).name.casefold() for name in names}
        if not self.base or Path(self.base).name.casefold() in same:
            return ""
        return f"{self.folder} was trained on {self.base}; make sure that {source} has the same weights"

    def _trained_on(self) -> str:
        return f" ({self.base})" if self.base else ""

    def _check_shape(self, matrix: Float[Tensor, "stored width"], length: int, width: int) -> None:
        if tuple(matrix.shape) != (length, width):
            raise ValueError(
                f"{PROMPT} of {self.folder} is {tuple(matrix.shape)}, but its {CONFIG} states {(length, width)}; "
                f"{_ADVICE}"
            )

    def _deep(self, matrix: Float[Tensor, "length matrix_x_width"]) -> Folded:
        if self.settings.get("task_type") == "SEQ_2_SEQ_LM":
            raise ValueError(
                f"{self.folder} is a {self.peft_type} adapter of an encoder-decoder, but softprompt has keys and "
                "values in the layers of decoders only; use PEFT itself, or train a prompt (softprompt train)"
            )
        count = 2 * self._setting("num_layers")
        self._check_shape(matrix, self._setting("num_virtual_tokens"), count * self._setting("token_dim"))
        return Folded(torch.cat(matrix.chunk(count, 1)), num_matrices=count)

    def _setting(self, name: str) -> int:
        value = (self.config or {}).get(name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} in {self.folder / CONFIG} is {value!r}; it must be a number from 1 on; {_ADVICE}")
        return value

    def _submodules(self) -> int:
        """For how many submodules vectors are stored: 2 for encoder and decoder, PEFT's default in encoder-decoders."""
        config = self.config or {}
        is_encoder_decoder = config.get("task_type") == "SEQ_2_SEQ_LM"
        if config.get("num_transformer_submodules") is None:
            return 2 if is_encoder_decoder else 1
        count = self._setting("num_transformer_submodules")
        if count > (2 if is_encoder_decoder else 1):
            raise ValueError(
                f"num_transformer_submodules in {self.folder / CONFIG} is {count}, but PEFT runs no model of the task "
                f"type {config.get('task_type')!r} with as many; {_ADVICE}"
            )
        return count

    def _multitask(self, matrix: Float[Tensor, "length dim"]) -> Float[Tensor, "length dim"]:
        cols, rows = self.tensor(_COLS), self.tensor(_ROWS)
        if self._submodules() > 1:
            raise ValueError(
                f"{self.folder} is a {_MULTITASK} adapter that also puts vectors in front of the decoder's input, "
                "which softprompt does not do; train it with num_transformer_submodules=1"
            )
        if cols.ndim == 3 and len(cols) > 1:
            raise ValueError(
                f"{self.folder} is a {_MULTITASK} adapter of {len(cols)} tasks, but a prompt is for one; make one of "
                "a single task from it in PEFT (prompt_tuning_init EXACT_SOURCE_TASK)"
            )
        if cols.shape[:2] != (1, len(matrix)) or rows.shape != (1, *cols.shape[2:], matrix.shape[1]):
            raise ValueError(
                f"{self.folder} holds {_COLS} {tuple(cols.shape)} and {_ROWS} {tuple(rows.shape)}, which do not fit "
                f"{PROMPT} {tuple(matrix.shape)}; {_ADVICE}"
            )
        return matrix * (cols[0] @ rows[0])


def is_peft_folder(folder: Path) -> bool:
    """Whether `folder` has an adapter's tensors."""
    return (folder / WEIGHTS).is_file() or (folder / _PICKLED).is_file()


def read_peft_folder(folder: Path) -> PeftFolder:
    """Read the adapter in `folder`; no code in it is executed.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder, it is a file, or it lacks a file.
        ValueError: a file is damaged, or holds more than tensors.
    """
    files.check_folder(folder, "give the folder of a PEFT adapter")
    return PeftFolder(folder, _read_config(folder), _read_tensors(folder))


def base_of_peft_folder(folder: Path) -> str:
    """The base model that the adapter in `folder` names; empty where it names none."""
    return _base(_read_config(folder) or {})


def _base(config: Mapping[str, Any]) -> str:
    return str(config.get("base_model_name_or_path") or "")


def _read_config(folder: Path) -> dict[str, Any] | None:
    return files.read_json(folder / CONFIG, _ADVICE) if (folder / CONFIG).exists() else None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    pickled = folder / _PICKLED
    if (folder / WEIGHTS).is_file() or not pickled.is_file():
        return files.read_tensors(folder / WEIGHTS, _ADVICE)
    try:
        tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{pickled} is damaged, or holds more than tensors, which is never executed; {_ADVICE}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{pickled} is not a dictionary of named tensors, so it is not an adapter; {_ADVICE}")
    return tensors


def read_prompt_bytes(content: bytes, dim: int, model: str, max_length: int) -> Folded:
    """The prompt in the bytes of an `adapter_model.safetensors`, checked by its header before a tensor is loaded.

    Args:
        dim: width of the backbone's embeddings.
        model: the backbone's name, for the message.
        max_length: most virtual tokens that are accepted.

    Raises:
        ValueError: it is damaged, or holds anything but one prompt as wide as the backbone's embeddings.
    """
    header = _header(content)
    tensors = {name: value for name, value in header.items() if name != "__metadata__"}
    if set(tensors) != {PROMPT}:
        raise ValueError(f"the file holds {sorted(tensors)[:5]}; a plain PEFT prompt holds {PROMPT} alone")
    fields = tensors[PROMPT]
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"the prompt's dtype is {str(dtype)[:20]!r}; it must be {', '.join(_DTYPES)}")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape)):
        raise ValueError(f"the prompt's shape is {str(shape)[:80]}; it must be [length, {dim}]")
    if not 1 <= shape[0] <= max_length or shape[1] != dim:
        raise ValueError(f"the prompt's shape is {shape}; {model} takes 1 to {max_length} vectors of {dim}")
    size = shape[0] * shape[1] * _DTYPES[dtype]
    if offsets != [0, size] or len(content) != 8 + int.from_bytes(content[:8], "little") + size:
        raise ValueError("the file does not have the length that its header states; it is damaged, send it again")
    try:
        matrix = load_bytes(content)[PROMPT].float()
    except SafetensorError as error:  # valid as JSON but not in this format
        raise ValueError(f"the file is not a safetensors file ({error}); it is damaged, send it again") from error
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("the prompt holds NaN or infinity; train it again")
    return Folded(matrix)


def _header(content: bytes) -> dict[str, Any]:
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 2 <= size <= min(_MAX_HEADER, len(content) - 8):
        raise ValueError("the body is not a safetensors file; send adapter_model.safetensors as the request's body")
    try:
        header = json.loads(content[8 : 8 + size])
    except (ValueError, RecursionError) as error:
        raise ValueError("the header of the safetensors file is not JSON; it is damaged, send it again") from error
    if not isinstance(header, dict) or not all(isinstance(value, dict) for value in header.values()):
        raise ValueError("the header of the safetensors file does not describe tensors; it is damaged, send it again")
    return header
