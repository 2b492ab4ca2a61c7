"""Seconds and memory of one training step on an encoder-decoder of T5-base's shape, beside PEFT's prompt tuning.

    python benchmarks/t5_step.py [--tokens 80] [--dtype float32] [--rounds 3] [--steps 1]

The weights are random, the same on all sides: speed needs no trained ones. `joint` is our prompt in the encoder's row;
`isolated` is the other model whose prompt sees itself alone and runs once a batch. PEFT is measured as it trains,
dropout on (`peft_dropout`; transformers' Trainer and PEFT's examples put the whole model into training mode), and in
evaluation mode (`peft`), which does the work that `joint` does. Losses of `isolated` and `peft_dropout` are their own
and are not compared.

sides.py says how all are measured and what the JSON holds. The floor counts, each linear layer twice and each
attention thrice as there, the encoder's weights at every place, the decoder's cross-attention keys and values at every
place, its other weights and the head at every label, and the encoder's self-attention; `isolated` has places for the
prompt once a batch in the encoder.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sides import Pair, Part, Settings, Work, generator, main
from train_step import LABELS, decomposed, training_step


def t5(part: Part) -> Any:
    """T5-base's shape with random weights, as a backbone."""
    import torch
    import transformers

    from softprompt.backbones import Backbone

    torch.manual_seed(part.seed)
    config = transformers.T5Config(
        vocab_size=32128, d_model=768, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12, d_kv=64,
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).to(getattr(torch, part.dtype)).eval()
    tokenizer = SimpleNamespace(all_special_ids=[0, 1])
    return Backbone(model, tokenizer, "t5-base's shape", "t5-base's shape", "encoder_decoder")


def batch(part: Part, tokens: int) -> tuple[Any, Any, Any]:
    """Token ids, their mask, and the answers' tokens."""
    import torch

    ids = torch.randint(2, 32000, (part.batch, tokens), generator=generator(part))
    return ids, torch.ones_like(ids), ids[:, :LABELS].clone()


def ours(prompt_attention: str) -> Callable[[Part], Callable[[int], Work]]:
    """Our training step."""

    def side(part: Part) -> Callable[[int], Work]:
        from softprompt import attach

        backbone = t5(part)

        def ready(tokens: int) -> Work:
            prompted = attach(backbone, decomposed(backbone, part), prompt_attention=prompt_attention)
            ids, mask, labels = batch(part, tokens)
            run = training_step(lambda: prompted(ids, mask, labels).loss, list(prompted.parameters()))
            return Work(run, backbone.model, multiply_adds(backbone.model, part, tokens, prompt_attention == "self"))

        return ready

    return side


def peft(dropout: bool) -> Callable[[Part], Callable[[int], Work]]:
    """PEFT's training step."""

    def side(part: Part) -> Callable[[int], Work]:
        import torch
        from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

        backbone = t5(part)
        backbone.model.set_attn_implementation("sdpa")  # as transformers loads it; ours brings its own attention
        config = PromptTuningConfig(
            task_type=TaskType.SEQ_2_SEQ_LM,
            num_virtual_tokens=part.length,
            num_transformer_submodules=1,
            prompt_tuning_init=PromptTuningInit.RANDOM,
        )
        model = get_peft_model(backbone.model, config).train(dropout)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        first = decomposed(backbone, part).prompt().detach()

        def ready(tokens: int) -> Work:
            with torch.no_grad():
                model.prompt_encoder["default"].embedding.weight.copy_(first)
            ids, mask, labels = batch(part, tokens)
            run = training_step(lambda: model(input_ids=ids, attention_mask=mask, labels=labels).loss, trained)
            return Work(run, model.base_model, multiply_adds(model.base_model, part, tokens, False))

        return ready

    return side


def multiply_adds(model: Any, part: Part, tokens: int, isolated: bool) -> int:
    import torch

    def weights(part: Any) -> int:
        return sum(module.weight.numel() for module in part.modules() if isinstance(module, torch.nn.Linear))

    rows, length, config = part.batch, part.length, model.config
    places = rows * (length + tokens)
    inner = config.num_heads * config.d_kv
    cross = config.num_decoder_layers * 2 * config.d_model * inner
    in_encoder, pairs = places, rows * (length + tokens) ** 2
    if isolated:
        in_encoder, pairs = length + rows * tokens, length**2 + rows * tokens * (length + tokens)
    head = config.d_model * config.vocab_size
    linear = weights(model.encoder) * in_encoder + cross * places
    linear += (weights(model.decoder) - cross + head) * rows * LABELS
    return 2 * linear + 3 * 2 * config.num_layers * inner * pairs


if __name__ == "__main__":
    SIDES = {
        "full": ours("full"),
        "peft": peft(dropout=False),
        "self": ours("self"),
        "peft_dropout": peft(dropout=True),
    }
    PAIRS = [
        Pair("full", "peft"),
        Pair("full", "peft_dropout", same=False),
        Pair("self", "peft", same=False),
        Pair("self", "peft_dropout", same=False),
    ]
    # PEFT's T5 gives its loss in the model's dtype, and bfloat16 numbers near 11 are 0.06 apart.
    main(__file__, SIDES, PAIRS, Settings(tokens=(80,)), str(__doc__), roundings=2)
