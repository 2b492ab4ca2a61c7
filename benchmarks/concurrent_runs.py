"""Time of a training step of eight prompts: in one shared pass, compared with one after another in the same run.

    python benchmarks/concurrent_runs.py [--batch-size 2 8] [--tokens 16 64] [--length 20] [--rounds 3]

Both sides train the same eight prompts, each on `--batch-size` rows of its own, over one backbone: `concurrent` shares
a pass, as `softprompt sweep --concurrent 8` does, and `sequential` steps one prompt after another, as `softprompt
sweep` does. The measurements and the JSON are described in harness.py; the roofline is eight times that of
train_step.py.
"""

from collections.abc import Callable
from typing import Any

from harness import Pair, Settings, Side, Work, WorkerSpec, generator, main
from train_step import BACKBONE, LABELS, decomposed, training_multiply_adds

PROMPTS = 8


def ours(backward: Callable[[list[Any], Any, Any, Any], float]) -> Side:
    """Eight prompts with their rows and optimizers; `backward` computes their gradients and returns the summed loss."""

    def side(spec: WorkerSpec) -> Callable[[int], Work]:
        import torch

        from softprompt import attach, load_backbone

        backbone = load_backbone(BACKBONE, dtype=spec.dtype, device="cpu")

        def prepare(tokens: int) -> Work:
            models = [attach(backbone, decomposed(backbone, spec)) for _ in range(PROMPTS)]
            vocab = backbone.model.get_input_embeddings().weight.shape[0]
            ids = torch.randint(vocab, (PROMPTS * spec.batch_size, tokens), generator=generator(spec))
            labels = torch.full_like(ids, -100)
            labels[:, -LABELS:] = ids[:, -LABELS:]
            optimizers = [torch.optim.AdamW(prompted.parameters(), lr=1e-3) for prompted in models]

            def run() -> float:
                loss = backward(models, ids, torch.ones_like(ids), labels)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                return loss

            return Work(run, backbone.model, PROMPTS * training_multiply_adds(backbone.model, spec, tokens))

        return prepare

    return side


def concurrent(models: list[Any], ids: Any, mask: Any, labels: Any) -> float:
    """One forward and one backward pass over the rows of all prompts."""
    import torch

    rows = len(ids) // len(models)
    index = torch.arange(len(models)).repeat_interleave(rows)
    losses = models[0].losses(ids, mask, labels, [prompted.prompt for prompted in models], index)
    loss = losses.sum() / rows / LABELS
    loss.backward()
    return float(loss.detach())


def sequential(models: list[Any], ids: Any, mask: Any, labels: Any) -> float:
    """A forward and a backward pass per prompt."""
    rows, total = len(ids) // len(models), 0.0
    for number, prompted in enumerate(models):
        batch = slice(number * rows, (number + 1) * rows)
        loss = prompted.losses(ids[batch], mask[batch], labels[batch]).sum() / rows / LABELS
        loss.backward()
        total += float(loss.detach())
    return total


if __name__ == "__main__":
    SIDES = {"concurrent": ours(concurrent), "sequential": ours(sequential)}
    DEFAULT = Settings(batch_size=(2, 8), tokens=(16, 64), length=(20,))
    main(__file__, SIDES, [Pair("concurrent", "sequential")], DEFAULT, str(__doc__))
