"""Time and memory of one training step on an encoder-decoder of T5-base's shape, compared with PEFT's prompt tuning.

    python benchmarks/t5_step.py [--tokens 80] [--dtype float32] [--rounds 3] [--steps 1]

The weights are random and the same on all sides; the values do not affect the speed. `full` is our prompt with
`--prompt-attention full`: prompt and text attend to each other in the encoder. `self` is a different model: the prompt
attends to itself alone and is encoded once per batch. PEFT is measured with dropout on (`peft_dropout`), because
transformers' Trainer and PEFT's examples put the full model into training mode, and in eval mode (`peft`), where it
does the same work as `full`. The losses of `self` and `peft_dropout` differ by design and are not compared.

The measurements and the JSON are described in harness.py. The roofline counts linear layers twice and attention three
times, as in train_step.py: the encoder's weights and the decoder's cross-attention keys and values at every position,
the decoder's other weights and the head at every label, and the encoder's self-attention. For `self` the encoder has
the prompt's positions once per batch.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from harness import Pair, Settings, Work, WorkerSpec, generator, main
from train_step import LABELS, decomposed, training_step


def t5(spec: WorkerSpec) -> Any:
    """A backbone of T5-base's shape with random weights."""
    import torch
    import transformers

    from softprompt.backbones import Backbone

    torch.manual_seed(spec.seed)
    config = transformers.T5Config(
        vocab_size=32128, d_model=768, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12, d_kv=64,
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).to(getattr(torch, spec.dtype)).eval()
    tokenizer = SimpleNamespace(all_special_ids=[0, 1])
    return Backbone(model, tokenizer, "t5-base's shape", "t5-base's shape", "encoder_decoder")


def batch(spec: WorkerSpec, tokens: int) -> tuple[Any, Any, Any]:
    """Token ids, their mask, and the labels."""
    import torch

    ids = torch.randint(2, 32000, (spec.batch_size, tokens), generator=generator(spec))
    return ids, torch.ones_like(ids), ids[:, :LABELS].clone()


def ours(prompt_attention: str) -> Callable[[WorkerSpec], Callable[[int], Work]]:
    """Our training step."""

    def side(spec: WorkerSpec) -> Callable[[int], Work]:
        from softprompt import attach

        backbone = t5(spec)

        def prepare(tokens: int) -> Work:
            prompted = attach(backbone, decomposed(backbone, spec), prompt_attention=prompt_attention)
            ids, mask, labels = batch(spec, tokens)
            run = training_step(lambda: prompted(ids, mask, labels).loss, list(prompted.parameters()))
            return Work(run, backbone.model, multiply_adds(backbone.model, spec, tokens, prompt_attention == "self"))

        return prepare

    return side


def peft(dropout: bool) -> Callable[[WorkerSpec], Callable[[int], Work]]:
    """PEFT's training step."""

    def side(spec: WorkerSpec) -> Callable[[int], Work]:
        import torch
        from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

        backbone = t5(spec)
        backbone.model.set_attn_implementation("sdpa")  # transformers' default; attach() installs our own
        config = PromptTuningConfig(
            task_type=TaskType.SEQ_2_SEQ_LM,
            num_virtual_tokens=spec.length,
            num_transformer_submodules=1,
            prompt_tuning_init=PromptTuningInit.RANDOM,
        )
        model = get_peft_model(backbone.model, config).train(dropout)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        initial = decomposed(backbone, spec).prompt().detach()

        def prepare(tokens: int) -> Work:
            with torch.no_grad():
                model.prompt_encoder["default"].embedding.weight.copy_(initial)
            ids, mask, labels = batch(spec, tokens)
            run = training_step(lambda: model(input_ids=ids, attention_mask=mask, labels=labels).loss, parameters)
            return Work(run, model.base_model, multiply_adds(model.base_model, spec, tokens, False))

        return prepare

    return side


def multiply_adds(model: Any, spec: WorkerSpec, tokens: int, self_attention_only: bool) -> int:
    import torch

    def weights(stack: Any) -> int:
        return sum(module.weight.numel() for module in stack.modules() if isinstance(module, torch.nn.Linear))

    rows, length, config = spec.batch_size, spec.length, model.config
    positions = rows * (length + tokens)
    inner = config.num_heads * config.d_kv
    cross = config.num_decoder_layers * 2 * config.d_model * inner
    encoder_positions, pairs = positions, rows * (length + tokens) ** 2
    if self_attention_only:
        encoder_positions, pairs = length + rows * tokens, length**2 + rows * tokens * (length + tokens)
    head = config.d_model * config.vocab_size
    linear = weights(model.encoder) * encoder_positions + cross * positions
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
    # PEFT's T5 returns its loss in the model's dtype, and bfloat16 values near 11 are 0.06 apart.
    main(__file__, SIDES, PAIRS, Settings(tokens=(80,)), str(__doc__), roundings=2)
