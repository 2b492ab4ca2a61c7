"""Log-probabilities of inputs and answers equal those of the model on each row alone, and clients can read them."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.models import Sampling
from softprompt.serve import Engine
from softprompt.serve.api.logprobs import TokenNames
from softprompt.serve.engine import kv_cache
from softprompt.serve.engine.generation import CausalGenerationBatch
from softprompt.serve.engine.request import EngineRequest, GenerateParams

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
MODELS = ("p0", "base", "p1", "p2", "p3", "base")
LENGTHS = (3, 1, 19, 6, 2, 11)


def model_logprobs(engine: Engine, request: EngineRequest, ids: list[int]) -> Tensor:
    """Of each token from the second on, with transformers alone: one row, no padding, no cache."""
    model, prompt = engine.backbone.model, request.entry.prompt
    tokens, positions = torch.tensor([ids]), torch.arange(len(ids))[None]
    embeds = prompt.shift(model.get_input_embeddings()(tokens), tokens, positions)
    embeds = torch.cat([prompt.prompt()[None].to(embeds), embeds], 1)
    logits: Tensor = model(inputs_embeds=embeds).logits[:, prompt.prompt().shape[0] :]
    return logits.float().log_softmax(-1)[0, :-1]


def check_equal(ours: Sequence[Any], expected: Any) -> None:
    """Equal `logprobs` of completions, in one part or several, up to float32's sums in another order."""

    def values(name: str) -> list[Any]:
        return [value for part in ours for value in getattr(part, name)]

    assert values("tokens") == expected.tokens
    assert values("text_offset") == expected.text_offset
    assert values("token_logprobs") == pytest.approx(expected.token_logprobs, abs=1e-4)
    for top, other in zip(values("top_logprobs"), expected.top_logprobs, strict=True):
        assert top == (other and pytest.approx(other, abs=1e-4))


@pytest.mark.parametrize("columns", [3, 1000])
@torch.no_grad()
def test_logprobs_equal_each_row_alone(
    decoder: Backbone, engine_of: Callable[..., Engine], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several lengths and prompts in one batch, whose inputs are read in slices of `columns`."""
    monkeypatch.setattr(kv_cache, "MAX_LOGITS", columns * len(LENGTHS) * decoder.vocab_size)
    engine = engine_of(decoder.source, prompts=4)
    draw = torch.Generator().manual_seed(0)
    requests = [
        EngineRequest(
            engine.get(name),
            torch.randint(5, 300, (length,), generator=draw).tolist(),
            # Penalties and temperature choose the tokens; what is reported are the model's own log-probabilities.
            GenerateParams(
                max_new_tokens=4,
                logprobs=3,
                score_input=length != 6,
                sampling=Sampling(temperature=float(length == 2)),
                frequency_penalty=2.0 * (length == 11),
            ),
        )
        for name, length in zip(MODELS, LENGTHS, strict=True)
    ]
    assert engine._runner.decoder is not None
    batch = CausalGenerationBatch(engine._runner.decoder, requests)
    for _ in range(4):
        for request, token, logprob in zip(batch.requests, batch.step(), batch.logprobs, strict=True):
            request.append_token(token, logprob)
    for request in requests:
        ids = [*request.ids, *request.tokens]
        expected, scored = model_logprobs(engine, request, ids), request.generation.score_input
        entries = [*request.input_logprobs, *request.logprobs]
        assert len(request.input_logprobs) == (len(request.ids) - 1 if scored else 0)
        assert [entry.token for entry in entries] == ids[1 if scored else len(request.ids) :]
        for entry, row in zip(entries, expected[-len(entries) :], strict=True):
            # float32 sums in another order, on logits of about 10.
            assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
            values, tokens = row.topk(3)
            assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
            assert [token for token, _ in entry.top] == tokens.tolist()


def test_cached_template_prefix_is_scored_too(engine_of: Callable[..., Engine], run_folders: list[Path]) -> None:
    engine = engine_of(prompts=0)
    entry, ids = engine.add("run", run_folders[0]), (5, 6, 7, 8, 9)
    decoder = engine._runner.decoder
    assert decoder is not None
    assert entry.kv_prefix is not None
    prefix = engine._scheduler.run_job(lambda: decoder.template_prefix(entry.prompt, entry.kv_prefix, ids[:3]))
    engine.register(dataclasses.replace(entry, template_prefix=prefix))
    request = engine.generate("run", ids, max_new_tokens=0, logprobs=0, score_input=True)
    assert request.result(30.0).tokens == ()
    with torch.no_grad():
        expected = model_logprobs(engine, request, list(ids))
    own = [float(row[token]) for row, token in zip(expected, ids[1:], strict=True)]
    assert [entry.logprob for entry in request.input_logprobs] == pytest.approx(own, abs=1e-4)


def test_completion_echoes_and_scores_text_and_ids(service: Any) -> None:
    client, tokenizer = service.openai(), service.engine.backbone.tokenizer
    texts = ["Ticket: a a b\nQueue:", "é c"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    asked: dict[str, Any] = {"model": "p1", "max_tokens": 4, "logprobs": 2, "echo": True}
    by_text = client.completions.create(prompt=texts, **asked)
    by_ids = client.completions.create(prompt=ids, **asked)
    for text, row, one, other in zip(texts, ids, by_text.choices, by_ids.choices, strict=True):
        answer = client.completions.create(model="p1", prompt=text, max_tokens=4).choices[0].text
        assert one.text == other.text == text + answer
        assert one.logprobs is not None
        check_equal([one.logprobs], other.logprobs)
        names, offsets = one.logprobs.tokens, one.logprobs.text_offset
        assert len(names) == len(one.logprobs.token_logprobs) == len(offsets) == len(one.logprobs.top_logprobs)
        assert len(names) in (len(row) + 4, len(row) + 1 + len(tokenizer(answer)["input_ids"]))
        assert names[0] == "<s>"
        assert one.logprobs.token_logprobs[0] is None
        assert one.logprobs.top_logprobs[0] is None
        for name, offset in zip(names[1:], offsets[1:], strict=True):
            if name != "</s>" and not name.startswith("bytes:"):
                assert one.text[offset:].startswith(name)
        for logprob, top in zip(one.logprobs.token_logprobs[1:], one.logprobs.top_logprobs[1:], strict=True):
            assert 1 <= len(top) <= 3
            assert logprob in top.values()


def test_only_the_input_is_scored_where_no_token_is_asked_for(service: Any) -> None:
    client = service.openai()
    asked: dict[str, Any] = {"model": "p2", "prompt": [5, 6, 7], "echo": True, "logprobs": 0}
    scored = client.completions.create(max_tokens=0, n=2, **asked)
    more = client.completions.create(max_tokens=1, **asked).choices[0]
    assert scored.usage.completion_tokens == 0
    for choice in scored.choices:
        assert choice.finish_reason == "length"
        assert more.text.startswith(choice.text)
        assert choice.logprobs.token_logprobs == pytest.approx(more.logprobs.token_logprobs[:3], abs=1e-4)
        assert [list(top) for top in choice.logprobs.top_logprobs[1:]] == [
            [name] for name in choice.logprobs.tokens[1:]
        ]
    assert (
        client.completions.create(**{**asked, "logprobs": None}, max_tokens=0).choices[0].text == scored.choices[0].text
    )


def test_logprobs_end_with_the_token_that_ended_the_text(service: Any) -> None:
    """lm-eval drops the last one, so an answer of no tokens must have one."""
    client, end = service.openai(), service.engine.backbone.tokenizer.eos_token_id
    choice = client.completions.create(
        model="p0", prompt=[5, 6, 7], echo=True, logprobs=1, max_tokens=1, logit_bias={str(end): 100}
    )
    assert choice.usage.completion_tokens == 0
    assert choice.choices[0].finish_reason == "stop"
    assert len(choice.choices[0].logprobs.token_logprobs) == 4
    assert choice.choices[0].logprobs.tokens[-1] == "</s>"


@pytest.mark.parametrize("chat", [True, False])
def test_streamed_logprobs_equal_the_full_ones(service: Any, chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    client, tokenizer = service.openai(), service.engine.backbone.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    asked: dict[str, Any] = {"model": "p1", "max_tokens": 8, "n": 2, "seed": 5, "temperature": 1.0}
    if chat:
        create = client.chat.completions.create
        asked |= {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2}
    else:
        create = client.completions.create
        asked |= {"prompt": "a b", "logprobs": 2, "echo": True}
    full, chunks = create(**asked), list(create(**asked, stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].usage == full.usage
    assert chunks[-1].choices == []
    for choice in full.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        given = [part.logprobs for part in parts if part.logprobs is not None]
        if chat:
            entries = [entry for part in given for entry in part.content]
            assert [entry.token for entry in entries] == [entry.token for entry in choice.logprobs.content]
            own = [entry.logprob for entry in choice.logprobs.content]
            assert [entry.logprob for entry in entries] == pytest.approx(own, abs=1e-4)
            content = b"".join(bytes(entry.bytes or ()) for entry in choice.logprobs.content)
            assert content.decode("utf-8", "replace") == choice.message.content
            assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
            assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        else:
            check_equal(given, choice.logprobs)
            assert "".join(part.text for part in parts) == choice.text


def test_logprobs_stop_at_the_stop_text(service: Any) -> None:
    client = service.openai()
    full = client.completions.create(model="p1", prompt="a b", max_tokens=12, logprobs=0)
    stop = full.choices[0].text[3:5]
    cut = client.completions.create(model="p1", prompt="a b", max_tokens=12, logprobs=0, stop=["never", stop])
    assert cut.choices[0].text == full.choices[0].text[: full.choices[0].text.index(stop)]
    assert len(cut.choices[0].logprobs.tokens) == cut.usage.completion_tokens < full.usage.completion_tokens
    assert cut.choices[0].logprobs.tokens == full.choices[0].logprobs.tokens[: cut.usage.completion_tokens]


def test_answers_of_a_seed_are_repeatable_and_differ(service: Any) -> None:
    client = service.openai()
    asked: dict[str, Any] = {"model": "p1", "prompt": ["a b", "c"], "max_tokens": 8, "n": 3, "temperature": 1.5}
    first, second, other = (client.completions.create(**asked, seed=seed) for seed in (7, 7, 8))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert texts != [choice.text for choice in other.choices]
    assert len(set(texts[:3])) == len(set(texts[3:])) == 3


def test_equal_inputs_without_a_seed_have_their_own_draws(service: Any) -> None:
    asked: dict[str, Any] = {"model": "p1", "prompt": ["a b"] * 3, "max_tokens": 12, "n": 2, "temperature": 9.0}
    texts = [choice.text for choice in service.openai().completions.create(**asked).choices]
    assert len(set(texts)) == 6


def test_logit_bias_bans_and_forces_tokens(service: Any) -> None:
    client, engine = service.openai(), service.engine
    asked: dict[str, Any] = {"model": "p1", "prompt": "a b", "max_tokens": 8}
    free = engine.generate("p1", "a b", max_new_tokens=8).result(30.0).tokens
    bias = dict.fromkeys(free, -100.0)
    banned = engine.generate("p1", "a b", max_new_tokens=8, logit_bias=bias).result(30.0).tokens
    assert not set(banned) & set(free)
    text = client.completions.create(**asked, logit_bias={str(token): -100 for token in free}).choices[0].text
    assert text == engine.backbone.tokenizer.decode(banned, skip_special_tokens=True)
    forced = client.completions.create(**asked, logit_bias={"40": 100}).choices[0].text
    assert forced == engine.backbone.tokenizer.decode([40] * 8)
    with pytest.raises(openai.BadRequestError, match="logit_bias names token 5000") as error:
        client.completions.create(**asked, logit_bias={"5000": 1})
    assert error.value.param == "logit_bias"


def test_penalties_count_the_answer_and_not_the_input(service: Any) -> None:
    """Where the bias of two tokens is far above all others, the penalties alone decide between the two."""
    engine = service.engine

    def answer(**penalties: float) -> tuple[int, ...]:
        bias = {40: 60.0, 41: 58.0}
        request = engine.generate("base", [40] * 9, max_new_tokens=6, logit_bias=bias, **penalties)
        tokens: tuple[int, ...] = request.result(30.0).tokens
        return tokens

    with torch.no_grad():
        ids, tokens, c = [40] * 9, [], {40: 0, 41: 0}
        for _ in range(6):
            logits = engine.backbone.model(torch.tensor([ids])).logits[0, -1]
            score = {40: 60.0 + float(logits[40]), 41: 58.0 + float(logits[41])}
            score = {token: score[token] - 1.5 * c[token] - 0.5 * (c[token] > 0) for token in score}
            tokens.append(max(score, key=score.__getitem__))
            c[tokens[-1]] += 1
            ids.append(tokens[-1])
    assert answer(frequency_penalty=1.5, presence_penalty=0.5) == tuple(tokens)
    assert answer() != tuple(tokens)


def test_encoder_decoder_refuses_what_needs_its_logits(service_of: Callable[..., Any]) -> None:
    client = service_of(name="t5", prompts=1).openai()
    for field, value in (("logprobs", 1), ("logit_bias", {"5": 1}), ("presence_penalty", 1), ("frequency_penalty", -1)):
        with pytest.raises(openai.BadRequestError, match=f"{field} needs a decoder-only model") as error:
            client.completions.create(model="p0", prompt="a", **{field: value})
        assert error.value.param == field
    assert client.completions.create(model="p0", prompt="a", max_tokens=2, echo=True).choices[0].text.startswith("a")


def test_token_names_of_a_sentencepiece_vocabulary() -> None:
    """A space as a character of the token, bytes for what is not in the vocabulary, and a first space that is lost."""
    import transformers
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {"<s>": 0, "▁a": 1, "b": 2, "<0xC3>": 3, "<0xA9>": 4, "▁": 5}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    names = TokenNames(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
    assert [names.name(token) for token in range(5)] == ["<s>", " a", "b", "bytes:\\xc3", "bytes:\\xa9"]
    assert [names.strips_first_space(token) for token in (1, 2)] == [True, False]
    assert names.text([0, 1, 2, 3, 4]) == "abé"
