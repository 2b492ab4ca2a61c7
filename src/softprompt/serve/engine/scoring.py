"""Log-probabilities of each row's candidates; rows of any prompts share a pass."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

from softprompt.backbones import Backbone
from softprompt.evaluation.predict import pad_id
from softprompt.models import attach, model_class
from softprompt.models.decode_state import DecodeState
from softprompt.models.label_tree import SharedLayer, score_rest
from softprompt.models.padding import pad_batch
from softprompt.serve.engine.kv_cache import Batch, CachedDecoder, Row
from softprompt.serve.engine.request import EngineRequest
from softprompt.serve.prompts.entry import PromptEntry, needs_head
from softprompt.tasks.data.collate import collate
from softprompt.tasks.data.examples import Example

_MAX_UNION = 8
"""Largest union of candidates that rows are scored with together; beyond it they take separate passes."""
Candidate = tuple[int, ...]
Scores = list[tuple[float, ...]]


class Scorer(ABC):
    """Scores the rows of a batch; a batch succeeds or fails as a whole."""

    @abstractmethod
    def __call__(self, requests: Sequence[EngineRequest]) -> Scores:
        """Log-probabilities of each row's candidates."""


@final
class CausalScorer(Scorer):
    """One pass over the rows of a decoder, from the cached keys and values of their prompts."""

    def __init__(self, decoder: CachedDecoder) -> None:
        self._decoder = decoder

    def __call__(self, requests: Sequence[EngineRequest]) -> Scores:
        """Candidates of several tokens continue from their row's keys and values."""
        candidates = [request.candidates for request in requests]
        longest = max(len(ids) for row in candidates for ids in row)
        batch, logits = self._decoder.prefill([kv_row(request) for request in requests], room=longest - 1)
        logp = logits.float().log_softmax(-1)
        first, _ = pad_batch([[ids[0] for ids in options] for options in candidates], logp.device)
        by_row = logp.gather(1, first).tolist()  # one copy from the device for all rows
        scores = [row[: len(options)] for row, options in zip(by_row, candidates, strict=True)]
        longer = [tuple(dict.fromkeys(ids for ids in options if len(ids) > 1)) for options in candidates]
        state = self._decode_state(batch, requests)
        for group in _group_by_candidates([row for row, options in enumerate(longer) if options], longer):
            union = list(dict.fromkeys(ids for row in group for ids in longer[row]))
            part = state if len(group) == len(requests) else _select_rows(state, group)
            for row, rest in zip(group, score_rest(self._decoder.prompted, part, union).tolist(), strict=True):
                logp_of = dict(zip(union, rest, strict=True))
                scores[row] = [
                    score + logp_of.get(ids, 0.0) for score, ids in zip(scores[row], candidates[row], strict=True)
                ]
        return [tuple(row) for row in scores]

    def _decode_state(self, batch: Batch, requests: Sequence[EngineRequest]) -> DecodeState:
        """The batch as `PromptedModel` continues it."""
        entries, numbers = unique_prompts(requests)
        index = torch.tensor(numbers, device=batch.mask.device)
        plain = all(entry.prompt.plain for entry in entries)  # the input's embeddings are the model's own
        cache, no_logits = Cache(layers=list(batch.layers)), batch.mask.new_zeros(len(requests), 0, 0)
        shifting = [] if plain else [entry.prompt for entry in entries]
        return DecodeState(
            cache, batch.mask, no_logits, batch.token_counts[:, None], shifting, None if plain else index
        )


def _select_rows(state: DecodeState, rows: Sequence[int]) -> DecodeState:
    selected, width = torch.tensor(rows, device=state.mask.device), state.mask.shape[1]
    layers = [
        SharedLayer(layer.keys[selected, :, :width], layer.values[selected, :, :width]) for layer in state.cache.layers
    ]
    return state._replace(
        cache=Cache(layers=layers),
        mask=state.mask[selected],
        next_position=state.next_position[selected],
        prompt_index=None if state.prompt_index is None else state.prompt_index[selected],
    )


def _group_by_candidates(rows: Sequence[int], candidates: Sequence[Sequence[Candidate]]) -> list[list[int]]:
    """Group rows into passes so that few candidates are scored for a row that does not have them."""
    groups: list[tuple[set[Candidate], list[int]]] = []
    for row in rows:
        options = set(candidates[row])
        for union, members in groups:
            if options <= union or len(union | options) <= _MAX_UNION:
                union |= options
                members.append(row)
                break
        else:
            groups.append((options, [row]))
    return [members for _, members in groups]


@final
class GeneralScorer(Scorer):
    """Through `PromptedModel.score`, for backbones whose prompts have no keys and values to cache."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._prompted = None if needs_head(backbone) else attach(backbone)

    def __call__(self, requests: Sequence[EngineRequest]) -> Scores:
        """Rows with different candidates share a pass if their union is small."""
        scores: dict[int, tuple[float, ...]] = {}
        for group in self._groups(requests):
            scores.update(zip(group, self._score_group([requests[row] for row in group]), strict=True))
        return [scores[row] for row in range(len(requests))]

    def _groups(self, requests: Sequence[EngineRequest]) -> list[list[int]]:
        """Rows that share a pass: all of them, unless a decoder would score many candidates for nothing."""
        if self._backbone.takes_images:
            return self._group_by_shape(requests)
        if not model_class(self._backbone).generates:
            return [list(range(len(requests)))]
        return _group_by_candidates(range(len(requests)), [request.candidates for request in requests])

    def _group_by_shape(self, requests: Sequence[EngineRequest]) -> list[list[int]]:
        """Rows whose images have the same size and whose prompts are for as many layers."""
        groups: dict[tuple[Any, int], list[int]] = {}
        for row, request in enumerate(requests):
            assert request.pixels is not None
            groups.setdefault((request.pixels.shape, request.entry.prompt.num_matrices), []).append(row)
        return list(groups.values())

    def _inputs(self, requests: Sequence[EngineRequest]) -> tuple[Tensor, Tensor | None]:
        device = self._backbone.device
        pixels = [request.pixels for request in requests if request.pixels is not None]
        if pixels:
            return torch.stack(pixels).to(device), None
        pad = pad_id(self._backbone)
        return collate(examples(requests), pad_id=pad, side="left", with_answers=False).inputs(device)

    def _score_group(self, requests: Sequence[EngineRequest]) -> Scores:
        entries, index = unique_prompts(requests)
        inputs, mask = self._inputs(requests)
        prompts, rows = [entry.prompt for entry in entries], torch.tensor(index, device=self._backbone.device)
        candidates = [request.candidates for request in requests]
        if self._prompted is None:
            heads = _Heads([request.entry for request in requests])
            prompted = attach(self._backbone, head=heads)
            scores = prompted.score(inputs, mask, [(0,)] * heads.classes, prompts=prompts, index=rows)
            return [tuple(row[: len(options)]) for row, options in zip(scores.tolist(), candidates, strict=True)]
        union = list(dict.fromkeys(ids for options in candidates for ids in options))
        column = {ids: index for index, ids in enumerate(union)}
        scores = self._prompted.score(inputs, mask, union, prompts=prompts, index=rows)
        return [
            tuple(row[column[ids]] for ids in options) for row, options in zip(scores.tolist(), candidates, strict=True)
        ]


@final
class _Heads(nn.Module):
    """Applies to each row its own prompt's head; classes beyond those of a row's head get probability 0."""

    def __init__(self, entries: Sequence[PromptEntry]) -> None:
        super().__init__()
        heads = [entry.head for entry in entries if entry.head is not None]
        if len(heads) < len(entries):
            raise ValueError("this backbone needs each prompt's trained head, but one has none; serve its run's folder")
        self.heads = nn.ModuleList(heads)
        self.classes = max(len(entry.candidates) for entry in entries)

    def forward(self, states: Float[Tensor, "row *hidden"]) -> Float[Tensor, "row classes"]:
        """Logits, minus infinity beyond the last class of a row's head."""
        logits = states.new_full((len(states), self.classes), -torch.inf)
        for row, head in enumerate(self.heads):
            row_logits = head(states[row : row + 1])[0]
            logits[row, : len(row_logits)] = row_logits
        return logits


def kv_row(request: EngineRequest) -> Row:
    """The row as the decoder takes it, after the cached template prefix where it starts with that."""
    entry, template_prefix = request.entry, request.entry.template_prefix
    assert entry.kv_prefix is not None
    if (
        template_prefix is not None
        and len(request.ids) > (cached := len(template_prefix.token_ids))
        and request.ids[:cached] == template_prefix.token_ids
    ):
        return Row(request.ids[cached:], entry.prompt, template_prefix)
    return Row(request.ids, entry.prompt, entry.kv_prefix)


def unique_prompts(requests: Sequence[EngineRequest]) -> tuple[list[PromptEntry], list[int]]:
    """The distinct prompts of the rows, and the index of each row's prompt among them."""
    entries = list({id(request.entry): request.entry for request in requests}.values())
    index = {id(entry): number for number, entry in enumerate(entries)}
    return entries, [index[id(request.entry)] for request in requests]


def examples(requests: Sequence[EngineRequest]) -> list[Example]:
    """The rows as `collate` takes them."""
    return [Example(request.ids, (), None, row) for row, request in enumerate(requests)]
