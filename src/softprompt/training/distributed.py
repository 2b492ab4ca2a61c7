"""Data-parallel training: several processes train one prompt, each on its share of every batch."""

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, final

import torch
import torch.distributed
from accelerate import PartialState
from torch import Tensor, nn

from softprompt.backbones import fsdp

_T = TypeVar("_T")

_TIMEOUT = timedelta(hours=12)
"""How long a collective waits for another process, which may be downloading a model; a dead one is noticed at once."""

_PEER_ENDED = (
    "another process of this training has ended; read its error, and continue with: softprompt train --resume RUN"
)

_PEER_ENDED_SIGNS = ("gloo", "remote process", "Connection closed", "Connection reset")
"""Parts of torch's error messages when a peer has died."""


@final
class LocalFailure(RuntimeError):
    """Raised in a process that cannot report its error to the others, and so must print it itself."""


@final
class DistributedGroup:
    """The processes started by one `torchrun` or `accelerate launch`; often just one.

    Unless its description says otherwise, every method is a collective: all processes must call it, in the same order.

    Raises:
        ValueError: `accelerate launch` started one process instead of several, or is set to use FSDP itself.
        RuntimeError: from any collective, if another process has ended.

    >>> DistributedGroup(cpu=True).share([4, 5, 6])
    [4, 5, 6]
    """

    def __init__(self, *, cpu: bool) -> None:
        _check_launcher()
        state = PartialState(cpu=cpu, timeout=_TIMEOUT)
        self.world_size: int = state.num_processes
        self.rank: int = state.process_index
        self.device: torch.device = state.device
        self.sharded = False
        """Whether the backbone is sharded, so that every forward and backward pass is a collective."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files (not a collective)."""
        return self.rank == 0

    def shard(self, model: Any) -> None:
        """Shard the layers of `model` over the processes and move it to their devices; one process only moves it."""
        if self.world_size > 1:
            fsdp.shard(model, self.device.type)
            self.sharded = True
        if self.device.type != "cpu":  # moving to accelerate's "cpu:0" would copy the model
            model.to(self.device)

    def share(self, rows: Sequence[_T]) -> Sequence[_T]:
        """Return this process's share of `rows` (not a collective)."""
        return rows[self.rank :: self.world_size]

    def pad_shard(self, local: Sequence[_T], rows: Sequence[_T]) -> Sequence[_T]:
        """With a sharded backbone, pad this process's share of `rows` to the longest share (not a collective)."""
        is_shorter = self.sharded and len(local) * self.world_size < len(rows)
        return [*local, rows[0]] if is_shorter else local

    def process_seed(self, seed: int) -> int:
        """A seed for this process, in the main process `seed` itself (not a collective)."""
        # 32 bits, since torch's CPU generator uses no more of a seed.
        return random.Random(f"{seed}:{self.rank}").getrandbits(32) if self.rank else seed

    def gather_in_order(self, local: Sequence[_T]) -> list[_T]:
        """The values that the processes computed for each row of their `share`, in the order of all rows."""
        parts = self.gather(list(local))
        values: list[Any] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            values[rank :: self.world_size] = part
        return values

    def all_reduce(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Sum `loss` and each parameter's gradient over all processes, in place."""
        if self.world_size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # a batch may have fewer rows than there are processes
                parameter.grad = torch.zeros_like(parameter)
        summed = [loss, *(parameter.grad for parameter in parameters if parameter.grad is not None)]
        flat = torch.cat([tensor.reshape(-1).float() for tensor in summed]).to(self.device)
        with _peer_errors():
            torch.distributed.all_reduce(flat)
        for tensor, values in zip(summed, torch.split(flat, [tensor.numel() for tensor in summed]), strict=True):
            tensor.copy_(values.view_as(tensor))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the main process's values into `tensors`, in place.

        Initial values can differ between kinds of processors: the sign of a singular vector is arbitrary, for one.
        """
        if self.world_size == 1:
            return
        for tensor in tensors:
            values = tensor.detach().contiguous().to(self.device)
            with _peer_errors():
                torch.distributed.broadcast(values, 0)
            tensor.copy_(values)

    def any(self, local: bool) -> bool:
        """Whether `local` is true in any process."""
        if self.world_size == 1:
            return local
        flag = torch.tensor(int(local), device=self.device)
        with _peer_errors():
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def gather(self, local: _T) -> list[_T]:
        """The value of each process, by rank."""
        if self.world_size == 1:
            return [local]
        values: list[Any] = [None] * self.world_size
        with _peer_errors():
            torch.distributed.all_gather_object(values, local)
        return values

    @contextmanager
    def collective_errors(self) -> Iterator[None]:
        """Raise in all processes if the block fails in one of them, with that process's message.

        The block must not contain a collective, which a failed process would miss.
        """
        if self.world_size == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if not self.any(failure is not None):
            return
        messages = self.gather("" if failure is None else f"{failure or type(failure).__name__}")
        if failure is not None:
            raise failure
        first = next(rank for rank, message in enumerate(messages) if message)
        raise RuntimeError(f"process {first} of {self.world_size} failed: {messages[first]}")

    @contextmanager
    def forward_scope(self) -> Iterator[None]:
        """For a block of forward and backward passes: like `collective_errors`, unless the backbone is sharded.

        Raises:
            LocalFailure: the backbone is sharded, and this process failed; the others notice in the same pass.
        """
        if not self.sharded:
            with self.collective_errors():
                yield
            return
        try:
            yield
        except Exception as error:
            if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _PEER_ENDED_SIGNS):
                raise RuntimeError(_PEER_ENDED) from error
            raise LocalFailure(
                f"process {self.rank} of {self.world_size} failed: {error or type(error).__name__}"
            ) from error

    def from_main(self, call: Callable[[], _T]) -> _T:
        """Call `call` in the main process only, and return its result in every process."""
        if self.world_size == 1:
            return call()
        result: list[Any] = [None]
        with self.collective_errors():
            if self.is_main:
                result[0] = call()
        with _peer_errors():
            torch.distributed.broadcast_object_list(result)
        return result[0]

    def main_process_first(self, call: Callable[[], _T]) -> _T:
        """Call `call` in the main process, then in the others, which find its downloads and conversions cached."""
        result: list[_T] = []
        for main_turn in (True, False):
            with self.collective_errors():
                if self.is_main is main_turn:
                    result.append(call())
        return result[0]

    def check_equal(self, what: str, local: object) -> None:
        """Check that `local` is equal in all processes.

        Raises:
            ValueError: it is not; in all processes.
        """
        values = self.gather(local)
        if different := [rank for rank, value in enumerate(values) if value != values[0]]:
            raise ValueError(
                f"{what} of process {different[0]} are not those of process 0; give each the same files and --dtype"
            )


@contextmanager
def _peer_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the base of torch.distributed's errors
        raise RuntimeError(_PEER_ENDED) from error


def _check_launcher() -> None:
    """Refuse launches that would silently do something else.

    Without MPI, `accelerate launch --cpu --num_processes 2` starts one process; `--use_fsdp` takes effect in
    `Accelerator.prepare`, which is not used here.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError(
            "accelerate launch has --use_fsdp, which does not shard a frozen backbone; leave --use_fsdp out, and give "
            "softprompt train --shard"
        )
    several_requested = "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if several_requested and not any(f"{name}SIZE" in os.environ for name in ("WORLD_", "PMI_", "OMPI_COMM_WORLD_")):
        raise ValueError(
            "accelerate launch started one process although several were requested, since on CPUs it needs mpirun; "
            "use: torchrun --nproc-per-node 2 -m softprompt.cli train ..."
        )
