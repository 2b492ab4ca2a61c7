"""Compare a finished run with stock PEFT on the same backbone: logits and greedy texts on the task's test rows.

    python benchmarks/peft_parity.py runs/sentiment-dpt-0 --rows 50

Both sides use float32 and one row at a time, because PEFT's outputs depend on padding. Prints one JSON object.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro
from peft import PeftModel

import softprompt
from softprompt.tasks.data.splits import splits


def main(run: Annotated[Path, tyro.conf.Positional], rows: int = 50, new_tokens: int = 12) -> None:
    """Compare a run with stock PEFT.

    Args:
        run: The run's folder.
        rows: Number of test rows.
        new_tokens: Tokens to generate per row.
    """
    loaded = softprompt.open_run(run)
    backbone = softprompt.load_backbone(loaded.experiment.backbone, dtype="float32")
    ours = softprompt.attach(backbone, loaded.prompt(backbone).fold())
    texts = [loaded.task.render(row) for row in splits(loaded.task).test.select(range(rows))]
    ids = [backbone.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    prepared = ours.prepare([ours.prompt])
    with torch.no_grad():
        logits = [ours(row, prompts=prepared).logits for row in ids]
        generated = [
            torch.stack(list(ours.generate(row, max_new_tokens=new_tokens, prompts=prepared)), 1)[0].tolist()
            for row in ids
        ]
        backbone.model.set_attn_implementation("sdpa")  # transformers' default, for PEFT
        theirs = PeftModel.from_pretrained(backbone.model, run).eval()
        gap, size, equal = 0.0, 0.0, 0
        for row, mine, text in zip(ids, logits, generated, strict=True):
            other = theirs(input_ids=row, attention_mask=torch.ones_like(row)).logits[:, -row.shape[1] :]
            gap, size = max(gap, float((mine - other).abs().max())), max(size, float(other.abs().max()))
            out = theirs.generate(
                input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=new_tokens, do_sample=False
            )
            equal += out[0, row.shape[1] :].tolist()[: len(text)] == text
    relative = gap / size
    print(f"logits differ by {gap:.2g} ({relative:.2g} of the largest); equal texts {equal} of {rows}", file=sys.stderr)
    print(json.dumps({"rows": rows, "difference": gap, "relative": relative, "equal_texts": equal}))


if __name__ == "__main__":
    tyro.cli(main)
