"""A run's model card (`README.md`) and its learning curve."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.models import PromptedModel
from softprompt.runs import HEAD, TENSORS, TUNED, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MODELS = {"causal": "AutoModelForCausalLM", "encoder_decoder": "AutoModelForSeq2SeqLM"}


def write(run: Run, trained: PromptedModel, results: Mapping[str, Any], peft_problem: str) -> str:
    """Write `README.md`, and `curve.png` if the extra `report` is installed.

    Args:
        peft_problem: why there are no PEFT files; empty if there are.

    Returns:
        Why the learning curve could not be drawn, which must not keep a trained run from finishing; empty if it was.
    """
    usage = f"Stock PEFT cannot load it: {peft_problem}." if peft_problem else _peft_usage(run, trained)
    parts = {TENSORS: trained.prompt, HEAD: trained.head, TUNED: trained.tuned}
    tensor_files = " and ".join(f"`{name}`" for name, part in parts.items() if part is not None)
    files.write_text(run.folder / "README.md", _text(run, results, usage, tensor_files))
    if importlib.util.find_spec("matplotlib") is not None:
        try:
            _curve(run)
        except Exception as error:
            return f"the learning curve could not be drawn ({files.one_line(error)}); the run is complete without it"
    return ""


def _peft_usage(run: Run, trained: PromptedModel) -> str:
    model = _auto_class(trained.backbone)
    notes = f" The trained head is in `{HEAD}`." if trained.head is not None else ""
    base = Path(trained.backbone.base)
    source = f'"{trained.backbone.base}"'
    if base.suffix == ".gguf":
        source = f'"{base.parent}", gguf_file="{base.name}"'
        notes += " The base model is a GGUF file, which `AutoPeftModel` cannot load by its path; load it as shown here."
    return f"""Stock PEFT loads this folder as it is.{notes}

```python
from peft import PeftModel
from transformers import {model}

model = PeftModel.from_pretrained({model}.from_pretrained({source}), "{run.name}")
```"""


def _auto_class(backbone: Backbone) -> str:
    if backbone.masked_lm:
        return "AutoModelForMaskedLM"
    return _MODELS.get(backbone.architecture, "AutoModel")


def _text(run: Run, results: Mapping[str, Any], usage: str, tensor_files: str) -> str:
    experiment, backbone = run.experiment, run.record["backbone"]
    layout = ", one prompt per layer" if experiment.depth == "deep" else ""
    layout = f", {experiment.unusual_layout}" if experiment.unusual_layout else layout
    size = f"{experiment.method}, {experiment.prompt.length} virtual tokens{layout}"
    subject = (
        f"A soft prompt ({size}) on `{backbone['base']}`"
        if experiment.baseline == "none"
        else f"The baseline `{experiment.baseline}` on `{backbone['base']}`"
    )
    zero_shot = f"| zero-shot, same template | {results['zero_shot']:.3f} |\n" if "zero_shot" in results else ""
    warning = results.get("selection_warning", "")
    if warning:
        warning = f"\n**{warning.capitalize()}**, as in the papers: compare it only with scores of the same kind.\n"
    interval = f"{results['ci_low']:.3f} to {results['ci_high']:.3f}"
    rows = "photos" if run.task.image else "chats.jsonl" if run.task.messages else "rows.csv"
    note = f"\nThe backbone's weights: {backbone['note']}.\n" if backbone["note"] else ""
    return f"""# {run.name}

{subject}, for the task `{run.task.name}`: {results["trainable"]:,} trained parameters.
{note}
| | {results["metric"]} |
|---|---|
| test ({results["n_test"]} rows, 95 % interval {interval}) | {results["test"]:.3f} |
{zero_shot}| always the majority answer | {results["majority"]:.3f} |
| development ({results["n_dev"]} rows, selected the checkpoint of step {results["best_step"]}) | {results["dev"]:.3f} |
{warning}
{usage}

```
softprompt predict {run.name} --input {rows}
softprompt evaluate {run.name}
```

`softprompt.json` records how it was trained; the trained tensors are in {tensor_files}.
"""


def _curve(run: Run) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    with rc_context({"text.parse_math": False}):  # a dollar sign in a name is a dollar sign
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        _draw_curve(figure, run)
        with files.atomic_write(run.folder / "curve.png") as draft:
            figure.savefig(draft, format="png", dpi=120)


def _draw_curve(figure: "Figure", run: Run) -> None:
    lines = list(run.metrics())
    losses = figure.subplots()
    losses.plot([line["step"] for line in lines], [line["loss"] for line in lines], color="0.6", linewidth=0.8)
    losses.set(xlabel="step", ylabel="training loss", title=run.name)
    scores = losses.twinx()
    points = [(line["step"], line["dev"]) for line in lines if "dev" in line]
    scores.plot([step for step, _ in points], [value for _, value in points], marker="o", color="C0")
    scores.set_ylabel(f"development {run.task.metrics[0]}", color="C0")
