"""Prompts after an encoder's first token (BERT, RoBERTa, DistilBERT, MPNet, MiniLM): `[CLS] prompt text [SEP]`."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput

from softprompt.backbones import Backbone
from softprompt.backbones.kernels import attention
from softprompt.backbones.kernels.varlen import VarlenLayout
from softprompt.models.base import Candidates, Ids, Index, Labels, Mask, PromptedModel, Prompts, mean_loss
from softprompt.models.encoder_prefix import EncoderPrefixStates, encoder_prefix_states, lay_out
from softprompt.models.inline import PromptEmbeddings, RowsWithPrompts, insert_prompts, prompt_embeddings, resolve
from softprompt.models.padding import Rows, align_padding, checked_mask
from softprompt.models.sampling import Sampling
from softprompt.models.verify import Sample, refuse_different, refuse_length_bound, refusing, remembered, sample
from softprompt.models.vision import Pooling
from softprompt.prompts import SoftPrompt
from softprompt.types import Pool, PromptAttention, PromptPosition


def fresh_head(backbone: Backbone, classes: int, generator: torch.Generator, pool: Pool = "cls") -> nn.Module | None:
    """The head to train with a prompt: `dim -> classes`, float32; none where the backbone answers in words.

    Args:
        classes: what is told apart; 0 where the answers are texts.
        generator: of the first weights, normal with a standard deviation of 0.02 as in BERT.
        pool: what the head of a vision model sees.

    Raises:
        ValueError: the backbone has no words to answer with, and there are fewer than two classes.
    """
    if backbone.architecture not in ("encoder", "vision") or backbone.masked_lm:
        return None
    if classes < 2:
        raise ValueError(
            f"{backbone.source} has no vocabulary head and answers with one of at least two classes, "
            f"but there are {classes}; choose a classification, or a backbone that generates"
        )
    # Meta first: nn.Linear's own first weights would draw from torch's global generator.
    head = nn.Linear(backbone.model.config.hidden_size, classes, device="meta").to_empty(device=backbone.device)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.02)
        head.bias.zero_()
    return nn.Sequential(Pooling(pool), head) if backbone.architecture == "vision" else head


@final
class Encoder(PromptedModel):
    """A prompt between an encoder's first token and its text, answered by a vocabulary head or by a trained one.

    A checkpoint with a masked-LM head answers in words: the mask token is put behind the text (in front of the
    closing token) of every row that does not have exactly one of its own, and an answer is the one token in its place.
    Any other checkpoint answers through `head`, a linear layer over the mean of the text's own last states (the first
    and the closing token count, the prompt does not, as sentence encoders pool), which is trained and kept with the
    prompt. Rows of several prompts in one call share the head.

    Costs one pass over prompt and text. Guarantees the outputs and gradients of `[first; prompt; text]` run as one row
    of its own, whatever the padding.

    Raises:
        ValueError: there is neither a vocabulary head nor `head`, the tokenizer has no mask token, or padding changes
            the model's results.
    """

    appends_eos = True
    prompt_positions = ("prefix", "suffix")
    supports_self_attention = True
    supports_self_attention_dropout = True

    def __init__(
        self,
        backbone: Backbone,
        prompt: SoftPrompt | None,
        head: nn.Module | None = None,
        tuned: nn.Module | None = None,
        prompt_position: PromptPosition = "prefix",
        prompt_attention: PromptAttention = "full",
    ) -> None:
        super().__init__(backbone, prompt, head, tuned, prompt_position, prompt_attention)
        if head is None and not backbone.masked_lm:
            raise ValueError(
                f"{backbone.source} has no vocabulary head to answer with; give a head to train, as in "
                "attach(backbone, prompt, head=fresh_head(backbone, classes, generator))"
            )
        if head is None and backbone.tokenizer.mask_token_id is None:
            raise ValueError(f"the tokenizer of {backbone.source} has no mask token to answer at; give a head to train")
        self.answer_in_sequence = head is None
        refuse_length_bound(backbone)
        remembered(backbone.model, f"padding {self._words() is None}", self._check_exact)
        if prompt_attention == "self":
            self._refuse_not_isolated()
            remembered(backbone.model, "isolated", self._check_isolated)

    def prepare(self, prompts: Sequence[SoftPrompt]) -> PromptEmbeddings | EncoderPrefixStates:
        """The prompts' vectors, since everything else depends on the text; isolated, their states in every layer."""
        if self.prompt_attention == "self":
            return encoder_prefix_states(self, prompts, self._packed)
        return prompt_embeddings(self, prompts)

    def target(self, answer: Sequence[int]) -> tuple[int, ...]:
        """As it is: it stands in the mask's place."""
        return tuple(answer)

    def check_row(self, input_ids: Sequence[int], answer_ids: Sequence[int], where: str) -> None:
        """As of every model; at a mask an answer is one token, and the mask that is put behind a text counts too."""
        if self.head is not None:
            super().check_row(input_ids, (), where)
            return
        if len(answer_ids) > 1:
            text = self.backbone.tokenizer.decode(list(answer_ids), skip_special_tokens=True)
            raise ValueError(
                f"the answer {text[:60]!r} of {where} is {len(answer_ids)} tokens to {self.backbone.source}, and its "
                "mask holds one; choose a classification whose label words its tokenizer keeps whole, or a decoder"
            )
        mask = self.backbone.tokenizer.mask_token_id
        super().check_row(input_ids if input_ids.count(mask) == 1 else (*input_ids, mask), answer_ids, where)

    def check_candidates(self, words: Sequence[str], candidates: Candidates) -> None:
        """As of every model; at a mask each is one token, and a head does not look at them."""
        if self.head is not None:
            return
        super().check_candidates(words, candidates)
        several = [(word, len(ids)) for word, ids in zip(words, candidates, strict=True) if len(ids) != 1]
        if several:
            listed = ", ".join(f"{word.strip()!r} ({count} tokens)" for word, count in several[:10])
            raise ValueError(
                f"the tokenizer of {self.backbone.source} does not keep these label words whole: {listed}; one mask "
                "holds one token, so choose words of one ([label_words] in the task), or another backbone"
            )

    def forward(
        self,
        input_ids: Ids,
        attention_mask: Mask = None,
        labels: Labels | None = None,
        prompts: Prompts = None,
        index: Index = None,
    ) -> MaskedLMOutput | SequenceClassifierOutput:
        """Logits at the mask, `[batch, 1, vocab]`, or the head's, `[batch, classes]`; the loss is a mean in float32.

        `labels` are one column: the token in the mask's prompt_position, or with a head the class; -100 where there is
        none.

        Raises:
            ValueError: several columns of labels, or no label at all.
        """
        loss = None
        if labels is None:
            logits = self._logits(input_ids, attention_mask, prompts, index)[:, None]
        else:
            logits, targets = self.label_logits(input_ids, attention_mask, labels, prompts, index)
            loss = mean_loss(logits, targets)
        if self.head is not None:
            return SequenceClassifierOutput(loss=loss, logits=logits[:, 0])
        return MaskedLMOutput(loss=loss, logits=logits)

    def label_logits(
        self, input_ids: Ids, attention_mask: Mask, labels: Labels, prompts: Prompts = None, index: Index = None
    ) -> tuple[Float[Tensor, "batch 1 classes"], Int[Tensor, "batch 1"]]:
        """The logits at the mask or of the head's classes, and the labels; raises as `forward` does."""
        if labels.shape[1] != 1 or not bool((labels != -100).any()):
            raise ValueError(
                f"labels of {self.backbone.source} are {tuple(labels.shape)}; an encoder answers with one token or "
                "class, so give one column with at least one label (use answers of a single token)"
            )
        return self._logits(input_ids, attention_mask, prompts, index)[:, None], labels

    def score(
        self, input_ids: Ids, attention_mask: Mask, candidates: Candidates, prompts: Prompts = None, index: Index = None
    ) -> Float[Tensor, "batch candidate"]:
        """Log-probability of each candidate's token at the mask; with a head, of each class, whatever its tokens.

        Raises:
            ValueError: a candidate of several tokens at a mask, or another number of candidates than the head's.
        """
        if self.head is None and (long := [list(ids) for ids in candidates if len(ids) != 1] or not candidates):
            raise ValueError(
                f"candidates {long or []} of {self.backbone.source} are not one token each, and one mask holds one; "
                "choose label words that its tokenizer keeps whole"
            )
        scores = self._logits(input_ids, attention_mask, prompts, index).float().log_softmax(-1)
        if self.head is None:
            return scores[:, torch.tensor([ids[0] for ids in candidates], device=scores.device)]
        if scores.shape[1] != len(candidates):
            raise ValueError(
                f"the head tells {scores.shape[1]} classes apart and {len(candidates)} candidates are given; use the "
                "task that it was trained for"
            )
        return scores

    def generate(
        self,
        input_ids: Ids,
        attention_mask: Mask = None,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[int] | None = None,
        prompts: Prompts = None,
        index: Index = None,
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Nothing: an encoder does not generate.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self.backbone.source} is an encoder and does not generate; choose a classification, or a decoder"
        )

    def _logits(
        self, input_ids: Ids, attention_mask: Mask, prompts: Prompts, index: Index
    ) -> Float[Tensor, "batch answer"]:
        """Of the vocabulary at the mask, or of the head's classes."""
        text = align_padding(input_ids, checked_mask(input_ids, attention_mask), pads="behind")
        if self.prompt_attention == "self":
            return self._isolated(prompts, index, text)
        prepared = resolve(self, prompts)
        if self.head is not None:
            rows = insert_prompts(self, prepared, index, text, lead=self._lead(text), limit=self.backbone.max_positions)
            return self.head(_mean(self._states(rows), rows.own))
        lead, text = self._lead(text), self._masked(text)
        rows = insert_prompts(self, prepared, index, text, lead=lead, limit=self.backbone.max_positions)
        at = self._answered(text)
        at = torch.where(at < lead, at, at + (rows.mask.sum(1) - text.mask.sum(1))[:, None])[:, 0]
        each = torch.arange(len(at), device=at.device)
        if (words := self._words()) is not None:
            return words(self._states(rows)[each, at])
        return self.backbone.model(inputs_embeds=rows.embeds, attention_mask=rows.mask).logits[each, at]

    def _isolated(self, prompts: Prompts, index: Index, text: Rows) -> Float[Tensor, "batch answer"]:
        """`_logits` where prompts see themselves alone: each is run once, and the rows go on from it."""
        text = text if self.head is not None else self._masked(text)
        states = self._isolated_states(prompts, index, text)
        if self.head is not None:
            return self.head(_mean(states, text.mask.bool()))
        at = self._answered(text)[:, 0]
        logits: Tensor = self._words()(states[torch.arange(len(at), device=at.device), at])
        return logits

    def _isolated_states(self, prompts: Prompts, index: Index, text: Rows) -> Float[Tensor, "batch seq hidden"]:
        """The text's own last states."""
        embeds, layout = lay_out(self, prompts, index, text, self.backbone.max_positions)
        return layout.rows.pad(self._packed(embeds, layout))

    def _packed(self, embeds: Float[Tensor, "token dim"], layout: VarlenLayout) -> Float[Tensor, "token hidden"]:
        """The last states; every token is in the place that it has in `[first; prompt; rest]`."""
        positions = layout.positions[0] + self._skipped()
        if layout.record_kv:  # of prompts alone
            positions += 1
        else:
            positions[: layout.rows.start] += 1
            positions[layout.rows.starts] = self._skipped()
        output = self.backbone.model.base_model(
            inputs_embeds=embeds[None],
            attention_mask=attention.varlen_mask(embeds.device),
            position_ids=positions[None],
            layout=layout,
        )
        return output.last_hidden_state[0]

    def _words(self) -> Any:
        """The vocabulary head where it is one module: it runs at the mask alone and not over the whole row."""
        # Looked up, not kept: an attribute would make a part of the backbone a submodule.
        return next((found for name in _HEADS if (found := getattr(self.backbone.model, name, None)) is not None), None)

    def _states(self, rows: RowsWithPrompts) -> Float[Tensor, "batch total hidden"]:
        """The last hidden states."""
        output = self.backbone.model.base_model(inputs_embeds=rows.embeds, attention_mask=rows.mask)
        states: Tensor = output.last_hidden_state
        return states

    def _masked(self, text: Rows) -> Rows:
        """The rows with a mask to answer at: a row's own where it has exactly one, else one before its closing token.

        Each row by itself, so that no neighbour changes where one is answered; of several masks the last is answered.
        """
        lengths, end, seq = text.mask.sum(1, keepdim=True), self._end(text), text.ids.shape[1]
        needs = self._masks(text).sum(1, keepdim=True) != 1
        column = torch.arange(seq + 1, device=text.ids.device).expand(len(text.ids), -1)
        source = torch.where(needs & (column > end), column - 1, column).clamp(max=seq - 1)
        ids = text.ids.gather(1, source).masked_fill(needs & (column == end), self.backbone.tokenizer.mask_token_id)
        return align_padding(ids, (column < lengths + needs.long()).long(), pads="behind")

    def _masks(self, text: Rows) -> Bool[Tensor, "batch seq"]:
        """Where mask tokens are."""
        return (text.ids == self.backbone.tokenizer.mask_token_id) & (text.mask == 1)

    def _answered(self, text: Rows) -> Int[Tensor, "batch 1"]:
        """The column of each row's last mask."""
        column = torch.arange(text.ids.shape[1], device=text.ids.device)
        return (self._masks(text) * column).max(1, keepdim=True).values

    def _lead(self, text: Rows) -> int | Int[Tensor, "batch 1"]:
        """Tokens in front of the prompt: [CLS], or the whole text, before a mask is put behind it."""
        return 1 if self.prompt_position == "prefix" else self._end(text)

    def _end(self, text: Rows) -> Int[Tensor, "batch 1"]:
        """Each row's tokens in front of its closing one."""
        lengths, closing = text.mask.sum(1, keepdim=True), self.backbone.tokenizer.sep_token_id
        return lengths - (text.ids.gather(1, lengths - 1) == (-1 if closing is None else closing)).long()

    def _skipped(self) -> int:
        """The position of a row's first token in the model's table."""
        table = getattr(getattr(self.backbone.model.base_model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        return 0 if padding is None else padding + 1

    def _check_exact(self) -> bool:
        """Compare rows of a mixed batch with each alone through the model's own forward, once a model."""
        how, model = "padding behind the row", self.backbone.model
        with refusing(self.backbone, how):
            given = sample(self.backbone)
            ids, mask = given.batch(self.backbone.device)
            rows = insert_prompts(
                self,
                prompt_embeddings(self, given.prompts),
                given.prompt_index,
                Rows(ids, mask, ids),
                lead=1,
                limit=None,
            )
            words = self._words()
            ours = (
                model(inputs_embeds=rows.embeds, attention_mask=rows.mask)[0]
                if words is None
                else words(self._states(rows))
            )
            for row in range(len(ids)):
                alone = model(inputs_embeds=self._alone(given, row))[0][0]
                refuse_different(self.backbone, alone, ours[row, : len(alone)], how, "outputs")
        return True

    def _alone(self, given: Sample, row: int) -> Float[Tensor, "one total dim"]:
        """One row with its prompt behind its first token."""
        own = self.backbone.model.get_input_embeddings()(torch.tensor(given.texts[row], device=self.backbone.device))
        return torch.cat([own[:1], given.prompt(row).to(own), own[1:]])[None]

    def _check_isolated(self) -> bool:
        """Compare with the model's own forward under a mask that hides the text from the prompt, once a model."""
        how, model, given = "isolated prompts", self.backbone.model, sample(self.backbone)
        with refusing(self.backbone, how):
            ids, mask = given.batch(self.backbone.device)
            wanted = []
            for row in range(len(ids)):
                embeds = self._alone(given, row)
                place = torch.arange(embeds.shape[1], device=ids.device)
                of_prompt = (place >= 1) & (place <= len(given.prompt(row)))
                seen = ~of_prompt[:, None] | of_prompt[None]
                states = model.base_model(inputs_embeds=embeds, attention_mask=seen[None, None]).last_hidden_state[0]
                wanted.append(states[~of_prompt])
            for prompts in (given.prompts, self.prepare(given.prompts)):
                ours = self._isolated_states(prompts, given.prompt_index, Rows(ids, mask, ids))
                refuse_different(self.backbone, torch.cat(wanted), ours[mask.bool()], how, "states")
        return True

    def _refuse_not_isolated(self) -> None:
        """Refuse a model that does not hand positions and attention on."""
        model = self.backbone.model
        accepted = inspect.signature(model.base_model.forward).parameters
        if (
            not attention.supports_varlen(model)
            or "position_ids" not in accepted
            or (self.head or self._words()) is None
        ):
            raise ValueError(
                f"{self.backbone.source} ({model.config.model_type}) does not hand positions and attention on, so its "
                "prompts cannot be isolated; leave prompt_attention=full, or choose a BERT or RoBERTa"
            )


_HEADS = ("cls", "lm_head")
"""What masked-LM models call a head that is one module; the others (DistilBERT) run theirs in their forward."""


def _mean(
    states: Float[Tensor, "batch total hidden"], own: Bool[Tensor, "batch total"]
) -> Float[Tensor, "batch hidden"]:
    """The mean state of the text's own tokens, float32."""
    return (states.float() * own[..., None]).sum(1) / own.sum(1, keepdim=True)
