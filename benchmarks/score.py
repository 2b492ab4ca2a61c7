"""Seconds and memory of scoring two answers to each row, beside PEFT's prompt tuning in the same run.

    python benchmarks/score.py [--tokens 32] [--batch-size 32] [--dtype float32] [--rounds 3] [--steps 3]

Both sides get the same weights, rows, dtype and prompt, without gradients. Ours prepares the prompt's keys and values
once, before the clock starts, as serving and evaluation do, and scores with `PromptedModel.score`; PEFT runs the prompt
in front of every row and the two answers are read from the last position of the logits it returns. `loss` is the mean
cross-entropy of one of the two answers against the other, alternating over the rows.

sides.py says how both are measured and what the JSON holds; the floor here is, prompt already paid,

    multiply_adds = n * batch * tokens + h * batch + 2 * w * batch * (tokens * length + tokens * (tokens + 1) / 2)
"""

from collections.abc import Callable
from typing import Any

from sides import Pair, Part, Settings, Work, main
from train_step import BACKBONE, batch, decomposed, peft_model, widths

ANSWERS = (" yes", " no")


def folded(part: Part) -> Callable[[int], Work]:
    """Ours with a finished prompt, made ready once."""
    import torch

    from softprompt import attach, load_backbone

    backbone = load_backbone(BACKBONE, dtype=part.dtype, device="cpu")
    prompted = attach(backbone, decomposed(backbone, part).fold())
    answers = answer_ids(backbone.tokenizer)
    with torch.no_grad():
        prepared = prompted.prepare([prompted.prompt])

    def ready(tokens: int) -> Work:
        ids, mask, _ = batch(backbone.model, part, tokens)

        def run() -> float:
            with torch.no_grad():
                return loss(prompted.score(ids, mask, [[first] for first in answers], prompts=prepared))

        return Work(run, backbone.model, multiply_adds(backbone.model, part, tokens))

    return ready


def peft(part: Part) -> Callable[[int], Work]:
    """PEFT with the same prompt."""
    import torch

    model, tokenizer = peft_model(part)
    answers = answer_ids(tokenizer)

    def ready(tokens: int) -> Work:
        ids, mask, _ = batch(model.base_model, part, tokens)

        def run() -> float:
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                return loss(logits[:, -1, answers].float())

        return Work(run, model.base_model, multiply_adds(model.base_model, part, tokens))

    return ready


def answer_ids(tokenizer: Any) -> list[int]:
    """The token of each answer.

    Raises:
        ValueError: an answer has several tokens, which one position's logits cannot score.
    """
    ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in ANSWERS]
    if any(len(tokens) != 1 for tokens in ids):
        raise ValueError(f"the answers {ANSWERS} are the tokens {ids}; choose answers of one token each")
    return [tokens[0] for tokens in ids]


def loss(scores: Any) -> float:
    """Mean cross-entropy of the answers, the right one alternating over the rows."""
    import torch

    return float(torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)) % len(ANSWERS)))


def multiply_adds(model: Any, part: Part, tokens: int) -> int:
    body, head, attention = widths(model)
    pairs = tokens * part.length + tokens * (tokens + 1) // 2
    return part.batch * (body * tokens + head + 2 * attention * pairs)


if __name__ == "__main__":
    settings = Settings(tokens=(32,), batch=(32,), steps=3)
    main(__file__, {"folded": folded, "peft": peft}, [Pair("folded", "peft")], settings, str(__doc__))
