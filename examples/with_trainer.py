"""Train a prompt with transformers' Trainer: `python with_trainer.py BACKBONE OUT [STEPS]`.

The Trainer gets a module that takes input_ids, attention_mask and labels and returns a loss; no wrapper is needed.
"""

import sys
from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from softprompt import DPT, attach, export_peft, load_backbone
from softprompt.prompts import SoftPrompt

TEXTS = ["The opposite of hot is cold", "The opposite of big is small", "The opposite of up is down"]


def main(source: str, out: str, steps: int = 30) -> SoftPrompt:
    backbone = load_backbone(source, dtype="float32")
    tokenizer = backbone.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompt = DPT(length=20, rank=4).build(backbone.host(), torch.Generator().manual_seed(0))
    rows = [{**row, "labels": row["input_ids"]} for row in map(tokenizer, TEXTS)]
    settings = TrainingArguments(
        out, max_steps=steps, learning_rate=0.03, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True
    )
    # The collator pads labels with -100.
    trainer = Trainer(attach(backbone, prompt), settings, DataCollatorForSeq2Seq(tokenizer), rows)
    print(trainer.train().metrics["train_loss"])
    export_peft(prompt.fold(), backbone, Path(out) / "adapter")
    return prompt


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
