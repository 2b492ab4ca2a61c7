"""Time and memory of one training step, compared with PEFT's prompt tuning in the same run.

    python benchmarks/train_step.py [--tokens 32 64] [--batch-size 16] [--length 100] [--dtype float32] [--rounds 3]

Both sides use the same weights, tokens, labels (the last two tokens of each row), dtype and initial prompt, in eval
mode on the CPU. A step is forward, backward, AdamW on the prompt, and setting the gradient to None. `peft` is
`model(**batch)`, as in PEFT's documentation, which fills a KV cache that training does not need; `peft_no_cache` is the
same with `use_cache=False`, as transformers' Trainer calls it. `plain` trains as many parameters as PEFT does; `dpt` is
the decomposed prompt. Rows have no padding, because with PEFT's layout padding can change a row's result.

The measurements and the JSON are described in harness.py. The roofline, with n weights in the body's linear layers, h
in the head, and w the width of all attention heads of all layers together:

    positions     = length + batch_size * tokens
    pairs         = length * (length + 1) / 2 + batch_size * (tokens * length + tokens * (tokens + 1) / 2)
    multiply_adds = 2 * (n * positions + h * batch_size * labels) + 3 * (2 * w * pairs)

Linear layers count twice, for the forward pass and the gradient of the input (frozen weights need no gradient).
Attention counts three times, because both factors of its two products need a gradient. The formula ignores what the
first and the last layer can save (at most two layers' share) and all operations other than matrix products: norms,
rotary embeddings, softmax, copies.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from harness import Pair, Settings, Side, Work, WorkerSpec, generator, linear_layers, main

BACKBONE = "smollm2-135m"
LABELS = 2
Load: TypeAlias = Callable[[WorkerSpec], Any]
"""Loads the backbone of a side."""


def smollm2(spec: WorkerSpec) -> Any:
    """SmolLM2-135M with its pretrained weights."""
    from softprompt import load_backbone

    return load_backbone(BACKBONE, dtype=spec.dtype, device=spec.device)


def ours(prompt_of: Callable[[Any, WorkerSpec], Any], load: Load = smollm2, *, checkpointing: bool = False) -> Side:
    """Our training step, with gradient checkpointing if `checkpointing`."""

    def side(spec: WorkerSpec) -> Callable[[int], Work]:
        from softprompt import attach
        from softprompt.backbones.kernels.gradient_checkpointing import gradient_checkpointing

        backbone = load(spec)

        def prepare(tokens: int) -> Work:
            prompted = attach(backbone, prompt_of(backbone, spec).to(backbone.device))
            ids, mask, labels = batch(backbone.model, spec, tokens)
            step = training_step(lambda: prompted(ids, mask, labels).loss, list(prompted.parameters()))

            def run() -> float:
                with gradient_checkpointing(backbone.model, checkpointing):
                    return step()

            return Work(run, backbone.model, training_multiply_adds(backbone.model, spec, tokens))

        return prepare

    return side


def peft(load: Load = smollm2, **options: Any) -> Side:
    """PEFT's training step; the model is called with `options`."""

    def side(spec: WorkerSpec) -> Callable[[int], Work]:
        import torch

        model, _ = peft_model(spec, load)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        initial = [parameter.detach().clone() for parameter in parameters]

        def prepare(tokens: int) -> Work:
            with torch.no_grad():
                for parameter, values in zip(parameters, initial, strict=True):
                    parameter.copy_(values)
            ids, mask, labels = batch(model.base_model, spec, tokens)
            run = training_step(
                lambda: model(input_ids=ids, attention_mask=mask, labels=labels, **options).loss, parameters
            )
            return Work(run, model.base_model, training_multiply_adds(model.base_model, spec, tokens))

        return prepare

    return side


def peft_model(spec: WorkerSpec, load: Load = smollm2) -> tuple[Any, Any]:
    """A PEFT prompt-tuning model in eval mode with our initial prompt, and its tokenizer."""
    import torch
    from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

    backbone = load(spec)
    backbone.model.set_attn_implementation("sdpa")  # transformers' default; attach() installs our own
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=spec.length,
        prompt_tuning_init=PromptTuningInit.RANDOM,
    )
    model = get_peft_model(backbone.model, config).eval().to(backbone.device)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(decomposed(backbone, spec).prompt())
    return model, backbone.tokenizer


def decomposed(backbone: Any, spec: WorkerSpec) -> Any:
    """The decomposed prompt, on the CPU; every side starts from its product."""
    from softprompt import DPT

    return DPT(length=spec.length, rank=spec.rank).build(backbone.host(), generator(spec))


def plain(backbone: Any, spec: WorkerSpec) -> Any:
    """The same initial prompt with every entry trained."""
    from softprompt.prompts.plain import PlainPrompt

    unit = backbone.host().rms
    return PlainPrompt(decomposed(backbone, spec).prompt().detach() / unit, unit)


def batch(model: Any, spec: WorkerSpec, tokens: int) -> tuple[Any, Any, Any]:
    """Token ids, their mask, and labels: the last two tokens of each row."""
    import torch

    embeddings = model.get_input_embeddings().weight
    ids = torch.randint(len(embeddings), (spec.batch_size, tokens), generator=generator(spec)).to(embeddings.device)
    labels = torch.full_like(ids, -100)
    labels[:, -LABELS:] = ids[:, -LABELS:]
    return ids, torch.ones_like(ids), labels


def training_step(loss_of: Callable[[], Any], parameters: Sequence[Any]) -> Callable[[], float]:
    """A complete training step, shared by both sides."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def training_multiply_adds(model: Any, spec: WorkerSpec, tokens: int) -> int:
    rows, length = spec.batch_size, spec.length
    body, head, attention = widths(model)
    linear = body * (length + rows * tokens) + head * rows * LABELS
    pairs = length * (length + 1) // 2 + rows * (tokens * length + tokens * (tokens + 1) // 2)
    return 2 * linear + 3 * (2 * attention * pairs)


def widths(model: Any) -> tuple[int, int, int]:
    """Number of weights in the body's linear layers and in the head, and the total width of all attention heads."""
    config = model.config
    head = model.get_output_embeddings().weight
    body = sum(module.in_features * module.out_features for module in linear_layers(model))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return body, head.numel(), config.num_hidden_layers * config.num_attention_heads * head_dim


if __name__ == "__main__":
    SIDES = {"plain": ours(plain), "peft": peft(), "dpt": ours(decomposed), "peft_no_cache": peft(use_cache=False)}
    PAIRS = [Pair(side, peer) for side in ("plain", "dpt") for peer in ("peft", "peft_no_cache")]
    main(__file__, SIDES, PAIRS, Settings(), str(__doc__))
