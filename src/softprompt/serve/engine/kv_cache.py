"""What a decoder knows of each row: keys and values in one buffer a layer, rows of any prompts side by side.

A row's columns are `pads, prompt, text`, its newest token in the last one, and positions are given explicitly, so that
neither a neighbour's length nor its coming and going changes a result. This is the one file of the service that knows
how a transformers model caches.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from softprompt.models import PromptedModel
from softprompt.models.causal import Causal
from softprompt.models.verify import Sample, refuse_different, refusing, remembered, sample, sliding_window
from softprompt.prompts import Folded

Columns = Float[Tensor, "head _ _"]
ROOM = 64
"""Columns that a buffer gets beyond what it needs, so that it is not made anew at every token."""


@final
@dataclass(frozen=True)
class KVPrefix:
    """A prompt's keys and values, without padding: what serving one more prompt costs."""

    layers: tuple[tuple[Columns, Columns], ...]
    read: tuple[int, ...] = ()
    """Tokens with which texts begin, and whose keys and values come behind the prompt's."""

    @property
    def length(self) -> int:
        """Columns: virtual tokens, and those that were read."""
        return int(self.layers[0][0].shape[1])

    @property
    def bytes(self) -> int:
        """Memory that the keys and values take."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    @property
    def finite(self) -> bool:
        """Whether all of them are numbers."""
        return all(bool(one.isfinite().all()) for pair in self.layers for one in pair)


@final
@dataclass(frozen=True)
class Row:
    """A text to be read behind its prompt, and behind what the state has read of it."""

    ids: Sequence[int]
    prompt: Folded
    state: KVPrefix


@final
class _Layer(CacheLayerMixin):
    """A buffer in which new keys and values are written behind `length`, and count only once `length` moves.

    A pass that fails halfway therefore leaves nothing behind, and can be tried again with fewer rows.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.keys, self.values, self.length = keys, values, length
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    @property
    def full(self) -> bool:
        """Whether there is no room for another column."""
        return self.length == self.keys.shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **others: Any) -> tuple[Tensor, Tensor]:
        """All keys and values so far, the given ones last."""
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the next pass sees, and where they begin."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Columns that count."""
        return self.length

    def get_max_length(self) -> int:
        """None: a full buffer is made anew."""
        return -1


@final
class Batch:
    """Rows that have been read: their buffers, which columns are real, and how many text tokens each has."""

    def __init__(
        self,
        layers: list[_Layer],
        mask: Int[Tensor, "row column"],
        texts: Int[Tensor, " row"],
        prompts: list[Folded],
    ) -> None:
        self.layers = layers
        self.mask = mask
        self.texts = texts
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, rows: slice) -> "Batch":
        """Neighbouring rows, in the same buffers: nothing is copied, and each part writes into its own rows."""
        layers = [_Layer(layer.keys[rows], layer.values[rows], layer.length) for layer in self.layers]
        return Batch(layers, self.mask[rows], self.texts[rows], self.prompts[rows])


@final
class CachedDecoder:
    """A frozen decoder that reads and continues rows of any prompts in one pass.

    Raises:
        ValueError: the model gives a row something else beside others than it gives the row alone.
    """

    def __init__(self, prompted: PromptedModel) -> None:
        self.prompted = prompted
        self._model = prompted.backbone.model
        self._positions = "position_ids" in inspect.signature(self._model.forward).parameters
        self._by_column = isinstance(prompted, Causal) and prompted.in_row
        """The model counts columns (MPT), so there may be no padding between a row's prompt, text and next token."""
        self.window = sliding_window(prompted.backbone)
        """The narrowest attention window, where there is one: no row may be wider."""
        remembered(self._model, "served", self._check_exact)

    def kv_prefix(self, prompt: Folded) -> KVPrefix:
        """The prompt's keys and values, computed once; no other prompt is touched.

        Raises:
            ValueError: a prompt as wide as another backbone's embeddings.
        """
        if not len(prompt.prompt()):  # what a pass of one token leaves, without its column
            one = self.kv_prefix(Folded(prompt.prompt().new_zeros(1, prompt.prompt().shape[1])))
            return KVPrefix(tuple((keys[:, :0].clone(), values[:, :0].clone()) for keys, values in one.layers))
        matrix = self.prompted.prompt_embeddings([prompt])[0]
        cache, mask = DynamicCache(), torch.ones(1, len(matrix), dtype=torch.long, device=matrix.device)
        embeds = matrix[None].to(self.prompted.backbone.dtype)
        self._model(
            inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1, **self._places(mask, 0)
        )
        return KVPrefix(tuple((layer.keys[0].clone(), layer.values[0].clone()) for layer in cache.layers))

    def template_prefix(self, prompt: Folded, state: KVPrefix, ids: Sequence[int]) -> KVPrefix:
        """The same for texts that begin with `ids`."""
        batch, _ = self.prefill([Row(ids, prompt, state)])
        kept = [(layer.keys[0, :, : layer.length], layer.values[0, :, : layer.length]) for layer in batch.layers]
        return KVPrefix(tuple((keys.clone(), values.clone()) for keys, values in kept), tuple(ids))

    def prefill(self, rows: Sequence[Row], room: int = 0) -> tuple[Batch, Float[Tensor, "row vocab"]]:
        """The rows in one pass, and the logits behind each.

        Args:
            rows: each with at least one token.
            room: columns to keep free for tokens that follow.

        Raises:
            ValueError: several rows together are wider than the attention window; read fewer at once.
        """
        device = self.prompted.backbone.device
        longest, before = max(len(row.ids) for row in rows), max(row.state.length for row in rows)
        wide = longest + before + room  # tokens that follow are fed at this width, prompt and text still apart
        if self.window is not None and wide > self.window:
            raise ValueError(f"rows of {wide} columns exceed the window of {self.window}; read fewer")
        layers = [
            self._prompts([row.state.layers[which] for row in rows], before, longest + room)
            for which in range(len(rows[0].state.layers))
        ]
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), before + longest, dtype=torch.long)
        for place, row in enumerate(rows):
            start = 0 if self._by_column else longest - len(row.ids)
            ids[place, start : start + len(row.ids)] = torch.tensor(row.ids)
            mask[place, before - row.state.length : before] = 1
            mask[place, before + start : before + start + len(row.ids)] = 1
        ids, mask = ids.to(device), mask.to(device)
        read = torch.tensor([len(row.state.read) for row in rows], device=device)
        lengths = torch.tensor([len(row.ids) for row in rows], device=device)
        batch = Batch(layers, mask[:, :before], read, [row.prompt for row in rows])
        if self._by_column:
            kept = torch.unique(lengths)
            logits = self._pass(batch, ids, mask, kept - 1)
            logits = logits[torch.arange(len(rows), device=device), torch.searchsorted(kept, lengths)]
        else:
            logits = self._pass(batch, ids, mask, torch.tensor([longest - 1], device=device))[:, 0]
        batch.mask, batch.texts = mask, read + lengths
        return (self.select(batch, range(len(rows)), room) if self._by_column else batch), logits

    def decode_next(self, batch: Batch, tokens: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
        """The logits behind one more token a row; what fails can be tried again, with all rows or a part."""
        self._widen(batch)
        mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], 1)
        logits = self._pass(batch, tokens[:, None], mask, torch.zeros_like(tokens[:1]))[:, 0]
        batch.mask, batch.texts = mask, batch.texts + 1
        return logits

    def select(self, batch: Batch, which: Sequence[int], room: int = ROOM) -> Batch:
        """The rows of these places (one may be named several times), in buffers without a column of padding alone."""
        return self.joined([(batch, place) for place in which], room)

    def joined(self, rows: Sequence[tuple[Batch, int]], room: int = ROOM) -> Batch:
        """Rows of several batches in one: their real columns moved to the end, pads in front."""
        places = [batch.mask[place].nonzero()[:, 0] for batch, place in rows]
        width = max(len(columns) for columns in places)
        layers = [
            _moved([(batch.layers[which], place) for batch, place in rows], places, width, room)
            for which in range(len(rows[0][0].layers))
        ]
        texts = torch.stack([batch.texts[place] for batch, place in rows])
        return Batch(layers, _mask(places, width), texts, [batch.prompts[place] for batch, place in rows])

    def _widen(self, batch: Batch) -> None:
        """Room for further tokens, a layer at a time, so that only one layer is ever there twice.

        Where memory runs out, the layers that have room have been moved; the next try moves the others, to where those
        are. The mask stays that of the others until the last one has moved.
        """
        full = [which for which, layer in enumerate(batch.layers) if layer.full]
        if not full:
            return
        places = [row.nonzero()[:, 0] for row in batch.mask]
        width = max((layer.length for layer in batch.layers if not layer.full), default=max(map(len, places)))
        mask = _mask(places, width)
        for which in full:
            batch.layers[which] = _moved([(batch.layers[which], row) for row in range(len(batch))], places, width, ROOM)
        batch.mask = mask

    def _prompts(self, states: Sequence[tuple[Columns, Columns]], before: int, room: int) -> _Layer:
        """One layer's buffer with each row's prompt at the end of its first `before` columns."""
        keys, values = (_blank(part[None], len(states), before + room) for part in states[0])
        for row, (key, value) in enumerate(states):
            keys[row, :, before - key.shape[1] : before] = key
            values[row, :, before - value.shape[1] : before] = value
        return _Layer(keys, values, before)

    def _pass(
        self, batch: Batch, ids: Int[Tensor, "row more"], mask: Int[Tensor, "row total"], keep: Int[Tensor, " kept"]
    ) -> Float[Tensor, "row kept vocab"]:
        """The logits behind the tokens in the columns `keep` of `ids`."""
        more = ids.shape[1]
        # Places count a text's own tokens; those of padding in front of it are meaningless and not negative.
        places = batch.texts[:, None] + (mask[:, -more:].cumsum(1) - 1).clamp(min=0)
        output = self._model(
            inputs_embeds=self._embedded(batch.prompts, ids, places),
            past_key_values=Cache(layers=batch.layers),
            use_cache=True,
            # A tensor, which copies what it picks: before a strided view the head would copy its matrix for each row.
            logits_to_keep=keep,
            **self._places(mask, mask.shape[1] - more),
        )
        for layer in batch.layers:
            layer.length = mask.shape[1]
        logits: Tensor = output.logits
        return logits

    def _check_exact(self) -> bool:
        """Rows of several prompts that come, go on and leave at different times, each compared with itself alone."""
        backbone, how = self.prompted.backbone, "rows that join and leave a batch"
        with refusing(backbone, how):
            given = sample(backbone, self.window)
            states = [self.kv_prefix(prompt) for prompt in given.prompts]
            prompts = [given.prompts[place] for place in given.prompt_index.tolist()]
            rows = [
                Row(text, prompt, states[place])
                for text, prompt, place in zip(given.texts, prompts, given.prompt_index.tolist(), strict=True)
            ]
            template_prefix = self.template_prefix(prompts[2], rows[2].state, given.texts[2][:1])
            rows[2] = Row(given.texts[2][1:], prompts[2], template_prefix)
            alone = [self._alone(given, row) for row in range(3)]
            first, second, third = given.answer
            early, one = self.prefill([rows[2], rows[0]], room=1)
            two = self.decode_next(early, torch.full_like(early.texts, first))
            late, three = self.prefill([rows[1]])
            four = self.decode_next(late, torch.full_like(late.texts, first))
            all_rows = self.joined([(early, 1), (late, 0), (early, 0)])
            five = self.decode_next(all_rows, torch.full_like(all_rows.texts, second))
            fewer = self.select(all_rows, [2, 0])
            six = self.decode_next(fewer, torch.full_like(fewer.texts, third))
            ours = [one, two, three, four, five, six]
            steps = (
                ((2, 0), 0),
                ((2, 0), 1),
                ((1,), 0),
                ((1,), 1),
                ((0, 1, 2), 2),
                ((2, 0), 3),
            )
            wanted = [torch.stack([alone[row][step] for row in which]) for which, step in steps]
            refuse_different(backbone, torch.cat(wanted), torch.cat(ours), how)
        return True

    def _alone(self, given: Sample, row: int) -> Float[Tensor, "step vocab"]:
        """The model's own logits behind one row's text and behind each of its answer's tokens."""
        ids = torch.tensor([*given.texts[row], *given.answer], device=self.prompted.backbone.device)
        own = self._model.get_input_embeddings()(ids)
        logits: Tensor = self._model(inputs_embeds=torch.cat([given.prompt(row).to(own), own])[None]).logits[0]
        return logits[-4:]

    def _embedded(
        self, prompts: Sequence[Folded], ids: Int[Tensor, "row more"], places: Int[Tensor, "row more"]
    ) -> Float[Tensor, "row more dim"]:
        """The tokens' embeddings, each row's as its prompt wants them; most prompts leave them alone."""
        shifting = list({id(prompt): prompt for prompt in prompts if not prompt.plain}.values())
        if not shifting:
            embeds: Tensor = self._model.get_input_embeddings()(ids)
            return embeds
        distinct = list({id(prompt): prompt for prompt in prompts}.values())
        index = torch.tensor([next(i for i, one in enumerate(distinct) if one is prompt) for prompt in prompts])
        return self.prompted.shifted(distinct, index.to(ids.device), ids, places)

    def _places(self, mask: Int[Tensor, "row total"], start: int) -> dict[str, Any]:
        """Mask and explicit positions from column `start` on; models without the latter count the mask themselves."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        return {"attention_mask": mask} | ({"position_ids": positions} if self._positions else {})


def _moved(rows: Sequence[tuple[_Layer, int]], places: Sequence[Int[Tensor, " _"]], width: int, room: int) -> _Layer:
    """One layer of these rows, the columns of `places` moved to the end of the first `width`."""
    keys, values = (_blank(part, len(rows), width + room) for part in (rows[0][0].keys, rows[0][0].values))
    for row, ((layer, place), columns) in enumerate(zip(rows, places, strict=True)):
        start = width - len(columns)
        keys[row, :, start:width] = layer.keys[place].index_select(1, columns)
        values[row, :, start:width] = layer.values[place].index_select(1, columns)
    return _Layer(keys, values, width)


def _mask(places: Sequence[Int[Tensor, " _"]], width: int) -> Int[Tensor, "row width"]:
    """As many columns as a row has places, at the end."""
    mask = torch.zeros(len(places), width, dtype=torch.long, device=places[0].device)
    for row, columns in enumerate(places):
        mask[row, width - len(columns) :] = 1
    return mask


def _blank(like: Tensor, rows: int, columns: int) -> Tensor:
    # Zeros: a hidden column's weight is 0, and 0 times what happens to lie in memory may be NaN.
    return like.new_zeros(rows, like.shape[1], columns, like.shape[3])
