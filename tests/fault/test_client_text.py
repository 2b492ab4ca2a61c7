"""vLLM's client refuses control tokens in a text unless they are allowed."""

import copy
from collections.abc import Callable

import pytest
from tokenizers import AddedToken

from softprompt.backbones import Backbone
from softprompt.export.client import Vllm, is_control
from softprompt.tasks.data.control_tokens import _is_control


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


def test_the_client_and_the_library_know_the_same_control_tokens() -> None:
    names = [
        "<think>",
        "[INST]",
        "{user}",
        "(system)",
        "\u00abuser\u00bb",
        "\uff1cuser\uff1e",
        " <x> ",
        "!",
        "<",
        "word",
        "  ",
    ]
    tokens = [AddedToken(name, special=special) for name in names for special in (False, True)]
    assert [is_control(token) for token in tokens] == [_is_control(token) for token in tokens]
