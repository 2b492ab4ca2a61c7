"""Checks that a model is exact with prompts in mixed batches, by running it; a model that is not is refused by name.

Every check runs rows of different lengths and prompts in one batch and compares each with the same row alone through
the model's own forward. Only there does a model differ that counts positions by column, or that attends to padding.
This is what all architectures use; a decoder's own comparisons are in `verify_causal.py`, the others' in their modules.
What a config already shows is refused in `config_checks.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.files import error_text
from softprompt.models.padding import pad_batch
from softprompt.prompts import Folded

_LONG_ROW = 32
"""Tokens of a check's longest row: a short row beside it has so much padding that rounding cannot hide its effect."""
_results: WeakKeyDictionary[Any, dict[str, bool]] = WeakKeyDictionary()
"""The results of each model's checks in this process, by the check's name."""


def forget(model: Any) -> None:
    """Drop the results of `model`'s checks, so that it is checked again: its layers will run in another way."""
    _results.pop(model, None)


def cached_check(model: Any, name: str, check: Callable[[], bool]) -> bool:
    """The result of `check`, run once for each model and name, without gradients or autocast; errors are not cached."""
    results = _results.setdefault(model, {})
    if name not in results:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            results[name] = check()
    return results[name]


@final
class Sample(NamedTuple):
    """Rows of different lengths with prompts of different lengths, and an answer that follows each row."""

    prompts: Sequence[Folded]
    prompt_index: Int[Tensor, " row"]
    texts: Sequence[Sequence[int]]
    answer: Sequence[int]
    """Three tokens."""

    def batch(self, device: torch.device) -> tuple[Int[Tensor, "row longest"], Int[Tensor, "row longest"]]:
        """The texts padded on the right, and their mask."""
        return pad_batch(self.texts, device)

    def prompt(self, row: int) -> Float[Tensor, "prompt dim"]:
        """The prompt of a row."""
        return self.prompts[int(self.prompt_index[row])].prompt()


def sample(backbone: Backbone, window: int | None = None) -> Sample:
    """Three rows: short, shorter with a short prompt, and long; fewer tokens where the model has few positions.

    Args:
        window: the most tokens of a row with its prompt and answer.
    """
    table = backbone.host().embedding
    most = min(limit for limit in (backbone.max_positions, backbone.max_answer_positions, window, 1024) if limit)
    longest = max(1, min(5, (most - 5) // 3))
    lengths = [min(4, longest), 2, max(3, min(_LONG_ROW, most - longest - 5))]
    # From all over the vocabulary: the first ids are special tokens, for which even plain bfloat16 is far off.
    count = longest + 2 + sum(lengths) + 3
    ids = torch.linspace(0.1 * len(table), 0.9 * len(table), count, device="cpu").long().tolist()
    ids = ids[::2] + ids[1::2]  # else a row's tokens would be neighbors in the vocabulary
    prompts = [Folded(table[ids[:longest]].float()), Folded(table[ids[longest : longest + 2][:longest]].float())]
    rest, texts = ids[longest + 2 :], list[list[int]]()
    for length in lengths:
        texts.append(rest[:length])
        rest = rest[length:]
    return Sample(prompts, torch.tensor([0, 1, 0], device=backbone.device), texts, rest)


class OutputMismatch(ValueError):
    """A model gives other outputs than it should."""


@contextmanager
def model_errors_refused(backbone: Backbone, how: str) -> Iterator[None]:
    """Turn any error of the model's own code into one that says what it was run with.

    Raises:
        OutputMismatch: the model failed.
    """
    try:
        yield
    except OutputMismatch:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's forward may be anybody's code, and raise anything
        raise OutputMismatch(
            f"{backbone.source} ({backbone.model.config.model_type}) fails with {how} ({error_text(error)[:200]}); its "
            "attention is unusual, so it is refused: choose another backbone"
        ) from error


def is_close(backbone: Backbone, expected: Float[Tensor, "*shape"], actual: Float[Tensor, "*shape"]) -> bool:
    """Whether two outputs differ by no more than rounding does."""
    wide, gap = expected.float(), expected.float() - actual.float()
    if backbone.dtype is torch.float32:
        return float(gap.abs().max()) <= 1e-3 * float(wide.abs().max())
    # bfloat16 is far off at single positions (a first token without a prompt, a rare one) and close on the whole, so
    # the worst twentieth does not count; an offset that all outputs of a token share means nothing. SmolLM2-135M: up
    # to 0.07, and above 0.2 where a row's positions are wrong.
    apart, size = ((part - part.mean(-1, keepdim=True)).norm(dim=-1).flatten() for part in (gap, wide))
    counted = (apart / size).argsort()[: len(apart) - len(apart) // 20]
    return float(apart[counted].norm()) <= 0.12 * float(size[counted].norm())


def check_close(
    backbone: Backbone,
    expected: Float[Tensor, "*shape"],
    actual: Float[Tensor, "*shape"],
    how: str,
    what: str = "logits",
) -> None:
    """Refuse a model whose outputs differ from those of each row alone with its prompt.

    Args:
        how: what `actual` was computed with, for the message.
        what: the outputs.

    Raises:
        OutputMismatch: they differ by more than rounding.
    """
    if not is_close(backbone, expected, actual):
        gap = float((expected.float() - actual.float()).abs().max())
        raise OutputMismatch(
            f"{backbone.source} ({backbone.model.config.model_type}) gives different {what} with {how} than for each "
            f"row alone with its prompt (largest difference {gap:.2g}), so it is refused: choose another backbone"
        )
