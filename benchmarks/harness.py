"""Compare two implementations of the same work, each in its own process, alternating, on the same weights and rows.

A benchmark defines its sides (ours, PEFT, ...) and the pairs of sides to compare; `main` is its command line. Each
combination of `--batch-size` and `--length` runs in processes of its own, which go through all of `--tokens`. The first
run of the work is a warm-up and is not timed. If the two sides of a pair do the same work and their losses differ by
more than the dtype explains, the exit status is 1.

The last line of stdout is JSON: `load_before`, the system's load average before the start (well above 0, the times
include another process's work), and for each pair and shape:

- `ours_s`, `peer_s`: seconds, the median over rounds of each round's median. `speedup` is the median over rounds of
  `peer seconds / our seconds`, above 1 where ours is faster; `spread` is its minimum and maximum.
- `ours_mb`, `peer_mb`: peak resident memory (`ru_maxrss`) during the work, in MiB; `_over_mb`: the part of it that was
  added to the loaded model; `_layers_mb`: the size of the model's linear layers without the head, scales included.
  `memory_ratio` and `memory_over_ratio` are ours divided by the peer's, below 1 where ours needs less.
- `roofline_s`: `multiply_adds` required by the task, divided by `rate`, the highest number of multiply-adds per second
  that the backbone's widest layer reached on the batch's text, measured in the same processes; `roofline_ratio` is
  `ours_s / roofline_s`.
- `profile`, where `roofline_ratio` is above 1.5: the share of our time in each of the most expensive torch operations,
  and the number of operations.
"""

import ctypes
import gc
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import tyro

# A child process inherits its parent's resident memory until exec, and `ru_maxrss` remembers that. So only the workers
# import torch.

Dtype = Literal["bfloat16", "float32"]
LOSS_TOLERANCE = {"bfloat16": 2.0**-8, "float32": 1e-5}
"""Largest relative difference between two losses: one rounding step of bfloat16, about a hundred of float32."""
PROFILE_ABOVE = 1.5
"""Ratio to the roofline above which our side is profiled."""


@final
@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What one worker process measures."""

    tokens: tuple[int, ...]
    batch_size: int
    length: int
    rank: int
    dtype: Dtype
    steps: int
    seed: int
    device: str = "cpu"


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings shared by all sides."""

    tokens: tuple[int, ...] = (32, 64)
    """Text tokens per row; each value is measured separately."""
    batch_size: tuple[int, ...] = (16,)
    """Rows; each value is measured separately."""
    length: tuple[int, ...] = (100,)
    """Virtual tokens; each value is measured separately."""
    rank: int = 10
    """Rank of the initial prompt on every side, and of the decomposed prompt during training."""
    dtype: Dtype = "bfloat16"
    """The backbone's dtype."""
    rounds: int = 3
    """How often each side is started; the sides alternate."""
    steps: int = 1
    """Timed repetitions per round, after one warm-up."""
    seed: int = 0
    """Seed of the tokens and the initial prompt."""

    def __post_init__(self) -> None:
        for name in ("rank", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.length and min(self.length) < self.rank:
            raise ValueError(f"rank is {self.rank} and a length {min(self.length)}; no length may be below the rank")
        for name, least in (("tokens", 3), ("batch_size", 1), ("length", 1)):
            if not getattr(self, name) or min(getattr(self, name)) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least one number, each {least} or more")

    def worker_specs(self) -> Iterator[WorkerSpec]:
        """One spec per combination of batch size and prompt length."""
        shared = {name: getattr(self, name) for name in ("tokens", "rank", "dtype", "steps", "seed")}
        for batch_size, length in itertools.product(self.batch_size, self.length):
            yield WorkerSpec(batch_size=batch_size, length=length, **shared)


class Work(NamedTuple):
    """The work of one side, ready to be timed."""

    run: Callable[[], float]
    """Does the work once; returns the loss before it, or another number that shows what was computed."""
    model: Any
    """The transformers model."""
    multiply_adds: int
    """Multiply-adds that the task requires, whatever the implementation."""


Side = Callable[[WorkerSpec], Callable[[int], Work]]
"""Loads the model; the returned function prepares the work for a number of text tokens, from the initial prompt."""


class Pair(NamedTuple):
    """Two sides to compare."""

    ours: str
    peer: str
    same: bool = True
    """Whether both compute the same, so that their losses must agree."""


@final
@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The result of one worker process for one number of tokens."""

    seconds: float
    loss: float
    peak_mb: float
    over_mb: float
    layers_mb: float
    multiply_adds: int
    rate: float
    threads: int
    profile: dict[str, Any] = field(default_factory=dict)

    @property
    def roofline_ratio(self) -> float:
        """Seconds divided by the seconds that the multiply-adds need at the measured peak rate."""
        return self.seconds * self.rate / self.multiply_adds


def generator(spec: WorkerSpec) -> Any:
    """A seeded generator for everything that is drawn."""
    import torch

    return torch.Generator().manual_seed(spec.seed)


def linear_layers(model: Any) -> list[Any]:
    """All linear layers except the head."""
    import torch

    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]


def matmul_rate(model: Any, rows: int) -> float:
    """Multiply-adds per second of the body's widest linear layer on `rows` vectors: the best of ten."""
    import torch

    layer = max(linear_layers(model), key=lambda module: module.in_features * module.out_features)
    vectors, weight = (  # new weights: the layer's own may be quantized
        torch.randn(count, layer.in_features).to(model.get_input_embeddings().weight.dtype)
        for count in (rows, layer.out_features)
    )
    best = float("inf")
    with torch.no_grad():
        for _ in range(10):
            start = time.perf_counter()
            torch.nn.functional.linear(vectors, weight)
            best = min(best, time.perf_counter() - start)
    return rows * weight.numel() / best


def peak_mb() -> float:
    """Peak resident memory since the process started, or since `reset_peak`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def reset_peak() -> None:
    """Reset the peak to the memory in use now; possible on Linux only."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps is resident, but not in use
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of resident memory


def profile_run(run: Callable[[], float]) -> dict[str, Any]:
    """The six torch operations with the largest shares of time, and the number of operations."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = [event for event in profiler.key_averages() if event.key.startswith(("aten::", "mkldnn::"))]
    total = sum(event.self_cpu_time_total for event in events)
    events.sort(key=lambda event: -event.self_cpu_time_total)
    shares = {event.key.partition("::")[2]: round(event.self_cpu_time_total / total, 3) for event in events[:6]}
    return {"shares": shares, "operations": sum(event.count for event in events)}


def measure(work: Work, spec: WorkerSpec, tokens: int, *, explain: bool) -> Measurement:
    """Measure the work in this process: a warm-up, then the timed repetitions.

    Args:
        explain: add a profile if the time is far above the roofline.
    """
    import torch

    reset_peak()
    before = peak_mb()
    loss = work.run()
    seconds = []
    for _ in range(spec.steps):
        start = time.perf_counter()
        work.run()
        seconds.append(time.perf_counter() - start)
    peak = peak_mb()
    tensors = (tensor for layer in linear_layers(work.model) for tensor in layer.state_dict().values())
    measurement = Measurement(
        seconds=statistics.median(seconds),
        loss=loss,
        peak_mb=peak,
        over_mb=peak - before,
        layers_mb=sum(tensor.nbytes for tensor in tensors) / 2**20,
        multiply_adds=work.multiply_adds,
        rate=matmul_rate(work.model, spec.batch_size * tokens),
        threads=torch.get_num_threads(),
    )
    if explain and measurement.roofline_ratio > PROFILE_ABOVE:
        measurement.profile.update(profile_run(work.run))
    return measurement


def run_worker(script: str, side: str, spec: WorkerSpec, *, explain: bool) -> list[Measurement]:
    """Measure one side in a new process, for each number of tokens.

    Raises:
        RuntimeError: the process failed; the end of its stderr.
    """
    command = [sys.executable, script, "worker", side, json.dumps({**asdict(spec), "explain": explain})]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"the process of {side} ended with {process.returncode}: {process.stderr.strip()[-2000:]}")
    return [Measurement(**values) for values in json.loads(process.stdout.splitlines()[-1])]


def compare(script: str, sides: Sequence[str], pairs: Sequence[Pair], settings: Settings) -> Iterator[dict[str, Any]]:
    """Run all sides in turn, `rounds` times; yield one case per pair and shape."""
    ours = {pair.ours for pair in pairs}
    for spec in settings.worker_specs():
        results: dict[tuple[str, int], list[Measurement]] = {(side, n): [] for n in spec.tokens for side in sides}
        for number, side in itertools.product(range(settings.rounds), sides):
            measurements = run_worker(script, side, spec, explain=side in ours)
            for tokens, measurement in zip(spec.tokens, measurements, strict=True):
                results[side, tokens].append(measurement)
                print(
                    f"round {number + 1} of {settings.rounds}, {side}, {spec.batch_size} rows of {tokens} tokens, "
                    f"prompt of {spec.length}: {measurement.seconds:.3f} s, {measurement.peak_mb:.0f} MiB, "
                    f"loss {measurement.loss:.5f}",
                    file=sys.stderr,
                )
        for tokens, pair in itertools.product(spec.tokens, pairs):
            yield summarize(pair, spec, tokens, results[pair.ours, tokens], results[pair.peer, tokens])


def summarize(
    pair: Pair, spec: WorkerSpec, tokens: int, ours: Sequence[Measurement], peer: Sequence[Measurement]
) -> dict[str, Any]:
    """One case of the JSON on the last line of stdout: our measurements beside the peer's."""

    def median(measurements: Sequence[Measurement], name: str) -> float:
        return statistics.median(getattr(measurement, name) for measurement in measurements)

    speedups = [theirs.seconds / our.seconds for our, theirs in zip(ours, peer, strict=True)]
    names = {"s": "seconds", "mb": "peak_mb", "over_mb": "over_mb", "layers_mb": "layers_mb"}
    loss, peer_loss = median(ours, "loss"), median(peer, "loss")
    required, rate = ours[0].multiply_adds, max(measurement.rate for measurement in ours)
    profiles = [measurement.profile for measurement in ours if measurement.profile]
    return {
        "ours": pair.ours,
        "peer": pair.peer,
        "tokens": tokens,
        **{name: getattr(spec, name) for name in ("batch_size", "length", "dtype", "steps")},
        "rounds": len(ours),
        "threads": ours[0].threads,
        **{f"ours_{short}": median(ours, name) for short, name in names.items()},
        **{f"peer_{short}": median(peer, name) for short, name in names.items()},
        "speedup": statistics.median(speedups),
        "spread": [min(speedups), max(speedups)],
        "memory_ratio": median(ours, "peak_mb") / median(peer, "peak_mb"),
        "memory_over_ratio": median(ours, "over_mb") / median(peer, "over_mb"),
        "same": pair.same,
        "loss_ours": loss,
        "loss_peer": peer_loss,
        "loss_gap": abs(loss - peer_loss) / abs(peer_loss),
        "multiply_adds": required,
        "rate": rate,
        "roofline_s": required / rate,
        "roofline_ratio": median(ours, "seconds") * rate / required,
        **({"profile": profiles[-1]} if profiles else {}),
    }


COLUMNS = {
    "ours": "10", "peer": "14", "batch_size": "10", "tokens": "6", "length": "6", "ours_s": "8.3f", "peer_s": "8.3f",
    "speedup": "7.2f", "least": "6.2f", "most": "6.2f", "ours_mb": "8.0f", "peer_mb": "8.0f", "memory_ratio": "12.2f",
    "roofline_s": "10.3f", "roofline_ratio": "14.2f", "loss_ours": "10.5f", "loss_peer": "10.5f",
}  # fmt: skip


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """The cases as text, followed by the profiles."""
    lines = [" ".join(f"{name:>{form.split('.')[0]}}" for name, form in COLUMNS.items())]
    profiles: dict[str, str] = {}
    for case in cases:
        row = {**case, "least": case["spread"][0], "most": case["spread"][1]}
        lines.append(" ".join(f"{row[name]:>{form}}" for name, form in COLUMNS.items()))
        if "profile" in case:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in case["profile"]["shares"].items())
            shape = f"{case['ours']}, {case['batch_size']} rows of {case['tokens']} tokens, prompt of {case['length']}"
            profiles[shape] = f"{case['profile']['operations']} operations; {shares}"
    above = f"over {PROFILE_ABOVE} times the roofline"
    return "\n".join([*lines, *(f"{shape}, {above}: {profile}" for shape, profile in profiles.items())])


def main(
    script: str,
    sides: Mapping[str, Side],
    pairs: Sequence[Pair],
    default: Settings,
    description: str,
    roundings: int = 1,
) -> None:
    """Compare the sides, or act as the worker process of one of them.

    Args:
        sides: all sides, in the order in which they are started.
        roundings: how many rounding steps the losses may differ by, where the sides batch rows differently.
    """
    if sys.argv[1:2] == ["worker"]:
        side, text = sys.argv[2:]
        values = json.loads(text)
        explain, spec = values.pop("explain"), WorkerSpec(**values)
        prepare = sides[side](spec)
        measurements = [measure(prepare(tokens), spec, tokens, explain=explain) for tokens in spec.tokens]
        print(json.dumps([asdict(measurement) for measurement in measurements]))
        return
    settings = tyro.cli(Settings, default=default, description=description)
    load = os.getloadavg()[0]
    cases = list(compare(script, list(sides), pairs, settings))
    print(table(cases), file=sys.stderr)
    print(json.dumps({"benchmark": Path(script).stem, "cores": os.cpu_count(), "load_before": load, "cases": cases}))
    largest = roundings * LOSS_TOLERANCE[settings.dtype]
    if any(case["loss_gap"] > largest for case in cases if case["same"]):
        sys.exit("the two sides' losses differ by more than the dtype explains: they do not do the same work")
