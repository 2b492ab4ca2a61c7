"""Time and memory of one training step on a Llama of the 1B shape, compared with PEFT's prompt tuning.

    python benchmarks/llama_step.py [--tokens 32 64] [--batch-size 16] [--length 100] [--dtype float32] [--rounds 3]

The shape is that of Llama 3.2 1B with 4 of its 16 layers, because a step of the full model would take minutes on two
cores. The weights are random and the same on all sides. Sides and roofline are those of train_step.py; PEFT runs
without its cache.
"""

from types import SimpleNamespace
from typing import Any

from harness import Pair, Settings, WorkerSpec, main
from train_step import decomposed, ours, peft, plain

LAYERS = 4


def llama(spec: WorkerSpec, layers: int = LAYERS) -> Any:
    """A backbone of this shape with random weights."""
    import torch
    import transformers

    from softprompt.backbones import Backbone

    torch.manual_seed(spec.seed)
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, max_position_embeddings=131072,
        dtype=getattr(torch, spec.dtype),
    )  # fmt: skip
    with torch.device(spec.device):
        model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    name = f"Llama 3.2 1B's shape, {layers} layers"
    return Backbone(model, SimpleNamespace(all_special_ids=[]), name, name, "causal")


if __name__ == "__main__":
    SIDES = {"plain": ours(plain, llama), "dpt": ours(decomposed, llama), "peft": peft(llama, use_cache=False)}
    main(__file__, SIDES, [Pair("plain", "peft"), Pair("dpt", "peft")], Settings(), str(__doc__))
