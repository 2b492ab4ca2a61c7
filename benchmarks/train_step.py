"""Seconds and memory of one training step, beside PEFT's prompt tuning in the same run.

    python benchmarks/train_step.py [--tokens 32 64] [--batch-size 16] [--length 100] [--dtype float32] [--rounds 3]

Both sides get the same weights, tokens, labels (the last two tokens of each row), dtype, and initial prompt; both run
in eval mode, on the CPU. The step is forward, backward, AdamW on the prompt, and setting the gradient to none. `peft`
is `model(**batch)`, as PEFT's documentation has it, which fills a cache that training does not need; `peft_no_cache` is
the same with `use_cache=False`, as transformers' Trainer has it. `plain` trains as many numbers as PEFT does; `dpt` is
the decomposed prompt. Rows are full, since PEFT's layout lets padding change a row's result.

sides.py says how they are measured and what the JSON holds. The floor: with n weights in the body's linear layers, h in
the head, and w the width of all attention heads of all layers together,

    places        = length + batch * tokens
    pairs         = length * (length + 1) / 2 + batch * (tokens * length + tokens * (tokens + 1) / 2)
    multiply_adds = 2 * (n * places + h * batch * labels) + 3 * (2 * w * pairs)

Linear layers count twice, forward and gradient of the input, since frozen weights need none; attention three times,
since both factors of its two products need one. The formula ignores what the first and the last layer can save (at most
two layers' share), and everything that is no product: norms, rotations, softmax, copies.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from sides import Pair, Part, Settings, Side, Work, generator, linear_layers, main

BACKBONE = "smollm2-135m"
LABELS = 2
Load: TypeAlias = Callable[[Part], Any]
"""The backbone that a side works on."""


def smollm2(part: Part) -> Any:
    """The catalogue's smallest decoder, with its own weights."""
    from softprompt import load_backbone

    return load_backbone(BACKBONE, dtype=part.dtype, device="cpu")


def ours(prompt_of: Callable[[Any, Part], Any], load: Load = smollm2, *, recompute: bool = False) -> Side:
    """Our training step; with gradient checkpointing if `recompute`."""

    def side(part: Part) -> Callable[[int], Work]:
        from softprompt import attach
        from softprompt.backbones.kernels.gradient_checkpointing import gradient_checkpointing

        backbone = load(part)

        def ready(tokens: int) -> Work:
            prompted = attach(backbone, prompt_of(backbone, part))
            ids, mask, labels = batch(backbone.model, part, tokens)
            step = training_step(lambda: prompted(ids, mask, labels).loss, list(prompted.parameters()))

            def run() -> float:
                with gradient_checkpointing(backbone.model, recompute):
                    return step()

            return Work(run, backbone.model, training_multiply_adds(backbone.model, part, tokens))

        return ready

    return side


def peft(load: Load = smollm2, **options: Any) -> Side:
    """PEFT's training step, its model called with `options`."""

    def side(part: Part) -> Callable[[int], Work]:
        import torch

        model, _ = peft_model(part, load)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        initial = [parameter.detach().clone() for parameter in trained]

        def ready(tokens: int) -> Work:
            with torch.no_grad():
                for parameter, values in zip(trained, initial, strict=True):
                    parameter.copy_(values)
            ids, mask, labels = batch(model.base_model, part, tokens)
            run = training_step(
                lambda: model(input_ids=ids, attention_mask=mask, labels=labels, **options).loss, trained
            )
            return Work(run, model.base_model, training_multiply_adds(model.base_model, part, tokens))

        return ready

    return side


def peft_model(part: Part, load: Load = smollm2) -> tuple[Any, Any]:
    """The backbone in PEFT's prompt tuning, in eval mode, with the same initial prompt as ours; and its tokenizer."""
    import torch
    from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

    backbone = load(part)
    backbone.model.set_attn_implementation("sdpa")  # as transformers loads it; ours brings its own attention
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=part.length,
        prompt_tuning_init=PromptTuningInit.RANDOM,
    )
    model = get_peft_model(backbone.model, config).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(decomposed(backbone, part).prompt())
    return model, backbone.tokenizer


def decomposed(backbone: Any, part: Part) -> Any:
    """The decomposed prompt; its product is where every side starts."""
    from softprompt import DPT

    return DPT(length=part.length, rank=part.rank).build(backbone.host(), generator(part))


def plain(backbone: Any, part: Part) -> Any:
    """The same prompt, every number trained by itself."""
    from softprompt.prompts.plain import PlainPrompt

    unit = backbone.host().rms
    return PlainPrompt(decomposed(backbone, part).prompt().detach() / unit, unit)


def batch(model: Any, part: Part, tokens: int) -> tuple[Any, Any, Any]:
    """Token ids, their mask, and labels: the last two tokens of each row."""
    import torch

    vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocab, (part.batch, tokens), generator=generator(part))
    labels = torch.full_like(ids, -100)
    labels[:, -LABELS:] = ids[:, -LABELS:]
    return ids, torch.ones_like(ids), labels


def training_step(loss_of: Callable[[], Any], parameters: Sequence[Any]) -> Callable[[], float]:
    """A whole step; both sides run this one."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def training_multiply_adds(model: Any, part: Part, tokens: int) -> int:
    rows, length = part.batch, part.length
    body, head, attention = widths(model)
    linear = body * (length + rows * tokens) + head * rows * LABELS
    pairs = length * (length + 1) // 2 + rows * (tokens * length + tokens * (tokens + 1) // 2)
    return 2 * linear + 3 * (2 * attention * pairs)


def widths(model: Any) -> tuple[int, int, int]:
    """Weights of the body's linear layers, of the head, and the width of all attention heads of all layers."""
    config = model.config
    head = model.get_output_embeddings().weight
    body = sum(module.in_features * module.out_features for module in linear_layers(model))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return body, head.numel(), config.num_hidden_layers * config.num_attention_heads * head_dim


if __name__ == "__main__":
    SIDES = {"plain": ours(plain), "peft": peft(), "dpt": ours(decomposed), "peft_no_cache": peft(use_cache=False)}
    PAIRS = [Pair(side, peer) for side in ("plain", "dpt") for peer in ("peft", "peft_no_cache")]
    main(__file__, SIDES, PAIRS, Settings(), str(__doc__))
