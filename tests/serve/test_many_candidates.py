"""Rows of a batch each choose among their own candidates of several tokens, and score as if they were alone."""

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
from softprompt.serve.prompts.entry import PromptEntry, bare

MakeBackbone = Callable[[str], Backbone]
PromptOf = Callable[..., SoftPrompt]
MANY = tuple((a, b, c) for a in range(11, 14) for b in range(20, 23) for c in range(30, 33))
SETS = (((11, 12, 13), (11, 12, 14), (15,)), ((16,), (17,)), MANY, ((11, 12, 13), (18, 19)), MANY[:4])
ROWS = ([40, 41, 42, 43, 44], [50], [60, 61, 62], [70, 71], [80, 81, 82, 83])


def tickets_of(backbone: Backbone, prompt_of: PromptOf) -> tuple[CausalScorer, list[EngineRequest]]:
    decoder = CachedDecoder(bare(backbone))
    served = []
    for seed in range(3):
        prompt = prompt_of(backbone, seed).fold()
        state = decoder.kv_prefix(prompt)
        served.append(PromptEntry(name=f"p{seed}", prompt=prompt, source="", state=state))
    requests = [EngineRequest(served[i % 3], ids, ClassifyParams(candidates=SETS[i])) for i, ids in enumerate(ROWS)]
    return CausalScorer(decoder), requests


@torch.no_grad()
@pytest.mark.parametrize("tokens", [4096, 9])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mistral"])
def test_rows_with_their_own_candidates(
    name: str, tokens: int, tiny_backbone: MakeBackbone, prompt_of: PromptOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_tree, "MOST_TOKENS", tokens)
    backbone = tiny_backbone(name)
    scorer, requests = tickets_of(backbone, prompt_of)
    for request, ours in zip(requests, scorer(requests), strict=True):
        candidates = request.work.candidates
        alone = attach(backbone).score(torch.tensor([request.ids]), None, candidates, prompts=[request.served.prompt])
        assert ours == pytest.approx(alone[0].tolist(), abs=2e-5)


@torch.no_grad()
def test_few_candidates_are_scored_in_vain(
    tiny_backbone: MakeBackbone, prompt_of: PromptOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, requests = tickets_of(tiny_backbone("llama"), prompt_of)
    passes: list[tuple[int, int]] = []
    before = scoring.score_rest

    def noted(prompted: object, state: label_tree.DecodeState, candidates: list[tuple[int, ...]]) -> torch.Tensor:
        passes.append((len(state.mask), len(candidates)))
        return before(prompted, state, candidates)

    monkeypatch.setattr(scoring, "score_rest", noted)
    scorer(requests)
    assert sorted(passes) == [(1, len(MANY)), (3, 7)]  # the row whose candidates are single tokens is in neither


@torch.no_grad()
def test_candidates_beyond_the_window_are_refused(tiny_backbone: MakeBackbone, prompt_of: PromptOf) -> None:
    scorer, requests = tickets_of(tiny_backbone("mistral"), prompt_of)
    served = requests[0].served
    room = 128 - served.state.length
    fits = EngineRequest(served, [5] * (room - 2), ClassifyParams(candidates=((11, 12, 13),)))
    assert len(scorer([fits])) == 1
    with pytest.raises(ValueError, match="window of 128"):
        scorer([EngineRequest(served, [5] * (room - 1), ClassifyParams(candidates=((11, 12, 13),)))])
