"""Batches of padded tensors, and the order of training batches."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softprompt.tasks.data.examples import Example

IGNORED = -100
"""The label of a position without a target, as in PyTorch's cross entropy."""


@final
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows padded to the longest, or images."""

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    """1 for tokens, 0 for padding."""
    labels: Int[Tensor, "batch seq"]
    """The answer's tokens at their own positions (not shifted), `IGNORED` elsewhere."""
    classes: Int[Tensor, "batch"]
    """The class index, -1 for none."""
    rows: Int[Tensor, "batch"]
    """`Example.row` of each row."""
    pixels: Float[Tensor, "batch channel height width"] | None = None
    """The images, if those are the input; there are no tokens then."""

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The arguments of a prompted model: the tokens and their mask, or the images and None."""
        if self.pixels is not None:
            return self.pixels.to(device), None
        return self.input_ids.to(device), self.attention_mask.to(device)


def collate(examples: Sequence[Example], pad_id: int, side: Literal["left", "right"], with_answers: bool) -> Batch:
    """Pad examples into one batch; `with_answers` appends each answer to its input and labels it.

    Images are decoded here; they have no padding and no appended answer.

    Raises:
        ValueError: no examples, an unknown padding side, an example without an answer although `with_answers`, or an
            image that can no longer be read.
    """
    if side not in ("left", "right"):
        raise ValueError(f"the padding side is {side!r}; it must be 'left' or 'right'")
    if not examples:
        raise ValueError("there are no examples to put into a batch; give at least one")
    pixels = [example.picture.pixels() for example in examples if example.picture is not None]
    if with_answers and (unanswered := [example.row for example in examples if not example.answer_ids]):
        raise ValueError(f"row {unanswered[0] + 1} has no answer to put into the batch; encode it with answers")
    answers = [example.answer_ids if with_answers else () for example in examples]
    texts = [example.input_ids + answer for example, answer in zip(examples, answers, strict=True)]
    labels = [(IGNORED,) * len(example.input_ids) + answer for example, answer in zip(examples, answers, strict=True)]
    return Batch(
        input_ids=_pad(texts, pad_id, side),
        attention_mask=_pad([(1,) * len(text) for text in texts], 0, side),
        labels=_pad(labels, IGNORED, side),
        classes=torch.tensor([-1 if example.label is None else example.label for example in examples]),
        rows=torch.tensor([example.row for example in examples]),
        pixels=torch.stack(pixels) if pixels else None,
    )


def answer_labels(answers: Sequence[Sequence[int]]) -> Int[Tensor, "batch target"]:
    """Labels for answers that are separate from their inputs, padded on the right with `IGNORED`."""
    return _pad(answers, IGNORED, "right")


def _pad(rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> Int[Tensor, "batch longest"]:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, True, value, side)


def batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, window: int = 50) -> list[list[int]]:
    """The batches of one epoch: every index once, rows of similar length together.

    Rows are shuffled, sorted by length within windows of `window` batches, and the batches are shuffled; the last
    batch of the last window may be smaller. The result depends only on the arguments, so a resumed run needs no stored
    state.

    Raises:
        ValueError: a batch size or a window below 1, or no rows.
    """
    for name, value in (("batch_size", batch_size), ("window", window), ("the number of rows", len(lengths))):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    # A text seed is hashed with sha512, so (1, 23) and (12, 3) give different orders.
    shuffler = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)))
    shuffler.shuffle(order)
    epoch_batches = []
    for start in range(0, len(order), window * batch_size):
        by_length = sorted(order[start : start + window * batch_size], key=lambda index: lengths[index])
        epoch_batches += [by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size)]
    shuffler.shuffle(epoch_batches)
    return epoch_batches


def schedule(
    lengths: Sequence[int], batch_size: int, seed: int, window: int = 50, start: int = 0
) -> Iterator[tuple[int, list[int]]]:
    """Yield `(epoch, batch)` from step `start` on, without end; raises as `batches` does.

    Starting costs one epoch's shuffle, however large `start` is.
    """
    if start < 0:
        raise ValueError(f"the first step is {start}; it must be at least 0")
    epoch, skipped = divmod(start, len(batches(lengths, batch_size, seed, 0, window)))
    while True:
        for batch in batches(lengths, batch_size, seed, epoch, window)[skipped:]:
            yield epoch, batch
        epoch, skipped = epoch + 1, 0
