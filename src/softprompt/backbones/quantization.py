"""Frozen backbones with linear layers of 4 bits per weight (bitsandbytes, extra `quantize`).

The prompt stays float32, and its gradient flows through the quantized weights; embeddings, norms and the head are
bfloat16. `nf4`: Dettmers et al. 2023, "QLoRA", section 3, with a scale for every 64 weights.

`LLM.int8()` is not supported: it also rounds a row's activations, so a shared prefix would give other logits than the
same prompt in the row.
"""

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

import torch

KINDS = ("nf4",)


def check_checkpoint(config: Any, dtype: str, source: str) -> None:
    """Check that a checkpoint is not quantized already, or is in the 4-bit format of `dtype`.

    Args:
        config: the model's config.
        dtype: the dtype that the user asked for.
        source: the model that the user asked for, for messages.

    Raises:
        ValueError: it is quantized in another way.
    """
    settings = _quantization_config(config)
    if not settings:
        return
    method = str(settings.get("quant_method") or "bitsandbytes")
    kind = settings.get("bnb_4bit_quant_type")
    if settings.get("load_in_4bit") and kind in KINDS:
        if dtype not in KINDS:
            raise ValueError(
                f"the weights of {source} are in 4 bits already (bitsandbytes {kind}), but dtype is {dtype}; give "
                f"--dtype {kind}"
            )
        return
    if method == "bitsandbytes":
        method = f"bitsandbytes {kind}" if settings.get("load_in_4bit") else "bitsandbytes in 8 bits"
    raise ValueError(
        f"the weights of {source} are quantized ({method}), which is not supported; give the original checkpoint, and "
        "--dtype nf4 to load it in 4 bits"
    )


def _quantization_config(config: Any) -> dict[str, Any]:
    """The checkpoint's own quantization settings; empty if its weights are not quantized."""
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            if settings := getattr(part, name, None):
                return dict(settings if isinstance(settings, Mapping) else settings.to_dict())
    return {}


def loading_arguments(kind: str, device: torch.device, config: Any) -> dict[str, Any]:
    """The arguments of `from_pretrained` that load a model in 4 bits.

    Args:
        kind: one of `KINDS`.
        device: the device to load onto.
        config: the model's config; a checkpoint in 4 bits is loaded with its own settings.

    Raises:
        ModuleNotFoundError: bitsandbytes is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            f"dtype {kind} needs bitsandbytes; install it in softprompt's clone with: pip install '.[quantize]'"
        )
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about kernels for other devices
    if settings := _quantization_config(config):
        config.quantization_config = {**settings, "bnb_4bit_compute_dtype": "bfloat16"}
        return {"device_map": {"": device}}
    bnb_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": bnb_config, "device_map": {"": device}}


def disable_repacking(model: Any) -> None:
    """Keep bitsandbytes from repacking the weights of `model`.

    On some CPUs it repacks a 4-bit layer, with bfloat16 scales, at the first forward pass without gradients, and
    unpacks it when the weights are read: prompts would be trained and used on different weights.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
