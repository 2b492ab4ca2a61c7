"""Time and memory of answering questions about passages, compared with PEFT's prompt tuning in the same run.

    python benchmarks/passages.py [--tokens 32] [--batch-size 32] [--dtype float32] [--rounds 3] [--steps 1]

Each of `--batch-size` rows is one of two passages of 300 tokens and a question of `--tokens` tokens (similar to
MultiRC, whose rows have about 350 tokens, 95 % of them in a prefix shared with another row). Our side, `passages`, is
`predict.answer` with prefix sharing, which computes each passage's keys and values once; its time includes the
planning. `full_rows` is the same without prefix sharing. PEFT runs prompt and passage with every row. `loss` is as in
score.py.

The measurements and the JSON are described in harness.py; the roofline counts each passage once and the prompt not at
all.
"""

from collections.abc import Callable
from typing import Any

from harness import Pair, Settings, Work, WorkerSpec, generator, main
from score import ANSWERS, answer_ids, loss
from train_step import BACKBONE, decomposed, peft_model, widths

PASSAGES, PASSAGE_TOKENS = 2, 300


def ours(*, prefix_sharing: bool) -> Callable[[WorkerSpec], Callable[[int], Work]]:
    """Our side: `predict.answer`, with or without prefix sharing."""

    def side(spec: WorkerSpec) -> Callable[[int], Work]:
        import torch

        from softprompt import attach, load_backbone
        from softprompt.evaluation.predict import answer
        from softprompt.tasks import Task
        from softprompt.tasks.data.examples import Example

        backbone = load_backbone(BACKBONE, dtype=spec.dtype, device="cpu")
        prompted = attach(backbone, decomposed(backbone, spec).fold())
        prompted.supports_prefix_sharing = prompted.supports_prefix_sharing and prefix_sharing
        task = Task(
            name="passages", template="{x}", label="y", label_words={word.strip(): word.strip() for word in ANSWERS}
        )

        def prepare(tokens: int) -> Work:
            ids = row_ids(backbone.model, spec, tokens)
            examples = [Example(tuple(row), (), None, index) for index, row in enumerate(ids.tolist())]

            def run() -> float:
                answers = answer(prompted, task, examples, max_new_tokens=1)
                return loss(torch.tensor([list(row.probabilities.values()) for row in answers]).log())

            return Work(run, backbone.model, multiply_adds(backbone.model, spec, tokens))

        return prepare

    return side


def peft(spec: WorkerSpec) -> Callable[[int], Work]:
    """PEFT with the same prompt, 16 rows at a time."""
    import torch

    model, tokenizer = peft_model(spec)
    answers = answer_ids(tokenizer)

    def prepare(tokens: int) -> Work:
        ids = row_ids(model.base_model, spec, tokens)

        def run() -> float:
            with torch.no_grad():
                logits = [
                    model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits[:, -1, answers]
                    for rows in ids.split(16)  # the logits of 32 rows at every position are 3 GB
                ]
                return loss(torch.cat(logits).float())

        return Work(run, model.base_model, multiply_adds(model.base_model, spec, tokens))

    return prepare


def row_ids(model: Any, spec: WorkerSpec, tokens: int) -> Any:
    """Token ids of the rows: a passage and a question."""
    import torch

    vocab = model.get_input_embeddings().weight.shape[0]
    draw = generator(spec)
    passages = torch.randint(vocab, (PASSAGES, PASSAGE_TOKENS), generator=draw)
    questions = torch.randint(vocab, (spec.batch_size, tokens), generator=draw)
    return torch.cat([passages[torch.arange(spec.batch_size) % PASSAGES], questions], 1)


def multiply_adds(model: Any, spec: WorkerSpec, tokens: int) -> int:
    """Each passage once after the prompt, each question after its passage."""
    body, head, attention = widths(model)
    pairs = PASSAGES * (PASSAGE_TOKENS * spec.length + PASSAGE_TOKENS * (PASSAGE_TOKENS + 1) // 2)
    pairs += spec.batch_size * (tokens * (spec.length + PASSAGE_TOKENS) + tokens * (tokens + 1) // 2)
    return (
        body * (PASSAGES * PASSAGE_TOKENS + spec.batch_size * tokens) + head * spec.batch_size + 2 * attention * pairs
    )


if __name__ == "__main__":
    settings = Settings(tokens=(32,), batch_size=(32,))
    sides = {"passages": ours(prefix_sharing=True), "full_rows": ours(prefix_sharing=False), "peft": peft}
    main(
        __file__, sides, [Pair("passages", "full_rows"), Pair("passages", "peft")], settings, str(__doc__), roundings=3
    )
