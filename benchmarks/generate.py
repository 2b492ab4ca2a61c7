"""Time to the first token and for 32 tokens, compared with PEFT's prompt tuning in the same run.

    python benchmarks/generate.py [--tokens 32] [--batch-size 1 16] [--dtype float32] [--rounds 3] [--steps 3]

Both sides use the same weights, rows, dtype and prompt, without gradients, and decode greedily: `first` and
`peft_first` one token, `text` and `peft` 32 (the end of sequence is ignored, so that all rows have the same length).
Our side has the prompt's keys and values ready, as a service does; PEFT runs the prompt with every row. `original`,
`int8` and `int4` are `text` with that `--decode-weights` instead of prepacked ones; int8 and int4 are for bfloat16, so
`--dtype float32` leaves them out. The tests compare the generated tokens in float32 (tests/parity/test_generate.py); in
bfloat16 the texts diverge at the first near-tie.

The measurements and the JSON are described in harness.py. The roofline counts score.py's multiply-adds for the input
and one position per row for each later token. Decoding multiplies few vectors and is bound by memory bandwidth, so with
few rows it is far above the roofline on any machine.
"""

import sys
from collections.abc import Callable
from typing import Any

import score
from harness import Pair, Settings, Work, WorkerSpec, main
from train_step import Load, batch, decomposed, peft_model, smollm2, widths

NEW_TOKENS = 32


def ours(new: int, load: Load = smollm2, decode_weights: Any = "auto") -> Callable[[WorkerSpec], Callable[[int], Work]]:
    """Our side, with the prompt's keys and values computed once."""

    def side(spec: WorkerSpec) -> Callable[[int], Work]:
        import torch

        from softprompt import attach

        backbone = load(spec).with_decode_weights(decode_weights)
        prompted, prompt = attach(backbone), decomposed(backbone, spec).fold().to(backbone.device)
        with torch.no_grad():
            prepared = prompted.prepare([prompt])

        def prepare(tokens: int) -> Work:
            ids, mask, _ = batch(backbone.model, spec, tokens)

            def run() -> float:
                return count_tokens([*prompted.generate(ids, mask, max_new_tokens=new, stop=[], prompts=prepared)], new)

            return Work(run, backbone.model, multiply_adds(backbone.model, spec, tokens, new))

        return prepare

    return side


def peft(new: int, load: Load = smollm2) -> Callable[[WorkerSpec], Callable[[int], Work]]:
    """PEFT with the same prompt."""

    def side(spec: WorkerSpec) -> Callable[[int], Work]:
        import torch

        model, _ = peft_model(spec, load)

        def prepare(tokens: int) -> Work:
            ids, mask, _ = batch(model.base_model, spec, tokens)

            def run() -> float:
                with torch.no_grad():
                    output = model.generate(
                        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new
                    )
                return count_tokens(output[:, -new:].unbind(1), new)

            return Work(run, model.base_model, multiply_adds(model.base_model, spec, tokens, new))

        return prepare

    return side


def count_tokens(columns: Any, new: int) -> float:
    """The number of generated tokens per row.

    Raises:
        RuntimeError: it is not the number requested.
    """
    if len(columns) != new:
        raise RuntimeError(f"{len(columns)} tokens per row were generated; expected {new}")
    return float(len(columns))


def multiply_adds(model: Any, spec: WorkerSpec, tokens: int, new: int) -> int:
    body, head, attention = widths(model)
    keys = sum(spec.length + tokens + later for later in range(1, new))
    return score.multiply_adds(model, spec, tokens) + spec.batch_size * (
        (new - 1) * (body + head) + 2 * attention * keys
    )


if __name__ == "__main__":
    SIDES = {"text": ours(NEW_TOKENS), "peft": peft(NEW_TOKENS), "first": ours(1), "peft_first": peft(1)}
    SIDES |= {"original": ours(NEW_TOKENS, decode_weights="original")}
    PAIRS = [Pair("text", "peft"), Pair("first", "peft_first"), Pair("original", "peft")]
    if not any("float32" in argument for argument in sys.argv):
        SIDES |= {"int8": ours(NEW_TOKENS, decode_weights="int8"), "int4": ours(NEW_TOKENS, decode_weights="int4")}
        PAIRS += [Pair("int8", "peft"), Pair("int4", "peft")]
    main(__file__, SIDES, PAIRS, Settings(tokens=(32,), batch_size=(1, 16), steps=3), str(__doc__))
