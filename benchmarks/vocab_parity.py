"""Does an exported checkpoint say what the live runs say? Real rows, three prompts mixed in a batch.

    python benchmarks/vocab_parity.py runs/sentiment-dpt-0 runs/boolq-plain-0 runs/sentiment-residual-0 --rows 50

The runs are exported to `vocab` in float32, loaded by plain transformers, and given the first run's test rows as token
ids, neighbours with different prompts. Fewer than three runs are filled up with prompts of sampled input vectors.
Prints one JSON object.
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
from softprompt.export.probe import left_padded
from softprompt.tasks import answer_ids, encode

BATCH = 9


def fill_up(opened: list[softprompt.Run], backbone: Backbone, out: Path) -> list[softprompt.Run]:
    """Three runs, the missing ones never trained."""
    for number in range(len(opened), 3):
        config = softprompt.Plain(length=10 + 7 * number)
        prompt = config.build(backbone.host(), torch.Generator().manual_seed(number))
        experiment = opened[0].experiment.replace(prompt=config, dtype="float32")
        run = runs.create(experiment, opened[0].task, backbone, out, f"untrained-{number}", "")
        opened.append(run.finish(softprompt.attach(backbone, prompt), {}))
    return opened


def scores(model: Any, row: Sequence[int], words: Sequence[Sequence[int]], old: int) -> torch.Tensor:
    """Log-probability of each word behind a row of plain ids, among the backbone's own tokens."""
    found = []
    for word in words:
        logits = model(input_ids=torch.tensor([[*row, *word]]), logits_to_keep=len(word) + 1).logits[0, :-1, :old]
        found.append(float(logits.float().log_softmax(-1)[torch.arange(len(word)), torch.tensor(word)].sum()))
    return torch.tensor(found)


@torch.no_grad()
def main(
    run: Annotated[tuple[Path, ...], tyro.conf.Positional], rows: int = 50, new_tokens: int = 12, max_tokens: int = 128
) -> None:
    """Compare an exported checkpoint with the live runs.

    Args:
        run: The runs' folders, of one backbone; a decoder.
        rows: Test rows of the first run's task.
        new_tokens: Tokens to generate for each.
        max_tokens: Longest input.
    """
    opened = [softprompt.open_run(folder) for folder in run]
    backbone = softprompt.load_backbone(opened[0].experiment.backbone, dtype="float32")
    with tempfile.TemporaryDirectory() as scratch:
        trained = fill_up(opened, backbone, Path(scratch) / "runs")
        folded = [one.prompt(backbone).fold() for one in trained]
        start = time.perf_counter()
        report = export_runs(trained, FORMATS["vocab"], Path(scratch) / "checkpoint", backbone=backbone)
        seconds = time.perf_counter() - start
        usage = json.loads((Path(scratch) / "checkpoint" / "prompts.json").read_text())
        plain = AutoModelForCausalLM.from_pretrained(Path(scratch) / "checkpoint", dtype="float32").eval()
    task, tokenizer, live = trained[0].task, backbone.tokenizer, softprompt.attach(backbone)
    test = read_splits(opened[0].experiment, task).test
    rows = min(rows, len(test))
    table = list(test.select(range(rows)))
    texts = [one.input_ids for one in encode(task, tokenizer, table, max_tokens, answers=False)[0]]
    words = answer_ids(task, tokenizer) if task.is_classification else ()
    prefix = [usage["prompts"][one.name]["ids"] for one in trained]
    prepared = live.prepare(folded)
    equal, gap, labels, said = 0, 0.0, 0, 0
    for begin in range(0, rows, BATCH):
        part = texts[begin : begin + BATCH]
        index = torch.arange(begin, begin + len(part)) % len(trained)
        whole = [[*prefix[which], *text] for which, text in zip(index.tolist(), part, strict=True)]
        ids, mask = left_padded(part, 0)
        given, given_mask = left_padded(whole, 0)
        written = plain.generate(
            input_ids=given,
            attention_mask=given_mask,
            max_new_tokens=new_tokens,
            min_new_tokens=None,
            do_sample=False,
            pad_token_id=0,
        )[:, given.shape[1] :]
        ours = torch.stack(list(live.generate(ids, mask, max_new_tokens=new_tokens, prompts=prepared, index=index)), 1)
        said += int(torch.isin(written, torch.tensor(usage["never_said"])).sum())
        ends = set(live.end_of_sequence())
        equal += sum(ended(mine, ends) == ended(its, ends) for mine, its in zip(ours, written, strict=True))
        if words:
            mine = live.score(ids, mask, words, prompts=prepared, index=index)
            theirs = torch.stack([scores(plain, row, words, usage["never_said"][0]) for row in whole])
            gap = max(gap, float((mine - theirs).abs().max()))
            labels += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
        print(f"{begin + len(part)} of {rows} rows, equal texts {equal}", file=sys.stderr)
    result = {
        "rows": rows,
        "prompts": report["prompts"],
        "equal_texts": equal,
        "equal_labels": labels if words else None,
        "largest_score_difference": gap if words else None,
        "prompt_tokens_said": said,
        "export": {key: report[key] for key in ("as_text", "largest_difference", "unsuppressed_probability")},
        "export_seconds": round(seconds, 1),
    }
    print(json.dumps(result))


def ended(tokens: torch.Tensor, ends: set[int]) -> list[int]:
    """The tokens before the first that ends a generation."""
    found: list[int] = []
    for token in tokens.tolist():
        if token in ends:
            break
        found.append(token)
    return found


if __name__ == "__main__":
    tyro.cli(main)
