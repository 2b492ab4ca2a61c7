"""Frozen weights in 8 or 4 bits for the products of decoding on a CPU, through kernels that torch brings.

A step for one token reads every weight once, so its time is that of reading them. The packed copies are read instead of
the weights, which stay for everything else: activations are bfloat16, products are summed in float32, and no weight is
written out dequantized.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn

GROUP = 32
"""Weights of an output channel that share a scale and an offset in 4 bits, as in GGUF's Q4_1."""
_INPUT_MULTIPLE = {"int8": 16, "int4": GROUP}
"""torch's kernels read beyond the end of a matrix whose inputs are not a multiple of this."""
_OUTPUT_MULTIPLE = {"int8": 1, "int4": 16}


class PackedLinear(ABC):
    """A weight matrix in few bits."""

    @abstractmethod
    def __call__(self, inputs: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
        """`inputs @ dequantized().T`, in the dtype of `inputs` (bfloat16)."""

    @abstractmethod
    def dequantized(self) -> Float[Tensor, "out in"]:
        """The weights that the product is computed with, float32."""


PackedLinears = Mapping[nn.Module, PackedLinear]
"""The packed copy of each linear layer's weight."""


@final
@dataclass(frozen=True)
class Int8Linear(PackedLinear):
    """`q * scale`, with q from -127 to 127 and a bfloat16 scale for each output channel (rounded to nearest)."""

    quantized: Int8[Tensor, "out in"]
    scale: Float[Tensor, " out"]

    @classmethod
    def pack(cls, weight: Float[Tensor, "out in"]) -> "Int8Linear":
        """Quantize a weight matrix; the largest error is half a scale, the largest weight of the channel / 254."""
        wide = weight.float()
        scale = (wide.abs().amax(1) / 127).bfloat16()
        # The rounded scale divides, so that rounding it adds no error. A channel of zeros has the scale 0.
        quantized = (wide / scale.float()[:, None].clamp(min=_TINY)).round_().clamp_(-127, 127)
        return cls(quantized.to(torch.int8), scale)

    def __call__(self, inputs: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
        """The product."""
        output: Tensor = torch.ops.aten._weight_int8pack_mm(inputs, self.quantized, self.scale)
        return output

    def dequantized(self) -> Float[Tensor, "out in"]:
        """The weights, float32."""
        return self.quantized * self.scale.float()[:, None]


@final
@dataclass(frozen=True)
class Int4Linear(PackedLinear):
    """`(q - 8) * scale + offset`, with q from 0 to 15 and bfloat16 scales and offsets for each `GROUP` inputs."""

    quantized: UInt8[Tensor, "out half_in"]
    scale_and_offset: Float[Tensor, "group out 2"]

    @classmethod
    def pack(cls, weight: Float[Tensor, "out in"]) -> "Int4Linear":
        """Quantize a weight matrix between the smallest and the largest weight of each group."""
        wide = weight.float().reshape(len(weight), -1, GROUP)
        lowest, highest = wide.aminmax(dim=2, keepdim=True)
        scale = ((highest - lowest) / 15).bfloat16()
        offset = (lowest + 8 * scale.float()).bfloat16()
        quantized = ((wide - offset.float()) / scale.float().clamp(min=_TINY)).round_().add_(8).clamp_(0, 15)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized.flatten(1).int(), 1)
        return cls(packed, torch.cat([scale, offset], 2).transpose(0, 1).contiguous())

    def __call__(self, inputs: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
        """The product."""
        output: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            inputs, self.quantized, GROUP, self.scale_and_offset
        )
        return output

    def dequantized(self) -> Float[Tensor, "out in"]:
        """The weights, float32: the product with the identity, since the packed order is the kernel's own."""
        width = 2 * self.quantized.shape[1]
        return self(torch.eye(width, dtype=torch.bfloat16)).t().float()


_TINY = torch.finfo(torch.float32).tiny
_PACK: Mapping[str, Callable[[Tensor], PackedLinear]] = {"int8": Int8Linear.pack, "int4": Int4Linear.pack}


@torch.no_grad()
def pack(model: nn.Module, decode_weights: str) -> PackedLinears:
    """Packed copies of the weights of every linear layer of `model`; its head is packed in 8 bits at least.

    Args:
        decode_weights: int8 or int4.

    Raises:
        ValueError: a layer's size is not one that torch's kernel takes.
    """
    head, packed = getattr(model, "lm_head", None), dict[nn.Module, PackedLinear]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kind = "int8" if module is head else decode_weights
            outputs, inputs = module.weight.shape
            if inputs % _INPUT_MULTIPLE[kind] or outputs % _OUTPUT_MULTIPLE[kind]:
                raise ValueError(
                    f"decode_weights is {decode_weights!r}, and {name} has {inputs} inputs and {outputs} outputs, "
                    f"which must be multiples of {_INPUT_MULTIPLE[kind]} and {_OUTPUT_MULTIPLE[kind]}; leave it out"
                )
            packed[module] = _PACK[kind](module.weight)
    return packed
