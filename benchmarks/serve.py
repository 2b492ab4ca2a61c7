"""A service with a hundred prompts under load, compared with PEFT switching adapters and with a single prompt.

    python benchmarks/serve.py [--seconds 120] [--prompts 100] [--clients 32] [--runs DIR] [--dtype auto] [--length 100]

The service runs in its own process and answers classifications over HTTP. The clients, in this process, send one row
and wait for the answer before they send the next; each row and its prompt are drawn from a pool. Three workloads
alternate in the same run, so that a slow minute of the machine affects all of them:

- `multi_prompt`: each request uses the prompt of its row;
- `single`: the same service and rows, all requests use the same prompt;
- `peft`: the same prompts as adapters of one PEFT model, with `set_adapter` and one row per call, logits at the last
  position only, in this process and without HTTP.

Before the clock starts, every pair of the pool is sent alone. An answer counts as `different` if its label is not the
one that it had alone, and as `beyond_rounding` if in addition the two labels were further apart than rounding in the
backbone's dtype explains (0.25 of a log-probability in bfloat16, whose logits between 16 and 32 are 0.125 apart; 0.0001
in float32); `largest_gap` is the largest distance between the two labels of such an answer.

`memory.per_prompt` is the growth of the service's resident memory per prompt after the first, beside the size of its
keys and values. The prompts are trained ones if `--runs` has runs of this backbone that PEFT can load, else random ones
near the embeddings. The last line of stdout is one JSON object.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BACKBONE = "smollm2-135m"
LABELS = (" negative", " positive")
WORDS = ("negative", "positive")
ROUNDS = 2
GAP = {"torch.bfloat16": 0.25, "torch.float32": 1e-4, "torch.float16": 0.032}
"""Two units in the last place of a logit between 16 and 32, one per label; far more in float32, whose sums reorder."""
Pair = tuple[str, str]


def main() -> None:
    settings = arguments()
    if settings.service:
        service(settings)
        return
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        pool, backbone = prepare(settings, folder)
        peft = peft_model(backbone, folder)
        log = folder / "service.log"  # a line per request
        with log.open("w") as lines:
            command = [sys.executable, __file__, "--service", path, *sys.argv[1:]]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=lines, text=True)
        try:
            assert server.stdout is not None
            facts = json.loads(server.stdout.readline())
            report = measure(settings, facts, pool, backbone, peft)
        except Exception:
            note(log.read_text()[-2000:])
            raise
        finally:
            server.terminate()
            server.wait(60)
    print(json.dumps(report), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="seconds per workload, all rounds together")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--length", type=int, default=100, help="length of a random prompt")
    parser.add_argument("--pairs", type=int, default=200, help="size of the pool of prompt and row")
    parser.add_argument("--words", type=int, default=30, help="maximum length of a review in words")
    parser.add_argument("--runs", type=Path, default=None, help="folder with trained runs of the backbone")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--service", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(settings: argparse.Namespace, folder: Path) -> tuple[list[Pair], Any]:
    """Write the prompts as PEFT folders below `folder`; return the pool of (prompt name, text) and the backbone."""
    import torch

    from softprompt import export_peft, list_runs, load_backbone, load_task
    from softprompt.export import peft_refusal
    from softprompt.prompts import Folded
    from softprompt.tasks.data.splits import splits

    backbone = load_backbone(BACKBONE, dtype=settings.dtype, device="cpu")
    runs = list_runs(settings.runs) if settings.runs else []
    folded = [run.prompt(backbone).fold() for run in runs if run.results and run.experiment.baseline == "none"]
    trained = [prompt for prompt in folded if not peft_refusal(prompt, backbone)]
    host, draw = backbone.host(), torch.Generator().manual_seed(0)
    for number in range(settings.prompts):
        if number < len(trained):
            prompt = trained[number]
        else:
            noise = torch.randn(settings.length, host.dim, generator=draw) * host.rms
            prompt = Folded(host.sample(settings.length, draw) + 0.2 * noise)
        (folder / f"task-{number:03d}").mkdir()
        export_peft(prompt, backbone, folder / f"task-{number:03d}")
    task = load_task("sentiment")
    rows = splits(task).test
    choose = random.Random(0)
    pool = []
    for index in range(settings.pairs):
        text = " ".join(str(rows[choose.randrange(len(rows))]["text"]).split()[: settings.words])
        pool.append((f"task-{index % settings.prompts:03d}", task.render({"text": text})))
    return pool, backbone


def service(settings: argparse.Namespace) -> None:
    """The process of the service; prints its address and its memory on stdout."""
    import psutil

    from softprompt import load_backbone
    from softprompt.serve import Limits
    from softprompt.serve.config import ServeConfig
    from softprompt.serve.service import serve  # imported before memory is measured

    backbone = load_backbone(BACKBONE, dtype=settings.dtype, device="cpu")
    folders = sorted(Path(settings.service).glob("task-*"))
    facts = memory(backbone, folders, psutil.Process())
    limits = Limits(max_queued=max(256, 2 * settings.clients))
    serve(
        ServeConfig(sources=tuple(map(str, folders)), port=0, limits=limits),
        backbone,
        on_start=lambda address: print(json.dumps({"address": address, **facts}), flush=True),
    )


def memory(backbone: Any, folders: Sequence[Path], process: Any) -> dict[str, Any]:
    """Memory per prompt after the first, beside the size of its keys and values."""
    from softprompt.serve import Engine

    engine = Engine(backbone)
    engine.add(folders[0].name, folders[0])
    before = process.memory_info().rss
    for folder in folders[1:]:
        engine.add(folder.name, folder)
    growth = process.memory_info().rss - before
    prefixes = [entry.kv_prefix.nbytes for entry in engine.prompts if entry.kv_prefix is not None][1:]
    vectors = [entry.prompt.prompt().nbytes for entry in engine.prompts][1:]
    engine.close()
    added = max(len(prefixes), 1)
    return {
        "per_prompt": growth / added,
        "keys_and_values": sum(prefixes) / added,
        "vectors": sum(vectors) / added,
        "ratio": round(growth / max(sum(prefixes), 1), 3),
    }


def measure(
    settings: argparse.Namespace, facts: dict[str, Any], pool: list[Pair], backbone: Any, peft: Any
) -> dict[str, Any]:
    address = facts.pop("address")
    note(f"sending {len(pool)} pairs alone")
    single = [(pool[0][0], text) for _, text in pool]
    with contextlib.closing(connect(address)) as client:
        alone = {pair: ask(client, pair) for pair in dict.fromkeys([*pool, *single])}
    sides: dict[str, list[dict[str, Any]]] = {"multi_prompt": [], "single": [], "peft": []}
    seconds = settings.seconds / ROUNDS
    for number in range(ROUNDS):
        note(f"round {number + 1} of {ROUNDS}")
        sides["multi_prompt"].append(load(address, pool, settings.clients, seconds, number))
        sides["single"].append(load(address, single, settings.clients, seconds, number))
        sides["peft"].append(peft_load(peft, backbone, pool, seconds, number))
    gap = GAP[str(backbone.dtype)]
    results = {name: summary(parts, alone, gap) for name, parts in sides.items()}
    rate = {name: side["requests_per_second"] for name, side in results.items()}
    return {
        "benchmark": "serve",
        "backbone": BACKBONE,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "cores": os.cpu_count(),
        "prompts": settings.prompts,
        "clients": settings.clients,
        "seconds": settings.seconds,
        **results,
        "memory": facts,
        "speedup_over_peft": round(rate["multi_prompt"] / rate["peft"], 2),
        "ratio_to_single": round(rate["multi_prompt"] / rate["single"], 3),
    }


def connect(address: str) -> http.client.HTTPConnection:
    """A client of the standard library; a heavier one would compete with the service for the cores."""
    url = urllib.parse.urlsplit(address)
    return http.client.HTTPConnection(str(url.hostname), url.port, timeout=120)


def ask(client: http.client.HTTPConnection, pair: Pair) -> dict[str, float]:
    """The probability of each label."""
    body = json.dumps({"model": pair[0], "input": pair[1], "labels": list(WORDS)})
    client.request("POST", "/v1/classify", body, {"Content-Type": "application/json"})
    response = client.getresponse()
    text = response.read()
    if response.status != 200:
        raise RuntimeError(f"the service answered {response.status}: {text[:300]!r}")
    probabilities: dict[str, float] = json.loads(text)["results"][0]["probabilities"]
    return probabilities


def load(address: str, pool: list[Pair], clients: int, seconds: float, seed: int) -> dict[str, Any]:
    """Latencies, answers and errors of all clients, one thread per client."""
    latencies: list[float] = []
    answers: list[tuple[Pair, dict[str, float]]] = []
    errors: list[str] = []
    begin = time.perf_counter()

    def run_client(number: int) -> None:
        choose = random.Random(seed * 1000 + number)
        with contextlib.closing(connect(address)) as client:
            while (start := time.perf_counter()) < begin + seconds:
                pair = choose.choice(pool)
                try:
                    answers.append((pair, ask(client, pair)))
                except (OSError, RuntimeError, http.client.HTTPException) as error:
                    errors.append(repr(error))
                    client.close()
                else:
                    latencies.append(time.perf_counter() - start)

    threads = [threading.Thread(target=run_client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": time.perf_counter() - begin, "latencies": latencies, "answers": answers, "errors": errors}


def peft_model(backbone: Any, folder: Path) -> Any:
    """Every prompt as an adapter of one PEFT model over a copy of the backbone with transformers' own attention."""
    import copy

    from peft import PeftModel

    model = copy.deepcopy(backbone.model)
    model.set_attn_implementation("sdpa")
    folders = sorted(folder.glob("task-*"))
    loaded = PeftModel.from_pretrained(model, folders[0], adapter_name=folders[0].name)
    for other in folders[1:]:
        loaded.load_adapter(other, adapter_name=other.name)
    return loaded.eval()


def peft_load(model: Any, backbone: Any, pool: list[Pair], seconds: float, seed: int) -> dict[str, Any]:
    import torch

    answers = [backbone.tokenizer(label, add_special_tokens=False)["input_ids"] for label in LABELS]
    if any(len(ids) != 1 for ids in answers):
        raise ValueError(f"the labels {LABELS} are {answers}; one position scores only labels of one token")
    choose, latencies, answered = random.Random(seed), [], []
    begin = time.perf_counter()
    while (start := time.perf_counter()) < begin + seconds:
        pair = choose.choice(pool)
        with torch.no_grad():
            model.set_adapter(pair[0])
            rows = backbone.tokenizer(pair[1], return_tensors="pt")
            logits = model(**rows, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            probs = logits[[ids[0] for ids in answers]].softmax(0).tolist()
        answered.append((pair, dict(zip(WORDS, probs, strict=True))))
        latencies.append(time.perf_counter() - start)
    return {"seconds": time.perf_counter() - begin, "latencies": latencies, "answers": answered, "errors": []}


def summary(parts: list[dict[str, Any]], alone: dict[Pair, dict[str, float]], gap: float) -> dict[str, Any]:
    import math

    latencies = sorted(time for part in parts for time in part["latencies"])
    different = beyond = 0
    largest = widest = 0.0
    for pair, scores in (answer for part in parts for answer in part["answers"]):
        expected = alone[pair]
        largest = max(largest, *(abs(scores[label] - expected[label]) for label in expected))
        if max(scores, key=scores.__getitem__) != max(expected, key=expected.__getitem__):
            different += 1
            first, second = expected.values()
            distance = abs(math.log(first) - math.log(second))
            widest = max(widest, distance)
            beyond += distance > gap
    return {
        "requests": len(latencies),
        "requests_per_second": round(len(latencies) / sum(part["seconds"] for part in parts), 2),
        "errors": sum(len(part["errors"]) for part in parts),
        "different": different,
        "beyond_rounding": beyond,
        "largest_gap": round(widest, 5),
        "largest_difference": round(largest, 5),
        **{f"p{level}_ms": round(1000 * percentile(latencies, level)) for level in (50, 95, 99)},
    }


def percentile(latencies: Sequence[float], level: int) -> float:
    """The nearest-rank percentile of sorted latencies."""
    return latencies[min(len(latencies) - 1, len(latencies) * level // 100)]


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
