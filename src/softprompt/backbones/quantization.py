"""Frozen backbones whose linear layers hold 4 bits a weight (bitsandbytes, extra `quantize`).

The prompt stays float32, and its gradient flows through the weights as they are held; embeddings, norms and the head
are bfloat16. `nf4`: Dettmers et al. 2023, "QLoRA", section 3, with a scale for each 64 weights.

Not `LLM.int8()`, which rounds a row's activations too: a prompt's shared prefix then gives other logits than the same
prompt in the row.
"""

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

import torch

KINDS = ("nf4",)


def refuse_other(config: Any, dtype: str, source: str) -> None:
    """Refuse a checkpoint whose weights are quantised already, except in 4 bits as `dtype` says.

    Args:
        config: the model's.
        dtype: what the user asked for.
        source: what the user asked for, for messages.

    Raises:
        ValueError: it is quantised otherwise.
    """
    held = _held(config)
    if not held:
        return
    method = str(held.get("quant_method") or "bitsandbytes")
    if held.get("load_in_4bit") and held.get("bnb_4bit_quant_type") in KINDS:
        if dtype not in KINDS:
            raise ValueError(
                f"the weights of {source} are in 4 bits already (bitsandbytes {held['bnb_4bit_quant_type']}), and "
                f"dtype is {dtype}; give --dtype {held['bnb_4bit_quant_type']}"
            )
        return
    if method == "bitsandbytes":
        method = f"bitsandbytes {held['bnb_4bit_quant_type']}" if held.get("load_in_4bit") else "bitsandbytes in 8 bits"
    raise ValueError(
        f"the weights of {source} are quantised ({method}), which is not supported; give the original checkpoint, and "
        "--dtype nf4 to hold it in 4 bits"
    )


def _held(config: Any) -> dict[str, Any]:
    """The checkpoint's own settings of quantisation; empty where its weights are plain."""
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            if held := getattr(part, name, None):
                return dict(held if isinstance(held, Mapping) else held.to_dict())
    return {}


def loading(kind: str, device: torch.device, config: Any) -> dict[str, Any]:
    """What `from_pretrained` is told to load a model so, on `device`.

    Args:
        kind: one of `KINDS`.
        device: where the model goes.
        config: the model's; a checkpoint in 4 bits is loaded as its own settings say.

    Raises:
        ModuleNotFoundError: bitsandbytes is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            f"dtype {kind} needs bitsandbytes; install it with: pip install 'softprompt[quantize]'"
        )
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that are elsewhere
    if own := _held(config):
        config.quantization_config = {**own, "bnb_4bit_compute_dtype": "bfloat16"}
        return {"device_map": {"": device}}
    held = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": held, "device_map": {"": device}}


def with_fixed_weights(model: Any) -> Any:
    """The same, its weights held in one way for good.

    On some CPUs a 4-bit layer is packed anew, with scales of bfloat16, at the first forward that needs no gradient, and
    unpacked where the weights are looked at: prompts would be trained and used on different weights.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
