"""Compare a `vocab` export with the live runs on real rows, with three prompts mixed in a batch.

    python benchmarks/vocab_parity.py runs/sentiment-dpt-0 runs/boolq-plain-0 runs/sentiment-residual-0 --rows 50

The runs are exported to `vocab` in float32 and loaded by plain transformers. Both sides get the first run's test rows
as token ids, adjacent rows with different prompts. Fewer than three runs are completed with untrained prompts. Prints
one JSON object.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from transformers import AutoModelForCausalLM

import softprompt
from softprompt import runs
from softprompt.backbones import Backbone
from softprompt.evaluation.evaluate import read_splits
from softprompt.export import FORMATS, export_runs
from softprompt.models.padding import pad_batch
from softprompt.tasks.data.tokenize import answer_ids, encode

BATCH = 9


def add_untrained(loaded: list[softprompt.Run], backbone: Backbone, out: Path) -> list[softprompt.Run]:
    """Complete the list to three runs with untrained ones."""
    for number in range(len(loaded), 3):
        config = softprompt.Plain(length=10 + 7 * number)
        prompt = config.build(backbone.host(), torch.Generator().manual_seed(number))
        experiment = loaded[0].experiment.replace(prompt=config, dtype="float32")
        run = runs.create(experiment, loaded[0].task, backbone, out, f"untrained-{number}", "")
        loaded.append(run.finish(softprompt.attach(backbone, prompt), {}))
    return loaded


def scores(model: Any, row: Sequence[int], words: Sequence[Sequence[int]], vocab_size: int) -> torch.Tensor:
    """Log-probability of each label word after a row of token ids, among the backbone's original tokens."""
    log_probs = []
    for word in words:
        logits = model(input_ids=torch.tensor([[*row, *word]]), logits_to_keep=len(word) + 1).logits[
            0, :-1, :vocab_size
        ]
        log_probs.append(float(logits.float().log_softmax(-1)[torch.arange(len(word)), torch.tensor(word)].sum()))
    return torch.tensor(log_probs)


@torch.no_grad()
def main(
    run: Annotated[tuple[Path, ...], tyro.conf.Positional],
    rows: int = 50,
    new_tokens: int = 12,
    max_input_tokens: int = 128,
) -> None:
    """Compare an exported checkpoint with the live runs.

    Args:
        run: Run folders, all of one decoder.
        rows: Number of test rows of the first run's task.
        new_tokens: Tokens to generate per row.
        max_input_tokens: Maximum input length in tokens.
    """
    loaded = [softprompt.open_run(folder) for folder in run]
    backbone = softprompt.load_backbone(loaded[0].experiment.backbone, dtype="float32")
    with tempfile.TemporaryDirectory() as scratch:
        trained = add_untrained(loaded, backbone, Path(scratch) / "runs")
        folded = [item.prompt(backbone).fold() for item in trained]
        start = time.perf_counter()
        report = export_runs(trained, FORMATS["vocab"], Path(scratch) / "checkpoint", backbone=backbone)
        seconds = time.perf_counter() - start
        usage = json.loads((Path(scratch) / "checkpoint" / "prompts.json").read_text())
        plain = AutoModelForCausalLM.from_pretrained(Path(scratch) / "checkpoint", dtype="float32").eval()
    task, tokenizer, live = trained[0].task, backbone.tokenizer, softprompt.attach(backbone)
    test = read_splits(loaded[0].experiment, task).test
    rows = min(rows, len(test))
    table = list(test.select(range(rows)))
    texts = [example.input_ids for example in encode(task, tokenizer, table, max_input_tokens, answers=False)[0]]
    words = answer_ids(task, tokenizer) if task.is_classification else ()
    prefix = [usage["prompts"][item.name]["ids"] for item in trained]
    prepared = live.prepare(folded)
    equal, gap, labels, generated_prompt_tokens = 0, 0.0, 0, 0
    for begin in range(0, rows, BATCH):
        batch = texts[begin : begin + BATCH]
        index = torch.arange(begin, begin + len(batch)) % len(trained)
        full = [[*prefix[number], *text] for number, text in zip(index.tolist(), batch, strict=True)]
        ids, mask = pad_batch(batch, torch.device("cpu"), "left")
        full_ids, full_mask = pad_batch(full, torch.device("cpu"), "left")
        generated = plain.generate(
            input_ids=full_ids,
            attention_mask=full_mask,
            max_new_tokens=new_tokens,
            min_new_tokens=None,
            do_sample=False,
            pad_token_id=0,
        )[:, full_ids.shape[1] :]
        ours = torch.stack(list(live.generate(ids, mask, max_new_tokens=new_tokens, prompts=prepared, index=index)), 1)
        generated_prompt_tokens += int(torch.isin(generated, torch.tensor(usage["suppressed_ids"])).sum())
        ends = set(live.end_of_sequence())
        equal += sum(before_end(mine, ends) == before_end(its, ends) for mine, its in zip(ours, generated, strict=True))
        if words:
            mine = live.score(ids, mask, words, prompts=prepared, index=index)
            theirs = torch.stack([scores(plain, row, words, usage["suppressed_ids"][0]) for row in full])
            gap = max(gap, float((mine - theirs).abs().max()))
            labels += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
        print(f"{begin + len(batch)} of {rows} rows, equal texts {equal}", file=sys.stderr)
    result = {
        "rows": rows,
        "prompts": report["prompts"],
        "equal_texts": equal,
        "equal_labels": labels if words else None,
        "largest_score_difference": gap if words else None,
        "generated_prompt_tokens": generated_prompt_tokens,
        "export": {key: report[key] for key in ("as_text", "largest_difference", "unsuppressed_probability")},
        "export_seconds": round(seconds, 1),
    }
    print(json.dumps(result))


def before_end(tokens: torch.Tensor, ends: set[int]) -> list[int]:
    """The tokens before the first end-of-sequence token."""
    kept: list[int] = []
    for token in tokens.tolist():
        if token in ends:
            break
        kept.append(token)
    return kept


if __name__ == "__main__":
    tyro.cli(main)
