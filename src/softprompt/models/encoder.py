"""Prompts after an encoder's first token (BERT, RoBERTa, DistilBERT, MPNet, MiniLM): `[CLS] prompt text [SEP]`."""

import inspect
from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput

from softprompt.backbones import Backbone
from softprompt.backbones.kernels import attention
from softprompt.backbones.kernels.varlen import VarlenLayout
from softprompt.models.base import PromptedModel
from softprompt.models.config_checks import check_batch_independence
from softprompt.models.encoder_prefix import EncoderPrefixStates, pack_with_prompts
from softprompt.models.heads import linear_head
from softprompt.models.inline import PromptEmbeddings, RowsWithPrompts, insert_prompts
from softprompt.models.input_checks import check_class_count
from softprompt.models.inputs import Candidates, Index, Inputs, Labels, Prompts
from softprompt.models.padding import Rows, align_padding, length_mask
from softprompt.models.verify import Sample, cached_check, check_close, model_errors_refused, sample
from softprompt.prompts import SoftPrompt
from softprompt.types import Pool


@final
class Encoder(PromptedModel):
    """A prompt between an encoder's first token and its text, answered by a vocabulary head or by a trained one.

    A checkpoint with a masked-LM head answers in words: the mask token is inserted after the text (before the closing
    token) of every row that does not have exactly one already, and an answer is the one token at the mask. Any other
    checkpoint answers through `head`, a linear layer over the mean of the text's own last hidden states (the first and
    the closing token count, the prompt does not, as sentence encoders pool), which is trained and saved with the
    prompt. Rows of several prompts in one call share the head.

    `forward` gives the logits at the mask, `[batch, 1, vocab]`, or the head's, `[batch, classes]`. `labels` are one
    column: the token at the mask, or the class.

    Costs one pass over prompt and text. Guarantees the outputs and gradients of `[first; prompt; text]` run as one row
    of its own, whatever the padding.

    Raises:
        ValueError: there is neither a vocabulary head nor `head`, the tokenizer has no mask token, or padding changes
            the model's results.
    """

    appends_eos = True
    answer_in_sequence = True
    max_label_tokens = 1
    prompt_positions = ("prefix", "suffix")
    supports_self_attention = True
    supports_self_attention_dropout = True

    @classmethod
    def needs_head(cls, backbone: Backbone) -> bool:
        """Whether the checkpoint has no masked-LM head."""
        return not backbone.masked_lm

    @classmethod
    def fresh_head(cls, backbone: Backbone, classes: int, generator: torch.Generator, pool: Pool) -> nn.Module | None:
        """A linear head for a checkpoint without a masked-LM head."""
        return None if backbone.masked_lm else linear_head(backbone, classes, generator)

    def _setup(self) -> None:
        backbone = self.backbone
        self.answer_in_sequence = self.head is None
        if self.head is None and backbone.tokenizer.mask_token_id is None:
            raise ValueError(f"the tokenizer of {backbone.source} has no mask token to answer at; give a head to train")
        check_batch_independence(backbone)
        cached_check(backbone.model, "bidirectional", self._check_bidirectional)
        cached_check(backbone.model, f"padding {self._vocabulary_head() is None}", self._check_exact)
        if self.prompt_attention == "self":
            self._check_supports_varlen()
            cached_check(backbone.model, "self attention", self._check_self_attention)

    def prepare(self, prompts: Sequence[SoftPrompt]) -> PromptEmbeddings | EncoderPrefixStates:
        """The prompts' vectors, since all else depends on the text; with `prompt_attention="self"` their states."""
        if self.prompt_attention == "self":
            return EncoderPrefixStates.compute(self, prompts, self._run_packed)
        return PromptEmbeddings.compute(self, prompts)

    def check_row(self, input_ids: Sequence[int], answer_ids: Sequence[int], where: str) -> None:
        """Also refuse an answer of several tokens at a mask; the mask that will be inserted counts as a token."""
        if self.head is not None:
            super().check_row(input_ids, (), where)
            return
        if len(answer_ids) > 1:
            text = self.backbone.tokenizer.decode(list(answer_ids), skip_special_tokens=True)
            raise ValueError(
                f"the answer {text[:60]!r} of {where} has {len(answer_ids)} tokens in {self.backbone.source}, but its "
                "mask holds one; choose a classification whose label words are single tokens, or a decoder"
            )
        mask = self.backbone.tokenizer.mask_token_id
        super().check_row(input_ids if input_ids.count(mask) == 1 else (*input_ids, mask), answer_ids, where)

    def check_candidates(self, label_words: Sequence[str], candidates: Candidates) -> None:
        """Also refuse label words of several tokens at a mask; a head ignores them."""
        if self.head is not None:
            return
        super().check_candidates(label_words, candidates)
        several = [(word, len(ids)) for word, ids in zip(label_words, candidates, strict=True) if len(ids) != 1]
        if several:
            listed = ", ".join(f"{word.strip()!r} ({count} tokens)" for word, count in several[:10])
            raise ValueError(
                f"the tokenizer of {self.backbone.source} splits these label words: {listed}; one mask holds one "
                "token, so choose single-token words ([label_words] in the task), or another backbone"
            )

    def _logits(self, inputs: Inputs) -> Float[Tensor, "batch 1 classes"]:
        return self._answer_logits(inputs)[:, None]

    def _output(self, logits: Tensor, loss: Tensor | None) -> MaskedLMOutput | SequenceClassifierOutput:
        if self.head is not None:
            return SequenceClassifierOutput(loss=loss, logits=logits[:, 0])
        return MaskedLMOutput(loss=loss, logits=logits)

    def _label_logits(
        self, inputs: Inputs, labels: Labels
    ) -> tuple[Float[Tensor, "batch 1 classes"], Int[Tensor, "batch 1"]]:
        if labels.shape[1] != 1 or not bool((labels != -100).any()):
            raise ValueError(
                f"labels of {self.backbone.source} are {tuple(labels.shape)}; an encoder answers with one token or "
                "class, so give one column with at least one label (use answers of a single token)"
            )
        return self._logits(inputs), labels

    def _score(self, inputs: Inputs, candidates: Candidates) -> Float[Tensor, "batch candidate"]:
        """Log-probability of each candidate's token at the mask; with a head, of each class in order.

        Raises:
            ValueError: a candidate of several tokens at a mask, or another number of candidates than the head's.
        """
        if self.head is None and not candidates:
            raise ValueError(f"no candidates are given to {self.backbone.source}; give single-token label words")
        if self.head is None and (long := [list(ids) for ids in candidates if len(ids) != 1]):
            raise ValueError(
                f"candidates {long} of {self.backbone.source} are not one token each, but a mask holds one; choose "
                "single-token label words"
            )
        scores = self._answer_logits(inputs).float().log_softmax(-1)
        if self.head is None:
            return scores[:, torch.tensor([ids[0] for ids in candidates], device=scores.device)]
        check_class_count(scores.shape[1], candidates)
        return scores

    def _answer_logits(self, inputs: Inputs) -> Float[Tensor, "batch answer"]:
        """Logits of the vocabulary at the mask, or of the head's classes."""
        text = self.text(inputs)
        if self.prompt_attention == "self":
            return self._self_attention_logits(inputs.prompts, inputs.prompt_index, text)
        prepared, limit = self.resolve(inputs.prompts, PromptEmbeddings), self.backbone.max_positions
        lead = self._lead(text)  # before a mask is inserted
        if self.head is not None:
            rows = insert_prompts(self, prepared, inputs.prompt_index, text, lead, limit)
            return self.head(_mean(self._hidden_states(rows), rows.is_text))
        text = self._with_mask(text)
        rows = insert_prompts(self, prepared, inputs.prompt_index, text, lead, limit)
        at = self._answer_column(text)
        at = torch.where(at < lead, at, at + (rows.mask.sum(1) - text.mask.sum(1))[:, None])[:, 0]
        batch = torch.arange(len(at), device=at.device)
        if (vocabulary_head := self._vocabulary_head()) is not None:
            return vocabulary_head(self._hidden_states(rows)[batch, at])
        return self.backbone.model(inputs_embeds=rows.embeds, attention_mask=rows.mask).logits[batch, at]

    def _self_attention_logits(self, prompts: Prompts, index: Index, text: Rows) -> Float[Tensor, "batch answer"]:
        """`_answer_logits` with `prompt_attention="self"`: each prompt runs once, and the rows attend to it."""
        text = text if self.head is not None else self._with_mask(text)
        states = self._self_attention_states(prompts, index, text)
        if self.head is not None:
            return self.head(_mean(states, text.mask.bool()))
        at = self._answer_column(text)[:, 0]
        logits: Tensor = self._vocabulary_head()(states[torch.arange(len(at), device=at.device), at])
        return logits

    def _self_attention_states(self, prompts: Prompts, index: Index, text: Rows) -> Float[Tensor, "batch seq hidden"]:
        """The last hidden states of the text."""
        embeds, layout = pack_with_prompts(self, prompts, index, text, self.backbone.max_positions)
        return layout.rows.pad(self._run_packed(embeds, layout))

    def _run_packed(self, embeds: Float[Tensor, "token dim"], layout: VarlenLayout) -> Float[Tensor, "token hidden"]:
        """The last hidden states of packed tokens, each at its position in `[first; prompt; rest]`."""
        positions = layout.positions[0] + self._first_position()
        if layout.record_kv:  # prompts alone
            positions += 1
        else:
            positions[: layout.rows.start] += 1
            positions[layout.rows.starts] = self._first_position()
        output = self.backbone.model.base_model(
            inputs_embeds=embeds[None],
            attention_mask=attention.varlen_mask(embeds.device),
            position_ids=positions[None],
            layout=layout,
        )
        return output.last_hidden_state[0]

    def _vocabulary_head(self) -> Any:
        """The vocabulary head where it is one module, which can run at the mask alone; else None."""
        # Looked up each time: an attribute would make a part of the backbone a submodule.
        heads = (getattr(self.backbone.model, name, None) for name in _HEADS)
        return next((head for head in heads if head is not None), None)

    def _hidden_states(self, rows: RowsWithPrompts) -> Float[Tensor, "batch total hidden"]:
        output = self.backbone.model.base_model(inputs_embeds=rows.embeds, attention_mask=rows.mask)
        states: Tensor = output.last_hidden_state
        return states

    def _with_mask(self, text: Rows) -> Rows:
        """The rows with a mask to answer at: a row's own if it has exactly one, else one before its closing token.

        Each row by itself, so that no neighbor changes where one is answered; of several masks the last is answered.
        """
        lengths, end, seq = text.mask.sum(1, keepdim=True), self._end(text), text.ids.shape[1]
        needs = self._is_mask(text).sum(1, keepdim=True) != 1
        column = torch.arange(seq + 1, device=text.ids.device).expand(len(text.ids), -1)
        source = torch.where(needs & (column > end), column - 1, column).clamp(max=seq - 1)
        ids = text.ids.gather(1, source).masked_fill(needs & (column == end), self.backbone.tokenizer.mask_token_id)
        return align_padding(ids, length_mask((lengths + needs.long())[:, 0], seq + 1), "right")

    def _is_mask(self, text: Rows) -> Bool[Tensor, "batch seq"]:
        return (text.ids == self.backbone.tokenizer.mask_token_id) & (text.mask == 1)

    def _answer_column(self, text: Rows) -> Int[Tensor, "batch 1"]:
        """The column of each row's last mask."""
        column = torch.arange(text.ids.shape[1], device=text.ids.device)
        return (self._is_mask(text) * column).max(1, keepdim=True).values

    def _lead(self, text: Rows) -> int | Int[Tensor, "batch 1"]:
        """Tokens before the prompt: [CLS], or the full text, where a mask has not been inserted yet."""
        return 1 if self.prompt_position == "prefix" else self._end(text)

    def _end(self, text: Rows) -> Int[Tensor, "batch 1"]:
        """Each row's tokens before its closing one."""
        lengths, closing = text.mask.sum(1, keepdim=True), self.backbone.tokenizer.sep_token_id
        return lengths - (text.ids.gather(1, lengths - 1) == (-1 if closing is None else closing)).long()

    def _first_position(self) -> int:
        """The row of the model's position table for a row's first token."""
        table = getattr(getattr(self.backbone.model.base_model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        return 0 if padding is None else padding + 1

    def _check_bidirectional(self) -> bool:
        """Refuse a model whose tokens do not see later ones: a prompt after the pooled token would do nothing."""
        model, ids = self.backbone.model, torch.tensor(sample(self.backbone).texts[-1], device=self.backbone.device)
        with model_errors_refused(self.backbone, "a text"):
            embeds = model.get_input_embeddings()(ids)[None]
            other_second = torch.cat([embeds[:, :1], embeds[:, :1], embeds[:, 2:]], 1)
            first, changed = (model(inputs_embeds=inputs)[0][0, 0] for inputs in (embeds, other_second))
        if torch.equal(first, changed):
            raise ValueError(
                f"{self.backbone.source} is a {type(model).__name__}, a decoder without its language-model head, whose "
                "tokens do not see later ones; give the model with its head, or an encoder"
            )
        return True

    def _check_exact(self) -> bool:
        """Compare rows of a mixed batch with each alone through the model's own forward."""
        how, model = "padding after the row", self.backbone.model
        with model_errors_refused(self.backbone, how):
            probe = sample(self.backbone)
            ids, mask = probe.batch(self.backbone.device)
            prepared = PromptEmbeddings.compute(self, probe.prompts)
            text = align_padding(ids, mask, "right")
            rows = insert_prompts(self, prepared, probe.prompt_index, text, lead=1, limit=None)
            if (vocabulary_head := self._vocabulary_head()) is None:
                outputs = model(inputs_embeds=rows.embeds, attention_mask=rows.mask)[0]
            else:
                outputs = vocabulary_head(self._hidden_states(rows))
            for row in range(len(ids)):
                single = model(inputs_embeds=self._single_row(probe, row))[0][0]
                check_close(self.backbone, single, outputs[row, : len(single)], how, "outputs")
        return True

    def _single_row(self, probe: Sample, row: int) -> Float[Tensor, "one total dim"]:
        """One row with its prompt after its first token."""
        ids = torch.tensor(probe.texts[row], device=self.backbone.device)
        embeds = self.backbone.model.get_input_embeddings()(ids)
        return torch.cat([embeds[:1], probe.prompt(row).to(embeds), embeds[1:]])[None]

    def _check_self_attention(self) -> bool:
        """Compare with the model's own forward under a mask that hides the text from the prompt."""
        how, model, probe = "prompt_attention=self", self.backbone.model, sample(self.backbone)
        with model_errors_refused(self.backbone, how):
            ids, mask = probe.batch(self.backbone.device)
            expected = []
            for row in range(len(ids)):
                embeds = self._single_row(probe, row)
                column = torch.arange(embeds.shape[1], device=ids.device)
                in_prompt = (column >= 1) & (column <= len(probe.prompt(row)))
                visible = ~in_prompt[:, None] | in_prompt[None]
                states = model.base_model(inputs_embeds=embeds, attention_mask=visible[None, None]).last_hidden_state[0]
                expected.append(states[~in_prompt])
            for prompts in (probe.prompts, self.prepare(probe.prompts)):
                states = self._self_attention_states(prompts, probe.prompt_index, Rows(ids, mask, ids))
                check_close(self.backbone, torch.cat(expected), states[mask.bool()], how, "states")
        return True

    def _check_supports_varlen(self) -> None:
        """Refuse a model whose layers do not pass positions and the layout on to our attention."""
        model = self.backbone.model
        accepted = inspect.signature(model.base_model.forward).parameters
        if (
            not attention.supports_varlen(model)
            or "position_ids" not in accepted
            or (self.head or self._vocabulary_head()) is None
        ):
            raise ValueError(
                f"{self.backbone.source} ({model.config.model_type}) does not pass positions and attention arguments "
                "on to its layers, which prompt_attention=self needs; use prompt_attention=full, or a BERT or RoBERTa"
            )


_HEADS = ("cls", "lm_head")
"""The names of a head that is one module in masked-LM models; the others (DistilBERT) run theirs in their forward."""


def _mean(
    states: Float[Tensor, "batch total hidden"], is_text: Bool[Tensor, "batch total"]
) -> Float[Tensor, "batch hidden"]:
    """The mean state of the text's own tokens, float32."""
    return (states.float() * is_text[..., None]).sum(1) / is_text.sum(1, keepdim=True)
