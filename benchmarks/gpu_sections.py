"""The sections of gpu.py: each returns what it measured as JSON values."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generate
import multi_prompt
import score
from gpu_sides import Models, Plan, compare
from train_step import decomposed, ours, peft, plain

ROOT = Path(__file__).resolve().parent.parent


def parity(plan: Plan, left: float) -> dict[str, Any]:
    """tests/devices, on the GPU or the pretend device."""
    device = "cuda" if plan.device == "cuda" else "pretend"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rs", "tests/devices"]
    environment = {**os.environ, "SOFTPROMPT_TEST_DEVICE": device, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        timeout=600 if plan.toy else min(200.0, left - 30.0),
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    return {"device": device, "passed": done.returncode == 0, "summary": lines[-1:], "failures": lines[-80:-1]
            if done.returncode else []}  # fmt: skip


def training(plan: Plan, models: Models, left: Callable[[], float]) -> Any:
    """Both models at every shape, the small ones first."""
    cases: list[dict[str, Any]] = []
    for rows, tokens in plan.shapes:
        for model in ("smollm2-135m", "llama-1b"):
            if left() < 60:
                cases.append({"model": model, "rows": rows, "tokens": tokens, "skipped": "no time is left"})
                continue
            sides = {
                "plain": ours(plain, models.load(model, "ours")),
                "dpt": ours(decomposed, models.load(model, "ours")),
                "peft": peft(models.load(model, "peft"), use_cache=False),
            }
            cases.append({"model": model, **compare(plan, sides, rows, tokens)})
    return cases


def compiled(plan: Plan, models: Models, left: Callable[[], float]) -> Any:
    """The training step with compiled layers, at the first and the last shape; on a CPU without CUDA graphs."""
    modes = ("default", "reduce-overhead") if plan.device == "cuda" else ("default",)
    cases: list[dict[str, Any]] = []
    for mode in modes:
        for rows, tokens in (plan.shapes[0], plan.shapes[-1]):
            case: dict[str, Any] = {"mode": mode, "model": "smollm2-135m", "rows": rows, "tokens": tokens}
            if left() < 60:
                cases.append({**case, "skipped": "no time is left"})
                continue
            sides = {
                "plain": ours(plain, models.load("smollm2-135m", f"ours:{mode}")),
                "peft": peft(models.load("smollm2-135m", f"peft:{mode}"), use_cache=False),
            }
            try:
                cases.append({**case, **compare(plan, sides, rows, tokens)})
            except Exception as error:  # the other mode should still be measured
                cases.append({**case, "error": f"{type(error).__name__}: {str(error)[-800:]}"})
    return cases


def scoring(plan: Plan, models: Models) -> Any:
    """Two answers per row."""
    own, theirs = (models.load("smollm2-135m", use) for use in ("ours", "peft"))
    sides = {
        "folded": lambda spec: score.folded(spec, own),
        "peft": lambda spec: score.peft(spec, theirs),
    }
    return [compare(plan, sides, plan.rows, tokens) for _, tokens in plan.shapes[:2]]


def generation(plan: Plan, models: Models) -> Any:
    """New tokens for one row and for 16; no loss is compared, only the number of tokens."""
    own, theirs = (models.load("smollm2-135m", use) for use in ("ours", "peft"))
    sides = {"text": generate.ours(plan.new_tokens, own), "peft": generate.peft(plan.new_tokens, theirs)}
    return [compare(plan, sides, rows, 32) | {"new_tokens": plan.new_tokens} for rows in (1, 16)]


def mixed_prompts(plan: Plan, models: Models) -> Any:
    """A batch whose rows have 16 prompts."""
    own, theirs = (models.load("smollm2-135m", use) for use in ("ours", "peft"))
    sides = {
        "indexed": lambda spec: multi_prompt.indexed(spec, own),
        "peft": lambda spec: multi_prompt.switching(spec, theirs),
    }
    return [compare(plan, sides, plan.rows, tokens, roundings=4) for _, tokens in plan.shapes[:2]]


def real_rows(plan: Plan, models: Models, folder: Path) -> Any:
    """Training steps on the task `sentiment`, by softprompt's own trainer."""
    from softprompt import DPT, Experiment, TrainingConfig, train
    from softprompt.assets import cache_folder, locate

    if locate("rotten-tomatoes") is None:
        return {"skipped": f"the rows (asset rotten-tomatoes) are not in the cache {cache_folder()}"}
    steps = plan.train_steps
    training_config = TrainingConfig(
        steps=steps, batch_size=4 if plan.toy else 16, eval_steps=steps // 2, dev_rows=8 if plan.toy else 200,
        test_rows=8 if plan.toy else 400, max_input_tokens=64 if plan.toy else 0,
    )  # fmt: skip
    prompt = DPT(length=plan.length, rank=plan.rank)
    experiment = Experiment(
        backbone=models.source, task="sentiment", prompt=prompt, training=training_config, dtype=plan.dtype
    )
    started = time.perf_counter()
    run = train(experiment, out=folder / "runs")
    metrics = [line["loss"] for line in run.metrics()]
    assert run.results is not None
    names = ("test", "majority", "dev", "seconds")
    part = max(1, steps // 10)
    return {
        "model": models.notes["smollm2-135m"],
        "steps": steps,
        "loss_first": statistics.mean(metrics[:part]),
        "loss_last": statistics.mean(metrics[-part:]),
        "results": {name: run.results[name] for name in names if name in run.results},
        "total_seconds": time.perf_counter() - started,
    }
