"""Seconds to a first token and for a whole text, beside PEFT's prompt tuning in the same run.

    python benchmarks/generate.py [--tokens 32] [--batch-size 1 16] [--dtype float32] [--rounds 3] [--steps 3]

Both sides get the same weights, rows, dtype and prompt, without gradients, and write greedily: `first` and `peft_first`
one token, `text` and `peft` 32 (the end of sequence ends nothing, so that all write as many). Ours has the prompt's
keys and values ready, as a service has; PEFT runs the prompt in front of every row. The tests compare the tokens
(tests/parity/test_generate.py), in float32: in bfloat16 two ways of rounding part at the first close call.

sides.py says how both are measured and what the JSON holds. The floor counts score.py's multiply-adds for the text and
one place a row for each later token; those multiply few vectors and wait for the weights, so a text of few rows is far
above it on any machine.
"""

from collections.abc import Callable
from typing import Any

import score
from sides import Pair, Part, Settings, Work, main
from train_step import BACKBONE, batch, decomposed, peft_model, widths

NEW = 32


def ours(new: int) -> Callable[[Part], Callable[[int], Work]]:
    """Ours with a finished prompt, made ready once."""

    def side(part: Part) -> Callable[[int], Work]:
        import torch

        from softprompt import attach, load_backbone

        backbone = load_backbone(BACKBONE, dtype=part.dtype, device="cpu")
        prompted, prompt = attach(backbone), decomposed(backbone, part).fold()
        with torch.no_grad():
            prepared = prompted.prepare([prompt])

        def ready(tokens: int) -> Work:
            ids, mask, _ = batch(backbone.model, part, tokens)

            def run() -> float:
                return written([*prompted.generate(ids, mask, max_new_tokens=new, stop=[], prompts=prepared)], new)

            return Work(run, backbone.model, multiply_adds(backbone.model, part, tokens, new))

        return ready

    return side


def peft(new: int) -> Callable[[Part], Callable[[int], Work]]:
    """PEFT with the same prompt."""

    def side(part: Part) -> Callable[[int], Work]:
        import torch

        model, _ = peft_model(part)

        def ready(tokens: int) -> Work:
            ids, mask, _ = batch(model.base_model, part, tokens)

            def run() -> float:
                with torch.no_grad():
                    found = model.generate(
                        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new
                    )
                return written(found[:, -new:].unbind(1), new)

            return Work(run, model.base_model, multiply_adds(model.base_model, part, tokens, new))

        return ready

    return side


def written(columns: Any, new: int) -> float:
    """How many tokens came for each row.

    Raises:
        RuntimeError: not as many as were asked for.
    """
    if len(columns) != new:
        raise RuntimeError(f"{len(columns)} tokens were written where {new} were asked for")
    return float(len(columns))


def multiply_adds(model: Any, part: Part, tokens: int, new: int) -> int:
    body, head, attention = widths(model)
    keys = sum(part.length + tokens + later for later in range(1, new))
    return score.multiply_adds(model, part, tokens) + part.batch * ((new - 1) * (body + head) + 2 * attention * keys)


if __name__ == "__main__":
    SIDES = {"text": ours(NEW), "peft": peft(NEW), "first": ours(1), "peft_first": peft(1)}
    PAIRS = [Pair("text", "peft"), Pair("first", "peft_first")]
    main(__file__, SIDES, PAIRS, Settings(tokens=(32,), batch=(1, 16), steps=3), str(__doc__))
