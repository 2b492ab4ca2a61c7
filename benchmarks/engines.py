"""Our service, vLLM on a CPU and llama.cpp's server: the same weights, prompts and rows, one engine at a time.

    make engines
    python benchmarks/engines.py [--seconds 60] [--prompts 16] [--threads 2]

- `classify`: requests a second with 32 clients, each asking for one review's label (30 tokens at most) with one of the
  prompts; our `/v1/classify`, and the exported client's `classify` for the other two.
- `write-1`, `write-8`: tokens a second, and the median seconds to the first token, of up to 64 tokens with 1 and 8
  clients.

All engines compute in float32 with the same number of threads. `equal` is how many labels of 20 rows are the first
engine's. The last line is one JSON object.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "engines"))
import servers

BACKBONE = "smollm2-135m"
Job = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each engine and case")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        jobs = prepare(folder, settings.prompts)
        report = {engine: measure(engine, folder, jobs, settings) for engine in ("softprompt", "vllm", "llama.cpp")}
    for engine in report.values():
        engine["equal"] = sum(a == b for a, b in zip(engine.pop("labels"), LABELS, strict=True))
    print(json.dumps(report), flush=True)


LABELS: list[str] = []


def prepare(folder: Path, prompts: int) -> list[Job]:
    """Random prompts of 20 vectors near the embeddings as finished runs, their exports, and (prompt, text) pairs."""
    import torch

    from softprompt import Experiment, Plain, assets, attach, load_backbone, load_task, runs
    from softprompt.export import FORMATS, export_runs
    from softprompt.export.gguf import Gguf
    from softprompt.tasks.data.tabular import read_rows

    backbone, task, config = load_backbone(BACKBONE, dtype="float32"), load_task("sentiment"), Plain(length=20)
    finished = []
    for seed in range(prompts):
        experiment = Experiment(backbone=BACKBONE, prompt=config, seed=seed, dtype="float32")
        run = runs.create(experiment, task, backbone, folder / "runs", f"p{seed}", "")
        prompt = config.build(backbone.host(), torch.Generator().manual_seed(seed))
        finished.append(run.finish(attach(backbone, prompt), {"test": 0.5}))
    export_runs(finished, FORMATS["vocab"], folder / "vllm", backbone=backbone)
    export_runs(finished, Gguf("f32"), folder / "llama.cpp", backbone=backbone)
    ends = [str(token) for token in attach(backbone, None).end_of_sequence()]
    (folder / "ends.json").write_text(json.dumps(ends))
    rows = read_rows(assets.fetch("rotten-tomatoes"))
    texts = [text for text, kind in zip(rows["text"][:], rows["category"][:], strict=True) if kind in task.label_words]
    short = [text for text in texts if len(backbone.tokenizer(task.render({"text": text}))["input_ids"]) <= 30]
    return [(f"p{number % prompts}", text) for number, text in enumerate(short[:400])]


def start(engine: str, folder: Path, threads: int) -> Any:
    log = folder / f"{engine}.log"
    if engine == "vllm":
        return servers.vllm(folder / "vllm", "--dtype", "float32", log=log, threads=threads)
    if engine == "llama.cpp":
        return servers.llama_cpp(folder / "llama.cpp" / "model.gguf", log=log, exact=False, threads=threads, slots=8)
    port, prompts = servers.free_port(), sorted((folder / "runs").iterdir())
    command = [sys.executable, "-m", "softprompt.cli", "serve", *map(str, prompts), "--port", str(port)]
    return servers.server([*command, "--dtype", "float32"], port, log, threads, path="/readyz")


def measure(engine: str, folder: Path, jobs: Sequence[Job], settings: argparse.Namespace) -> dict[str, Any]:
    from softprompt import load_task

    task = load_task("sentiment")
    with start(engine, folder, settings.threads) as url:
        if engine == "softprompt":

            def classify(job: Job) -> str:
                answer = post(url + "/v1/classify", {"model": job[0], "input": {"text": job[1]}})
                return str(json.load(answer)["results"][0]["label"])
        else:
            from softprompt.export.client import open_client

            client = open_client(folder / engine, url, "model")

            def classify(job: Job) -> str:
                return client.classify(job[0], task.render({"text": job[1]})).label

        def write(job: Job) -> tuple[float, int]:
            return stream(engine, url, folder, job[0], task.render({"text": job[1]}))

        labels = [classify(job) for job in jobs[:20]]
        if not LABELS:
            LABELS.extend(labels)
        report: dict[str, Any] = {"labels": labels}
        times = drive(classify, jobs, 32, settings.seconds)
        report["classify"] = {"requests_per_second": round(len(times) / settings.seconds, 2)}
        for clients in (1, 8):
            times = drive(write, jobs, clients, settings.seconds)
            seconds = statistics.median(first for first, _ in times) if times else None
            rate = round(sum(tokens for _, tokens in times) / settings.seconds, 1)
            report[f"write-{clients}"] = {"tokens_per_second": rate, "seconds_to_first_token": seconds}
    print(engine, {key: value for key, value in report.items() if key != "labels"}, file=sys.stderr, flush=True)
    return report


def drive(work: Callable[[Job], Any], jobs: Sequence[Job], clients: int, seconds: float) -> list[Any]:
    """What `clients` threads got done within `seconds`, each asking again as soon as it has its answer."""
    queue, results, end = itertools.cycle(jobs), [], time.monotonic() + seconds
    lock = threading.Lock()

    def run() -> None:
        while time.monotonic() < end:
            with lock:
                job = next(queue)
            result = work(job)
            if time.monotonic() < end:
                results.append(result)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def stream(engine: str, url: str, folder: Path, prompt: str, text: str) -> tuple[float, int]:
    """Seconds until the first of at most 64 streamed tokens, and their number; returns after the last."""
    body: dict[str, Any] = {"model": "model", "stream": True, "temperature": 0, "max_tokens": 64, "ignore_eos": True}
    body["stream_options"] = {"include_usage": True}
    path = "/v1/completions"
    if engine == "softprompt":
        body |= {"model": prompt, "prompt": text}
        del body["ignore_eos"]  # the service has no such field: the tokens that end a text are suppressed
        body["logit_bias"] = dict.fromkeys(json.loads((folder / "ends.json").read_text()), -100)
    elif engine == "vllm":
        body["prompt"] = prompt_text(folder / engine, prompt) + text
    else:
        path, body = "/completion", {"prompt": prompt_text(folder / engine, prompt) + text, "stream": True, **LLAMA}
    begin, first, tokens = time.monotonic(), 0.0, 0
    for line in post(url + path, body):
        if line.startswith(b"data:") and not line.startswith(b"data: [DONE]"):
            first = first or time.monotonic() - begin
            event = json.loads(line[5:])
            tokens = (event.get("usage") or {}).get("completion_tokens") or event.get("tokens_predicted") or tokens
    if not tokens:
        raise RuntimeError(f"{engine} did not say how many tokens it wrote")
    return first, int(tokens)


LLAMA = {"n_predict": 64, "ignore_eos": True, "samplers": ["temperature"], "temperature": 0}


def prompt_text(folder: Path, prompt: str) -> str:
    return str(json.loads((folder / "prompts.json").read_text())["prompts"][prompt]["text"])


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=600)


if __name__ == "__main__":
    main()
