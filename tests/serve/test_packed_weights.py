"""The service decodes with packed weights where it is told to, and says where it cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from softprompt import Backbone, attach, evaluate, predict
from softprompt.backbones.kernels.packed_linear import Int8Linear, PrepackedLinear
from softprompt.prompts import SoftPrompt
from softprompt.serve import Engine, Limits
from softprompt.serve.engine.kv_cache import CachedDecoder


@pytest.fixture
def backbone(tiny_backbone: Callable[[str], Backbone]) -> Backbone:
    """A tiny Llama in bfloat16."""
    source = tiny_backbone("llama")
    sizes: dict[str, Any] = {name: getattr(source.model.config, name) for name in ("bos_token_id", "eos_token_id")}
    sizes |= {"vocab_size": source.vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).bfloat16().eval()
    return Backbone(model, source.tokenizer, "llama", "llama", "causal")


@pytest.mark.parametrize("decode_weights", ["auto", "int8"])
@pytest.mark.parametrize("text", [[5], [5, 6, 7]])
def test_service_decodes_with_packed_weights_only(
    backbone: Backbone,
    prompt_of: Callable[..., SoftPrompt],
    text: list[int],
    decode_weights: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Packed products of zeros give token 0. Inexact ones only decode, also after a text of one token."""
    monkeypatch.setattr(CachedDecoder, "_check_exact", lambda _: True)  # which sees that the products are wrong
    for kind in (PrepackedLinear, Int8Linear):
        monkeypatch.setattr(
            kind, "__call__", lambda self, inputs: inputs.new_zeros(len(inputs), len(self.dequantized()))
        )
    prompt = prompt_of(backbone, 0).fold()
    with torch.no_grad():
        first = int(attach(backbone, None)(torch.tensor([text]), prompts=[prompt]).logits[0, -1].argmax())
    expected = first if decode_weights == "int8" else 0
    with Engine(backbone.with_decode_weights(decode_weights), Limits(timeout=60.0)) as engine:
        engine.add("p", prompt)
        assert engine.generate("p", text, max_new_tokens=4).result().tokens == (expected, 0, 0, 0)
    assert first


def test_where_nothing_is_decoded_packed_weights_are_refused(run_folders: list[Path], unchecked: None) -> None:
    rows = [{"text": "a"}]
    with pytest.raises(ValueError, match="decode_weights is 'int8', but task 'tickets' has labels"):
        predict(run_folders[0], rows, decode_weights="int8")
    with pytest.raises(ValueError, match="decode_weights is 'int4', but task 'tickets' has labels"):
        evaluate(run_folders[0], decode_weights="int4")
