"""Prompts and rows of any length, one behind another in one sequence without padding."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@final
class Block:
    """Sequences that lie one behind another among packed tokens.

    Args:
        start: the place of the first one's first token.
        lengths: tokens of each, at least one.
    """

    def __init__(self, start: int, lengths: Sequence[int], device: torch.device) -> None:
        self.start, self.lengths, self.count, self.longest = start, tuple(lengths), len(lengths), max(lengths)
        self.total = sum(lengths)
        self.device = device
        self.even = min(lengths) == self.longest

    @cached_property
    def starts(self) -> Int[Tensor, " sequence"]:
        """Where each begins."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return self.start + lengths.cumsum(0) - lengths

    @property
    def ends(self) -> Int[Tensor, " sequence"]:
        """Where the last token of each is."""
        return self.starts + torch.tensor(self.lengths, device=self.device) - 1

    @cached_property
    def real(self) -> Bool[Tensor, "sequence longest"]:
        """Where there is a token when each is padded at its end to the longest."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.arange(self.longest, device=self.device) < lengths[:, None]

    @cached_property
    def _places(self) -> Int[Tensor, " padded"]:
        offsets = torch.arange(self.longest, device=self.device).expand(self.count, -1)
        return (self.starts[:, None] + offsets.where(self.real, 0)).flatten()

    @cached_property
    def _kept(self) -> Int[Tensor, " total"]:
        return self.real.flatten().nonzero()[:, 0]

    def padded(
        self, states: Float[Tensor, "token *width"], *, blank: bool = False
    ) -> Float[Tensor, "sequence longest *width"]:
        """Its sequences side by side; behind a short one stands anything, or nothing but zeros if `blank`."""
        if self.even:
            part = states[self.start : self.start + self.total]
            return part.view(self.count, self.longest, *states.shape[1:])
        wide = states.index_select(0, self._places).view(self.count, self.longest, *states.shape[1:])
        return wide.masked_fill(~self.real.view(*self.real.shape, *[1] * (wide.dim() - 2)), 0) if blank else wide

    def flat(self, wide: Float[Tensor, "sequence longest *width"]) -> Float[Tensor, "total *width"]:
        """The inverse of `padded`, without the padding."""
        packed = wide.reshape(-1, *wide.shape[2:])
        return packed if self.even else packed.index_select(0, self._kept)


States = tuple[Float[Tensor, "sequence longest head head_dim"], Float[Tensor, "sequence longest head value_dim"]]
"""A layer's keys and values of several sequences, padded."""


@final
class VarlenLayout:
    """How packed tokens are laid out: every prompt, then every row; a row sees its prompt and its own past, or itself.

    Args:
        prompts: tokens of each prompt; none: rows without a prompt.
        rows: tokens of each row.
        index: the prompt of each row.
        causal: a token sees what stands before it; else all of its sequence, and a row all of its prompt.
        cached_kv: each layer's keys and values of the prompts, in the layers' order, where they were computed before;
            the prompts are then not among the packed tokens, and the layout is for one pass.
        record_kv: the rows' own are wanted in `recorded_kv`, for later passes.
    """

    def __init__(
        self,
        prompts: Sequence[int],
        rows: Sequence[int],
        index: Int[Tensor, " row"],
        *,
        causal: bool = True,
        cached_kv: Sequence[States] | None = None,
        record_kv: bool = False,
    ) -> None:
        self.index, self.causal, self.record_kv = index, causal, record_kv
        self.prompts = Block(0, prompts, index.device) if prompts else None
        self.prefix_is_cached = cached_kv is not None
        self._cached_kv: Iterator[States] = iter(cached_kv or ())
        self.rows = Block(0 if self.prefix_is_cached else sum(prompts), rows, index.device)
        self.recorded_kv: list[States] = []
        """Each layer's keys and values of the rows, where the layout record_kv them, once a pass is through."""

    @property
    def blocks(self) -> list[Block]:
        """In their order."""
        return [self.rows] if self.prompts is None or self.prefix_is_cached else [self.prompts, self.rows]

    @cached_property
    def positions(self) -> Int[Tensor, "one token"]:
        """Each token's place in `[prompt; row]`."""
        places = []
        for block in self.blocks:
            counted = torch.arange(block.longest, device=block.device).expand(block.count, -1)
            if block is self.rows and self.prompts is not None:
                lengths = torch.tensor(self.prompts.lengths, device=block.device)
                counted = counted + lengths[self.index][:, None]
            places.append(counted[block.real])
        return torch.cat(places)[None]

    def at(self, places: Int[Tensor, "row kept"]) -> Int[Tensor, "row kept"]:
        """Where each row's own tokens are among all; -1: the last of its prompt, or its first one without a prompt."""
        before = self.prompts.ends[self.index] if self.prompts else self.rows.starts
        return torch.where(places < 0, before[:, None], self.rows.starts[:, None] + places)

    def prefix_kv(
        self, key: Float[Tensor, "token head head_dim"], value: Float[Tensor, "token head value_dim"]
    ) -> States | None:
        """The prompts' own of a layer's keys and values; none without prompts.

        To be called once a layer, in the layers' order, where prompts are kept.
        """
        if self.prompts is None:
            return None
        return (
            next(self._cached_kv) if self.prefix_is_cached else (self.prompts.padded(key), self.prompts.padded(value))
        )

    def views(
        self, key: Float[Tensor, "token head head_dim"], value: Float[Tensor, "token head value_dim"]
    ) -> list[tuple[Block, Tensor, Tensor]]:
        """Each block with the keys and values that its queries may see, `[prompt, padded; own, padded]`.

        To be called as `prefix_kv` is.
        """
        prompts = self.prefix_kv(key, value)
        return [(block, *self.view(block, key, value, prompts)) for block in self.blocks]

    def view(
        self,
        block: Block,
        key: Float[Tensor, "token head head_dim"],
        value: Float[Tensor, "token head value_dim"],
        prompts: States | None,
    ) -> tuple[Float[Tensor, "row some head head_dim"], Float[Tensor, "row some head value_dim"]]:
        """The keys and values of one block's `views`; `prompts` is what `prefix_kv` gave for the layer."""
        keys, values = block.padded(key), block.padded(value)
        if prompts is None or block is not self.rows:
            return keys, values
        return self._behind(prompts[0], keys), self._behind(prompts[1], values)

    def record(self, key: Float[Tensor, "token head head_dim"], value: Float[Tensor, "token head value_dim"]) -> None:
        """Note a layer's keys and values of the rows; once a layer, in the layers' order."""
        self.recorded_kv.append((self.rows.padded(key), self.rows.padded(value)))

    def _behind(
        self, prompts: Float[Tensor, "prompt longest *width"], own: Float[Tensor, "row more *width"]
    ) -> Float[Tensor, "row some *width"]:
        one = prompts.expand(len(own), *prompts.shape[1:]) if len(prompts) == 1 else prompts[self.index]
        return torch.cat([one, own], 1)

    def visible(self, block: Block) -> Bool[Tensor, "#sequence one #longest some"]:
        """Which of the keys in a block's view its queries do see."""
        blocked = self.blocked(block)[0]
        before = 0 if self.prompts is None or block is self.prompts else self.prompts.longest
        return nn.functional.pad(~blocked, (before + block.longest - blocked.shape[-1], 0), value=True)

    def blocked(self, block: Block) -> Bool[Tensor, "1 #sequence 1 longest some"]:
        """What a block's queries must not see of the last keys put before them: `[prompt, padded; own, padded]`."""
        return self._rows_blocked if block is self.rows else self._later(block)

    @cached_property
    def _rows_blocked(self) -> Bool[Tensor, "1 #sequence 1 longest some"]:
        later = self._later(self.rows)
        if self.prompts is None or self.prompts.even:
            return later
        beyond = ~self.prompts.real[self.index][None, :, None, None].expand(-1, -1, -1, self.rows.longest, -1)
        return torch.cat([beyond, later.expand(-1, self.rows.count, -1, -1, -1)], -1)

    def _later(self, block: Block) -> Bool[Tensor, "1 #sequence 1 longest longest"]:
        if not self.causal:
            return ~block.real[None, :, None, None].expand(-1, -1, -1, block.longest, -1)
        # A short sequence's padding stands behind its tokens, so hiding what comes later hides it too.
        square = torch.ones(block.longest, block.longest, dtype=torch.bool, device=block.device)
        return square.triu(1)[None, None, None]
