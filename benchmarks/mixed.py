"""Seconds and memory of a batch whose rows belong to 16 prompts, beside PEFT that switches between its adapters.

    python benchmarks/mixed.py [--tokens 32] [--batch-size 32] [--dtype float32] [--rounds 3] [--steps 3]

Both sides get the same weights, rows, dtype and 16 prompts, without gradients, and score two answers to each row as
score.py does. Ours has the prompts' keys and values ready and takes the whole batch in one call with an index; PEFT,
which ignores `adapter_names` for prompts, gets the rows of each prompt together and calls `set_adapter` before each
group, so that it runs as few and as large groups as it can. Rows are dealt out to the prompts in turn.

sides.py says how both are measured and what the JSON holds; the floor is score.py's.
"""

from collections.abc import Callable
from typing import Any

from score import answer_ids, loss, multiply_adds
from sides import Pair, Part, Settings, Work, generator, main
from train_step import BACKBONE, batch, peft_model

PROMPTS = 16


def matrices(backbone: Any, part: Part) -> list[Any]:
    """The prompts, each a decomposed one's product."""
    from softprompt import DPT

    draw = generator(part)
    config = DPT(length=part.length, rank=part.rank)
    return [config.build(backbone.host(), draw).fold() for _ in range(PROMPTS)]


def indexed(part: Part) -> Callable[[int], Work]:
    """Ours: one call for all rows."""
    import torch

    from softprompt import attach, load_backbone

    backbone = load_backbone(BACKBONE, dtype=part.dtype, device="cpu")
    prompted, answers = attach(backbone), answer_ids(backbone.tokenizer)
    with torch.no_grad():
        prepared = prompted.prepare(matrices(backbone, part))
    index = torch.arange(part.batch) % PROMPTS

    def ready(tokens: int) -> Work:
        ids, mask, _ = batch(backbone.model, part, tokens)

        def run() -> float:
            with torch.no_grad():
                candidates = [[first] for first in answers]
                return loss(prompted.score(ids, mask, candidates, prompts=prepared, index=index))

        return Work(run, backbone.model, multiply_adds(backbone.model, part, tokens))

    return ready


def switching(part: Part) -> Callable[[int], Work]:
    """PEFT: a call for the rows of each adapter."""
    import torch

    from softprompt import load_backbone

    model, tokenizer = peft_model(part)
    answers = answer_ids(tokenizer)
    config = model.peft_config["default"]
    prompts = matrices(load_backbone(BACKBONE, dtype=part.dtype, device="cpu"), part)
    for number, prompt in enumerate(prompts):
        model.add_adapter(str(number), config)
        with torch.no_grad():
            model.prompt_encoder[str(number)].embedding.weight.copy_(prompt.prompt())
    model.eval()

    def ready(tokens: int) -> Work:
        ids, mask, _ = batch(model.base_model, part, tokens)
        logits = torch.empty(part.batch, len(answers))

        def run() -> float:
            with torch.no_grad():
                for number in range(min(PROMPTS, part.batch)):
                    model.set_adapter(str(number))
                    rows = slice(number, None, PROMPTS)
                    found = model(input_ids=ids[rows], attention_mask=mask[rows], use_cache=False).logits
                    logits[rows] = found[:, -1, answers].float()
                return loss(logits)

        return Work(run, model.base_model, multiply_adds(model.base_model, part, tokens))

    return ready


if __name__ == "__main__":
    # A label's logit of about 20 is off by 0.06 in bfloat16, otherwise in each grouping of the rows: some roundings of
    # the mean. In float32 the losses agree to the last digit shown.
    SIDES = {"mixed": indexed, "peft": switching}
    main(__file__, SIDES, [Pair("mixed", "peft")], Settings(batch=(32,), steps=3), str(__doc__), roundings=4)
