"""Train a prompt in your own loop: `python own_loop.py BACKBONE [STEPS]` (a folder, Hub id, .gguf file or asset).

`attach` returns an nn.Module whose only parameters are the prompt's; the backbone does not change.
"""

import sys

import torch

from softprompt import DPT, attach, load_backbone

PAIRS = [("The opposite of hot is", " cold"), ("The opposite of big is", " small"), ("The opposite of up is", " down")]


def main(source: str, steps: int = 30) -> None:
    backbone = load_backbone(source, dtype="float32")
    prompt = DPT(length=20, rank=4).build(backbone.host(), torch.Generator().manual_seed(0))
    prompted = attach(backbone, prompt)
    optimizer = torch.optim.AdamW(prompted.parameters(), lr=0.03)
    rows = [[backbone.tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in PAIRS]
    for step in range(steps):
        loss = torch.zeros(())
        for question, answer in rows:
            ids = torch.tensor([question + answer])
            labels = torch.tensor([[-100] * len(question) + answer])  # not shifted: labels align with their own tokens
            loss = loss + prompted(ids, labels=labels).loss / len(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}  loss {loss.item():.3f}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], *map(int, sys.argv[2:3]))
