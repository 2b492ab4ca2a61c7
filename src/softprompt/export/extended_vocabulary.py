"""A backbone whose vocabulary has the prompts' vectors as tokens, and a head that does not generate them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from tokenizers import AddedToken
from torch import Tensor, nn

from softprompt.backbones import Backbone
from softprompt.evaluation.predict import input_limit
from softprompt.export.base import ExportedPrompt, deep_refusal, embedding_scale
from softprompt.export.probe import TEXTS, probe, text_ids
from softprompt.models import attach, model_class
from softprompt.tasks.data.tokenize import answer_ids

SUPPRESSED_LOGIT = -1e4
"""The bias of a token that is never generated: its probability is 0 in every dtype, and no sum becomes NaN."""


@final
@dataclass(frozen=True)
class ExtendedCheckpoint:
    """A model and a tokenizer with new tokens, and what their user must know."""

    model: Any
    """Shares every weight with the backbone's, except for the embedding table and the head."""
    tokenizer: Any
    usage: dict[str, Any]
    """What `prompts.json` says: ids and text of each prompt, ids to suppress, template, label tokens."""


def vocabulary_refusal(trained: ExportedPrompt, backbone: Backbone) -> str:
    """Why the prompt cannot be rows of the backbone's embedding table; empty where it can."""
    if trained.folded.is_deep:
        return deep_refusal("a vocabulary")
    if not trained.folded.plain:
        return (
            f"tokens cannot express the prompt, since {trained.run.experiment.method} also changes the input's own "
            "embeddings; export to npz, serve it with softprompt serve, or train dpt or residual"
        )
    if backbone.quantized:
        return (
            f"the backbone's weights are stored as {backbone.quantized}, but a checkpoint needs them unquantized; "
            "train in bfloat16, or export to npz"
        )
    if embedding_scale(backbone) is None:
        return (
            f"the embedding layer of {backbone.source} does more than scale its table, so no row of the table is the "
            "prompt; export to npz, or serve it with softprompt serve"
        )
    return ""


def extend(trained: Sequence[ExportedPrompt], backbone: Backbone) -> ExtendedCheckpoint:
    """The backbone with one new token per vector of each prompt.

    Raises:
        ValueError: a token name is taken, or the tokenizer's ids have gaps.
    """
    vectors = torch.cat([item.folded.prompt().detach().float().to(backbone.device) for item in trained])
    old = len(backbone.model.get_input_embeddings().weight)
    first = max(old, len(backbone.tokenizer))
    tokenizer = _extend_tokenizer(backbone.tokenizer, trained, first)
    stand_in = _least_likely_token(trained, backbone)
    model, silenced = extend_model(backbone, vectors, first - old, stand_in)
    ids = {item.name: tokenizer.convert_tokens_to_ids(_tokens(item)) for item in trained}
    as_text = _as_text(tokenizer, trained[0], ids[trained[0].name], backbone)
    usage = {
        "backbone": backbone.base,
        "layout": "the prompt's ids, then the text's own ids"
        + ("" if model_class(backbone).appends_eos else " without closing tokens"),
        "suppressed_ids": list(range(old, first + len(vectors))),
        "stand_in_id": None if silenced else stand_in,
        "as_text": as_text,
        "prompts": {
            item.name: {
                "ids": ids[item.name],
                "text": None if as_text is None else "".join(_tokens(item)) + as_text["after_prompt"],
                **task_entry(item, backbone),
            }
            for item in trained
        },
    }
    return ExtendedCheckpoint(model, tokenizer, usage)


def task_entry(trained: ExportedPrompt, backbone: Backbone) -> dict[str, Any]:
    """What `prompts.json` says of a prompt's task: the template, each label's token ids, and the run's limits."""
    task, training, answers = trained.run.task, trained.run.experiment.training, {}
    if task.is_classification:
        answers = dict(zip(task.label_words, map(list, answer_ids(task, backbone.tokenizer)), strict=True))
    return {
        **({"messages": task.messages} if task.messages else {"template": task.template}),
        "answers": answers,
        "max_input_tokens": input_limit(attach(backbone, trained.folded), task, training),
        "max_new_tokens": training.max_new_tokens,
    }


@torch.no_grad()
def extend_model(backbone: Backbone, vectors: Float[Tensor, "new dim"], gap: int, stand_in: int) -> tuple[Any, bool]:
    """A model with `vectors` as new embedding rows, and whether its head's bias keeps it from generating them.

    The old rows of the head keep their bits, so the old tokens' logits do not change. The new rows of the head:

    - A head with a bias (BART's `final_logits_bias`, Phi's `lm_head.bias`) gets `SUPPRESSED_LOGIT` there, tied or not.
    - Without a bias, weights alone cannot rule a token out: after an RMS norm the last state reaches both `h` and `-h`,
      so no row has the smallest logit for every `h` (least of all a row of zeros, whose logit 0 exceeds every negative
      one). A tied head would be worse, since its new rows would be the prompts, which have large norms. So the head is
      untied, and each new row copies that of `stand_in`, a token that the model hardly ever predicts. The new ids must
      also be suppressed, which the caller writes into the generation config; and since each new token's probability is
      the stand-in's, its effect on the others' probabilities can be computed.

    Args:
        vectors: the new tokens', as the model sees them.
        gap: unused ids between the table's end and the first new token.
        stand_in: an id of the old vocabulary.
    """
    model = backbone.model
    tables = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    shared = {id(weight): weight for weight in model.parameters() if id(weight) not in tables}
    new = copy.deepcopy(model, shared)
    old = len(model.get_input_embeddings().weight)
    new.resize_token_embeddings(old + gap + len(vectors), mean_resizing=False)
    embedding, head = new.get_input_embeddings(), new.get_output_embeddings()
    biases = [
        bias for bias in (getattr(head, "bias", None), getattr(new, "final_logits_bias", None)) if bias is not None
    ]
    if not biases:
        if head.weight is embedding.weight:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            _declare_untied(new)
        head.weight[old:] = head.weight[stand_in]
    for bias in biases:
        bias[..., old:] = SUPPRESSED_LOGIT
    embedding.weight[old:] = 0
    embedding.weight[old + gap :] = (vectors / (embedding_scale(backbone) or 1.0)).to(embedding.weight)
    return new, bool(biases)


def _declare_untied(model: Any) -> None:
    """Set `tie_word_embeddings=False` where the config's class allows it.

    T5's does not: there the value also scales the decoder's outputs, always reads as true, and a file with two tables
    loads as two tables.
    """
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        if not type(config)(tie_word_embeddings=False).tie_word_embeddings:
            config.tie_word_embeddings = False


def _tokens(trained: ExportedPrompt) -> list[str]:
    """The prompt's tokens, one per vector: `<prompt-NAME-0>`, `<prompt-NAME-1>`, ..."""
    return [f"{trained.token_name[:-1]}-{row}>" for row in range(len(trained.folded.matrix))]


def _extend_tokenizer(tokenizer: Any, trained: Sequence[ExportedPrompt], first: int) -> Any:
    """A copy with the prompts' tokens from the id `first` on, after one filler for each padding row of the table.

    Padding rows are not used for prompts: the head has rows for them too, which count in the run's probabilities.

    Raises:
        ValueError: a token is taken, or the tokenizer's ids have gaps.
    """
    new = copy.deepcopy(tokenizer)
    fillers = [f"<no-token-{number}>" for number in range(len(tokenizer), first)]
    tokens = [token for item in trained for token in _tokens(item)]
    new.add_tokens([AddedToken(token, special=True, normalized=False) for token in fillers + tokens], True)
    if new.convert_tokens_to_ids(tokens) != list(range(first, first + len(tokens))):
        raise ValueError(
            f"the tokenizer does not give {tokens[0]} the id {first}: the token name is taken, or its ids have gaps; "
            "choose another name with --token-names"
        )
    return new


def _least_likely_token(trained: Sequence[ExportedPrompt], backbone: Backbone) -> int:
    """The token whose largest probability in the probe is the smallest."""
    most = torch.stack([batch.logp.amax(0) for batch in probe(trained, backbone)]).amax(0)
    return int(most.argmin())


def _as_text(tokenizer: Any, trained: ExportedPrompt, ids: Sequence[int], backbone: Backbone) -> dict[str, Any] | None:
    """How `tokenizer(prompt text + after_prompt + text)` gives a row's ids, with or without special tokens added.

    None where neither does (SentencePiece tokenizers treat a text's first word differently): only ids work then.
    """
    rows = text_ids(backbone, TEXTS, model_class(backbone).appends_eos)
    lead = ""
    for count in range(len(rows[0])):
        if rows[0][count] not in backbone.tokenizer.all_special_ids or len({row[: count + 1] for row in rows}) > 1:
            break
        lead += backbone.tokenizer.convert_ids_to_tokens(rows[0][count])
    for after_prompt, special in (("", True), (lead, False)):
        before = "".join(_tokens(trained)) + after_prompt
        encoded = tokenizer([before + text for text in TEXTS], add_special_tokens=special)["input_ids"]
        if encoded == [[*ids, *row] for row in rows]:
            return {"after_prompt": after_prompt, "add_special_tokens": special}
    return None
