"""Seconds and memory of one training step, beside PEFT's prompt tuning in the same run.

    python benchmarks/train_step.py [--tokens 32 64] [--dtype float32] [--rounds 3] [--steps 1]

Both sides get the same weights, tokens, labels (the last two tokens of each row), dtype, and initial prompt; both run
in eval mode, on the CPU, in processes of their own, in turn. The step is forward, backward, AdamW on the prompt, and
setting the gradient to none. `peft` is what ratios are against: `model(**batch)`, as PEFT's documentation has it, which
fills a cache that training does not need; `peft_no_cache` is the same with `use_cache=False`, as transformers' Trainer
has it. `plain` trains as many numbers as PEFT does; `dpt` is the decomposed prompt. Rows are full, since PEFT's layout
lets padding change a row's result. The first step warms up and is not timed; its loss must be the same on both sides,
else the exit status is 1.

The last line of stdout is JSON: `load_before`, the system's load average before the start (much above 0: another's
work is in the times), and per case:

- `ours_s`, `peft_s`: seconds a step, median over rounds of the median in a round. `ratio` is the median over rounds
  of PEFT's seconds by ours in that round, above 1 where ours is faster; `spread` the smallest and the largest.
- `ours_mb`, `peft_mb`: highest resident memory (`ru_maxrss`) while stepping, MiB; `_over_mb`: what of it came on top
  of the loaded model. `memory_ratio` and `memory_over_ratio` are ours by PEFT's, below 1 where ours is smaller.
- `floor_s`: `multiply_adds` that the step needs, by `rate`, the most a second that the backbone's widest layer reached
  on the batch's text alone, measured in the same processes; `over_floor` is `ours_s` by `floor_s`. With n weights in
  the body's linear layers, h in the head, and w the width of all attention heads of all layers together:

      places        = length + batch * tokens
      pairs         = length * (length + 1) / 2 + batch * (tokens * length + tokens * (tokens + 1) / 2)
      multiply_adds = 2 * (n * places + h * batch * labels) + 3 * (2 * w * pairs)

  Linear layers count twice, forward and gradient of the input, since frozen weights need none; attention three times,
  since both factors of its two products need one. The formula ignores what the first and the last layer can save
  (at most two layers' share), and everything that is no product: norms, rotations, softmax, copies.
"""

import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import tyro

# A started process counts its parent's resident memory as its own until it is replaced, and `ru_maxrss` remembers it.
# So torch is imported by the workers alone.

BACKBONE = "smollm2-135m"
PEER = "peft"
LABELS = 2
LOSS_TOLERANCE = {"bfloat16": 2.0**-8, "float32": 1e-5}
"""Largest relative difference of the two losses: one rounding of bfloat16, and a hundred of float32."""


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both sides are given."""

    tokens: tuple[int, ...] = (32, 64)
    """Text tokens a row; each number is a case of its own."""
    batch: int = 16
    """Rows."""
    length: int = 100
    """Virtual tokens."""
    rank: int = 10
    """Rank of the initial prompt on every side, and of the decomposed one while it trains."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the backbone computes in."""
    rounds: int = 3
    """Times that each side is started, in turn."""
    steps: int = 1
    """Timed steps in a round, after one that warms up; a step of PEFT's takes seconds."""
    seed: int = 0
    """Of the tokens and the initial prompt."""

    def __post_init__(self) -> None:
        for name in ("batch", "length", "rank", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.tokens or min(self.tokens) <= LABELS:
            raise ValueError(f"tokens are {self.tokens}; give at least one number, each above {LABELS}")


class Work(NamedTuple):
    """One side, ready: what is timed, and what it is measured against."""

    run: Callable[[], float]
    """Does it once; the loss before it."""
    model: Any
    """The transformers model."""
    multiply_adds: int
    """That the task needs, however it is done."""


Side = Callable[[Settings], Callable[[int], Work]]
"""Loads the model; what comes back gets the work ready for a number of text tokens, from the initial prompt."""


@final
@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process found."""

    seconds: float
    loss: float
    peak_mb: float
    over_mb: float
    multiply_adds: int
    rate: float
    threads: int


def ours(prompt_of: Callable[[Any, Settings], Any]) -> Side:
    """Our training step."""

    def side(settings: Settings) -> Callable[[int], Work]:
        from softprompt import attach, load_backbone

        backbone = load_backbone(BACKBONE, dtype=settings.dtype, device="cpu")

        def ready(tokens: int) -> Work:
            attachment = attach(backbone, prompt_of(backbone, settings))
            ids, mask, labels = batch(backbone.model, settings, tokens)
            run = training_step(lambda: attachment(ids, mask, labels).loss, list(attachment.parameters()))
            return Work(run, backbone.model, training_multiply_adds(backbone.model, settings, tokens))

        return ready

    return side


def peft(**options: Any) -> Side:
    """PEFT's training step, its model called with `options`."""

    def side(settings: Settings) -> Callable[[int], Work]:
        import torch

        model, _ = peft_model(settings)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        initial = [parameter.detach().clone() for parameter in trained]

        def ready(tokens: int) -> Work:
            with torch.no_grad():
                for parameter, values in zip(trained, initial, strict=True):
                    parameter.copy_(values)
            ids, mask, labels = batch(model.base_model, settings, tokens)
            run = training_step(
                lambda: model(input_ids=ids, attention_mask=mask, labels=labels, **options).loss, trained
            )
            return Work(run, model.base_model, training_multiply_adds(model.base_model, settings, tokens))

        return ready

    return side


def peft_model(settings: Settings) -> tuple[Any, Any]:
    """The backbone in PEFT's prompt tuning, in eval mode, with the same initial prompt as ours; and its tokenizer."""
    import torch
    from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

    from softprompt import load_backbone

    backbone = load_backbone(BACKBONE, dtype=settings.dtype, device="cpu")
    backbone.model.set_attn_implementation("sdpa")  # as transformers loads it; ours brings its own attention
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=settings.length,
        prompt_tuning_init=PromptTuningInit.RANDOM,
    )
    model = get_peft_model(backbone.model, config).eval()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(decomposed(backbone, settings).prompt())
    return model, backbone.tokenizer


def decomposed(backbone: Any, settings: Settings) -> Any:
    """The decomposed prompt; its product is where every side starts."""
    from softprompt import DPT

    return DPT(length=settings.length, rank=settings.rank).build(backbone.host(), generator(settings))


def plain(backbone: Any, settings: Settings) -> Any:
    """The same prompt, every number trained by itself."""
    from softprompt.prompts.plain import PlainPrompt

    unit = backbone.host().rms
    return PlainPrompt(decomposed(backbone, settings).prompt().detach() / unit, unit)


def generator(settings: Settings) -> Any:
    import torch

    return torch.Generator().manual_seed(settings.seed)


def batch(model: Any, settings: Settings, tokens: int) -> tuple[Any, Any, Any]:
    """Token ids, their mask, and labels: the last two tokens of each row."""
    import torch

    vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocab, (settings.batch, tokens), generator=generator(settings))
    labels = torch.full_like(ids, -100)
    labels[:, -LABELS:] = ids[:, -LABELS:]
    return ids, torch.ones_like(ids), labels


def training_step(loss_of: Callable[[], Any], parameters: Sequence[Any]) -> Callable[[], float]:
    """A whole step; both sides run this one."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def training_multiply_adds(model: Any, settings: Settings, tokens: int) -> int:
    rows, length = settings.batch, settings.length
    body, head, attention = widths(model)
    linear = body * (length + rows * tokens) + head * rows * LABELS
    pairs = length * (length + 1) // 2 + rows * (tokens * length + tokens * (tokens + 1) // 2)
    return 2 * linear + 3 * (2 * attention * pairs)


def widths(model: Any) -> tuple[int, int, int]:
    """Weights of the body's linear layers, of the head, and the width of all attention heads of all layers."""
    config = model.config
    head = model.get_output_embeddings().weight
    body = sum(module.weight.numel() for module in linear_layers(model))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return body, head.numel(), config.num_hidden_layers * config.num_attention_heads * head_dim


def linear_layers(model: Any) -> list[Any]:
    """Every linear layer but the head."""
    import torch

    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]


def matmul_rate(model: Any, rows: int) -> float:
    """Multiply-adds a second of the body's widest linear layer on `rows` vectors: the best of ten."""
    import torch

    layer = max(linear_layers(model), key=lambda module: module.weight.numel())
    vectors = torch.randn(rows, layer.in_features).to(layer.weight.dtype)
    best = float("inf")
    with torch.no_grad():
        for _ in range(10):
            start = time.perf_counter()
            layer(vectors)
            best = min(best, time.perf_counter() - start)
    return rows * layer.weight.numel() / best


def peak_mb() -> float:
    """Highest resident memory since the process started, or since `forget_peak`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def forget_peak() -> None:
    """Set the peak to what is in use now, where the system can; elsewhere both peaks hold what was before."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps is resident, but not in use
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of resident memory


def measure(work: Work, settings: Settings, tokens: int) -> Measured:
    """One case of one side in this process: a warm-up and the timed steps."""
    import torch

    forget_peak()
    before = peak_mb()
    loss = work.run()
    seconds = []
    for _ in range(settings.steps):
        start = time.perf_counter()
        work.run()
        seconds.append(time.perf_counter() - start)
    peak = peak_mb()
    return Measured(
        seconds=statistics.median(seconds),
        loss=loss,
        peak_mb=peak,
        over_mb=peak - before,
        multiply_adds=work.multiply_adds,
        rate=matmul_rate(work.model, settings.batch * tokens),
        threads=torch.get_num_threads(),
    )


def started(script: str, side: str, settings: Settings) -> list[Measured]:
    """What one side finds in a process of its own, for each number of tokens.

    Raises:
        RuntimeError: the process failed; its last words.
    """
    command = [sys.executable, script, "worker", side, json.dumps(asdict(settings))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process of {side} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return [Measured(**one) for one in json.loads(done.stdout.splitlines()[-1])]


def compared(script: str, sides: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """Every side in turn, `rounds` times; a case for each of ours and each number of tokens."""
    found: dict[tuple[str, int], list[Measured]] = {(side, n): [] for n in settings.tokens for side in sides}
    for number in range(settings.rounds):
        for side in sides:
            for tokens, one in zip(settings.tokens, started(script, side, settings), strict=True):
                found[side, tokens].append(one)
                print(
                    f"round {number + 1} of {settings.rounds}, {side}, {tokens} tokens: {one.seconds:.3f} s, "
                    f"{one.peak_mb:.0f} MiB, loss {one.loss:.5f}",
                    file=sys.stderr,
                )
    return [
        case(side, settings, tokens, mine, found[PEER, tokens])
        for (side, tokens), mine in found.items()
        if side != PEER
    ]


def case(
    side: str, settings: Settings, tokens: int, mine: Sequence[Measured], peer: Sequence[Measured]
) -> dict[str, Any]:
    """One side of ours beside the peer, as the last line of stdout has it."""

    def median(runs: Sequence[Measured], name: str) -> float:
        return statistics.median(getattr(one, name) for one in runs)

    ratios = [theirs.seconds / our.seconds for our, theirs in zip(mine, peer, strict=True)]
    names = {"s": "seconds", "mb": "peak_mb", "over_mb": "over_mb"}
    loss, peer_loss = median(mine, "loss"), median(peer, "loss")
    needed, rate = mine[0].multiply_adds, max(one.rate for one in mine)
    return {
        "method": side,
        "tokens": tokens,
        **{name: getattr(settings, name) for name in ("batch", "length", "dtype", "rounds", "steps")},
        "threads": mine[0].threads,
        **{f"ours_{short}": median(mine, name) for short, name in names.items()},
        **{f"peft_{short}": median(peer, name) for short, name in names.items()},
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "memory_ratio": median(mine, "peak_mb") / median(peer, "peak_mb"),
        "memory_over_ratio": median(mine, "over_mb") / median(peer, "over_mb"),
        "loss_ours": loss,
        "loss_peft": peer_loss,
        "loss_gap": abs(loss - peer_loss) / abs(peer_loss),
        "multiply_adds": needed,
        "rate": rate,
        "floor_s": needed / rate,
        "over_floor": median(mine, "seconds") * rate / needed,
    }


COLUMNS = {
    "method": "13", "tokens": "6", "ours_s": "8.3f", "peft_s": "8.3f", "ratio": "6.2f", "least": "6.2f", "most": "6.2f",
    "ours_mb": "8.0f", "peft_mb": "8.0f", "ours_over_mb": "13.0f", "peft_over_mb": "13.0f", "floor_s": "8.3f",
    "over_floor": "11.2f", "loss_ours": "10.5f", "loss_peft": "10.5f",
}  # fmt: skip


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """The cases for a reader."""
    lines = [" ".join(f"{name:>{form.split('.')[0]}}" for name, form in COLUMNS.items())]
    for one in cases:
        row = {**one, "least": one["spread"][0], "most": one["spread"][1]}
        lines.append(" ".join(f"{row[name]:>{form}}" for name, form in COLUMNS.items()))
    return "\n".join(lines)


def main(
    script: str,
    sides: Mapping[str, Side],
    default: Settings,
    description: str,
    apart: Sequence[str] = (),
    roundings: int = 1,
) -> None:
    """Compare the sides, or be one of them in a process of its own.

    Args:
        apart: sides that compute something else, whose losses are not compared with the peer's.
        roundings: by how many roundings the losses may differ where the sides run other rows together.
    """
    if sys.argv[1:2] == ["worker"]:
        side, values = sys.argv[2:]
        settings = Settings(**json.loads(values))
        ready = sides[side](settings)
        print(json.dumps([asdict(measure(ready(tokens), settings, tokens)) for tokens in settings.tokens]))
        return
    settings = tyro.cli(Settings, default=default, description=description)
    busy = os.getloadavg()[0]
    cases = compared(script, list(sides), settings)
    print(table(cases), file=sys.stderr)
    print(json.dumps({"benchmark": Path(script).stem, "cores": os.cpu_count(), "load_before": busy, "cases": cases}))
    most = roundings * LOSS_TOLERANCE[settings.dtype]
    if any(one["loss_gap"] > most for one in cases if one["method"] not in apart):
        sys.exit("the two sides' losses differ by more than the dtype explains: they do not do the same work")


if __name__ == "__main__":
    SIDES = {"plain": ours(plain), PEER: peft(), "dpt": ours(decomposed), "peft_no_cache": peft(use_cache=False)}
    main(__file__, SIDES, Settings(), str(__doc__))
