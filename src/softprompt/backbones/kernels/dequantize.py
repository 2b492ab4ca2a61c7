"""The weight matrix of a frozen linear layer, dequantized where it is stored in 4 bits."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def is_supported(linear: Any) -> bool:
    """Whether `dequantized_weight` can read this layer."""
    return type(linear) is torch.nn.Linear or type(linear).__name__ == "Linear4bit"


def dequantized_weight(linear: Any) -> Float[Tensor, "out in"]:
    """The layer's own weight, or a dequantized copy if it is stored in 4 bits."""
    weight: Tensor = linear.weight
    if type(linear) is not torch.nn.Linear:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, linear.weight.quant_state)
    return weight
