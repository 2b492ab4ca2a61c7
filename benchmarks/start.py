"""Time from process start to a prompt's first answer, compared with PEFT and transformers' loading.

    python benchmarks/start.py [--rounds 3] [--dtype float32]

Each side loads the same backbone (a GGUF file) and the same PEFT prompt folder in its own process and scores two
answers to one row. softprompt caches the converted weights as safetensors at the first load, which happens here before
the clock starts; transformers dequantizes the file's 4-bit weights every time. `s` is the total and `loaded_s` the time
until model and prompt are loaded; both include the imports. The last line of stdout is JSON.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import tyro

BACKBONE, TEXT = "smollm2-135m", "The film is"


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings shared by both sides."""

    rounds: int = 3
    """How often each side is started; the sides alternate."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The backbone's dtype."""


def ours(folder: Path, dtype: str) -> Any:
    """Load backbone and prompt with softprompt; return the function that scores a row."""
    import torch

    from softprompt import attach, load_backbone
    from softprompt.runs import read_prompt

    backbone = load_backbone(BACKBONE, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    prompted = attach(backbone, read_prompt(folder, backbone))

    def run() -> float:
        ids = torch.tensor([backbone.tokenizer(TEXT)["input_ids"]])
        with torch.no_grad():
            return float(prompted.score(ids, None, [[token] for token in answers(backbone.tokenizer)])[0, 0])

    return run


def peft(folder: Path, dtype: str) -> Any:
    """The same with transformers and PEFT."""
    import torch
    import transformers
    from peft import PeftModel

    from softprompt.assets import fetch

    file = fetch(BACKBONE)
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    base = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=getattr(torch, dtype))
    model = PeftModel.from_pretrained(base, folder).eval()

    def run() -> float:
        ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()
        return float(logits.log_softmax(-1)[answers(tokenizer)[0]])

    return run


def answers(tokenizer: Any) -> list[int]:
    """The first token of each answer."""
    return [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" good", " bad")]


SIDES = {"softprompt": ours, "peft": peft}


def worker(side: str, folder: Path, dtype: str, start: float) -> None:
    """Measure one side in this process and print the result."""
    run = SIDES[side](folder, dtype)
    loaded = time.time() - start
    score = run()
    print(json.dumps({"s": time.time() - start, "loaded_s": loaded, "score": score}))


def run_worker(side: str, folder: Path, dtype: str) -> dict[str, float]:
    """Measure one side in a new process.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, __file__, "worker", side, str(folder), dtype, str(time.time())]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"the process of {side} ended with {process.returncode}; its stderr is above")
    result: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    print(f"{side}: {result['s']:.1f} s", file=sys.stderr)
    return result


def prompt_folder(folder: Path, dtype: str) -> None:
    """Write a PEFT prompt folder for the backbone."""
    import torch

    from softprompt import DPT, load_backbone
    from softprompt.export.peft import export_peft

    backbone = load_backbone(BACKBONE, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    export_peft(DPT(length=100).build(backbone.host(), torch.Generator().manual_seed(0)).fold(), backbone, folder)


def main() -> None:
    """Compare the sides, or act as the worker process of one of them."""
    if sys.argv[1:2] == ["worker"]:
        side, folder, dtype, start = sys.argv[2:]
        worker(side, Path(folder), dtype, float(start))
        return
    settings = tyro.cli(Settings, description=__doc__)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        prompt_folder(Path(folder), settings.dtype)
        rounds = [
            {side: run_worker(side, Path(folder), settings.dtype) for side in SIDES} for _ in range(settings.rounds)
        ]
    speedups = [results["peft"]["s"] / results["softprompt"]["s"] for results in rounds]
    report = {
        "benchmark": "start", "cores": os.cpu_count(), "load_before": load, "dtype": settings.dtype, "runs": rounds,
        "speedup": statistics.median(speedups), "spread": [min(speedups), max(speedups)],
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
