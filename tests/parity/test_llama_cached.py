"""Texts and further tokens over a KV cache through our layers, against transformers on each row alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from softprompt import Backbone, attach
from softprompt.backbones.kernels import llama, llama_cached
from softprompt.models import causal
from softprompt.prompts import Folded

MakeBackbone = Callable[[str], Backbone]
TEXTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
MORE = [[20, 21, 22], [23, 24, 25], [26, 27, 28]]


@pytest.fixture(params=["llama", "mistral", "qwen2"])
def backbone(request: pytest.FixtureRequest, tiny_backbone: MakeBackbone) -> Backbone:
    """Qwen2 has biases in its query, key and value projections."""
    if request.param != "qwen2":
        return tiny_backbone(request.param)
    torch.manual_seed(0)
    source = tiny_backbone("llama")
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {
        name: getattr(source.model.config, name)
        for name in (*names, "intermediate_size", "bos_token_id", "eos_token_id", "pad_token_id")
    }
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)).eval()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(projection.bias)
    return Backbone(model, source.tokenizer, "qwen2", "qwen2", "causal")


def prompts_of(backbone: Backbone) -> list[Folded]:
    draw = torch.Generator().manual_seed(0)
    return [Folded(backbone.host().sample(length, draw)) for length in (4, 2)]


def padded(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts))
    ids = torch.tensor([[2] * (width - len(text)) + text for text in texts])
    return ids, torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])


@torch.no_grad()
def test_decoded_logits_match_transformers_on_single_rows(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    run = llama_cached.run
    monkeypatch.setattr(llama_cached, "run", lambda *given: calls.append(1) or run(*given))
    assert llama.is_supported(backbone.model)
    prompts, index = prompts_of(backbone), torch.tensor([1, 0, 1])
    prompted = attach(backbone, None)
    calls.clear()
    state = prompted.prefill(*padded(TEXTS), prompts=prompted.prepare(prompts), index=index)  # type: ignore[operator]
    steps = [state.logits[:, -1]]
    for number in range(3):
        state = prompted.decode(state.with_room(2), torch.tensor([[row[number]] for row in MORE]))  # type: ignore[operator]
        steps.append(state.logits[:, -1])
    assert len(calls) == 5  # the prompts, the texts, and three tokens
    embed = backbone.model.get_input_embeddings()
    for row, (text, more) in enumerate(zip(TEXTS, MORE, strict=True)):
        embeds = torch.cat([prompts[index[row]].prompt(), embed(torch.tensor(text + more))])[None]
        expected = backbone.model(inputs_embeds=embeds).logits[0, -4:]
        actual = torch.stack([step[row] for step in steps])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_without_a_prompt_and_several_tokens_at_once_match_transformers(backbone: Backbone) -> None:
    """Padding before a row then has no column to attend to but itself."""
    prompted = attach(backbone, None)
    state = prompted.prefill(*padded(TEXTS))  # type: ignore[operator]
    steps = [state.logits[:, -1:], prompted.decode(state, torch.tensor(MORE)).logits]  # type: ignore[operator]
    for row, (text, more) in enumerate(zip(TEXTS, MORE, strict=True)):
        expected = backbone.model(input_ids=torch.tensor([text + more])).logits[0, -4:]
        torch.testing.assert_close(torch.cat([step[row] for step in steps]), expected, rtol=1e-4, atol=1e-5)


def test_generation_beyond_a_buffer_equals_transformers(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "ROOM", 3)
    [prompt, _] = prompts_of(backbone)
    ids, mask = padded(TEXTS)
    tokens = torch.stack(list(attach(backbone, prompt).generate(ids, mask, max_new_tokens=10, stop=())), 1)
    embed = backbone.model.get_input_embeddings()
    for row, text in zip(tokens.tolist(), TEXTS, strict=True):
        embeds = torch.cat([prompt.prompt(), embed(torch.tensor(text))])[None]
        options: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
        expected = backbone.model.generate(inputs_embeds=embeds, eos_token_id=[], **options)
        assert row == expected[0].tolist()
