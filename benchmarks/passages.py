"""Seconds and memory of answering questions about passages, beside PEFT's prompt tuning in the same run.

    python benchmarks/passages.py [--tokens 32] [--batch-size 32] [--dtype float32] [--rounds 3] [--steps 1]

`--batch-size` rows ask about two passages of 300 tokens, `--tokens` more each (the rows of MultiRC are of this kind:
about 350 tokens, 19 of 20 of them a beginning that another row has too). Ours is `predict.answer`, which reads each
passage once behind the prompt; `whole` is the same with every row read whole, and PEFT runs prompt and passage in front
of every row. What ours plans and prepares is in its time. `loss` as in score.py.

sides.py says how the sides are measured and what the JSON holds; the floor here has each passage once, prompt paid.
"""

from collections.abc import Callable
from typing import Any

from score import ANSWERS, answer_ids, loss
from sides import Pair, Part, Settings, Work, generator, main
from train_step import BACKBONE, decomposed, peft_model, widths

PASSAGES, PASSAGE = 2, 300


def ours(*, supports_prefix_sharing: bool) -> Callable[[Part], Callable[[int], Work]]:
    """Through `predict.answer`.

    Args:
        extends: beginnings may be read once.
    """

    def side(part: Part) -> Callable[[int], Work]:
        import torch

        from softprompt import attach, load_backbone
        from softprompt.evaluation.predict import answer
        from softprompt.tasks import Example, Task

        backbone = load_backbone(BACKBONE, dtype=part.dtype, device="cpu")
        prompted = attach(backbone, decomposed(backbone, part).fold())
        prompted.supports_prefix_sharing = prompted.supports_prefix_sharing and supports_prefix_sharing
        task = Task(
            name="passages", template="{x}", label="y", label_words={one.strip(): one.strip() for one in ANSWERS}
        )

        def ready(tokens: int) -> Work:
            ids = rows(backbone.model, part, tokens)
            examples = [Example(tuple(row), (), None, place) for place, row in enumerate(ids.tolist())]

            def run() -> float:
                found = answer(prompted, task, examples, max_new_tokens=1)
                return loss(torch.tensor([list(one.probabilities.values()) for one in found]).log())

            return Work(run, backbone.model, multiply_adds(backbone.model, part, tokens))

        return ready

    return side


def peft(part: Part) -> Callable[[int], Work]:
    """PEFT with the same prompt, as many rows at once."""
    import torch

    model, tokenizer = peft_model(part)
    answers = answer_ids(tokenizer)

    def ready(tokens: int) -> Work:
        ids = rows(model.base_model, part, tokens)

        def run() -> float:
            with torch.no_grad():
                found = [
                    model(input_ids=some, attention_mask=torch.ones_like(some), use_cache=False).logits[:, -1, answers]
                    for some in ids.split(16)  # logits of 32 rows at every place are 3 GB
                ]
                return loss(torch.cat(found).float())

        return Work(run, model.base_model, multiply_adds(model.base_model, part, tokens))

    return ready


def rows(model: Any, part: Part, tokens: int) -> Any:
    """Token ids of the rows: a passage, and what is asked about it."""
    import torch

    vocab = model.get_input_embeddings().weight.shape[0]
    draw = generator(part)
    passages = torch.randint(vocab, (PASSAGES, PASSAGE), generator=draw)
    asked = torch.randint(vocab, (part.batch, tokens), generator=draw)
    return torch.cat([passages[torch.arange(part.batch) % PASSAGES], asked], 1)


def multiply_adds(model: Any, part: Part, tokens: int) -> int:
    """Each passage once behind the prompt, each question behind its passage."""
    body, head, attention = widths(model)
    pairs = PASSAGES * (PASSAGE * part.length + PASSAGE * (PASSAGE + 1) // 2)
    pairs += part.batch * (tokens * (part.length + PASSAGE) + tokens * (tokens + 1) // 2)
    return body * (PASSAGES * PASSAGE + part.batch * tokens) + head * part.batch + 2 * attention * pairs


if __name__ == "__main__":
    settings = Settings(tokens=(32,), batch=(32,))
    sides = {"passages": ours(supports_prefix_sharing=True), "whole": ours(supports_prefix_sharing=False), "peft": peft}
    main(__file__, sides, [Pair("passages", "whole"), Pair("passages", "peft")], settings, str(__doc__), roundings=3)
