"""The varlen layout: prompts and rows of any length, packed one after another into one sequence without padding."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@final
class PackedSequences:
    """Consecutive sequences within the packed tokens.

    Args:
        start: the index of the first sequence's first token.
        lengths: the number of tokens in each sequence, at least one.
    """

    def __init__(self, start: int, lengths: Sequence[int], device: torch.device) -> None:
        self.start, self.lengths, self.count, self.longest = start, tuple(lengths), len(lengths), max(lengths)
        self.total = sum(lengths)
        self.device = device
        self.equal_lengths = min(lengths) == self.longest

    @cached_property
    def starts(self) -> Int[Tensor, " sequence"]:
        """The index of each sequence's first token."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return self.start + lengths.cumsum(0) - lengths

    @property
    def ends(self) -> Int[Tensor, " sequence"]:
        """The index of each sequence's last token."""
        return self.starts + torch.tensor(self.lengths, device=self.device) - 1

    @cached_property
    def mask(self) -> Bool[Tensor, "sequence longest"]:
        """True for tokens, False for padding, when the sequences are padded at their end."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.arange(self.longest, device=self.device) < lengths[:, None]

    @cached_property
    def _pad_index(self) -> Int[Tensor, " padded"]:
        """For each padded position, the index of its token; of the sequence's first token for padding."""
        offsets = torch.arange(self.longest, device=self.device).expand(self.count, -1)
        return (self.starts[:, None] + offsets.where(self.mask, 0)).flatten()

    @cached_property
    def _unpad_index(self) -> Int[Tensor, " total"]:
        return self.mask.flatten().nonzero()[:, 0]

    def pad(
        self, states: Float[Tensor, "token *width"], *, zero_padding: bool = False
    ) -> Float[Tensor, "sequence longest *width"]:
        """The sequences as a padded batch.

        Args:
            zero_padding: fill the padding with zeros; by default it repeats the sequence's first token.
        """
        if self.equal_lengths:
            part = states[self.start : self.start + self.total]
            return part.view(self.count, self.longest, *states.shape[1:])
        padded = states.index_select(0, self._pad_index).view(self.count, self.longest, *states.shape[1:])
        if not zero_padding:
            return padded
        return padded.masked_fill(~self.mask.view(*self.mask.shape, *[1] * (padded.dim() - 2)), 0)

    def unpad(self, padded: Float[Tensor, "sequence longest *width"]) -> Float[Tensor, "total *width"]:
        """The inverse of `pad`: the tokens alone, packed."""
        packed = padded.reshape(-1, *padded.shape[2:])
        return packed if self.equal_lengths else packed.index_select(0, self._unpad_index)


States = tuple[Float[Tensor, "sequence longest kv_head head_dim"], Float[Tensor, "sequence longest kv_head value_dim"]]
"""One layer's keys and values of several sequences, padded."""


@final
class VarlenLayout:
    """How packed tokens are laid out: all prompts, then all rows.

    A prompt attends to itself; a row attends to its prompt and to itself.

    Args:
        prompts: the length of each prompt; empty for rows without a prompt.
        rows: the length of each row.
        index: the prompt of each row.
        causal: a token attends only to tokens before it; otherwise to its full sequence, and a row to its full prompt.
        cached_kv: the prompts' keys and values in every layer, in layer order, from an earlier pass. The prompts are
            then not among the packed tokens, and the layout can be used for one pass only.
        record_kv: collect the rows' keys and values in `recorded_kv`, for later passes.
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
        self.prompts = PackedSequences(0, prompts, index.device) if prompts else None
        self.prefix_is_cached = cached_kv is not None
        self._cached_kv: Iterator[States] = iter(cached_kv or ())
        self.rows = PackedSequences(0 if self.prefix_is_cached else sum(prompts), rows, index.device)
        self.recorded_kv: list[States] = []
        """The rows' keys and values in every layer, after a pass with `record_kv`."""

    @property
    def parts(self) -> list[PackedSequences]:
        """The prompts (unless there are none, or they are cached) and the rows: all that is packed, in order."""
        return [self.rows] if self.prompts is None or self.prefix_is_cached else [self.prompts, self.rows]

    @cached_property
    def positions(self) -> Int[Tensor, "1 token"]:
        """The position ids: each token's position in `[prompt; row]`."""
        positions = []
        for part in self.parts:
            offsets = torch.arange(part.longest, device=part.device).expand(part.count, -1)
            if part is self.rows and self.prompts is not None:
                lengths = torch.tensor(self.prompts.lengths, device=part.device)
                offsets = offsets + lengths[self.index][:, None]
            positions.append(offsets[part.mask])
        return torch.cat(positions)[None]

    def token_index(self, positions: Int[Tensor, "row kept"]) -> Int[Tensor, "row kept"]:
        """The indices, among all packed tokens, of some tokens of each row.

        Args:
            positions: counted from the row's first token. -1 is the last token of its prompt; without a prompt, the
                row's first token.
        """
        before = self.prompts.ends[self.index] if self.prompts else self.rows.starts
        return torch.where(positions < 0, before[:, None], self.rows.starts[:, None] + positions)

    def next_cached_kv(self) -> States | None:
        """The cached prompts' keys and values in the next layer, padded; None where no prompt is cached.

        Call it exactly once per layer, in layer order.
        """
        return next(self._cached_kv) if self.prefix_is_cached else None

    def packed_prompts(
        self, key: Float[Tensor, "token head head_dim"], value: Float[Tensor, "token head value_dim"]
    ) -> States | None:
        """The keys and values of the prompts among the packed tokens, padded; None without prompts."""
        return None if self.prompts is None else (self.prompts.pad(key), self.prompts.pad(value))

    def parts_with_kv(
        self, key: Float[Tensor, "token head head_dim"], value: Float[Tensor, "token head value_dim"]
    ) -> list[tuple[PackedSequences, Tensor, Tensor]]:
        """Each part with its visible keys and values; has the same restriction as `next_cached_kv`."""
        prefix = self.next_cached_kv() or self.packed_prompts(key, value)
        return [(part, *self.visible_kv(part, key, value, prefix)) for part in self.parts]

    def visible_kv(
        self,
        part: PackedSequences,
        key: Float[Tensor, "token head head_dim"],
        value: Float[Tensor, "token head value_dim"],
        prefix: States | None,
    ) -> tuple[Float[Tensor, "row keys head head_dim"], Float[Tensor, "row keys head value_dim"]]:
        """The keys and values that a part's queries may attend to: `[prompt, padded; the sequence itself, padded]`.

        Args:
            prefix: the prompts' keys and values in this layer, if there are prompts.
        """
        keys, values = part.pad(key), part.pad(value)
        if prefix is None or part is not self.rows:
            return keys, values
        return self._prepend_prefix(prefix[0], keys), self._prepend_prefix(prefix[1], values)

    def record(self, key: Float[Tensor, "token head head_dim"], value: Float[Tensor, "token head value_dim"]) -> None:
        """Append one layer's keys and values of the rows to `recorded_kv`; call it once per layer, in layer order."""
        self.recorded_kv.append((self.rows.pad(key), self.rows.pad(value)))

    def _prepend_prefix(
        self, prefix: Float[Tensor, "prompt longest *width"], states: Float[Tensor, "row more *width"]
    ) -> Float[Tensor, "row keys *width"]:
        by_row = prefix.expand(len(states), *prefix.shape[1:]) if len(prefix) == 1 else prefix[self.index]
        return torch.cat([by_row, states], 1)

    def mask(self, part: PackedSequences) -> Bool[Tensor, "#sequence 1 #longest keys"]:
        """The attention mask over a part's visible keys: True where a query attends to a key."""
        masked_out = self.masked_out(part)[0]
        before = 0 if self.prompts is None or part is self.prompts else self.prompts.longest
        return nn.functional.pad(~masked_out, (before + part.longest - masked_out.shape[-1], 0), value=True)

    def masked_out(self, part: PackedSequences) -> Bool[Tensor, "1 #sequence 1 longest last_keys"]:
        """True where a part's queries must not attend to a key. It covers the last keys; all before them are visible.

        It covers the sequence itself, and the prompt too where prompts differ in length and so have padding.
        """
        return self._rows_masked_out if part is self.rows else self._self_masked_out(part)

    @cached_property
    def _rows_masked_out(self) -> Bool[Tensor, "1 #sequence 1 longest last_keys"]:
        rows_only = self._self_masked_out(self.rows)
        if self.prompts is None or self.prompts.equal_lengths:
            return rows_only
        padding = ~self.prompts.mask[self.index][None, :, None, None].expand(-1, -1, -1, self.rows.longest, -1)
        return torch.cat([padding, rows_only.expand(-1, self.rows.count, -1, -1, -1)], -1)

    def _self_masked_out(self, part: PackedSequences) -> Bool[Tensor, "1 #sequence 1 longest longest"]:
        """`masked_out` among the tokens of each sequence itself."""
        if not self.causal:
            return ~part.mask[None, :, None, None].expand(-1, -1, -1, part.longest, -1)
        # Padding is at the end of a sequence, so a causal mask excludes it too.
        square = torch.ones(part.longest, part.longest, dtype=torch.bool, device=part.device)
        return square.triu(1)[None, None, None]
