"""vLLM's client refuses control tokens in a text unless they are allowed."""

import copy
from collections.abc import Callable

import pytest
from tokenizers import AddedToken

from softprompt.backbones import Backbone
from softprompt.export.client import Vllm


def test_the_client_refuses_control_tokens(tiny_backbone: Callable[[str], Backbone]) -> None:
    prompts = object.__new__(Vllm)
    prompts.tokenizer = tokenizer = copy.deepcopy(tiny_backbone("gpt2").tokenizer)
    tokenizer.add_tokens([AddedToken("<think>")])
    plain = prompts.ids("a fine film")
    for token in (tokenizer.eos_token, tokenizer.bos_token, "<think>"):
        with pytest.raises(ValueError, match="the text holds the control token '<"):
            prompts.ids(f"a fine {token} film")
        ids = prompts.ids(f"a fine {token} film", control=True)
        assert tokenizer.convert_tokens_to_ids(token) in ids[1:]
    assert prompts.ids("a fine film", control=True) == plain
