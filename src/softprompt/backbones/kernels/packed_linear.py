"""Copies of frozen weights for the matrix products of decoding on a CPU, through kernels that torch brings.

A step for a few tokens reads every weight once, so its time is that of reading them. `PrepackedLinear` holds the same
weights in blocks, in the order in which oneDNN reads them; torch's own product of few rows would reorder them at every
call, or read them slowly. `Int8Linear` and `Int4Linear` hold them in fewer bits: activations are bfloat16, products are
summed in float32, and no weight is written out dequantized. The weights themselves stay for everything else.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn

GROUP = 32
"""Weights of an output channel that share a scale and an offset in 4 bits, as in GGUF's Q4_1."""
AUTO_LIMIT = 2**30
"""Bytes that a copy may take without being asked for."""
_INPUT_MULTIPLE = {"int8": 16, "int4": GROUP}
"""torch's kernels read beyond the end of a matrix whose inputs are not a multiple of this."""
_OUTPUT_MULTIPLE = {"int8": 1, "int4": 16}
_ROWS = 8
"""Rows of inputs for which oneDNN chooses the order; other numbers of rows are as fast with it, or nearly."""


class PackedLinear(ABC):
    """A copy of a weight matrix."""

    @abstractmethod
    def __call__(self, inputs: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
        """`inputs @ dequantized().T`, in the dtype of `inputs` (bfloat16 for 8 and 4 bits)."""

    @abstractmethod
    def dequantized(self) -> Float[Tensor, "out in"]:
        """The weights that the product is computed with, float32."""


@final
@dataclass(frozen=True)
class PrepackedLinear(PackedLinear):
    """The weights themselves, in the order in which oneDNN reads them."""

    blocked: Tensor
    """In a layout of oneDNN's own, which only its operations read."""

    @classmethod
    def pack(cls, weight: Float[Tensor, "out in"]) -> "PrepackedLinear":
        """Copy a weight matrix into blocks."""
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS))

    def __call__(self, inputs: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
        """The product."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.blocked, None, "none", [], "")
        return output

    def dequantized(self) -> Float[Tensor, "out in"]:
        """The weights, float32."""
        return self.blocked.to_dense().float()


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
Kind = Literal["prepacked", "int8", "int4"]
_PACK: Mapping[Kind, Callable[[Tensor], PackedLinear]] = {
    "prepacked": PrepackedLinear.pack,
    "int8": Int8Linear.pack,
    "int4": Int4Linear.pack,
}


class _Copy(NamedTuple):
    """The copy of one or several layers' weights, and what shows that they have changed since."""

    weights: Sequence[Tensor]
    versions: Sequence[int]
    """How often torch's operations had changed each weight in place."""
    pointers: Sequence[int]
    samples: Sequence[Tensor]
    """Views of some of each weight's values."""
    values: Tensor
    """Those values when the copy was made."""
    packed: PackedLinear


@final
class PackedWeights:
    """The packed copies of a model's linear layers, each made when it is first used.

    A layer whose weight has been replaced, or changed in place by torch's operations, is packed again at its next use.
    A change that torch does not count (through `.data`, as PEFT merges adapters) is noticed by `refresh`. A layer that
    has become more than a product (an adapter, a hook) or has another dtype runs by itself, without a copy.
    """

    def __init__(self, model: nn.Module, kind: Kind) -> None:
        """See `check_packable` for 8 and 4 bits, and `can_prepack`."""
        self._head, self.kind = getattr(model, "lm_head", None), kind
        self._dtype = next(model.parameters()).dtype
        self._copies = dict[Any, _Copy]()

    @property
    def is_exact(self) -> bool:
        """Whether the copies hold the same weights."""
        return self.kind == "prepacked"

    def refresh(self) -> None:
        """Drop the copies whose weights have other values now, judged by a few hundred values of each.

        Call it before a text; it takes about 1 ms for SmolLM2.
        """
        copies = list(self._copies.items())
        moved = [layers for layers, copy in copies if [weight.data_ptr() for weight in copy.weights] != copy.pointers]
        now = torch.cat([sample for _, copy in copies for sample in copy.samples]) if copies else None
        if now is None or (not moved and torch.equal(now, torch.cat([copy.values for _, copy in copies]))):
            return
        for layers, copy in copies:
            if layers in moved or not torch.equal(torch.cat(list(copy.samples)), copy.values):
                self._copies.pop(layers, None)  # another thread may have been here

    @torch.no_grad()
    def __call__(self, inputs: Float[Tensor, "row in"], *layers: Any) -> Float[Tensor, "row out"]:
        """The outputs of linear layers that read the same inputs, next to each other: one product for all of them."""
        if not all(_is_product(layer, self._dtype) for layer in layers):
            return torch.cat([layer(inputs) for layer in layers], 1)
        output = self._copy_of(layers)(inputs)
        offset = 0
        for layer in layers:
            if layer.bias is not None:
                output[:, offset : offset + layer.out_features] += layer.bias
            offset += layer.out_features
        return output

    def _copy_of(self, layers: Any) -> PackedLinear:
        weights = [layer.weight for layer in layers]
        versions = list(map(_version, weights))
        copy = self._copies.get(layers)
        if copy is None or copy.versions != versions or not all(map(operator.is_, copy.weights, weights)):
            packed = _PACK[_kind_of(layers[0], self._head, self.kind)](torch.cat(weights))
            pointers, samples = [weight.data_ptr() for weight in weights], list(map(_sample, weights))
            copy = _Copy(weights, versions, pointers, samples, torch.cat(samples), packed)
            self._copies[layers] = copy
        return copy.packed

    def __getstate__(self) -> dict[str, Any]:
        """Without the copies, which neither `copy.deepcopy` nor `pickle` can read: they are made again."""
        return self.__dict__ | {"_copies": {}}


def can_prepack(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether this torch build and CPU have oneDNN's product for the dtype of `model`, and its layers are products."""
    if not torch._C._has_mkldnn or not all(_is_product(linear, dtype) for _, linear in _linears(model)):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_size(model: nn.Module) -> int:
    """Bytes of a copy of the weights of every linear layer."""
    return sum(linear.weight.nbytes for _, linear in _linears(model))


def check_packable(model: nn.Module, kind: Kind) -> None:
    """Refuse a model with a linear layer that torch's kernel for 8 or 4 bits cannot stand for.

    Raises:
        ValueError: a layer is more than a product, or its size does not fit.
    """
    for name, linear in _linears(model):
        if not _is_product(linear, torch.bfloat16):
            raise ValueError(
                f"decode_weights is {kind!r}, but {name} is not a plain linear layer in bfloat16 (an adapter, or a "
                "hook); merge the adapter or remove the hook, or leave decode_weights out"
            )
        bits = _kind_of(linear, getattr(model, "lm_head", None), kind)
        outputs, inputs = linear.weight.shape
        if inputs % _INPUT_MULTIPLE[bits] or outputs % _OUTPUT_MULTIPLE[bits]:
            raise ValueError(
                f"decode_weights is {kind!r}, but {name} has {inputs} inputs and {outputs} outputs, which must be "
                f"multiples of {_INPUT_MULTIPLE[bits]} and {_OUTPUT_MULTIPLE[bits]}; leave it out"
            )


def _kind_of(linear: nn.Module, head: nn.Module | None, kind: Kind) -> Kind:
    """The head is packed in 8 bits at least."""
    return "int8" if kind == "int4" and linear is head else kind


def _sample(weight: Tensor) -> Tensor:
    """A view of at most 512 values spread over a matrix, in other columns from row to row."""
    if not weight.is_contiguous():
        return weight.detach().diagonal()
    return weight.detach().view(-1)[:: max(1, weight.numel() // 512) | 1]


def _version(weight: Tensor) -> int:
    """How often a tensor was changed in place; 0 where torch does not count it."""
    return 0 if weight.is_inference() else weight._version


def _is_product(linear: Any, dtype: torch.dtype) -> bool:
    """Whether a linear layer is no more than that: nothing hooks into it or replaces its forward."""
    changed = "forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks
    return type(linear) is nn.Linear and linear.weight.dtype == dtype and not changed


def _linears(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
