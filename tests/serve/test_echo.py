"""A completion's text is what follows its input, also where the tokenizer strips the first space of a text."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from softprompt.backbones import Backbone
from softprompt.serve import Engine
from softprompt.serve.api.app import make_app

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def _tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's, with two words."""
    pieces = ["<unk>", "<s>", "</s>", "▁Hello", "▁world"]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *sorted({*"".join(pieces[3:])})])}
    merges = []
    for word in pieces[3:]:
        for end in range(1, len(word)):
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
            merges.append((word[:end], word[end]))
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


@pytest.mark.parametrize("stream", [False, True])
def test_answer_keeps_the_space_after_its_input(tiny_backbone: Callable[[str], Backbone], stream: bool) -> None:
    tokenizer = _tokenizer()
    hello, world = tokenizer.convert_tokens_to_ids(["▁Hello", "▁world"])
    backbone = Backbone(tiny_backbone("llama").model, tokenizer, "llama", "llama", "causal")
    asked: dict[str, Any] = {"model": "base", "max_tokens": 2, "logit_bias": {str(world): 100}, "logprobs": 0}
    with Engine(backbone) as engine, TestClient(make_app(engine), base_url="http://localhost") as client:

        def ask(**body: Any) -> tuple[str, list[int]]:
            response = client.post("/v1/completions", json={**asked, **body, "stream": stream})
            lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
            choices = [json.loads(line)["choices"][0] for line in lines if line != "[DONE]"]
            offsets = [
                offset for choice in choices if choice["logprobs"] for offset in choice["logprobs"]["text_offset"]
            ]
            return "".join(choice["text"] for choice in choices), offsets

        assert ask(prompt="Hello") == (" world world", [0, 6])
        for prompt in ("Hello", [1, hello]):
            assert ask(prompt=prompt, echo=True) == ("Hello world world", [0, 0, 5, 11])
        assert ask(prompt=[1]) == ("world world", [0, 5])  # nothing is before it
        message = {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True}
        chat = client.post("/v1/chat/completions", json={**asked, **message}).json()
        assert chat["choices"][0]["message"]["content"] == "world world"
