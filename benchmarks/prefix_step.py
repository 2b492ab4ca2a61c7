"""Time and memory of a training step of a deep prompt (keys and values in every layer), and of PEFT's prefix tuning.

    python benchmarks/prefix_step.py [--tokens 32 64] [--batch-size 16] [--length 20] [--dtype float32] [--rounds 3]

Both sides start from the keys and values of the same virtual tokens, without a network that generates them, and train
every value (`plain`) or a low-rank update of each matrix (`dpt`). Steps, rows and labels are those of train_step.py. No
token runs for the prompt, so the roofline is:

    pairs         = batch_size * (tokens * length + tokens * (tokens + 1) / 2)
    multiply_adds = 2 * (n * batch_size * tokens + h * batch_size * labels) + 3 * (2 * w * pairs)
"""

from collections.abc import Callable
from typing import Any

from harness import Pair, Settings, Side, Work, WorkerSpec, generator, main
from train_step import LABELS, batch, smollm2, training_step, widths


def ours(method: str) -> Side:
    """Our training step."""

    def side(spec: WorkerSpec) -> Callable[[int], Work]:
        from softprompt import attach

        backbone = smollm2(spec)

        def prepare(tokens: int) -> Work:
            prompted = attach(backbone, deep_prompt(backbone, spec, method).to(backbone.device))
            ids, mask, labels = batch(backbone.model, spec, tokens)
            run = training_step(lambda: prompted(ids, mask, labels).loss, list(prompted.parameters()))
            return Work(run, backbone.model, multiply_adds(backbone.model, spec, tokens))

        return prepare

    return side


def peft(spec: WorkerSpec) -> Callable[[int], Work]:
    """PEFT's training step."""
    import torch
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    backbone = smollm2(spec)
    start = deep_prompt(backbone, spec, "plain").prompt().detach()
    start = torch.cat(start.chunk(backbone.max_matrices), 1)  # a token's keys and values side by side
    backbone.model.set_attn_implementation("sdpa")  # transformers' default; attach() installs our own
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=spec.length)
    model = get_peft_model(backbone.model, config).eval().to(backbone.device)
    [embedding] = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def prepare(tokens: int) -> Work:
        with torch.no_grad():
            embedding.copy_(start)
        ids, mask, labels = batch(model.base_model, spec, tokens)
        run = training_step(lambda: model(input_ids=ids, attention_mask=mask, labels=labels).loss, [embedding])
        return Work(run, model.base_model, multiply_adds(model.base_model, spec, tokens))

    return prepare


def deep_prompt(backbone: Any, spec: WorkerSpec, method: str) -> Any:
    """A deep prompt that starts from the keys and values of vocabulary embeddings."""
    from softprompt.models.deep_kv import as_deep
    from softprompt.prompts import METHODS
    from softprompt.prompts.deep import build

    start = as_deep(backbone, backbone.host().sample(spec.length, generator(spec)))
    sizes = {"length": spec.length, **({"rank": spec.rank} if method == "dpt" else {})}
    return build(METHODS[method](**sizes), backbone.hosts(backbone.max_matrices, start=start), generator(spec))


def multiply_adds(model: Any, spec: WorkerSpec, tokens: int) -> int:
    rows, (body, head, attention) = spec.batch_size, widths(model)
    pairs = rows * (tokens * spec.length + tokens * (tokens + 1) // 2)
    return 2 * (body * rows * tokens + head * rows * LABELS) + 3 * (2 * attention * pairs)


if __name__ == "__main__":
    SIDES = {"plain": ours("plain"), "peft": peft, "dpt": ours("dpt")}
    main(__file__, SIDES, [Pair("plain", "peft"), Pair("dpt", "peft")], Settings(length=(20,)), str(__doc__))
