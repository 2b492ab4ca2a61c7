"""Whether a decoder gives each row of a mixed batch what it gives the row alone, in every way that rows are run."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.models.base import Prepared
from softprompt.models.verify import Sample, is_near, refuse_different, refusing, sample
from softprompt.types import PromptPosition

if TYPE_CHECKING:
    from softprompt.models.causal import Causal


def check_rows(prompted: "Causal", how: str) -> None:
    """Compare texts, candidates behind them, and tokens that follow one by one, with and without prompts.

    Args:
        how: how prompts and rows are laid out, for the message.

    Raises:
        ValueError: the model gives a row something else than it gives the row alone, or fails.
    """
    backbone = prompted.backbone
    with refusing(backbone, how):
        given = sample(backbone, prompted.window)
        ids, mask = given.batch(backbone.device)
        for prompts, index in ((given.prompts, given.prompt_index), ([], None)):
            alone = [
                _alone(backbone, given, row, prompted.prompt_position, bare=not prompts) for row in range(len(ids))
            ]
            lengths = [len(text) for text in given.texts]
            prepared = prompted.prepare(prompts)
            logits = prompted(ids, mask, prompts=prepared, index=index).logits[mask.bool()]
            wanted = torch.cat([one[:length] for one, length in zip(alone, lengths, strict=True)])
            refuse_different(backbone, wanted, logits, how)
            behind = torch.stack([one[length:] for one, length in zip(alone, lengths, strict=True)])
            _refuse_other_steps(prompted, given, ids, mask, prepared, index, behind, how)
            scores = prompted.score(ids, mask, [given.answer, given.answer[1:]], prepared, index)
            logp = behind.float().log_softmax(-1)
            each = torch.stack([logp[:, step, token] for step, token in enumerate(given.answer)], 1)
            other = _alone_score(backbone, given, prompted.prompt_position, bare=not prompts)
            refuse_different(backbone, torch.stack([each.sum(1), other], 1), scores, how, "scores")


def packs_alike(prompted: "Causal") -> bool:
    """Whether prompts and rows that are trained packed give the same too."""
    backbone = prompted.backbone
    given = sample(backbone, prompted.window)
    follow = torch.tensor(given.answer, device=backbone.device).expand(len(given.texts), -1)
    ids, mask = given.batch(backbone.device)
    ids = torch.cat([ids.flip(1), follow], 1)  # padding in front
    mask = torch.cat([mask.flip(1), torch.ones_like(follow)], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -follow.shape[1] :] = follow
    turned = given._replace(texts=[list(reversed(text)) for text in given.texts])
    try:
        for prompts, index in ((given.prompts, given.prompt_index), ([], None)):
            logits = prompted(ids, mask, labels, prompts=prompts, index=index).logits
            alone = [
                _alone(backbone, turned, row, prompted.prompt_position, bare=not prompts)[-1 - follow.shape[1] : -1]
                for row in range(len(ids))
            ]
            if not is_near(backbone, torch.stack(alone), logits):
                return False
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # the model's own, of a layout it refuses
        return False
    return True


def _refuse_other_steps(
    prompted: "Causal",
    given: Sample,
    ids: Int[Tensor, "row seq"],
    mask: Int[Tensor, "row seq"],
    prepared: Prepared,
    index: Int[Tensor, " row"] | None,
    wanted: Float[Tensor, "row step vocab"],
    how: str,
) -> None:
    """The same of tokens that follow one by one, from keys and values that are kept."""
    state = prompted.prefill(ids, mask, prepared, index, room=len(given.answer))
    found = [state.logits[:, -1]]
    for token in given.answer:
        state = prompted.decode(state, torch.full((len(ids), 1), token, device=ids.device))
        found.append(state.logits[:, -1])
    refuse_different(prompted.backbone, wanted, torch.stack(found, 1), how)


def _alone_score(
    backbone: Backbone, given: Sample, prompt_position: PromptPosition, *, bare: bool
) -> Float[Tensor, " row"]:
    """Each row's log-probability of the answer without its first token."""
    shorter, scores = given._replace(answer=given.answer[1:]), list[Tensor]()
    for row, text in enumerate(given.texts):
        logp = _alone(backbone, shorter, row, prompt_position, bare=bare)[len(text) :].log_softmax(-1)
        scores.append(torch.stack([logp[step, token] for step, token in enumerate(shorter.answer)]).sum())
    return torch.stack(scores)


def _alone(
    backbone: Backbone, given: Sample, row: int, prompt_position: PromptPosition, *, bare: bool
) -> Float[Tensor, "text_and_answer vocab"]:
    """One row's logits from the model itself: at each of its text's tokens, and then before each next one.

    The place behind the text is its last token's, or a prompt's that stands there, and those of the answer follow.
    """
    ids = torch.tensor([*given.texts[row], *given.answer], device=backbone.device)
    own, count = backbone.model.get_input_embeddings()(ids), len(given.texts[row])
    lead = {"prefix": 0, "after_bos": 1, "suffix": count}[prompt_position]
    prompt = own[:0] if bare else given.prompt(row).to(backbone.device, own.dtype)
    embeds = torch.cat([own[:lead], prompt, own[lead:]])[None]
    logits: Tensor = backbone.model(inputs_embeds=embeds).logits[0].float()
    text = torch.arange(count, device=ids.device)
    text = torch.where(text < lead, text, text + len(prompt))
    return torch.cat([logits[text], logits[count + len(prompt) - 1 :]])
