"""Seconds and memory of one training step on a Llama of a billion weights' shape, beside PEFT's prompt tuning.

    python benchmarks/llama_step.py [--tokens 32 64] [--batch-size 16] [--length 100] [--dtype float32] [--rounds 3]

The shape is Llama 3.2 1B's, with 4 of its 16 layers, since the whole would take minutes a step on two cores; weights
are random, the same on all sides: speed needs no trained ones. Sides, floor and all else are train_step.py's.
"""

from types import SimpleNamespace
from typing import Any

from sides import Pair, Part, Settings, main
from train_step import decomposed, ours, peft, plain

LAYERS = 4


def llama(part: Part) -> Any:
    """The shape with random weights, as a backbone."""
    import torch
    import transformers

    from softprompt.backbones import Backbone

    torch.manual_seed(part.seed)
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, max_position_embeddings=131072,
        dtype=getattr(torch, part.dtype),
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    name = f"Llama 3.2 1B's shape, {LAYERS} layers"
    return Backbone(model, SimpleNamespace(all_special_ids=[]), name, name, "causal")


if __name__ == "__main__":
    SIDES = {"plain": ours(plain, llama), "dpt": ours(decomposed, llama), "peft": peft(llama, use_cache=False)}
    main(__file__, SIDES, [Pair("plain", "peft"), Pair("dpt", "peft")], Settings(), str(__doc__))
