"""The KV cache of a running batch: one buffer per layer, in which rows of any prompts lie next to each other.

A row's columns are `padding, prompt, text`, its newest token in the last one, and positions are explicit, so that
neither a neighbor's length nor its coming and going changes a result. This is the one file of the service that knows
how a transformers model caches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from softprompt.backbones.kernels import llama_cached
from softprompt.backbones.kernels.packed_linear import PackedWeights
from softprompt.models import PromptedModel
from softprompt.models.causal import Causal
from softprompt.models.kv_buffer import ROOM, KVBuffer
from softprompt.models.kv_prefix import KVPrefix, LayerKV
from softprompt.models.padding import length_mask, pad_batch
from softprompt.models.verify import Sample, cached_check, check_close, model_errors_refused, sample
from softprompt.prompts import Folded

MAX_LOGITS = 2**24
"""Logits of a pass whose logits are all read (64 MB in float32); more columns take several passes."""
Visit = Callable[[int, int, Float[Tensor, "token vocab"]], None]
"""Called with a row's number, the index of one of its tokens, and the logits after this and some following tokens."""


@final
@dataclass(frozen=True)
class Row:
    """A text to run after its prefix: the prompt, and the tokens of the text that the prefix contains already."""

    ids: Sequence[int]
    prompt: Folded
    prefix: KVPrefix


@final
class Batch:
    """Rows in a cache: their buffers, the real columns, and the number of text tokens of each."""

    def __init__(
        self,
        layers: list[KVBuffer],
        mask: Int[Tensor, "row column"],
        token_counts: Int[Tensor, " row"],
        prompts: list[Folded],
    ) -> None:
        self.layers = layers
        self.mask = mask
        self.token_counts = token_counts
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, rows: slice) -> "Batch":
        """Neighboring rows, in the same buffers: nothing is copied, and each part writes into its own rows."""
        layers = [KVBuffer(layer.keys[rows], layer.values[rows], layer.length) for layer in self.layers]
        return Batch(layers, self.mask[rows], self.token_counts[rows], self.prompts[rows])


@final
class CachedDecoder:
    """A frozen decoder that starts and continues rows of any prompts in one pass.

    Raises:
        ValueError: a row's result depends on the batch's other rows.
    """

    def __init__(self, prompted: PromptedModel) -> None:
        assert isinstance(prompted, Causal)
        self.prompted = prompted
        self._model = prompted.backbone.model
        self._counts_columns = prompted.layout == "inline"
        """The model counts positions by column (MPT): no padding between a row's prompt, text and next token."""
        # The check compares the model with itself, so it runs with its own weights or exact copies.
        self._packed: PackedWeights | None = prompted.packed if prompted.packed and prompted.packed.is_exact else None
        cached_check(self._model, f"served {self._packed and self._packed.kind}", self._check_exact)
        self._packed = prompted.packed

    def kv_prefix(self, prompt: Folded) -> KVPrefix:
        """The prompt's keys and values.

        Raises:
            ValueError: a prompt as wide as another backbone's embeddings.
        """
        matrix = prompt.prompt()
        length = len(matrix) // prompt.num_matrices
        if not length:  # one pass of one token, of which no column is taken
            prompt = Folded(matrix.new_zeros(1, matrix.shape[1]))
        return self.prompted.kv_prefixes([prompt]).select(0, length)

    def template_prefix(self, prompt: Folded, prefix: KVPrefix, ids: Sequence[int]) -> KVPrefix:
        """The keys and values of a prompt and of `ids`, with which its template begins."""
        batch, _ = self.prefill([Row(ids, prompt, prefix)])
        return KVPrefix.copy_of(((layer.keys, layer.values) for layer in batch.layers), 0, batch.layers[0].length, ids)

    def prefill(
        self, rows: Sequence[Row], room: int = 0, visit: Visit | None = None
    ) -> tuple[Batch, Float[Tensor, "row vocab"]]:
        """Start rows in one pass, and the logits after each.

        Args:
            rows: each with at least one token.
            room: free columns for tokens that follow.
            visit: gets the logits after all of the rows' tokens; the passes are then sliced to bound memory.

        Raises:
            ValueError: the rows together are wider than the attention window; start fewer at once.
        """
        device, window = self.prompted.backbone.device, self.prompted.window
        longest, before = max(len(row.ids) for row in rows), max(row.prefix.length for row in rows)
        width = longest + before + room  # following tokens are fed at this width, prompt and text still apart
        if window is not None and width > window:
            raise ValueError(f"rows of {width} columns exceed the window of {window}; start fewer at once")
        layers = [
            _prefix_layer([row.prefix.layers[number] for row in rows], before, longest + room)
            for number in range(len(rows[0].prefix.layers))
        ]
        ids, real = pad_batch([row.ids for row in rows], device, "right" if self._counts_columns else "left")
        prefix_lengths = torch.tensor([row.prefix.length for row in rows], device=device)
        prefix_mask = length_mask(prefix_lengths, before, "left")
        counted = torch.tensor([len(row.prefix.token_ids) for row in rows], device=device)
        lengths = torch.tensor([len(row.ids) for row in rows], device=device)
        batch = Batch(layers, prefix_mask, counted, [row.prompt for row in rows])
        mask = torch.cat([prefix_mask, real], 1)
        if visit is not None:
            logits = self._visit_slices(batch, ids, mask, [len(row.ids) for row in rows], visit)
        elif self._counts_columns:
            last = torch.unique(lengths)
            logits = self._pass(batch, ids, mask, last - 1)
            logits = logits[torch.arange(len(rows), device=device), torch.searchsorted(last, lengths)]
        else:
            logits = self._pass(batch, ids, mask, torch.tensor([longest - 1], device=device))[:, 0]
        batch.mask, batch.token_counts = mask, counted + lengths
        return (self.select(batch, range(len(rows)), room) if self._counts_columns else batch), logits

    def _visit_slices(
        self,
        batch: Batch,
        ids: Int[Tensor, "row more"],
        mask: Int[Tensor, "row total"],
        lengths: Sequence[int],
        visit: Visit,
    ) -> Float[Tensor, "row vocab"]:
        """Run `ids` a slice of columns at a time; the logits after each row's last token."""
        width, counted = ids.shape[1], batch.token_counts
        before, real = mask.shape[1] - width, mask[:, mask.shape[1] - width :]
        starts = [0 if self._counts_columns else width - length for length in lengths]
        # Two at least: a pass of one column is a decode step, in which no column is padding.
        step = max(2, MAX_LOGITS // (len(lengths) * self.prompted.backbone.vocab_size))
        last: dict[int, Tensor] = {}
        for begin in range(0, width, step):
            end = min(begin + step, width)
            batch.token_counts = counted + real[:, :begin].sum(1)
            columns = torch.arange(end - begin, device=ids.device)
            logits = self._pass(batch, ids[:, begin:end], mask[:, : before + end], columns)
            for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                first, stop = max(begin, start), min(end, start + length)
                if first < stop:
                    visit(row, first - start, logits[row, first - begin : stop - begin])
                if first < stop == start + length:
                    last[row] = logits[row, stop - begin - 1].clone()
        return torch.stack([last[row] for row in range(len(lengths))])

    def decode_next(self, batch: Batch, tokens: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
        """The logits after one more token per row; a failed call can be repeated, with all rows or a part."""
        self._widen(batch)
        mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], 1)
        logits = self._pass(batch, tokens[:, None], mask, torch.zeros_like(tokens[:1]), decodes=True)[:, 0]
        batch.mask, batch.token_counts = mask, batch.token_counts + 1
        return logits

    def select(self, batch: Batch, rows: Sequence[int], room: int = ROOM) -> Batch:
        """These rows (one may occur several times), in buffers without columns of padding alone."""
        return self.concat([(batch, row) for row in rows], room)

    def concat(self, rows: Sequence[tuple[Batch, int]], room: int = ROOM) -> Batch:
        """Rows of several batches in one: their real columns moved to the right, padding on the left."""
        columns = [batch.mask[row].nonzero()[:, 0] for batch, row in rows]
        width = max(map(len, columns))
        layers = [
            _moved([(batch.layers[number], row) for batch, row in rows], columns, width, room)
            for number in range(len(rows[0][0].layers))
        ]
        token_counts = torch.stack([batch.token_counts[row] for batch, row in rows])
        return Batch(layers, _mask(columns, width), token_counts, [batch.prompts[row] for batch, row in rows])

    def _widen(self, batch: Batch) -> None:
        """Make room for further tokens, a layer at a time, so that only one layer is ever in memory twice.

        Where memory runs out, the layers that have room have been moved; the next try moves the others, to the same
        columns. The mask stays that of the others until the last one has moved.
        """
        full = [number for number, layer in enumerate(batch.layers) if layer.is_full]
        if not full:
            return
        columns = [row.nonzero()[:, 0] for row in batch.mask]
        width = max((layer.length for layer in batch.layers if not layer.is_full), default=max(map(len, columns)))
        mask = _mask(columns, width)
        for number in full:
            rows = [(batch.layers[number], row) for row in range(len(batch))]
            batch.layers[number] = _moved(rows, columns, width, ROOM)
        batch.mask = mask

    def _pass(
        self,
        batch: Batch,
        ids: Int[Tensor, "row more"],
        mask: Int[Tensor, "row total"],
        keep: Int[Tensor, " kept"],
        *,
        decodes: bool = False,
    ) -> Float[Tensor, "row kept vocab"]:
        """The logits after the tokens in the columns `keep` of `ids`.

        Args:
            decodes: this is a token more for each row, which inexact copies of the weights are for.
        """
        more = ids.shape[1]
        # Positions count a text's own tokens; those of padding before it are meaningless and not negative.
        positions = batch.token_counts[:, None] + (mask[:, -more:].cumsum(1) - 1).clamp(min=0)
        embeds = self._embeddings(batch.prompts, ids, positions)
        cache = Cache(layers=batch.layers)
        if self.prompted.runs_fused_over_cache:
            packed = self._packed if self._packed and (decodes or self._packed.is_exact) else None
            logits = llama_cached.run(self._model, embeds, cache, mask, keep, packed)
        else:
            logits = self._model(
                inputs_embeds=embeds,
                past_key_values=cache,
                use_cache=True,
                # A tensor, which copies what it selects: after a strided view the head would copy its matrix for each
                # row.
                logits_to_keep=keep,
                **self.prompted.attention_arguments(mask, more),
            ).logits
        for layer in batch.layers:
            layer.length = mask.shape[1]
        return logits

    def _embeddings(
        self, prompts: Sequence[Folded], ids: Int[Tensor, "row more"], positions: Int[Tensor, "row more"]
    ) -> Float[Tensor, "row more dim"]:
        """The tokens' embeddings, each row's shifted by its prompt; most prompts shift none."""
        if all(prompt.plain for prompt in prompts):
            embeds: Tensor = self._model.get_input_embeddings()(ids)
            return embeds
        distinct = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        index = torch.tensor([distinct[prompt] for prompt in prompts], device=ids.device)
        return self.prompted.token_embeddings(list(distinct), index, ids, positions)

    def _check_exact(self) -> bool:
        """Run rows of several prompts that come and leave at different times, and compare each with itself alone."""
        backbone, how = self.prompted.backbone, "rows that join and leave a batch"
        with model_errors_refused(backbone, how):
            probe = sample(backbone, self.prompted.window)
            prefixes, numbers = [self.kv_prefix(prompt) for prompt in probe.prompts], probe.prompt_index.tolist()
            rows = [
                Row(text, probe.prompts[number], prefixes[number])
                for text, number in zip(probe.texts, numbers, strict=True)
            ]
            template_prefix = self.template_prefix(rows[2].prompt, rows[2].prefix, probe.texts[2][:1])
            rows[2] = Row(probe.texts[2][1:], rows[2].prompt, template_prefix)
            single = [self._single_row_logits(probe, row) for row in range(3)]
            first, second, third = probe.answer

            def decode(batch: Batch, token: int) -> Tensor:
                return self.decode_next(batch, torch.full_like(batch.token_counts, token))

            early, logits = self.prefill([rows[2], rows[0]], room=1)
            steps: list[tuple[tuple[int, ...], int, Tensor]] = [((2, 0), 0, logits)]
            steps.append(((2, 0), 1, decode(early, first)))
            late, logits = self.prefill([rows[1]])
            steps.append(((1,), 0, logits))
            steps.append(((1,), 1, decode(late, first)))
            all_rows = self.concat([(early, 1), (late, 0), (early, 0)])
            steps.append(((0, 1, 2), 2, decode(all_rows, second)))
            steps.append(((2, 0), 3, decode(self.select(all_rows, [2, 0]), third)))
            expected = [single[row][step] for members, step, _ in steps for row in members]
            check_close(backbone, torch.stack(expected), torch.cat([logits for *_, logits in steps]), how)
        return True

    def _single_row_logits(self, probe: Sample, row: int) -> Float[Tensor, "step vocab"]:
        """The model's own logits after one row's text and after each token of its answer."""
        ids = torch.tensor([*probe.texts[row], *probe.answer], device=self.prompted.backbone.device)
        embeds = self._model.get_input_embeddings()(ids)
        embeds = torch.cat([probe.prompt(row).to(embeds), embeds])[None]
        logits: Tensor = self._model(inputs_embeds=embeds).logits[0]
        return logits[-4:]


def _prefix_layer(prefixes: Sequence[LayerKV], before: int, room: int) -> KVBuffer:
    """One layer's buffer with each row's prefix at the end of its first `before` columns."""
    keys, values = (_blank(part[None], len(prefixes), before + room) for part in prefixes[0])
    for row, (key, value) in enumerate(prefixes):
        keys[row, :, before - key.shape[1] : before] = key
        values[row, :, before - value.shape[1] : before] = value
    return KVBuffer(keys, values, before)


def _moved(
    rows: Sequence[tuple[KVBuffer, int]], columns: Sequence[Int[Tensor, " _"]], width: int, room: int
) -> KVBuffer:
    """One layer of these rows, each one's `columns` moved to the end of the first `width`."""
    keys, values = (_blank(part, len(rows), width + room) for part in (rows[0][0].keys, rows[0][0].values))
    for number, ((layer, row), real) in enumerate(zip(rows, columns, strict=True)):
        start = width - len(real)
        keys[number, :, start:width] = layer.keys[row].index_select(1, real)
        values[number, :, start:width] = layer.values[row].index_select(1, real)
    return KVBuffer(keys, values, width)


def _mask(columns: Sequence[Int[Tensor, " _"]], width: int) -> Int[Tensor, "row width"]:
    """The mask of rows whose real columns were moved to the end of `width`."""
    lengths = torch.tensor([len(real) for real in columns], device=columns[0].device)
    return length_mask(lengths, width, "left")


def _blank(like: Tensor, rows: int, columns: int) -> Tensor:
    # Zeros: a masked column's weight is 0, and 0 times what happens to be in memory may be NaN.
    return like.new_zeros(rows, like.shape[1], columns, like.shape[3])
