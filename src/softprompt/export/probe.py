"""A few fixed texts and the live run's next-token probabilities after them: the reference for every export."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.evaluation.predict import pad_id
from softprompt.export.base import ExportedPrompt
from softprompt.models import attach
from softprompt.models.padding import pad_batch
from softprompt.tasks.data.tokenize import TEXT_TASK, encode

TEXTS = (
    "Yes.",
    "A film that earns its tears.",
    "Question: is the sky blue today? Answer:",
    "  The delivery came late,\nand nobody at the counter knew why; I want my money back.",
    "1, 2, 3 and 4: naïve café – 100 % sure",
)
"""Short and long, with leading spaces, a line break, digits and non-ASCII letters."""
_BATCH = 8


class Probe(NamedTuple):
    """Rows of several prompts, mixed, and the live run's next-token probabilities."""

    prompt_index: Int[Tensor, " batch"]
    """Each row's prompt."""
    ids: Sequence[Sequence[int]]
    """Each row's own tokens."""
    logp: Float[Tensor, "batch vocab"]
    """Log-probability of the next token (the first of the answer)."""


def text_ids(backbone: Backbone, texts: Sequence[str], appends_eos: bool) -> list[tuple[int, ...]]:
    """Each text's tokens as a run sees them, with closing special tokens if `appends_eos`."""
    rows = [{"text": text} for text in texts]
    return [
        example.input_ids
        for example in encode(TEXT_TASK, backbone.tokenizer, rows, 512, appends_eos=appends_eos, answers=False)[0]
    ]


@torch.no_grad()
def probe(trained: Sequence[ExportedPrompt], backbone: Backbone) -> Iterator[Probe]:
    """Every text with every prompt, in batches; neighboring rows have different prompts."""
    live = attach(backbone)
    prepared = live.prepare([item.folded.to(backbone.device) for item in trained])
    texts = text_ids(backbone, TEXTS, live.appends_eos)
    rows = [(prompt, ids) for ids in texts for prompt in range(len(trained))]
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        ids, mask = pad_batch([ids for _, ids in batch], backbone.device, "left", pad_id(backbone))
        index = torch.tensor([prompt for prompt, _ in batch], device=backbone.device)
        output = live(ids, mask, prompts=prepared, index=index)
        yield Probe(index.cpu(), [ids for _, ids in batch], output.logits[:, -1].float().log_softmax(-1).cpu())
