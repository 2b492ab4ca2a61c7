"""The usual baselines: LoRA, full fine-tuning, and a trained head alone, with the same loop and run folder."""

import copy
import dataclasses
import importlib.util
import tempfile
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.models.peft_folder import CONFIG, WEIGHTS
from softprompt.types import Baseline

RATES: dict[Baseline, float] = {"none": 1.0, "lora": 0.03, "full": 0.001, "head": 1.0}
"""Learning rate of the tuned weights relative to the run's: 0.03 means 9e-4 for LoRA and 3e-5 for full fine-tuning."""

LORA_RANK, LORA_ALPHA = 8, 16
_VISION_TARGETS = ["q_proj", "v_proj", "query", "value"]
"""What LoRA updates in a vision transformer, for which PEFT has no default: the projections that it takes for text."""


@final
class Tuned(nn.Module):
    """Some of a model's own parameters as a module: training or loading it changes the model."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            parameter.requires_grad_()
            self.register_parameter(name.replace(".", "/"), parameter)


def tune(backbone: Backbone, baseline: Baseline, seed: int) -> tuple[Backbone, Tuned | None]:
    """A copy of `backbone` with trainable weights, and those weights; for other baselines `backbone` itself and None.

    A copy for LoRA shares the frozen weights with `backbone`, which does not change.

    Args:
        seed: of LoRA's initial weights.

    Raises:
        ModuleNotFoundError: LoRA without the extra `peft`.
        ValueError: `full` on weights that are not float32, in which its small steps would be lost.
    """
    if baseline in ("none", "head"):
        return backbone, None
    frozen = [*backbone.model.parameters(), *backbone.model.buffers()] if baseline == "lora" else []
    model = copy.deepcopy(backbone.model, {id(tensor): tensor for tensor in frozen})
    if baseline == "lora":
        parameters = _with_lora(model, _VISION_TARGETS if backbone.takes_images else None, seed)
    else:
        if backbone.dtype is not torch.float32:
            raise ValueError(
                f"full fine-tuning on {backbone.dtype} loses its small steps to rounding; give --dtype float32"
            )
        parameters = dict(model.named_parameters())
    return dataclasses.replace(backbone, model=model), Tuned(parameters)


def _with_lora(model: Any, targets: list[str] | None, seed: int) -> dict[str, nn.Parameter]:
    _check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    # PEFT draws A from the global generator, whose state the fork restores.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=targets), model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return parameters


def export_lora(backbone: Backbone, task_type: str | None, folder: Path) -> None:
    """Write a tuned copy's LoRA weights as the folder that stock PEFT loads.

    Args:
        task_type: PEFT's name for the task, see `PromptedModel.peft_task_type`.
    """
    _check_peft()
    from peft import get_peft_model_state_dict

    config = copy.deepcopy(backbone.model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = backbone.base, True
    config.task_type = task_type
    # PEFT loads weights by their names in its own wrapper of the model, and silently skips other names.
    tensors = {f"base_model.model.{name}": tensor for name, tensor in get_peft_model_state_dict(backbone.model).items()}
    files.write_tensors(folder / WEIGHTS, tensors)
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        files.write_text(folder / CONFIG, (Path(scratch) / CONFIG).read_text(encoding="utf-8"))


def _check_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError(
            "LoRA needs the extra `peft`; install it in softprompt's clone with: pip install '.[peft]'"
        )
