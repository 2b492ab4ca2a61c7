"""The teacher of a distillation: the frozen model with a context in front of every row."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompt.backbones import Backbone
from softprompt.models.base import PromptedModel
from softprompt.models.input_checks import checked_mask
from softprompt.models.inputs import Candidates, Ids, Labels, Mask, PreparedPrompts


@final
class Teacher:
    """What a distilled prompt learns to imitate: the frozen model that reads `context` before each row.

    A decoder computes the context's keys and values once and shares them among all rows, for as long as the teacher
    lives; an encoder or encoder-decoder reads the context again with every row. No call computes gradients, and none
    has dropout, which may be on meanwhile for the student in the same model.

    Args:
        model: the backbone without a prompt.
        context: all tokens in front of a row: the context's text, what comes before it (the tokens with which the
            tokenizer begins a text; in a chat, also the system message's header) and after it (the message's end).
        leading: how many tokens come before the text.
        trailing: how many come after it.
        replaced: the tokens with which a row begins by itself, and which it loses here; None: the leading ones.

    Raises:
        ValueError: a context without a token of its own.
    """

    def __init__(
        self,
        model: PromptedModel,
        context: Sequence[int],
        leading: int = 0,
        trailing: int = 0,
        replaced: Sequence[int] | None = None,
    ) -> None:
        if len(context) <= leading + trailing:
            raise ValueError("the context has no token; give a text that has one")
        self.model, self.context, self._leading, self._trailing = model, tuple(context), leading, trailing
        self._replaced_ids = self.context[:leading] if replaced is None else tuple(replaced)
        self._replaced = torch.tensor(self._replaced_ids, dtype=torch.long, device=model.backbone.device)
        self._cached_prefix: PreparedPrompts | None = None

    @property
    def backbone(self) -> Backbone:
        """The frozen model."""
        return self.model.backbone

    def shortened(self, count: int, *, from_end: bool) -> "Teacher | None":
        """The teacher whose context has only the first (last) `count` tokens of its text; None if it has no more."""
        end = len(self.context) - self._trailing
        text = self.context[self._leading : end]
        if not 0 < count < len(text):
            return None
        remaining = text[-count:] if from_end else text[:count]
        context = (*self.context[: self._leading], *remaining, *self.context[end:])
        return Teacher(self.model, context, self._leading, self._trailing, self._replaced_ids)

    def label_logits(
        self, input_ids: Ids, attention_mask: Mask, labels: Labels
    ) -> tuple[Float[Tensor, "batch kept vocab"], Int[Tensor, "batch kept"]]:
        """The logits that predict `labels`, in the same columns as `PromptedModel.label_logits` has them."""
        with self._no_grad_eval():
            ids, mask = self._rows(input_ids, attention_mask)
            if ids.shape != input_ids.shape and not self.model.appends_eos:  # labels lie beside the input's tokens
                labels = nn.functional.pad(labels, (ids.shape[1] - labels.shape[1], 0), value=-100)
            return self.model.label_logits(ids, mask, labels, self._prefix())

    def score(self, input_ids: Ids, attention_mask: Mask, candidates: Candidates) -> Float[Tensor, "batch candidate"]:
        """Log-probability, float32, of each candidate's tokens as the answer to each row."""
        with self._no_grad_eval():
            return self.model.score(*self._rows(input_ids, attention_mask), candidates, self._prefix())

    def generate(self, input_ids: Ids, attention_mask: Mask, *, max_new_tokens: int) -> Iterator[Int[Tensor, " batch"]]:
        """The teacher's greedy answers, one token per row and step, as `PromptedModel.generate` gives them."""
        with self._no_grad_eval():
            ids, mask = self._rows(input_ids, attention_mask)
            prefix = self._prefix()
        return self.model.generate(ids, mask, max_new_tokens=max_new_tokens, prompts=prefix)

    @contextmanager
    def _no_grad_eval(self) -> Iterator[None]:
        in_training = [module for module in self.backbone.model.modules() if module.training]
        for module in in_training:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module in in_training:
                module.training = True

    def _prefix(self) -> PreparedPrompts | None:
        if self.model.supports_prefix_sharing and self._cached_prefix is None:
            self._cached_prefix = self.model.with_shared_prefix(self.model.prepare([]), [self.context])
        return self._cached_prefix

    def _rows(self, ids: Ids, mask: Mask) -> tuple[Int[Tensor, "batch read"], Int[Tensor, "batch read"]]:
        """The rows without the tokens that the context replaces; the context is prepended unless it is cached."""
        mask = self._without_replaced(ids, checked_mask(ids, mask))
        if self.model.supports_prefix_sharing:
            return ids, mask
        context = torch.tensor(self.context, device=ids.device).expand(len(ids), -1)
        return torch.cat([context, ids], 1), torch.cat([torch.ones_like(context), mask], 1)

    def _without_replaced(self, ids: Ids, mask: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        count = len(self._replaced)
        if not count:
            return mask
        number = mask.cumsum(1) * mask  # from 1 at a row's first token
        expected = self._replaced[(number - 1).clamp(0, count - 1)]
        leads = (number > 0) & (number <= count)
        same = ((ids == expected) | ~leads).all(1, keepdim=True)
        # A row that is nothing else keeps its tokens: a row needs one.
        return torch.where(same & leads & (mask.sum(1, keepdim=True) > count), 0, mask)
