"""Checks that a row's result does not depend on the batch's other rows, in every way that a decoder runs rows."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.models.inputs import PreparedPrompts
from softprompt.models.padding import align_padding
from softprompt.models.verify import Sample, check_close, is_close, model_errors_refused, sample
from softprompt.types import PromptPosition

if TYPE_CHECKING:
    from softprompt.models.causal import Causal


@final
class SingleRows:
    """The rows of a model's checks, and its logits for each row alone, which are computed once for all checks."""

    def __init__(self, backbone: Backbone, window: int | None, prompt_position: PromptPosition) -> None:
        self._backbone, self._window, self._prompt_position = backbone, window, prompt_position
        self._logits: dict[bool, list[Tensor]] = {}

    @cached_property
    def rows(self) -> Sample:
        """The rows."""
        return sample(self._backbone, self._window)

    def logits(self, *, bare: bool) -> Sequence[Float[Tensor, "text_and_answer vocab"]]:
        """Each row's logits with its prompt, or without one if `bare`, as `_single_row_logits` gives them."""
        if bare not in self._logits:
            self._logits[bare] = [
                _single_row_logits(self._backbone, self.rows, row, self._prompt_position, bare=bare)
                for row in range(len(self.rows.texts))
            ]
        return self._logits[bare]


def check_mixed_batch(prompted: "Causal", single_rows: SingleRows, how: str) -> None:
    """Compare texts, scored candidates, and tokens decoded step by step with single rows, with and without prompts.

    Args:
        single_rows: what to compare with.
        how: how prompts and rows are laid out, for the message.

    Raises:
        OutputMismatch: the model gives a row something else than it gives the row alone, or fails.
    """
    backbone = prompted.backbone
    with model_errors_refused(backbone, how):
        rows = single_rows.rows
        ids, mask = rows.batch(backbone.device)
        for prompts, index in ((rows.prompts, rows.prompt_index), ([], None)):
            single = single_rows.logits(bare=not prompts)
            lengths = [len(text) for text in rows.texts]
            prepared = prompted.prepare(prompts)
            logits = prompted(ids, mask, prompts=prepared, index=index).logits[mask.bool()]
            expected = torch.cat([part[:length] for part, length in zip(single, lengths, strict=True)])
            check_close(backbone, expected, logits, how)
            after_text = torch.stack([part[length:] for part, length in zip(single, lengths, strict=True)])
            _check_steps(prompted, rows, ids, mask, prepared, index, after_text, how)
            scores = prompted.score(ids, mask, [rows.answer, rows.answer[1:]], prepared, index)
            logp = after_text.float().log_softmax(-1)
            token_logp = torch.stack([logp[:, step, token] for step, token in enumerate(rows.answer)], 1)
            shorter = _single_row_scores(backbone, rows, prompted.prompt_position, bare=not prompts)
            check_close(backbone, torch.stack([token_logp.sum(1), shorter], 1), scores, how, "scores")


def packed_rows_are_exact(prompted: "Causal", single_rows: SingleRows) -> bool:
    """Whether prompts and rows that run packed, as in training, give the same too."""
    backbone, rows = prompted.backbone, single_rows.rows
    answer = torch.tensor(rows.answer, device=backbone.device).expand(len(rows.texts), -1)
    text = align_padding(*rows.batch(backbone.device))  # on the left
    ids, mask = torch.cat([text.ids, answer], 1), torch.cat([text.mask, torch.ones_like(answer)], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -answer.shape[1] :] = answer
    try:
        for prompts, index in ((rows.prompts, rows.prompt_index), ([], None)):
            logits = prompted(ids, mask, labels, prompts=prompts, index=index).logits
            single = [part[-1 - answer.shape[1] : -1] for part in single_rows.logits(bare=not prompts)]
            if not is_close(backbone, torch.stack(single), logits):
                return False
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # the model's own code rejects the layout
        return False
    return True


def _check_steps(
    prompted: "Causal",
    rows: Sample,
    ids: Int[Tensor, "row seq"],
    mask: Int[Tensor, "row seq"],
    prepared: PreparedPrompts,
    index: Int[Tensor, " row"] | None,
    expected: Float[Tensor, "row step vocab"],
    how: str,
) -> None:
    """Compare tokens that are decoded one by one from cached keys and values."""
    state = prompted.prefill(ids, mask, prepared, index, room=len(rows.answer))
    logits = [state.logits[:, -1]]
    for token in rows.answer:
        state = prompted.decode(state, torch.full((len(ids), 1), token, device=ids.device))
        logits.append(state.logits[:, -1])
    check_close(prompted.backbone, expected, torch.stack(logits, 1), how)


def _single_row_scores(
    backbone: Backbone, rows: Sample, prompt_position: PromptPosition, *, bare: bool
) -> Float[Tensor, " row"]:
    """Each row's log-probability of the answer without its first token."""
    shorter, scores = rows._replace(answer=rows.answer[1:]), list[Tensor]()
    for row, text in enumerate(rows.texts):
        logits = _single_row_logits(backbone, shorter, row, prompt_position, bare=bare)
        logp = logits[len(text) :].log_softmax(-1)
        scores.append(torch.stack([logp[step, token] for step, token in enumerate(shorter.answer)]).sum())
    return torch.stack(scores)


def _single_row_logits(
    backbone: Backbone, rows: Sample, row: int, prompt_position: PromptPosition, *, bare: bool
) -> Float[Tensor, "text_and_answer vocab"]:
    """One row's logits from the model itself: at each of its text's tokens, then before each token of the answer.

    The first of the latter is at the text's last token, or at the last of a prompt that follows the text.
    """
    ids = torch.tensor([*rows.texts[row], *rows.answer], device=backbone.device)
    tokens, count = backbone.model.get_input_embeddings()(ids), len(rows.texts[row])
    lead = {"prefix": 0, "after_bos": 1, "suffix": count}[prompt_position]
    prompt = tokens[:0] if bare else rows.prompt(row).to(backbone.device, tokens.dtype)
    embeds = torch.cat([tokens[:lead], prompt, tokens[lead:]])[None]
    logits: Tensor = backbone.model(inputs_embeds=embeds).logits[0].float()
    text = torch.arange(count, device=ids.device)
    text = torch.where(text < lead, text, text + len(prompt))
    return torch.cat([logits[text], logits[count + len(prompt) - 1 :]])
