"""Tests and benchmarks on one GPU, in 8 minutes at most; without one, everything at toy size on the CPU.

    benchmarks/gpu.sh [--cache FOLDER] [--output FILE] [--seconds 470] [--toy]

The last line of stdout is JSON; with `--output` the same is written to a file after each section, so that a killed
process leaves what it had. A section that fails has its `error`; one that does not fit into `--seconds`, or whose
packages are missing (`environment.missing`), says why under `skipped`.

- `parity`: tests/devices on this device: what users do, compared with the CPU's numbers.
- `training`: our step (`plain`, `dpt`) and PEFT's without its cache, as in train_step.py; SmolLM2-135M and the shape of
  Llama 3.2 1B with its 16 layers and random weights; 16 and 128 rows, 64 and 512 tokens.
- `compiled`: the same with each layer compiled by torch.compile, and with CUDA graphs (`reduce-overhead`).
- `scoring`, `generation`, `mixed_prompts`: as in score.py, generate.py and multi_prompt.py.
- `real_rows`: 200 training steps, with evaluations, on the task `sentiment`.

`seconds` is the median of the repetitions after one that is not timed; the sides alternate. `prepare_seconds` are
those of loading and attaching, which runs the layers and so compiles them, `first_seconds` those of the first run.
`peak_mb` is the most memory that torch allocated during the first run, and `over_mb` the part of it that was added
(on a CPU, resident memory). Where `loss_gap` is above `loss_tolerance`, the sides did not do the same work.
SmolLM2-135M and the rows come from the cache folder of softprompt's assets (`--cache`, else `SOFTPROMPT_CACHE`, else
the usual one); nothing is downloaded. Without the model in it, a model of its shape with random weights takes its
place, and `models` says so.
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, final

NEEDED = (
    "torch", "transformers", "accelerate", "datasets", "safetensors", "sklearn", "scipy", "numpy", "tyro", "rich",
    "jaxtyping", "gguf", "tokenizers", "peft",
)  # fmt: skip
NEEDED_BY_TESTS = ("pytest", "beartype", "filelock", "PIL", "fastapi", "uvicorn", "prometheus_client", "matplotlib")


class OutOfTime(Exception):
    """Ends the section that runs when the time is over."""


@final
class Report:
    """The results so far, section by section.

    Args:
        seconds: the time for everything; the section that runs at its end is stopped.
        output: rewritten after each section.
    """

    def __init__(self, seconds: float, output: Path | None) -> None:
        self.values: dict[str, Any] = {}
        self._deadline, self._output = time.monotonic() + seconds, output

        def stop(*_: object) -> None:
            raise OutOfTime(f"the {seconds:.0f} seconds are over")

        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self._deadline - time.monotonic()

    def section(self, name: str, measure: Callable[[], Any], least: float = 20.0) -> None:
        """Add what `measure` returns, or why it could not run.

        Args:
            least: seconds without which it is not started.
        """
        started = time.monotonic()
        if self.left < least:
            value: Any = {"skipped": f"{max(self.left, 0):.0f} seconds are left, and it needs {least:.0f}"}
        else:
            try:
                value = measure()
            except Exception as error:  # the others should still be measured
                value = {"error": f"{type(error).__name__}: {str(error)[-1500:]}"}
        self.values[name] = value
        self.values.setdefault("section_seconds", {})[name] = round(time.monotonic() - started, 1)
        print(f"{name}: {self.values['section_seconds'][name]} s", file=sys.stderr, flush=True)
        if self._output is not None:
            self._output.write_text(json.dumps(self.values, indent=1))


def environment() -> dict[str, Any]:
    """Versions, the device, and the packages that are missing."""
    names = {name: importlib.util.find_spec(name) is not None for name in (*NEEDED, *NEEDED_BY_TESTS)}
    values: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "missing": [name for name in NEEDED if not names[name]],
        "missing_for_tests": [name for name in NEEDED_BY_TESTS if not names[name]],
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft") if names[name]},
        "cuda": None,
    }
    if names["torch"]:
        import torch

        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            values["cuda"] = {
                "device": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
                "toolkit": torch.version.cuda,
            }
    return values


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="softprompt's cache folder with smollm2-135m and rotten-tomatoes")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file, after each section")
    parser.add_argument("--seconds", type=float, default=470.0, help="the time for everything")
    parser.add_argument("--toy", action="store_true", help="small sizes, which a CPU always gets")
    arguments = parser.parse_args()
    if arguments.cache is not None:
        if not arguments.cache.is_dir():
            parser.error(f"--cache is {arguments.cache}, which is no folder; give softprompt's cache folder")
        os.environ["SOFTPROMPT_CACHE"] = str(arguments.cache.absolute())
    report = Report(arguments.seconds, arguments.output)
    report.values["environment"] = found = environment()
    if found["missing"]:
        print(json.dumps(report.values))
        sys.exit(f"missing packages: {', '.join(found['missing'])}")
    import gpu_sections as sections  # needs the packages
    from gpu_sides import Models, Plan

    device = "cuda" if found["cuda"] else "cpu"
    plan = Plan.of(device, toy=arguments.toy or device == "cpu")
    if device == "cpu":
        report.values["note"] = "no GPU: everything ran at toy size on the CPU, so the times say nothing"
    report.values |= {"device": device, "toy": plan.toy}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = Models(plan, folder / "model")
        report.values["models"] = models.notes
        if found["missing_for_tests"]:
            report.values["parity"] = {"skipped": f"missing packages: {', '.join(found['missing_for_tests'])}"}
        else:
            report.section("parity", lambda: sections.parity(plan, report.left), 60.0)
        report.section("scoring", lambda: sections.scoring(plan, models))
        report.section("generation", lambda: sections.generation(plan, models))
        report.section("mixed_prompts", lambda: sections.mixed_prompts(plan, models))
        report.section("real_rows", lambda: sections.real_rows(plan, models, folder), 60.0)
        report.section("training", lambda: sections.training(plan, models, lambda: report.left), 60.0)
        report.section("compiled", lambda: sections.compiled(plan, models, lambda: report.left), 60.0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(report.values))


if __name__ == "__main__":
    main()
