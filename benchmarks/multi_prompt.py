"""Time and memory of a batch whose rows use 16 different prompts, compared with PEFT switching adapters.

    python benchmarks/multi_prompt.py [--tokens 32] [--batch-size 32] [--dtype float32] [--rounds 3] [--steps 3]

Both sides use the same weights, rows, dtype and 16 prompts, without gradients, and score two answers per row as
score.py does. Our side (`indexed`) has the prompts' keys and values ready and scores the batch in one call with a
prompt index per row. PEFT ignores `adapter_names` for prompt tuning, so its rows are grouped by prompt, with one
`set_adapter` and one forward pass per group. Rows are assigned to the prompts round-robin.

The measurements and the JSON are described in harness.py; the roofline is that of score.py.
"""

from collections.abc import Callable
from typing import Any

from harness import Pair, Settings, Work, WorkerSpec, generator, main
from score import answer_ids, loss, multiply_adds
from train_step import Load, batch, peft_model, smollm2

PROMPTS = 16


def folded_prompts(backbone: Any, spec: WorkerSpec) -> list[Any]:
    """The prompts: decomposed prompts with different factors, folded."""
    from softprompt import DPT

    draw = generator(spec)
    config = DPT(length=spec.length, rank=spec.rank)
    return [config.build(backbone.host(), draw).fold().to(backbone.device) for _ in range(PROMPTS)]


def indexed(spec: WorkerSpec, load: Load = smollm2) -> Callable[[int], Work]:
    """Our side: one call for all rows."""
    import torch

    from softprompt import attach

    backbone = load(spec)
    prompted, answers = attach(backbone), answer_ids(backbone.tokenizer)
    with torch.no_grad():
        prepared = prompted.prepare(folded_prompts(backbone, spec))
    index = torch.arange(spec.batch_size, device=backbone.device) % PROMPTS

    def prepare(tokens: int) -> Work:
        ids, mask, _ = batch(backbone.model, spec, tokens)

        def run() -> float:
            with torch.no_grad():
                candidates = [[first] for first in answers]
                return loss(prompted.score(ids, mask, candidates, prompts=prepared, index=index))

        return Work(run, backbone.model, multiply_adds(backbone.model, spec, tokens))

    return prepare


def switching(spec: WorkerSpec, load: Load = smollm2) -> Callable[[int], Work]:
    """PEFT: one call per adapter."""
    import torch

    model, tokenizer = peft_model(spec, load)
    answers = answer_ids(tokenizer)
    config = model.peft_config["default"]
    prompts = folded_prompts(load(spec), spec)
    for number, prompt in enumerate(prompts):
        model.add_adapter(str(number), config)
        with torch.no_grad():
            model.prompt_encoder[str(number)].embedding.weight.copy_(prompt.prompt())
    model.eval()

    def prepare(tokens: int) -> Work:
        ids, mask, _ = batch(model.base_model, spec, tokens)
        logits = torch.empty(spec.batch_size, len(answers), device=ids.device)

        def run() -> float:
            with torch.no_grad():
                for number in range(min(PROMPTS, spec.batch_size)):
                    model.set_adapter(str(number))
                    rows = slice(number, None, PROMPTS)
                    output = model(input_ids=ids[rows], attention_mask=mask[rows], use_cache=False).logits
                    logits[rows] = output[:, -1, answers].float()
                return loss(logits)

        return Work(run, model.base_model, multiply_adds(model.base_model, spec, tokens))

    return prepare


if __name__ == "__main__":
    # In bfloat16 a logit of about 20 is off by 0.06, differently for each grouping of the rows, which moves the mean by
    # several rounding steps. In float32 the losses agree to the last digit shown.
    SIDES = {"indexed": indexed, "peft": switching}
    main(__file__, SIDES, [Pair("indexed", "peft")], Settings(batch_size=(32,), steps=3), str(__doc__), roundings=4)
