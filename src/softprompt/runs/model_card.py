"""A run's README and its learning curve, for whoever opens the folder."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.models import PromptedModel
from softprompt.runs import HEAD, TENSORS, TUNED, Run

_MODELS = {"causal": "AutoModelForCausalLM", "encoder_decoder": "AutoModelForSeq2SeqLM"}


def write(run: Run, trained: PromptedModel, results: Mapping[str, Any], refusal: str) -> None:
    """Write `README.md`, and `curve.png` where the extra `report` is installed.

    Args:
        refusal: why there is no PEFT pair; empty where there is one.
    """
    use = f"Stock PEFT cannot load it: {refusal}." if refusal else _use(run, trained)
    parts = {TENSORS: trained.prompt, HEAD: trained.head, TUNED: trained.tuned}
    kept = " and ".join(f"`{name}`" for name, part in parts.items() if part is not None)
    files.write_text(run.folder / "README.md", _text(run, results, use, kept))
    if importlib.util.find_spec("matplotlib") is not None:
        _curve(run)


def _use(run: Run, trained: PromptedModel) -> str:
    model = _model(trained.backbone)
    head = f" The head that was trained with it is apart, in `{HEAD}`." if trained.head is not None else ""
    base = Path(trained.backbone.base)
    where = f'"{trained.backbone.base}"'
    if base.suffix == ".gguf":
        where = f'"{base.parent}", gguf_file="{base.name}"'
        head += " The base model is a GGUF file, which `AutoPeftModel` cannot load by its path; do it as here."
    return f"""Stock PEFT loads this folder as it is.{head}

```python
from peft import PeftModel
from transformers import {model}

model = PeftModel.from_pretrained({model}.from_pretrained({where}), "{run.name}")
```"""


def _model(backbone: Backbone) -> str:
    if backbone.masked_lm:
        return "AutoModelForMaskedLM"
    return _MODELS.get(backbone.architecture, "AutoModel")


def _text(run: Run, results: Mapping[str, Any], use: str, kept: str) -> str:
    experiment, backbone = run.experiment, run.record["backbone"]
    where = ", in front of every layer" if experiment.depth == "deep" else ""
    where = f", {experiment.unusual_layout}" if experiment.unusual_layout else where
    size = f"{experiment.method}, {experiment.prompt.length} virtual tokens{where}"
    what = (
        f"A soft prompt ({size}) on `{backbone['base']}`"
        if experiment.baseline == "none"
        else f"The baseline `{experiment.baseline}` on `{backbone['base']}`"
    )
    zero_shot = f"| zero-shot, same template | {results['zero_shot']:.3f} |\n" if "zero_shot" in results else ""
    caution = (
        f"\n**{results['caution'].capitalize()}**, as the papers do: compare it with such scores alone.\n"
        if "caution" in results
        else ""
    )
    note = f"\nThe backbone's weights: {backbone['note']}.\n" if backbone["note"] else ""
    return f"""# {run.name}

{what}, for the task `{run.task.name}`: {results["trainable"]:,} trained numbers.
{note}
| | {results["metric"]} |
|---|---|
| test ({results["n_test"]} rows, 95 % interval {results["low"]:.3f} to {results["high"]:.3f}) | {results["test"]:.3f} |
{zero_shot}| always the majority answer | {results["majority"]:.3f} |
| development ({results["n_dev"]} rows, chose the checkpoint of step {results["best_step"]}) | {results["dev"]:.3f} |
{caution}
{use}

```
softprompt predict {run.name} --input {"photos" if run.task.image else "rows.csv"}
softprompt evaluate {run.name}
```

`softprompt.json` says how it was made; what was trained is in {kept}.
"""


def _curve(run: Run) -> None:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    lines = list(run.metrics())
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    losses = figure.subplots()
    losses.plot([line["step"] for line in lines], [line["loss"] for line in lines], color="0.6", linewidth=0.8)
    losses.set(xlabel="step", ylabel="training loss", title=run.name)
    scores = losses.twinx()
    points = [(line["step"], line["dev"]) for line in lines if "dev" in line]
    scores.plot([step for step, _ in points], [value for _, value in points], marker="o", color="C0")
    scores.set_ylabel(f"development {run.task.metrics[0]}", color="C0")
    with files.atomic_write(run.folder / "curve.png") as draft:
        figure.savefig(draft, format="png", dpi=120)
