"""A hundred prompts behind one service, beside PEFT switching adapters, and beside the service with a single prompt.

    python benchmarks/serve.py [--seconds 120] [--prompts 100] [--clients 32] [--runs DIR] [--dtype auto] [--length 100]

A service of its own process answers classifications over HTTP. Clients, in this process, ask one row each and wait for
the answer before they ask again; the row and its prompt are drawn from a pool. In the same run, in rounds that take
turns (mixed, one prompt, PEFT), so that a slow minute of the machine meets all of them:

- `mixed`: every request names one of the prompts;
- `single`: the same service and rows, every request names the same prompt;
- `peft`: the same prompts as adapters of one PEFT model, `set_adapter` and one row a call, logits at the last position
  alone, in this process and without HTTP.

Before the clock starts every pair of the pool is asked alone. An answer is `different` where its label is another than
the one it had alone, and `beyond_rounding` where that is so although the two labels were further apart than rounding in
the backbone's dtype explains (0.25 of a log-probability in bfloat16, whose logits between 16 and 32 are 0.125 apart;
0.0001 in float32); `largest_gap` is how far apart they were at most.

`memory.per_prompt` is the growth of the service's resident memory for each prompt after the first, beside the bytes of
its keys and values. The prompts are trained ones where `--runs` has runs of this backbone that PEFT can load too, else
random ones near the embeddings. The last line is one JSON object.
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
"""Two last places of a logit between 16 and 32, one for each label; of float32 far more, for sums in another order."""
Pair = tuple[str, str]


def main() -> None:
    settings = arguments()
    if settings.service:
        service(settings)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pool, backbone = prepared(settings, folder)
        peft = peft_model(backbone, folder)
        started = subprocess.Popen(
            [sys.executable, __file__, "--service", place, *sys.argv[1:]], stdout=subprocess.PIPE, text=True
        )
        try:
            assert started.stdout is not None
            facts = json.loads(started.stdout.readline())
            report = measured(settings, facts, pool, backbone, peft)
        finally:
            started.terminate()
            started.wait(60)
    print(json.dumps(report), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of each side, all rounds together")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--length", type=int, default=100, help="virtual tokens of a random prompt")
    parser.add_argument("--pairs", type=int, default=200, help="prompts with a row each, asked alone first")
    parser.add_argument("--token-names", type=int, default=30, help="words of a review, at most")
    parser.add_argument("--runs", type=Path, default=None, help="folder with trained runs of the backbone")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--service", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepared(settings: argparse.Namespace, folder: Path) -> tuple[list[Pair], Any]:
    """The prompts as PEFT folders below `folder`, and pairs of a prompt and a text."""
    import torch

    from softprompt import export_peft, list_runs, load_backbone, load_task
    from softprompt.export import peft_refusal
    from softprompt.prompts import Folded
    from softprompt.tasks import splits

    backbone = load_backbone(BACKBONE, dtype=settings.dtype, device="cpu")
    runs = list_runs(settings.runs) if settings.runs else []
    folded = [run.prompt(backbone).fold() for run in runs if run.results and run.experiment.baseline == "none"]
    trained = [prompt for prompt in folded if not peft_refusal(prompt, backbone.architecture)]
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
    for place in range(settings.pairs):
        text = " ".join(str(rows[choose.randrange(len(rows))]["text"]).split()[: settings.words])
        pool.append((f"task-{place % settings.prompts:03d}", task.render({"text": text})))
    return pool, backbone


def service(settings: argparse.Namespace) -> None:
    """The process that answers; tells its address and its memory on stdout."""
    import psutil

    from softprompt import load_backbone
    from softprompt.serve import Limits
    from softprompt.serve.metrics import Metrics
    from softprompt.serve.service import serve, started_engine  # noqa: F401  (both are imported before memory is read)

    backbone = load_backbone(BACKBONE, dtype=settings.dtype, device="cpu")
    folders = sorted(Path(settings.service).glob("task-*"))
    facts = memory(backbone, folders, psutil.Process(), Limits(), Metrics())
    serve(
        backbone,
        [(folder.name, folder) for folder in folders],
        port=0,
        limits=Limits(max_waiting=max(256, 2 * settings.clients)),
        started=lambda address: print(json.dumps({"address": address, **facts}), flush=True),
    )


def memory(backbone: Any, folders: Sequence[Path], process: Any, limits: Any, metrics: Any) -> dict[str, Any]:
    """What the prompts after the first one add to the process, beside their keys and values."""
    from softprompt.serve.service import started_engine

    engine = started_engine(backbone, [(folders[0].name, folders[0])], None, limits, metrics)
    before = process.memory_info().rss
    for folder in folders[1:]:
        engine.add(folder.name, folder)
    grown = process.memory_info().rss - before
    states = [served.state.bytes for served in engine.prompts if served.state is not None][1:]
    vectors = [served.prompt.prompt().nbytes for served in engine.prompts][1:]
    engine.close()
    further = max(len(states), 1)
    return {
        "per_prompt": grown / further,
        "keys_and_values": sum(states) / further,
        "vectors": sum(vectors) / further,
        "ratio": round(grown / max(sum(states), 1), 3),
    }


def measured(
    settings: argparse.Namespace, facts: dict[str, Any], pool: list[Pair], backbone: Any, peft: Any
) -> dict[str, Any]:
    address = facts.pop("address")
    note(f"asking {len(pool)} pairs alone")
    one = [(pool[0][0], text) for _, text in pool]
    with contextlib.closing(connected(address)) as client:
        alone = {pair: ask(client, pair) for pair in dict.fromkeys([*pool, *one])}
    sides: dict[str, list[dict[str, Any]]] = {"mixed": [], "single": [], "peft": []}
    seconds = settings.seconds / ROUNDS
    for turn in range(ROUNDS):
        note(f"round {turn + 1} of {ROUNDS}")
        sides["mixed"].append(load(address, pool, settings.clients, seconds, turn))
        sides["single"].append(load(address, one, settings.clients, seconds, turn))
        sides["peft"].append(peft_load(peft, backbone, pool, seconds, turn))
    gap = GAP[str(backbone.dtype)]
    found = {name: summary(parts, alone, gap) for name, parts in sides.items()}
    rate = {name: side["requests_per_second"] for name, side in found.items()}
    return {
        "benchmark": "serve",
        "backbone": BACKBONE,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "cores": os.cpu_count(),
        "prompts": settings.prompts,
        "clients": settings.clients,
        "seconds": settings.seconds,
        **found,
        "memory": facts,
        "times_peft": round(rate["mixed"] / rate["peft"], 2),
        "of_single": round(rate["mixed"] / rate["single"], 3),
    }


def connected(address: str) -> http.client.HTTPConnection:
    """A client of the standard library: a heavier one would take from the service the cores that it is measured on."""
    url = urllib.parse.urlsplit(address)
    return http.client.HTTPConnection(str(url.hostname), url.port, timeout=120)


def ask(client: http.client.HTTPConnection, pair: Pair) -> dict[str, float]:
    """Each label's probability."""
    body = json.dumps({"model": pair[0], "input": pair[1], "labels": list(WORDS)})
    client.request("POST", "/v1/classify", body, {"Content-Type": "application/json"})
    response = client.getresponse()
    text = response.read()
    if response.status != 200:
        raise RuntimeError(f"the service answered {response.status}: {text[:300]!r}")
    scores: dict[str, float] = json.loads(text)["results"][0]["scores"]
    return scores


def load(address: str, pool: list[Pair], clients: int, seconds: float, seed: int) -> dict[str, Any]:
    """What the clients, a thread each, met while the clock ran."""
    took: list[float] = []
    answers: list[tuple[Pair, dict[str, float]]] = []
    errors: list[str] = []
    begin = time.perf_counter()

    def one(number: int) -> None:
        choose = random.Random(seed * 1000 + number)
        with contextlib.closing(connected(address)) as client:
            while (start := time.perf_counter()) < begin + seconds:
                pair = choose.choice(pool)
                try:
                    answers.append((pair, ask(client, pair)))
                except (OSError, RuntimeError, http.client.HTTPException) as error:
                    errors.append(repr(error))
                    client.close()
                else:
                    took.append(time.perf_counter() - start)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": time.perf_counter() - begin, "took": took, "answers": answers, "errors": errors}


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
        raise ValueError(f"the labels {LABELS} are {answers}; one position scores labels of one token alone")
    choose, took, found = random.Random(seed), [], []
    begin = time.perf_counter()
    while (start := time.perf_counter()) < begin + seconds:
        pair = choose.choice(pool)
        with torch.no_grad():
            model.set_adapter(pair[0])
            rows = backbone.tokenizer(pair[1], return_tensors="pt")
            logits = model(**rows, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            chances = logits[[ids[0] for ids in answers]].softmax(0).tolist()
        found.append((pair, dict(zip(WORDS, chances, strict=True))))
        took.append(time.perf_counter() - start)
    return {"seconds": time.perf_counter() - begin, "took": took, "answers": found, "errors": []}


def summary(parts: list[dict[str, Any]], alone: dict[Pair, dict[str, float]], gap: float) -> dict[str, Any]:
    import math

    took = sorted(time for part in parts for time in part["took"])
    different = beyond = 0
    largest = widest = 0.0
    for pair, scores in (answer for part in parts for answer in part["answers"]):
        expected = alone[pair]
        largest = max(largest, *(abs(scores[label] - expected[label]) for label in expected))
        if max(scores, key=scores.__getitem__) != max(expected, key=expected.__getitem__):
            different += 1
            one, other = expected.values()
            apart = abs(math.log(one) - math.log(other))
            widest = max(widest, apart)
            beyond += apart > gap
    return {
        "requests": len(took),
        "requests_per_second": round(len(took) / sum(part["seconds"] for part in parts), 2),
        "errors": sum(len(part["errors"]) for part in parts),
        "different": different,
        "beyond_rounding": beyond,
        "largest_gap": round(widest, 5),
        "largest_difference": round(largest, 5),
        **{f"p{level}_ms": round(1000 * took[min(len(took) - 1, len(took) * level // 100)]) for level in (50, 95, 99)},
    }


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
