"""The weights of a frozen linear layer, whatever it holds them in."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def has_matrix(linear: Any) -> bool:
    """Whether `matrix` knows how `linear` holds its weights."""
    return type(linear) is torch.nn.Linear or type(linear).__name__ == "Linear4bit"


def matrix(linear: Any) -> Float[Tensor, "out in"]:
    """The weights of a linear layer: its own, or a whole copy of those that it holds in 4 bits."""
    weights: Tensor = linear.weight
    if type(linear) is not torch.nn.Linear:
        from bitsandbytes.functional import dequantize_4bit

        weights = dequantize_4bit(weights.data, linear.weight.quant_state)
    return weights
