"""Time and memory of scoring two answers per row, compared with PEFT's prompt tuning in the same run.

    python benchmarks/score.py [--tokens 32] [--batch-size 32] [--dtype float32] [--rounds 3] [--steps 3]

Both sides use the same weights, rows, dtype and prompt, without gradients. Our side (`folded`) computes the prompt's
keys and values once, before the clock starts, as serving and evaluation do, and scores with `PromptedModel.score`. PEFT
runs the prompt with every row; the two answers are read from the last position of its logits. `loss` is the mean
cross-entropy between the two answers; which one is the target alternates over the rows.

The measurements and the JSON are described in harness.py. The roofline, without the prompt's own pass, with n, h and w
as in train_step.py:

    multiply_adds = n * rows * tokens + h * rows + 2 * w * rows * (tokens * length + tokens * (tokens + 1) / 2)
"""

from collections.abc import Callable
from typing import Any

from harness import Pair, Settings, Work, WorkerSpec, main
from train_step import Load, batch, decomposed, peft_model, smollm2, widths

ANSWERS = (" yes", " no")


def folded(spec: WorkerSpec, load: Load = smollm2) -> Callable[[int], Work]:
    """Our side, with the prompt's keys and values computed once."""
    import torch

    from softprompt import attach

    backbone = load(spec)
    prompted = attach(backbone, decomposed(backbone, spec).fold().to(backbone.device))
    answers = answer_ids(backbone.tokenizer)
    with torch.no_grad():
        prepared = prompted.prepare([prompted.prompt])

    def prepare(tokens: int) -> Work:
        ids, mask, _ = batch(backbone.model, spec, tokens)

        def run() -> float:
            with torch.no_grad():
                return loss(prompted.score(ids, mask, [[first] for first in answers], prompts=prepared))

        return Work(run, backbone.model, multiply_adds(backbone.model, spec, tokens))

    return prepare


def peft(spec: WorkerSpec, load: Load = smollm2) -> Callable[[int], Work]:
    """PEFT with the same prompt."""
    import torch

    model, tokenizer = peft_model(spec, load)
    answers = answer_ids(tokenizer)

    def prepare(tokens: int) -> Work:
        ids, mask, _ = batch(model.base_model, spec, tokens)

        def run() -> float:
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                return loss(logits[:, -1, answers].float())

        return Work(run, model.base_model, multiply_adds(model.base_model, spec, tokens))

    return prepare


def answer_ids(tokenizer: Any) -> list[int]:
    """The token of each answer.

    Raises:
        ValueError: an answer has more than one token, so the logits of one position cannot score it.
    """
    ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in ANSWERS]
    if any(len(tokens) != 1 for tokens in ids):
        raise ValueError(f"the answers {ANSWERS} are the tokens {ids}; choose answers of one token each")
    return [tokens[0] for tokens in ids]


def loss(scores: Any) -> float:
    """Mean cross-entropy of the answers; the target alternates over the rows."""
    import torch

    targets = torch.arange(len(scores), device=scores.device) % len(ANSWERS)
    return float(torch.nn.functional.cross_entropy(scores, targets))


def multiply_adds(model: Any, spec: WorkerSpec, tokens: int) -> int:
    body, head, attention = widths(model)
    pairs = tokens * spec.length + tokens * (tokens + 1) // 2
    return spec.batch_size * (body * tokens + head + 2 * attention * pairs)


if __name__ == "__main__":
    settings = Settings(tokens=(32,), batch_size=(32,), steps=3)
    # The prompt runs through other kernels than PEFT's: in bfloat16 each row is 0.05 off float32 on both sides.
    main(__file__, {"folded": folded, "peft": peft}, [Pair("folded", "peft")], settings, str(__doc__), roundings=4)
