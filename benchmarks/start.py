"""Seconds from the start of a process to a prompt's first answer, beside PEFT on transformers' own loading.

    python benchmarks/start.py [--rounds 3] [--dtype float32]

Both sides load the same backbone (a GGUF file) and the same PEFT prompt folder in a process of their own and score two
answers to one row. Ours keeps the weights as the safetensors of an earlier load beside its other assets, and is given
that load before the clock starts; transformers takes the file's four-bit numbers apart every time. `s` is the whole,
`loaded_s` the time when model and prompt were there; imports are among both. The last line of stdout is JSON.
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
    """What both sides are given."""

    rounds: int = 3
    """Times that each side is started, in turn."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the backbone computes in."""


def ours(folder: Path, dtype: str) -> Any:
    """Backbone and prompt as softprompt loads them; what scores a row."""
    import torch

    from softprompt import attach, load_backbone
    from softprompt.runs import read_prompt

    backbone = load_backbone(BACKBONE, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    prompted = attach(backbone, read_prompt(folder, backbone))

    def run() -> float:
        ids = torch.tensor([backbone.tokenizer(TEXT)["input_ids"]])
        with torch.no_grad():
            return float(prompted.score(ids, None, [[one] for one in answers(backbone.tokenizer)])[0, 0])

    return run


def peft(folder: Path, dtype: str) -> Any:
    """The same as transformers and PEFT load them."""
    import torch
    import transformers
    from peft import PeftModel

    from softprompt.assets import fetch

    file = fetch(BACKBONE)
    named = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**named)
    base = transformers.AutoModelForCausalLM.from_pretrained(**named, dtype=getattr(torch, dtype))
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
    """One side in this process; prints what it found."""
    run = SIDES[side](folder, dtype)
    loaded = time.time() - start
    score = run()
    print(json.dumps({"s": time.time() - start, "loaded_s": loaded, "score": score}))


def started(side: str, folder: Path, dtype: str) -> dict[str, float]:
    """What a side finds in a process of its own.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, __file__, "worker", side, str(folder), dtype, str(time.time())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process of {side} ended with {done.returncode}; what it said is above")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{side}: {found['s']:.1f} s", file=sys.stderr)
    return found


def prompt_folder(folder: Path, dtype: str) -> None:
    """A PEFT prompt of the backbone."""
    import torch

    from softprompt import DPT, load_backbone
    from softprompt.export.peft import export_peft

    backbone = load_backbone(BACKBONE, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    export_peft(DPT(length=100).build(backbone.host(), torch.Generator().manual_seed(0)).fold(), backbone, folder)


def main() -> None:
    """Compare the sides, or be one of them."""
    if sys.argv[1:2] == ["worker"]:
        side, folder, dtype, start = sys.argv[2:]
        worker(side, Path(folder), dtype, float(start))
        return
    settings = tyro.cli(Settings, description=__doc__)
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        prompt_folder(Path(folder), settings.dtype)
        rounds = [{side: started(side, Path(folder), settings.dtype) for side in SIDES} for _ in range(settings.rounds)]
    ratios = [one["peft"]["s"] / one["softprompt"]["s"] for one in rounds]
    found = {
        "benchmark": "start", "cores": os.cpu_count(), "load_before": busy, "dtype": settings.dtype, "runs": rounds,
        "ratio": statistics.median(ratios), "spread": [min(ratios), max(ratios)],
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
