"""Generating after a shared prefix is transformers' own generating after `[prompt; text]`."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.backbones.kernels import llama_cached
from softprompt.models import PromptedModel, Sampling, attach
from softprompt.prompts import Folded

NEW = 10
LENGTHS = (4, 7, 1)
INDEX = torch.tensor([1, 0, 2, 1])
MakeBackbone = Callable[[str], Backbone]


def prompts_of(backbone: Backbone) -> list[Folded]:
    table, draw = backbone.host().embedding, torch.Generator().manual_seed(0)
    return [Folded(table[torch.randint(len(table), (length,), generator=draw)]) for length in LENGTHS]


def texts() -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, 300, (count,), generator=draw) for count in (6, 2, 9, 1)]


def batch(rows: list[Tensor], extra: int = 3) -> tuple[Tensor, Tensor]:
    wide = max(map(len, rows)) + extra
    ids = torch.stack([torch.nn.functional.pad(row, (wide - len(row), 0), value=2) for row in rows])
    return ids, torch.stack([(torch.arange(wide) >= wide - len(row)).long() for row in rows])


def transformers_own(backbone: Backbone, prompt: Folded, row: Tensor, stop: list[int]) -> list[int]:
    embeds = torch.cat([prompt.prompt()[None], backbone.model.get_input_embeddings()(row)[None]], 1)
    made = backbone.model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=stop or [-1],
        pad_token_id=0,
    )
    return made[0].tolist()


@pytest.fixture
def llama(tiny_backbone: MakeBackbone) -> PromptedModel:
    backbone = tiny_backbone("llama")
    return attach(backbone, prompts_of(backbone)[0])


def tokens(prompted: PromptedModel, row: Tensor, **settings: object) -> list[int]:
    return [int(token) for token in prompted.generate(row[None], **{"stop": [], "max_new_tokens": NEW, **settings})]


def test_greedy_single_row_matches_transformers(decoder: Backbone) -> None:
    prompt, row = prompts_of(decoder)[0], texts()[0]
    assert tokens(attach(decoder, prompt), row) == transformers_own(decoder, prompt, row, [])


def test_greedy_mixed_lengths_match_transformers(decoder: Backbone) -> None:
    prompts, rows = prompts_of(decoder), texts()
    made = torch.stack(
        list(attach(decoder).generate(*batch(rows), max_new_tokens=NEW, stop=[], prompts=prompts, index=INDEX)), 1
    )
    expected = [transformers_own(decoder, prompts[number], row, []) for number, row in zip(INDEX, rows, strict=True)]
    assert made.tolist() == expected


def test_stop_token_ends_row_then_call(decoder: Backbone) -> None:
    prompts, rows = prompts_of(decoder), texts()
    free = [transformers_own(decoder, prompts[number], row, []) for number, row in zip(INDEX, rows, strict=True)]
    stop = [free[0][2], free[1][4], free[2][1], free[3][3]]
    made = torch.stack(
        list(attach(decoder).generate(*batch(rows), max_new_tokens=NEW, stop=stop, prompts=prompts, index=INDEX)), 1
    ).tolist()
    ends = [next(position for position, token in enumerate(row) if token in stop) for row in free]
    assert len(made[0]) == max(ends) + 1
    for row, full, end in zip(made, free, ends, strict=True):
        assert row[: end + 1] == full[: end + 1]
        assert set(row[end:]) == {full[end]}, "a finished row repeats its stop token"


def test_default_stop_is_backbones_eos(llama: PromptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    row = texts()[0]
    free = tokens(llama, row)
    monkeypatch.setattr(llama.backbone.model.generation_config, "eos_token_id", free[3])
    made = tokens(llama, row, stop=None)
    assert made == free[: free.index(free[3]) + 1]


def test_each_token_is_yielded_before_the_next(llama: PromptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    run = llama_cached.run
    monkeypatch.setattr(llama_cached, "run", lambda *given: calls.append(1) or run(*given))
    prepared = llama.prepare([llama.prompt])
    stream = llama.generate(texts()[0][None], max_new_tokens=4, stop=[], prompts=prepared)
    for count in range(1, 5):
        next(stream)
        assert len(calls) == count
    assert list(stream) == []


def test_generation_leaves_grad_mode_unchanged(llama: PromptedModel) -> None:
    """Two streams read in turn and never to their end: the reader's own mode is untouched in between and after."""
    first, second = (llama.generate(row[None], max_new_tokens=4, stop=[]) for row in texts()[:2])
    for stream in (first, second, first, second, first):
        token = next(stream)
        assert torch.is_grad_enabled()
        assert not token.requires_grad
    first.close()
    assert list(second)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1e-4), Sampling(temperature=2.0, top_k=1), Sampling(temperature=2.0, top_p=1e-6)],
    ids=["cold", "top_k", "top_p"],
)
def test_sampling_from_one_token_is_greedy(llama: PromptedModel, sampling: Sampling) -> None:
    assert tokens(llama, texts()[0], sampling=sampling) == tokens(llama, texts()[0])


def test_equal_seeds_draw_equal_tokens(llama: PromptedModel) -> None:
    def drawn(seed: int) -> list[int]:
        return tokens(llama, texts()[0], sampling=Sampling(temperature=3.0, seed=seed))

    torch.manual_seed(1)
    first = drawn(7)
    before = torch.get_rng_state()
    assert drawn(7) == first
    assert drawn(8) != first
    assert torch.equal(torch.get_rng_state(), before), "drawing used torch's global generator"


def test_draws_follow_the_warped_distribution(llama: PromptedModel) -> None:
    row, count = texts()[0], 4000
    logits = llama(row[None]).logits[0, -1].detach() / 4.0
    cached = logits.masked_fill(logits < logits.topk(20).values[-1], -torch.inf)
    expected = cached.softmax(-1)
    drawn = next(llama.generate(row.expand(count, -1), stop=[], sampling=Sampling(temperature=4.0, top_k=20, seed=5)))
    share = torch.bincount(drawn, minlength=300) / count
    # Four standard deviations of a binomial share; the seed is fixed, so it never flickers.
    assert bool(((share - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all())
    assert int((expected > 0.02).sum()) > 3, "one likely token would make this easy"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -0.5}, "temperature is -0.5; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan; it must be 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_invalid_sampling_is_refused(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampling(**settings)
