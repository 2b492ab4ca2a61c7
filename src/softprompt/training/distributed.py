"""The processes that train one prompt together, each with its share of every batch; mostly there is one."""

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

_PATIENCE = timedelta(hours=12)
"""How long one waits for another, who may be downloading a model; who has ended is noticed at once."""

_ENDED = "another process of this training has ended; see what it said, and go on with: softprompt train --resume RUN"

_MISSED = ("gloo", "remote process", "Connection closed", "Connection reset")
"""What torch's errors hold where one waits for another that is gone."""


@final
class LocalFailure(RuntimeError):
    """One of several processes has failed and cannot tell the others why: whoever it is says it itself."""


@final
class DistributedGroup:
    """The processes started by one `torchrun` or `accelerate launch`; this one is number `rank` of `world_size`.

    Where there are several every method is a meeting: each process calls the same ones in the same order.

    Raises:
        ValueError: `accelerate launch` started one process where several were asked for, or is to shard by itself.
        RuntimeError: from any method, when another process has ended.

    >>> DistributedGroup(cpu=True).share([4, 5, 6])
    [4, 5, 6]
    """

    def __init__(self, *, cpu: bool) -> None:
        _refuse_launch()
        state = PartialState(cpu=cpu, timeout=_PATIENCE)
        self.world_size: int = state.num_processes
        self.rank: int = state.process_index
        self.device: torch.device = state.device
        self.sharded = False
        """Whether each holds a part of the backbone, so that every pass is a meeting."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def shard(self, model: Any) -> None:
        """Share out the layers of `model`, which one process keeps whole, and bring it to the processes' devices."""
        if self.world_size > 1:
            fsdp.shard(model, self.device.type)
            self.sharded = True
        if self.device.type != "cpu":  # to "cpu:0", as accelerate has it, all would be copied
            model.to(self.device)

    def share(self, rows: Sequence[_T]) -> Sequence[_T]:
        """Of rows that all have, those of this process; no meeting."""
        return rows[self.rank :: self.world_size]

    def pad_shard(self, mine: Sequence[_T], rows: Sequence[_T]) -> Sequence[_T]:
        """The share of this process; where passes are meetings, as long as any other. No meeting itself."""
        fewer = self.sharded and len(mine) * self.world_size < len(rows)
        return [*mine, rows[0]] if fewer else mine

    def own_seed(self, seed: int) -> int:
        """One for each process, the main one's being `seed`; no meeting."""
        # Below 2^32: torch's generator on the CPU takes no more of a seed.
        return random.Random(f"{seed}:{self.rank}").getrandbits(32) if self.rank else seed

    def gather_in_order(self, own: Sequence[_T]) -> list[_T]:
        """What was made of each `share`, a value a row, in the order of all rows."""
        parts = self.gather(list(own))
        whole: list[Any] = [None] * sum(map(len, parts))
        for index, part in enumerate(parts):
            whole[index :: self.world_size] = part
        return whole

    def all_reduce(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Put the sum over all processes into `loss` and into each parameter's gradient."""
        if self.world_size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # a last batch may have fewer rows than there are processes
                parameter.grad = torch.zeros_like(parameter)
        summed = [loss, *(parameter.grad for parameter in parameters if parameter.grad is not None)]
        flat = torch.cat([tensor.reshape(-1).float() for tensor in summed]).to(self.device)
        with _meeting():
            torch.distributed.all_reduce(flat)
        for tensor, values in zip(summed, torch.split(flat, [tensor.numel() for tensor in summed]), strict=True):
            tensor.copy_(values.view_as(tensor))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Put the main process's values into `tensors`; on another kind of processor they may have come out otherwise.

        A singular vector has no sign of its own, for one, and each process would train another product.
        """
        if self.world_size == 1:
            return
        for tensor in tensors:
            whole = tensor.detach().contiguous().to(self.device)
            with _meeting():
                torch.distributed.broadcast(whole, 0)
            tensor.copy_(whole)

    def any(self, mine: bool) -> bool:
        """Whether it is so in any process."""
        if self.world_size == 1:
            return mine
        flag = torch.tensor(int(mine), device=self.device)
        with _meeting():
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def gather(self, mine: _T) -> list[_T]:
        """The value of each process."""
        if self.world_size == 1:
            return [mine]
        found: list[Any] = [None] * self.world_size
        with _meeting():
            torch.distributed.all_gather_object(found, mine)
        return found

    @contextmanager
    def collective_errors(self) -> Iterator[None]:
        """What each process does by itself: an error in one of them ends all, with its sentence.

        There must be no meeting within: who has failed would not be there.
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
        sentences = self.gather("" if failure is None else f"{failure or type(failure).__name__}")
        if failure is not None:
            raise failure
        first = next(index for index, sentence in enumerate(sentences) if sentence)
        raise RuntimeError(f"process {first} of {self.world_size} failed: {sentences[first]}")

    @contextmanager
    def forward_scope(self) -> Iterator[None]:
        """The backbone's passes over each process's rows: as a `part`, unless they are meetings themselves.

        Raises:
            Alone: where they are, this process has failed; the others miss it in the same pass.
        """
        if not self.sharded:
            with self.collective_errors():
                yield
            return
        try:
            yield
        except Exception as error:
            if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _MISSED):
                raise RuntimeError(_ENDED) from error
            raise LocalFailure(
                f"process {self.rank} of {self.world_size} failed: {error or type(error).__name__}"
            ) from error

    def from_main(self, call: Callable[[], _T]) -> _T:
        """What `call` gives in the main process, which alone makes it."""
        if self.world_size == 1:
            return call()
        found: list[Any] = [None]
        with self.collective_errors():
            if self.is_main:
                found[0] = call()
        with _meeting():
            torch.distributed.broadcast_object_list(found)
        return found[0]

    def main_process_first(self, call: Callable[[], _T]) -> _T:
        """What `call` gives in each process, the main one first.

        What it downloads, converts or measures for good is then there for the others.
        """
        found: list[_T] = []
        for first in (True, False):
            with self.collective_errors():
                if self.is_main is first:
                    found.append(call())
        return found[0]

    def check_equal(self, what: str, mine: object) -> None:
        """Raise a ValueError in all processes unless all have the same."""
        values = self.gather(mine)
        if others := [index for index, value in enumerate(values) if value != values[0]]:
            raise ValueError(
                f"{what} of process {others[0]} are not those of process 0; give each the same files and --dtype"
            )


@contextmanager
def _meeting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that torch.distributed raises
        raise RuntimeError(_ENDED) from error


def _refuse_launch() -> None:
    """Refuse what the launcher would do without a word.

    Without MPI, `accelerate launch --cpu --num_processes 2` starts one process; `--use_fsdp` is left to a `prepare`
    that knows no frozen backbone.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError(
            "accelerate launch is told to use FSDP, which is not how a frozen backbone is shared out here; leave "
            "--use_fsdp out, and give softprompt train --shard"
        )
    several = "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if several and not any(f"{name}SIZE" in os.environ for name in ("WORLD_", "PMI_", "OMPI_COMM_WORLD_")):
        raise ValueError(
            "accelerate launch has started one process where several were asked for, since on CPUs it needs mpirun; "
            "use: torchrun --nproc-per-node 2 -m softprompt.cli train ..."
        )
