"""Weights on disk, read one tensor at a time; and a model of which only the embedding table is in memory."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig
from transformers.utils import cached_file

from softprompt.files import first_line

_WEIGHTS = "model.safetensors"


@final
class Checkpoint:
    """The weights of a model on disk, read one tensor at a time.

    Args:
        folder: the folder or Hub id to read from; of a Hub id, only the files that are needed are downloaded.
        source: the model that the user asked for, for messages.
        prefix: transformers' `base_model_prefix`, which a checkpoint's names may lack or have in addition.

    Raises:
        ValueError: there are no weights in safetensors.
    """

    def __init__(self, folder: str, source: str, prefix: str) -> None:
        self._folder, self._source, self._prefix = folder, source, prefix
        try:
            index = cached_file(folder, f"{_WEIGHTS}.index.json", _raise_exceptions_for_missing_entries=False)
            if index is not None:
                self._files: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
                return
            with safe_open(cached_file(folder, _WEIGHTS), framework="pt") as weights:
                self._files = dict.fromkeys(weights.keys(), _WEIGHTS)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"{source} has no {_WEIGHTS} from which its embedding table can be read alone ({first_line(error)}); "
                "save the model with save_pretrained first"
            ) from error

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor that transformers loads as `name`, in the checkpoint's dtype.

        Raises:
            ValueError: the checkpoint has no such tensor, or its file is damaged.
        """
        prefix = f"{self._prefix}."
        for stored in (name, name.removeprefix(prefix), prefix + name):
            if stored in self._files:
                try:
                    with safe_open(cached_file(self._folder, self._files[stored]), framework="pt") as weights:
                        tensor: torch.Tensor = weights.get_tensor(stored)
                        return tensor
                except (OSError, SafetensorError) as error:
                    raise ValueError(f"{stored} of {self._source} cannot be read ({first_line(error)})") from error
        raise ValueError(
            f"the checkpoint of {self._source} has no tensor {name}, since transformers renames its tensors as it "
            "loads them (GPT-NeoX, some mixtures of experts), so its weights cannot be compared with a run's; use "
            "--engine local, or serve the run's PEFT files alone"
        )


def load_table(auto_class: Any, folder: str, source: str, config: Any, dtype: torch.dtype) -> tuple[Any, Checkpoint]:
    """The model on the device `meta`, its embedding table alone with values (on the CPU), and its weights on disk.

    Args:
        auto_class: a class with `from_config`.
        folder: the folder or Hub id to load from.
        source: the model that the user asked for, for messages.
        config: the model's config.
        dtype: of the table.

    Raises:
        ValueError: the table cannot be read, or has another shape than the config says.
    """
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype)
    embeddings = model.get_input_embeddings()
    checkpoint = Checkpoint(folder, source, model.base_model_prefix)
    [name] = [name for name, weights in model.named_parameters() if weights is embeddings.weight]
    table = checkpoint.tensor(name)
    if table.shape != embeddings.weight.shape:
        raise ValueError(
            f"{source} holds {name} of shape {tuple(table.shape)}, but its config.json makes it "
            f"{tuple(embeddings.weight.shape)}; the checkpoint and its config.json do not belong together"
        )
    embeddings.weight = nn.Parameter(table.to(dtype), requires_grad=False)
    model.tie_weights()
    with suppress(OSError):  # there is none
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, checkpoint
