"""Log-probabilities of each row's own candidates, rows of any prompts in one pass."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

from softprompt.backbones import Backbone
from softprompt.evaluation.predict import pad_id
from softprompt.models import PromptedModel
from softprompt.models.decode_state import DecodeState
from softprompt.models.label_tree import SharedLayer, score_rest
from softprompt.serve.engine.kv_cache import Batch, CachedDecoder, Row
from softprompt.serve.engine.request import ClassifyParams, EngineRequest
from softprompt.serve.prompts.entry import PromptEntry, bare, needs_head
from softprompt.tasks import Example, collate

_UNION = 8
"""Candidates that rows may be scored with for each other's sake, in place of a pass of their own."""
Scores = list[tuple[float, ...]]


class Scorer(ABC):
    """Scores the rows of a batch; a batch either has all its scores or fails as a whole."""

    @abstractmethod
    def __call__(self, requests: Sequence[EngineRequest]) -> Scores:
        """Each row's log-probability of each of its candidates."""


@final
class CausalScorer(Scorer):
    """One pass over all texts, behind keys and values that were computed when the prompts came."""

    def __init__(self, decoder: CachedDecoder) -> None:
        self._decoder = decoder

    def __call__(self, requests: Sequence[EngineRequest]) -> Scores:
        """Candidates of several tokens go on from their row's keys and values."""
        wanted = [candidates_of(request) for request in requests]
        longest = max(len(candidate) for own in wanted for candidate in own)
        batch, logits = self._decoder.prefill([row_of(request) for request in requests], room=longest - 1)
        logp = logits.float().log_softmax(-1)
        scores = [logp[row, [ids[0] for ids in candidates]].tolist() for row, candidates in enumerate(wanted)]
        longer = [tuple(dict.fromkeys(ids for ids in own if len(ids) > 1)) for own in wanted]
        state = self._state(batch, requests)
        for group in _grouped([row for row, own in enumerate(longer) if own], longer):
            union = list(dict.fromkeys(ids for row in group for ids in longer[row]))
            part = state if len(group) == len(requests) else _rows(state, group)
            for row, rest in zip(group, score_rest(self._decoder.prompted, part, union).tolist(), strict=True):
                value = dict(zip(union, rest, strict=True))
                scores[row] = [score + value.get(ids, 0.0) for score, ids in zip(scores[row], wanted[row], strict=True)]
        return [tuple(row) for row in scores]

    def _state(self, batch: Batch, requests: Sequence[EngineRequest]) -> DecodeState:
        """The batch as an attachment goes on from it."""
        prompts, index = distinct(requests)
        rows = torch.tensor(index, device=batch.mask.device)
        plain = all(one.prompt.plain for one in prompts)  # whose rows' embeddings are the model's own
        cache, none = Cache(layers=list(batch.layers)), batch.mask.new_zeros(len(requests), 0, 0)
        shifting = [] if plain else [one.prompt for one in prompts]
        return DecodeState(cache, batch.mask, none, batch.texts[:, None], shifting, None if plain else rows)


def _rows(state: DecodeState, rows: Sequence[int]) -> DecodeState:
    """Some rows of a batch that has been read."""
    at, width = torch.tensor(rows, device=state.mask.device), state.mask.shape[1]
    layers = [SharedLayer(layer.keys[at, :, :width], layer.values[at, :, :width]) for layer in state.cache.layers]
    index = None if state.rows is None else state.rows[at]
    return state._replace(
        cache=Cache(layers=layers), mask=state.mask[at], next_position=state.next_position[at], rows=index
    )


def _grouped(rows: Sequence[int], candidates: Sequence[Sequence[tuple[int, ...]]]) -> list[list[int]]:
    """Rows that share a pass: few candidates of one are scored for another in vain."""
    groups: list[tuple[set[tuple[int, ...]], list[int]]] = []
    for row in rows:
        own = set(candidates[row])
        for union, members in groups:
            if own <= union or len(union | own) <= _UNION:
                union |= own
                members.append(row)
                break
        else:
            groups.append((own, [row]))
    return [members for _, members in groups]


@final
class GeneralScorer(Scorer):
    """Through the attachment, where nothing of a prompt but its vectors can be computed ahead."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._prompted = None if needs_head(backbone) else bare(backbone)

    def __call__(self, requests: Sequence[EngineRequest]) -> Scores:
        """Rows whose candidates differ are scored together while few candidates are scored in vain."""
        found: dict[int, tuple[float, ...]] = {}
        for group in self._groups(requests):
            part = [requests[place] for place in group]
            found.update(zip(group, self._together(part), strict=True))
        return [found[place] for place in range(len(requests))]

    def _groups(self, requests: Sequence[EngineRequest]) -> list[list[int]]:
        """Places of rows that share a pass: all of them, unless a decoder would run for many candidates in vain."""
        if self._backbone.architecture == "encoder":
            return [list(range(len(requests)))]
        if self._backbone.architecture == "vision":
            return self._by_shape(requests)
        return _grouped(range(len(requests)), [candidates_of(request) for request in requests])

    def _by_shape(self, requests: Sequence[EngineRequest]) -> list[list[int]]:
        """Places of images of one size whose prompts are of one depth."""
        found: dict[tuple[Any, int], list[int]] = {}
        for place, request in enumerate(requests):
            assert request.pixels is not None
            found.setdefault((request.pixels.shape, request.served.prompt.depth), []).append(place)
        return list(found.values())

    def _inputs(self, requests: Sequence[EngineRequest]) -> tuple[Tensor, Tensor | None]:
        device = self._backbone.device
        pixels = [request.pixels for request in requests if request.pixels is not None]
        if pixels:
            return torch.stack(pixels).to(device), None
        pad = pad_id(self._backbone)
        return collate(examples(requests), pad_id=pad, side="left", with_answers=False).inputs(device)

    def _together(self, requests: Sequence[EngineRequest]) -> Scores:
        prompts, index = distinct(requests)
        inputs, mask = self._inputs(requests)
        places = torch.tensor(index, device=self._backbone.device)
        wanted = [candidates_of(request) for request in requests]
        if self._prompted is None:
            heads = _Heads([request.served for request in requests])
            attached: PromptedModel = bare(self._backbone, heads)
            scores = attached.score(
                inputs, mask, [(0,)] * heads.classes, prompts=[p.prompt for p in prompts], index=places
            )
            return [tuple(row[: len(own)]) for row, own in zip(scores.tolist(), wanted, strict=True)]
        union = list(dict.fromkeys(candidate for own in wanted for candidate in own))
        at = {candidate: column for column, candidate in enumerate(union)}
        scores = self._prompted.score(inputs, mask, union, prompts=[p.prompt for p in prompts], index=places)
        return [tuple(row[at[one]] for one in own) for row, own in zip(scores.tolist(), wanted, strict=True)]


@final
class _Heads(nn.Module):
    """Each row through its own prompt's head; a class that a row's head does not have gets no probability."""

    def __init__(self, served: Sequence[PromptEntry]) -> None:
        super().__init__()
        heads = [one.head for one in served if one.head is not None]
        if len(heads) < len(served):
            raise ValueError("a prompt without its head cannot answer for an encoder without words; serve its run")
        self.heads = nn.ModuleList(heads)
        self.classes = max(len(one.candidates) for one in served)

    def forward(self, states: Float[Tensor, "row *hidden"]) -> Float[Tensor, "row classes"]:
        """Logits, behind the last class of a row minus infinity."""
        found = states.new_full((len(states), self.classes), -torch.inf)
        for row, head in enumerate(self.heads):
            logits = head(states[row : row + 1])[0]
            found[row, : len(logits)] = logits
        return found


def candidates_of(request: EngineRequest) -> tuple[tuple[int, ...], ...]:
    """What a row chooses among."""
    assert isinstance(request.work, ClassifyParams)
    return request.work.candidates


def row_of(request: EngineRequest) -> Row:
    """The row as a decoder reads it: behind the beginning that was read when its prompt came, if it has that."""
    served, template_prefix = request.served, request.served.template_prefix
    assert served.state is not None
    if (
        template_prefix is not None
        and len(request.ids) > (read := len(template_prefix.read))
        and tuple(request.ids[:read]) == template_prefix.read
    ):
        return Row(request.ids[read:], served.prompt, template_prefix)
    return Row(request.ids, served.prompt, served.state)


def distinct(requests: Sequence[EngineRequest]) -> tuple[list[PromptEntry], list[int]]:
    """The prompts that the rows use, once each, and which one each row takes."""
    served = list({id(request.served): request.served for request in requests}.values())
    places = {id(one): place for place, one in enumerate(served)}
    return served, [places[id(request.served)] for request in requests]


def examples(requests: Sequence[EngineRequest]) -> list[Example]:
    """The rows as `collate` takes them."""
    return [Example(request.ids, (), None, row) for row, request in enumerate(requests)]
