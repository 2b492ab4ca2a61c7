"""How two ways of doing the same work are compared: in processes of their own, in turn, on the same weights and rows.

A benchmark says what its sides do and which pairs of them to compare; `main` is its command line. Every combination of
`--batch-size` and `--length` gets processes of its own, which go through `--tokens`. The first time that a side works
warms up and is not timed; its loss must be the same on both sides of a pair that does the same work, else the exit
status is 1.

The last line of stdout is JSON: `load_before`, the system's load average before the start (much above 0: another's
work is in the times), and per pair and case:

- `ours_s`, `peer_s`: seconds, median over rounds of the median in a round. `ratio` is the median over rounds of the
  peer's seconds by ours in that round, above 1 where ours is faster; `spread` the smallest and the largest.
- `ours_mb`, `peer_mb`: highest resident memory (`ru_maxrss`) while at work, MiB; `_over_mb`: what of it came on top of
  the loaded model; `_layers_mb`: what the model's linear layers but the head take, scales included. `memory_ratio` and
  `memory_over_ratio` are ours by the peer's, below 1 where ours is smaller.
- `floor_s`: `multiply_adds` that the work needs, by `rate`, the most a second that the backbone's widest layer reached
  on the batch's text alone, measured in the same processes; `over_floor` is `ours_s` by `floor_s`.
- `profile`, where `over_floor` is above 1.5: what ours spends its time in, the shares of torch's operations, and how
  many there are.
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

# A started process counts its parent's resident memory as its own until it is replaced, and `ru_maxrss` remembers it.
# So torch is imported by the workers alone.

Dtype = Literal["bfloat16", "float32"]
LOSS_TOLERANCE = {"bfloat16": 2.0**-8, "float32": 1e-5}
"""Largest relative difference of two losses: one rounding of bfloat16, and a hundred of float32."""
FAR = 1.5
"""Times the floor above which the profile has to say why."""


@final
@dataclass(frozen=True, kw_only=True)
class Part:
    """What a process is given."""

    tokens: tuple[int, ...]
    batch: int
    length: int
    rank: int
    dtype: Dtype
    steps: int
    seed: int


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both sides are given."""

    tokens: tuple[int, ...] = (32, 64)
    """Text tokens a row; each number is a case of its own."""
    batch: tuple[int, ...] = (16,)
    """Rows; each number is a case of its own."""
    length: tuple[int, ...] = (100,)
    """Virtual tokens; each number is a case of its own."""
    rank: int = 10
    """Rank of the initial prompt on every side, and of the decomposed one while it trains."""
    dtype: Dtype = "bfloat16"
    """What the backbone computes in."""
    rounds: int = 3
    """Times that each side is started, in turn."""
    steps: int = 1
    """Times in a round that the work is timed, after one that warms up."""
    seed: int = 0
    """Of the tokens and the initial prompt."""

    def __post_init__(self) -> None:
        for name in ("rank", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.length and min(self.length) < self.rank:
            raise ValueError(f"rank is {self.rank} and a length {min(self.length)}; no length may be below the rank")
        for name, least in (("tokens", 3), ("batch", 1), ("length", 1)):
            if not getattr(self, name) or min(getattr(self, name)) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least one number, each {least} or more")

    def parts(self) -> Iterator[Part]:
        """What needs processes of its own."""
        shared = {name: getattr(self, name) for name in ("tokens", "rank", "dtype", "steps", "seed")}
        for batch, length in itertools.product(self.batch, self.length):
            yield Part(batch=batch, length=length, **shared)


class Work(NamedTuple):
    """One side, ready: what is timed, and what it is measured against."""

    run: Callable[[], float]
    """Does it once; the loss before it, or another number that shows what it did."""
    model: Any
    """The transformers model."""
    multiply_adds: int
    """That the task needs, however it is done."""


Side = Callable[[Part], Callable[[int], Work]]
"""Loads the model; what comes back gets the work ready for a number of text tokens, from the initial prompt."""


class Pair(NamedTuple):
    """Two sides to compare."""

    ours: str
    peer: str
    same: bool = True
    """They compute the same, so that their losses have to agree."""


@final
@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process found."""

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
    def over_floor(self) -> float:
        """Seconds by those that the multiply-adds need."""
        return self.seconds * self.rate / self.multiply_adds


def generator(part: Part) -> Any:
    """Of everything that is drawn."""
    import torch

    return torch.Generator().manual_seed(part.seed)


def linear_layers(model: Any) -> list[Any]:
    """Every linear layer but the head."""
    import torch

    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]


def matmul_rate(model: Any, rows: int) -> float:
    """Multiply-adds a second of the body's widest linear layer on `rows` vectors: the best of ten."""
    import torch

    layer = max(linear_layers(model), key=lambda module: module.in_features * module.out_features)
    vectors, weight = (  # weights of its own: the layer's may be quantised
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
    """Highest resident memory since the process started, or since `forget_peak`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def forget_peak() -> None:
    """Set the peak to what is in use now, where the system can; elsewhere both peaks hold what was before."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps is resident, but not in use
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of resident memory


def profiled(run: Callable[[], float]) -> dict[str, Any]:
    """The shares of time of torch's operations, the largest six, and how many there are."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    events = [event for event in found.key_averages() if event.key.startswith(("aten::", "mkldnn::"))]
    whole = sum(event.self_cpu_time_total for event in events)
    events.sort(key=lambda event: -event.self_cpu_time_total)
    shares = {event.key.partition("::")[2]: round(event.self_cpu_time_total / whole, 3) for event in events[:6]}
    return {"shares": shares, "operations": sum(event.count for event in events)}


def measure(work: Work, part: Part, tokens: int, *, explain: bool) -> Measured:
    """One case of one side in this process: a warm-up and the timed ones.

    Args:
        explain: add a profile where the floor is far.
    """
    import torch

    forget_peak()
    before = peak_mb()
    loss = work.run()
    seconds = []
    for _ in range(part.steps):
        start = time.perf_counter()
        work.run()
        seconds.append(time.perf_counter() - start)
    peak = peak_mb()
    found = Measured(
        seconds=statistics.median(seconds),
        loss=loss,
        peak_mb=peak,
        over_mb=peak - before,
        layers_mb=sum(one.nbytes for layer in linear_layers(work.model) for one in layer.state_dict().values()) / 2**20,
        multiply_adds=work.multiply_adds,
        rate=matmul_rate(work.model, part.batch * tokens),
        threads=torch.get_num_threads(),
    )
    if explain and found.over_floor > FAR:
        found.profile.update(profiled(work.run))
    return found


def started(script: str, side: str, part: Part, *, explain: bool) -> list[Measured]:
    """What one side finds in a process of its own, for each number of tokens.

    Raises:
        RuntimeError: the process failed; its last words.
    """
    command = [sys.executable, script, "worker", side, json.dumps({**asdict(part), "explain": explain})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process of {side} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return [Measured(**one) for one in json.loads(done.stdout.splitlines()[-1])]


def compared(script: str, sides: Sequence[str], pairs: Sequence[Pair], settings: Settings) -> Iterator[dict[str, Any]]:
    """Every side in turn, `rounds` times; a case for each pair and each shape."""
    ours = {pair.ours for pair in pairs}
    for part in settings.parts():
        found: dict[tuple[str, int], list[Measured]] = {(side, n): [] for n in part.tokens for side in sides}
        for number, side in itertools.product(range(settings.rounds), sides):
            for tokens, one in zip(part.tokens, started(script, side, part, explain=side in ours), strict=True):
                found[side, tokens].append(one)
                print(
                    f"round {number + 1} of {settings.rounds}, {side}, {part.batch} rows of {tokens} tokens, prompt of "
                    f"{part.length}: {one.seconds:.3f} s, {one.peak_mb:.0f} MiB, loss {one.loss:.5f}",
                    file=sys.stderr,
                )
        for tokens, pair in itertools.product(part.tokens, pairs):
            yield case(pair, part, tokens, found[pair.ours, tokens], found[pair.peer, tokens])


def case(pair: Pair, part: Part, tokens: int, mine: Sequence[Measured], peer: Sequence[Measured]) -> dict[str, Any]:
    """One side of ours beside its peer, as the last line of stdout has it."""

    def median(runs: Sequence[Measured], name: str) -> float:
        return statistics.median(getattr(one, name) for one in runs)

    ratios = [theirs.seconds / our.seconds for our, theirs in zip(mine, peer, strict=True)]
    names = {"s": "seconds", "mb": "peak_mb", "over_mb": "over_mb", "layers_mb": "layers_mb"}
    loss, peer_loss = median(mine, "loss"), median(peer, "loss")
    needed, rate = mine[0].multiply_adds, max(one.rate for one in mine)
    explained = [one.profile for one in mine if one.profile]
    return {
        "ours": pair.ours,
        "peer": pair.peer,
        "tokens": tokens,
        **{name: getattr(part, name) for name in ("batch", "length", "dtype", "steps")},
        "rounds": len(mine),
        "threads": mine[0].threads,
        **{f"ours_{short}": median(mine, name) for short, name in names.items()},
        **{f"peer_{short}": median(peer, name) for short, name in names.items()},
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "memory_ratio": median(mine, "peak_mb") / median(peer, "peak_mb"),
        "memory_over_ratio": median(mine, "over_mb") / median(peer, "over_mb"),
        "same": pair.same,
        "loss_ours": loss,
        "loss_peer": peer_loss,
        "loss_gap": abs(loss - peer_loss) / abs(peer_loss),
        "multiply_adds": needed,
        "rate": rate,
        "floor_s": needed / rate,
        "over_floor": median(mine, "seconds") * rate / needed,
        **({"profile": explained[-1]} if explained else {}),
    }


COLUMNS = {
    "ours": "10", "peer": "14", "batch": "5", "tokens": "6", "length": "6", "ours_s": "8.3f", "peer_s": "8.3f",
    "ratio": "6.2f", "least": "6.2f", "most": "6.2f", "ours_mb": "8.0f", "peer_mb": "8.0f", "memory_ratio": "12.2f",
    "floor_s": "8.3f", "over_floor": "10.2f", "loss_ours": "10.5f", "loss_peer": "10.5f",
}  # fmt: skip


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """The cases for a reader, and where the floor is far what takes the time."""
    lines = [" ".join(f"{name:>{form.split('.')[0]}}" for name, form in COLUMNS.items())]
    far: dict[str, str] = {}
    for one in cases:
        row = {**one, "least": one["spread"][0], "most": one["spread"][1]}
        lines.append(" ".join(f"{row[name]:>{form}}" for name, form in COLUMNS.items()))
        if "profile" in one:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in one["profile"]["shares"].items())
            what = f"{one['ours']}, {one['batch']} rows of {one['tokens']} tokens, prompt of {one['length']}"
            far[what] = f"{one['profile']['operations']} operations; {shares}"
    return "\n".join([*lines, *(f"{what}, {FAR} times the floor or more: {why}" for what, why in far.items())])


def main(
    script: str,
    sides: Mapping[str, Side],
    pairs: Sequence[Pair],
    default: Settings,
    description: str,
    roundings: int = 1,
) -> None:
    """Compare the sides, or be one of them in a process of its own.

    Args:
        sides: what is started in turn.
        roundings: by how many roundings the losses may differ where the sides run other rows together.
    """
    if sys.argv[1:2] == ["worker"]:
        side, given = sys.argv[2:]
        values = json.loads(given)
        explain, part = values.pop("explain"), Part(**values)
        ready = sides[side](part)
        found = [measure(ready(tokens), part, tokens, explain=explain) for tokens in part.tokens]
        print(json.dumps([asdict(one) for one in found]))
        return
    settings = tyro.cli(Settings, default=default, description=description)
    busy = os.getloadavg()[0]
    cases = list(compared(script, list(sides), pairs, settings))
    print(table(cases), file=sys.stderr)
    print(json.dumps({"benchmark": Path(script).stem, "cores": os.cpu_count(), "load_before": busy, "cases": cases}))
    most = roundings * LOSS_TOLERANCE[settings.dtype]
    if any(one["loss_gap"] > most for one in cases if one["same"]):
        sys.exit("the two sides' losses differ by more than the dtype explains: they do not do the same work")
