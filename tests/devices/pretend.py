"""A pretend accelerator: a torch device `pretend` whose tensors lie in CPU memory and refuse to meet CPU tensors.

It registers torch's PrivateUse1 backend from Python, so it needs a process of its own: a process can have one such
backend, for good. A tensor of the device wraps the CPU tensor that holds its values. Autograd, modules and optimizers
see a device that is not the CPU; each operation is run by the CPU's kernel, so results can be compared closely. As on
CUDA, an operation on tensors of both devices raises, unless one of them is a CPU scalar in an elementwise operation.
Unlike on CUDA, a CPU tensor as an index into a device tensor raises too: it would be a hidden copy.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, final

import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
_FACTORIES = (
    "arange", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tril_indices", "triu_indices", "zeros",
)  # fmt: skip
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from")
"""The operations that move values between devices."""
_SYNCS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero", "aten::unique_dim",
          "aten::_unique2", "aten::masked_select", "aten::repeat_interleave")  # fmt: skip
"""The operations whose result the host must wait for, with the copies to the CPU."""

syncs: Counter[str] = Counter()
"""How often the host waited for the device, by operation."""


class MixedDevices(RuntimeError):
    """An operation on tensors of several devices."""


@final
class PretendTensor(torch.Tensor):
    """A tensor of the pretend device; `values` is the CPU tensor of its values."""

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "PretendTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.values = values
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"pretend {self.values!r}"

    @property
    def data(self) -> "PretendTensor":
        """Without its history."""
        return torch._C.TensorBase.data.__get__(self)

    @data.setter
    def data(self, other: "PretendTensor") -> None:
        torch._C.TensorBase.data.__set__(self, other)
        self.values = other.values

    def untyped_storage(self) -> torch.UntypedStorage:
        """Where the values are: its address tells tied weights."""
        return self.values.untyped_storage()

    def tolist(self) -> Any:
        """What torch does itself for a tensor that is not of a subclass: copy to the CPU first."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run one operation on the values of its tensors."""
    name, tensors = func._schema.name, list(_tensors([args, kwargs]))
    if name not in _COPIES:
        _check_devices(func, tensors)
    target = kwargs.get("device")
    on_device = torch.device(target).type == NAME if target is not None else _is_on_device(func, tensors)
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name in _SYNCS or _indexes_by_mask(func, args) or (name in _COPIES and not on_device):
        syncs[name] += 1
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    # The wrapper of an operation in place is its own result.
    wrappers = {id(tensor.values): tensor for tensor in tensors if isinstance(tensor, PretendTensor)}
    result = func(*_map(_values, args), **{key: _map(_values, value) for key, value in kwargs.items()})

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, PretendTensor) or not on_device:
            return value
        wrapper = wrappers.get(id(value))
        if wrapper is None:
            return PretendTensor(value)
        if wrapper.shape != value.shape:
            raise NotImplementedError(f"{name} resized a tensor of the pretend device in place")
        return wrapper

    return _map(wrap, result)


def _map(function: Any, tree: Any) -> Any:
    """`function` of each leaf of nested lists and tuples."""
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map(function, item) for item in tree)
    return function(tree)


def _tensors(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _values(value: Any) -> Any:
    return value.values if isinstance(value, PretendTensor) else value


def _is_on_device(func: Any, tensors: Sequence[torch.Tensor]) -> bool:
    first = tensors[0] if func._schema.name in _COPIES else None
    return isinstance(first, PretendTensor) if first is not None else True


def _check_devices(func: Any, tensors: Sequence[torch.Tensor]) -> None:
    pointwise = torch.Tag.pointwise in func.tags or func._schema.name in ("aten::fill_", "aten::masked_fill_")
    strangers = [
        tensor for tensor in tensors if not isinstance(tensor, PretendTensor) and not (pointwise and tensor.dim() == 0)
    ]
    on_device = [isinstance(tensor, PretendTensor) for tensor in tensors]
    writes_to_cpu = func._schema.is_mutable and any(on_device) and not on_device[0]  # also where it is a scalar
    if writes_to_cpu or (strangers and any(on_device)):
        shapes = [f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors]
        raise MixedDevices(f"{func} got tensors of several devices: {', '.join(shapes)}")


def _indexes_by_mask(func: Any, args: Sequence[Any]) -> bool:
    """Whether a boolean mask selects elements, whose number the host must know."""
    return func._schema.name in ("aten::index", "aten::index_put_") and any(
        index is not None and index.dtype is torch.bool for index in args[1]
    )


class PretendGenerator(torch.Generator):
    """A random generator of the pretend device; it draws what the CPU's would. See `StrictDevices` for its checks."""

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type != NAME:
            return torch._C.Generator(device)
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        """The pretend device."""
        return torch.device(NAME, 0)


def _factory(func: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> PretendTensor:
        return PretendTensor(func(*args, **{**kwargs, "device": torch.device("cpu"), "pin_memory": False}))

    return kernel


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _values(target).copy_(_values(source))
    return target


class _Module(_DummyBackendModule):
    def synchronize(self, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_library: list[torch.library.Library] = []


def register() -> None:
    """Add the device to this process."""
    # So that modules move as to CUDA: the parameter object stays, and with it what is tied to it.
    torch.__future__.set_swap_module_params_on_conversion(True)
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    for name in _FACTORIES:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            if "out" not in overload and "names" not in overload:
                func = getattr(packet, overload)
                library.impl(func, _factory(func), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _library.append(library)  # kernels live as long as it does
    torch.Generator = PretendGenerator  # type: ignore[misc]
