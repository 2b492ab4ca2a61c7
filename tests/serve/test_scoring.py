"""Rows with candidates of their own, of several tokens, score in a batch as they do alone."""

from collections.abc import Callable

import pytest
import torch

from softprompt.backbones import Backbone
from softprompt.models import attach, label_tree
from softprompt.prompts import SoftPrompt
from softprompt.serve.engine import scoring
from softprompt.serve.engine.kv_cache import CachedDecoder
from softprompt.serve.engine.request import ClassifyParams, EngineRequest
from softprompt.serve.engine.scoring import CausalScorer
from softprompt.serve.prompts.entry import PromptEntry

MakeBackbone = Callable[[str], Backbone]
PromptOf = Callable[..., SoftPrompt]
MANY = tuple((a, b, c) for a in range(11, 14) for b in range(20, 23) for c in range(30, 33))
SETS = (((11, 12, 13), (11, 12, 14), (15,)), ((16,), (17,)), MANY, ((11, 12, 13), (18, 19)), MANY[:4])
ROWS = ([40, 41, 42, 43, 44], [50], [60, 61, 62], [70, 71], [80, 81, 82, 83])


def requests_of(backbone: Backbone, prompt_of: PromptOf) -> tuple[CausalScorer, list[EngineRequest]]:
    decoder = CachedDecoder(attach(backbone))
    entries = []
    for seed in range(3):
        prompt = prompt_of(backbone, seed).fold()
        kv_prefix = decoder.kv_prefix(prompt)
        entries.append(PromptEntry(name=f"p{seed}", prompt=prompt, source="", kv_prefix=kv_prefix))
    requests = [EngineRequest(entries[i % 3], ids, ClassifyParams(candidates=SETS[i])) for i, ids in enumerate(ROWS)]
    return CausalScorer(decoder), requests


@torch.no_grad()
@pytest.mark.parametrize("tokens", [4096, 9])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mistral"])
def test_rows_with_own_candidates_score_as_alone(
    name: str, tokens: int, tiny_backbone: MakeBackbone, prompt_of: PromptOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_tree, "MAX_TOKENS", tokens)
    backbone = tiny_backbone(name)
    scorer, requests = requests_of(backbone, prompt_of)
    for request, ours in zip(requests, scorer(requests), strict=True):
        candidates = request.params.candidates
        alone = attach(backbone).score(torch.tensor([request.ids]), None, candidates, prompts=[request.entry.prompt])
        assert ours == pytest.approx(alone[0].tolist(), abs=2e-5)


@torch.no_grad()
def test_rows_are_grouped_by_shared_candidates(
    tiny_backbone: MakeBackbone, prompt_of: PromptOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, requests = requests_of(tiny_backbone("llama"), prompt_of)
    passes: list[tuple[int, int]] = []
    real = scoring.score_rest

    def record(prompted: object, state: label_tree.DecodeState, candidates: list[tuple[int, ...]]) -> torch.Tensor:
        passes.append((len(state.mask), len(candidates)))
        return real(prompted, state, candidates)

    monkeypatch.setattr(scoring, "score_rest", record)
    scorer(requests)
    assert sorted(passes) == [(1, len(MANY)), (3, 7)]  # the row with single-token candidates is in neither


@torch.no_grad()
def test_candidates_beyond_the_window_are_rejected(tiny_backbone: MakeBackbone, prompt_of: PromptOf) -> None:
    scorer, requests = requests_of(tiny_backbone("mistral"), prompt_of)
    entry = requests[0].entry
    room = 128 - entry.kv_prefix.length
    fits = EngineRequest(entry, [5] * (room - 2), ClassifyParams(candidates=((11, 12, 13),)))
    assert len(scorer([fits])) == 1
    with pytest.raises(ValueError, match="window of 128"):
        scorer([EngineRequest(entry, [5] * (room - 1), ClassifyParams(candidates=((11, 12, 13),)))])
