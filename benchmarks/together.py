"""Seconds of a training step of eight prompts: all in one pass, beside one after another in the same run.

    python benchmarks/together.py [--batch-size 2 8] [--tokens 16 64] [--length 20] [--dtype float32] [--rounds 3]

Both sides train the same prompts, each with `batch` rows of its own, on one backbone: `together` as `softprompt sweep
--concurrent 8` does, `apart` as `softprompt sweep` does, so that the peer is ourselves. sides.py says how they are
measured and what the JSON holds; the floor is eight times train_step.py's.
"""

from collections.abc import Callable
from typing import Any

from sides import Pair, Part, Settings, Side, Work, main
from train_step import BACKBONE, LABELS, decomposed, training_multiply_adds

PROMPTS = 8


def ours(step: Callable[[list[Any], Any, Any, Any], float]) -> Side:
    """Eight prompts, their rows and their optimisers, trained by `step`."""

    def side(part: Part) -> Callable[[int], Work]:
        import torch

        from sides import generator
        from softprompt import attach, load_backbone

        backbone = load_backbone(BACKBONE, dtype=part.dtype, device="cpu")

        def ready(tokens: int) -> Work:
            attachments = [attach(backbone, decomposed(backbone, part)) for _ in range(PROMPTS)]
            vocab = backbone.model.get_input_embeddings().weight.shape[0]
            ids = torch.randint(vocab, (PROMPTS * part.batch, tokens), generator=generator(part))
            labels = torch.full_like(ids, -100)
            labels[:, -LABELS:] = ids[:, -LABELS:]
            optimisers = [torch.optim.AdamW(prompted.parameters(), lr=1e-3) for prompted in attachments]

            def run() -> float:
                loss = step(attachments, ids, torch.ones_like(ids), labels)
                for training_step in optimisers:
                    training_step.step()
                    training_step.zero_grad(set_to_none=True)
                return loss

            return Work(run, backbone.model, PROMPTS * training_multiply_adds(backbone.model, part, tokens))

        return ready

    return side


def run_concurrently(attachments: list[Any], ids: Any, mask: Any, labels: Any) -> float:
    """One pass over the rows of all, and one backward."""
    import torch

    each = len(ids) // len(attachments)
    index = torch.arange(len(attachments)).repeat_interleave(each)
    losses = attachments[0].losses(ids, mask, labels, [one.prompt for one in attachments], index)
    loss = losses.sum() / each / LABELS
    loss.backward()
    return float(loss.detach())


def apart(attachments: list[Any], ids: Any, mask: Any, labels: Any) -> float:
    """A pass and a backward for each."""
    each, whole = len(ids) // len(attachments), 0.0
    for at, one in enumerate(attachments):
        mine = slice(at * each, (at + 1) * each)
        loss = one.losses(ids[mine], mask[mine], labels[mine]).sum() / each / LABELS
        loss.backward()
        whole += float(loss.detach())
    return whole


if __name__ == "__main__":
    DEFAULT = Settings(batch=(2, 8), tokens=(16, 64), length=(20,))
    main(
        __file__, {"together": ours(together), "apart": ours(apart)}, [Pair("together", "apart")], DEFAULT, str(__doc__)
    )
