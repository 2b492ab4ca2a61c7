"""The sizes, models and measurements of gpu.py."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, final

from harness import LOSS_TOLERANCE, Dtype, WorkerSpec, peak_mb, reset_peak

SMOLLM2: Mapping[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
TOY: Mapping[str, Any] = {
    **SMOLLM2, "vocab_size": 600, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 3,
}  # fmt: skip


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes to measure."""

    device: str
    dtype: Dtype
    toy: bool
    shapes: tuple[tuple[int, int], ...]
    """Rows and tokens of a training step."""
    length: int
    rank: int
    rows: int
    """Rows of scoring and of mixed prompts."""
    new_tokens: int
    train_steps: int
    repetitions: int
    llama_layers: int

    @classmethod
    def of(cls, device: str, *, toy: bool) -> "Plan":
        """The sizes for a GPU, or small ones."""
        if toy:
            return cls(
                device=device, dtype="float32", toy=True, shapes=((2, 8), (4, 16)), length=10, rank=2, rows=16,
                new_tokens=4, train_steps=4, repetitions=2, llama_layers=2,
            )  # fmt: skip
        return cls(
            device=device, dtype="bfloat16", toy=False, shapes=((16, 64), (16, 512), (128, 64), (128, 512)), length=100,
            rank=10, rows=32, new_tokens=32, train_steps=200, repetitions=5, llama_layers=16,
        )  # fmt: skip


@final
class Models:
    """The backbones, loaded once for each kind of use: one side changes the attention, another compiles the layers.

    Args:
        folder: where a model with random weights and its tokenizer are saved, if SmolLM2 is not in the cache.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        self.notes: dict[str, str] = {}
        self._source = self._smollm2()
        name = f"the shape of Llama 3.2 1B, {plan.llama_layers} layers, random weights"
        self.notes["llama-1b"] = "a Llama of 2 layers, random weights" if plan.toy else name

    def _smollm2(self) -> str:
        from softprompt.assets import cache_folder, locate

        if self._plan.toy:
            self.notes["smollm2-135m"] = "toy: a Llama of 2 layers, random weights"
        elif locate("smollm2-135m") is not None:
            self.notes["smollm2-135m"] = "the pretrained weights"
            return "smollm2-135m"
        else:
            self.notes["smollm2-135m"] = f"random weights of its shape: it is not in the cache {cache_folder()}"
        save_random(TOY if self._plan.toy else SMOLLM2, self._folder)
        return str(self._folder)

    @property
    def source(self) -> str:
        """SmolLM2-135M, or what takes its place, as `load_backbone` takes it."""
        return self._source

    def load(self, name: str, use: str) -> Callable[[Any], Any]:
        """How a side loads a model: `smollm2-135m` or `llama-1b`, one copy for each `use`."""
        return lambda spec: self._backbone(name, use)

    @cache  # noqa: B019  (lives as long as the process)
    def _backbone(self, name: str, use: str) -> Any:
        from llama_step import llama
        from softprompt import load_backbone
        from softprompt.backbones.kernels.gradient_checkpointing import layers

        plan = self._plan
        if name == "smollm2-135m":
            backbone = load_backbone(self._source, dtype=plan.dtype, device=plan.device)
        elif plan.toy:
            backbone = toy_llama(plan)
        else:
            backbone = llama(spec_of(plan, 1, 1), plan.llama_layers)
        mode = use.partition(":")[2]
        if mode:
            for layer in layers(backbone.model):
                layer.compile(mode=None if mode == "default" else mode)
        return backbone


def toy_llama(plan: Plan) -> Any:
    """In place of the 1B shape at toy size."""
    import torch
    import transformers

    from softprompt.backbones import Backbone

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TOY)).eval().requires_grad_(False)
    name = "a toy Llama"
    return Backbone(model.to(plan.device), SimpleNamespace(all_special_ids=[]), name, name, "causal")


def save_random(shape: Mapping[str, Any], folder: Path) -> None:
    """A Llama of this shape with random weights, and a byte-level tokenizer in which the answers are single tokens."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from score import ANSWERS

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Review: it is\nSentiment:" + "".join((*ANSWERS, " negative", " positive"))], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)


def spec_of(plan: Plan, rows: int, tokens: int) -> WorkerSpec:
    """The plan's sizes as the benchmarks' sides take them."""
    return WorkerSpec(
        tokens=(tokens,), batch_size=rows, length=plan.length, rank=plan.rank, dtype=plan.dtype,
        steps=plan.repetitions, seed=0, device=plan.device,
    )  # fmt: skip


def compare(plan: Plan, sides: Mapping[str, Any], rows: int, tokens: int, roundings: int = 1) -> dict[str, Any]:
    """Time the sides in turn; the first is compared with the last, PEFT.

    Args:
        roundings: how many rounding steps the losses may differ by, where the sides batch rows differently.
    """
    import torch

    spec = spec_of(plan, rows, tokens)
    works, results = {}, {}
    for name, side in sides.items():
        try:
            started = time.perf_counter()
            works[name] = side(spec)(tokens)
            prepared = time.perf_counter() - started
            results[name] = {"prepare_seconds": prepared, **warm_up(plan, works[name].run)}
        except torch.OutOfMemoryError:
            works.pop(name, None)
            results[name] = {"error": "out of memory"}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(plan.repetitions):
        for name, work in works.items():
            started = time.perf_counter()
            work.run()  # returns a number, so the device has ended
            seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        results[name] |= {"seconds": statistics.median(values), "least": min(values), "most": max(values)}
    peer = list(sides)[-1]
    tolerance = roundings * LOSS_TOLERANCE[plan.dtype]
    values: dict[str, Any] = {"rows": rows, "tokens": tokens, "sides": results, "loss_tolerance": tolerance}
    if peer in works:
        others = [name for name in works if name != peer]
        values["speedup"] = {name: results[peer]["seconds"] / results[name]["seconds"] for name in others}
        expected = results[peer]["loss"]
        values["loss_gap"] = {name: abs(results[name]["loss"] - expected) / abs(expected) for name in others}
        values["same_work"] = max(values["loss_gap"].values(), default=0.0) <= tolerance
    return values


def warm_up(plan: Plan, run: Callable[[], float]) -> dict[str, Any]:
    """One run that is not timed: its loss and its memory."""
    import torch

    if plan.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        reset_peak()
        before = peak_mb()
    started = time.perf_counter()
    loss = run()
    first = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**20 if plan.device == "cuda" else peak_mb()
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    return {"loss": loss, "first_seconds": first, "peak_mb": round(peak, 1), "over_mb": round(peak - before, 1)}
