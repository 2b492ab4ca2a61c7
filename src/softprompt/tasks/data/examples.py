"""Tokenized rows in compact arrays; an `Example` is created on access."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final, overload

from softprompt.backbones.image_processor import Picture


@final
@dataclass(frozen=True)
class Example:
    """One row: its token ids, or its image."""

    input_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """The answer, which follows the input; empty if there is none."""
    label: int | None
    """The class index, in a classification."""
    row: int
    """The row's index among the encoded rows, from 0."""
    picture: Picture | None = None
    """The image, if that is the input; decoded when a batch is collated."""
    where: str = ""
    """The row's name in errors: its number in its file, counted from 1, and the file."""


@final
class Examples(Sequence[Example]):
    """Text examples at four bytes per token; a slice shares the tokens."""

    def __init__(self, origin: str = "") -> None:
        self._origin = origin
        self._numbers = array("i")
        self._ids, self._ends = array("i"), array("q", [0])
        self._answers, self._answer_ends = array("i"), array("q", [0])
        self._labels = array("i")
        self._order: range | array[int] = range(0)
        self.answers_ended = 0
        """Number of answers whose end-of-sequence text was dropped."""

    def append(self, input_ids: Sequence[int], answer_ids: Sequence[int], label: int | None, number: int) -> None:
        """Append a row; `number` is its number in its file, counted from 1."""
        self._numbers.append(number)
        self._ids.extend(input_ids)
        self._ends.append(len(self._ids))
        self._answers.extend(answer_ids)
        self._answer_ends.append(len(self._answers))
        self._labels.append(-1 if label is None else label)
        self._order = range(len(self._labels))

    def lengths(self) -> list[int]:
        """Number of tokens of each input."""
        return [self._ends[row + 1] - self._ends[row] for row in self._order]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: int | slice) -> "Example | Examples":
        """One example, or a slice of them."""
        if isinstance(index, slice):
            view = object.__new__(Examples)
            view.__dict__.update(self.__dict__, _order=self._order[index])
            return view
        row = self._order[index]
        return Example(
            tuple(self._ids[self._ends[row] : self._ends[row + 1]]),
            tuple(self._answers[self._answer_ends[row] : self._answer_ends[row + 1]]),
            None if self._labels[row] < 0 else self._labels[row],
            row,
            where=f"row {self._numbers[row]}" + (f" of {self._origin}" if self._origin else ""),
        )


def input_lengths(examples: Sequence[Example]) -> list[int]:
    """Number of tokens of each input."""
    if isinstance(examples, Examples):
        return examples.lengths()
    return [len(example.input_ids) for example in examples]
