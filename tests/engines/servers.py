"""Starts the real servers of vLLM and llama.cpp, each with the Python of its own environment (`make engines`)."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(engine: str) -> Path:
    """The interpreter of `vllm` or `llamacpp`."""
    return ROOT / f".venv-{engine}" / "bin" / "python"


def vllm(model: Path, *flags: str, log: Path, threads: int = 1) -> AbstractContextManager[str]:
    """vLLM's server, which calls the model `model`; gives its URL."""
    port = free_port()
    command = [
        str(python("vllm")),
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        str(model),
        "--served-model-name",
        "model",
    ]
    command += ["--max-model-len", "1024", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    return server([*command, "--gpu-memory-utilization", "0.1", *flags], port, log, threads)


def llama_cpp(model: Path, *, log: Path, exact: bool, threads: int = 1, slots: int = 2) -> AbstractContextManager[str]:
    """llama.cpp's server; `exact` keeps keys and values in float32, without flash attention."""
    port = free_port()
    options = {"threads": threads, "slots": slots, "context": 1024 * slots, "exact": exact}
    script = str(Path(__file__).with_name("llama_server.py"))
    return server([str(python("llamacpp")), script, str(model), str(port), json.dumps(options)], port, log, threads)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def server(
    command: Sequence[str], port: int, log: Path, threads: int = 1, path: str = "/health", seconds: int = 600
) -> Iterator[str]:
    """Run `command` until the block ends; gives its URL once it answers at `path`."""
    url = f"http://127.0.0.1:{port}"
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env={**os.environ, **settings, "PYTHONPATH": ""}
        )
    try:
        for _ in range(seconds):
            if process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(url + path, timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        if process.poll() is not None:
            raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()[-2000:]}")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
