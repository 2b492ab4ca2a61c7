"""A small T5 trained from random weights, and a copying task for it: experiments without a downloaded model.

    python benchmarks/tiny_t5.py FOLDER

The T5 (width 64, two layers) learns to copy three letters, or to reverse them if the input starts with a mode token.
FOLDER then contains the model, its tokenizer, and `reverse.toml` with rows on which a prompt can learn to reverse the
letters without the mode token. The last line of stdout is JSON: the shares of 500 rows that the T5 without a prompt
copies, and reverses with and without the mode token.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

LETTERS = "abcdefghij"
MODE = "reverse"
STEPS = 900
TASK = """train = "rows.jsonl"
template = "{text}"
target = "answer"
metrics = ["exact_match"]
"""


def tokenizer() -> Any:
    """A word-level tokenizer with one word per letter."""
    vocab = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", MODE, *LETTERS])}
    word_level = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    word_level.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_level, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def model() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=4 + len(LETTERS),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
    )


def batch(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of three letters and the end of sequence, and the same rows after the mode token."""
    ids = torch.randint(4, 4 + len(LETTERS), (count, 3), generator=generator)
    ends = torch.ones(count, 1, dtype=torch.long)
    return torch.cat([ids, ends], 1), torch.cat([torch.full((count, 1), 3), ids, ends], 1)


def reversed_rows(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([ids[:, :3].flip(1), ids[:, 3:]], 1)


def learn(t5: Any) -> None:
    """Train both tasks from random weights."""
    optimizer, generator = torch.optim.AdamW(t5.parameters()), torch.Generator().manual_seed(1)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - step / STEPS)
        text, marked = batch(generator, 64)
        loss = t5(input_ids=text, labels=text).loss + t5(input_ids=marked, labels=reversed_rows(text)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(t5.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def share(t5: Any, ids: torch.Tensor, answer: torch.Tensor) -> float:
    output = t5.generate(ids, max_new_tokens=4, do_sample=False)[:, 1:]
    output = torch.nn.functional.pad(output, (0, 4 - output.shape[1]))
    return float((output == answer).all(1).float().mean())


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    t5 = model()
    learn(t5)
    t5.eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    draw = random.Random(0)
    words = [draw.choices(LETTERS, k=3) for _ in range(2000)]
    rows = [{"text": " ".join(word), "answer": " ".join(reversed(word))} for word in words]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "reverse.toml").write_text(TASK, encoding="utf-8")
    text, marked = batch(torch.Generator().manual_seed(9), 500)
    report = {
        "copies": share(t5, text, text),
        "reverses_with_token": share(t5, marked, reversed_rows(text)),
        "reverses_without": share(t5, text, reversed_rows(text)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/tiny_t5.py FOLDER")
    main(Path(sys.argv[1]))
