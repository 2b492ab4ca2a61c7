"""Prompts in an encoder-decoder's input (T5, mT5, FLAN-T5, BART and their relatives)."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from softprompt.backbones import Backbone, fsdp
from softprompt.backbones.kernels import attention, t5
from softprompt.models.base import (
    Candidates,
    Ids,
    Index,
    Labels,
    Mask,
    PromptedModel,
    Prompts,
    mean_loss,
    refuse_unknown,
)
from softprompt.models.encoder_prefix import EncoderPrefixStates, encoder_prefix_states, lay_out
from softprompt.models.inline import PromptEmbeddings, RowsWithPrompts, insert_prompts, prompt_embeddings, resolve
from softprompt.models.label_tree import LabelTree, SharedLayer, in_parts
from softprompt.models.padding import Rows, align_padding, checked_mask, pad_batch
from softprompt.models.sampling import Chooser, Sampling
from softprompt.models.verify import refuse_different, refuse_length_bound, refusing, remembered, sample
from softprompt.prompts import SoftPrompt
from softprompt.types import PromptAttention, PromptPosition


class _Read(NamedTuple):
    """A batch that the encoder has read, and what the decoder has kept of it so far."""

    states: Float[Tensor, "batch total dim"]
    mask: Int[Tensor, "batch total"]
    cache: EncoderDecoderCache


@final
class EncoderDecoder(PromptedModel):
    """A prompt in front of the encoder's text, or where `place` says; the decoder sees it through its cross-attention.

    Costs one pass of the encoder over prompt and text a call; candidates and generated tokens share it, and the
    cross-attention's keys and values too. Guarantees the outputs and gradients of `[prompt; text]` run as one row of
    its own, whatever the padding and whatever prompts of other lengths are in the batch.

    An answer ends with the end of sequence, as these models were trained to end theirs; where the checkpoint forces a
    first token (BART's `<s>`, mBART's language), an answer begins with it.

    Raises:
        ValueError: the model has no encoder to call by itself, or padding changes its results.
    """

    appends_eos = True
    prompt_positions = ("prefix", "after_bos", "suffix")
    supports_self_attention = True

    def __init__(
        self,
        backbone: Backbone,
        prompt: SoftPrompt | None,
        head: nn.Module | None = None,
        tuned: nn.Module | None = None,
        prompt_position: PromptPosition = "prefix",
        prompt_attention: PromptAttention = "full",
    ) -> None:
        super().__init__(
            backbone, prompt, tuned=tuned, prompt_position=prompt_position, prompt_attention=prompt_attention
        )
        if head is not None:
            raise ValueError(f"{backbone.source} answers in words and takes no head; leave it out")
        if not hasattr(backbone.model, "prepare_decoder_input_ids_from_labels"):
            raise ValueError(
                f"{backbone.source} ({backbone.model.config.model_type}) does not say how its decoder's input is made "
                "from labels; choose a text-to-text model such as T5 or BART"
            )
        generation = backbone.model.generation_config
        forced = generation.forced_bos_token_id
        self._first: tuple[int, ...] = () if forced is None else (int(forced),)
        if prompt_attention == "self" and not t5.is_supported(backbone.model.get_encoder()):
            raise ValueError(
                f"{backbone.source} ({backbone.model.config.model_type}) is no T5 or mT5, whose prompts alone can be "
                "isolated among encoder-decoders; leave prompt_attention=full"
            )
        self.supports_fsdp = prompt_attention != "self"
        refuse_length_bound(backbone)
        remembered(backbone.model, "padding", self._check_exact)

    def prepare(self, prompts: Sequence[SoftPrompt]) -> PromptEmbeddings | EncoderPrefixStates:
        """The prompts' vectors, since the encoder's pass depends on the text; isolated, their states in the encoder."""
        if self.prompt_attention == "self":
            return encoder_prefix_states(self, prompts, partial(t5.run, self.backbone.model.get_encoder()))
        return prompt_embeddings(self, prompts)

    def target(self, answer: Sequence[int]) -> tuple[int, ...]:
        """The answer with the forced first token, if there is one, and the end of sequence, once each."""
        ends = self.end_of_sequence()
        front = () if tuple(answer[:1]) == self._first else self._first
        return (*front, *answer, *(() if answer and answer[-1] in ends else ends[:1]))

    def check_row(self, input_ids: Sequence[int], answer_ids: Sequence[int], where: str) -> None:
        """As of every model; an answer is the decoder's, and has that one's positions to itself."""
        super().check_row(input_ids, answer_ids, where)
        refuse_unknown(self.backbone, answer_ids, where)
        if not answer_ids:
            return
        longest, limit = len(self.target(answer_ids)), self.backbone.max_answer_positions
        if limit is not None and longest > limit:
            raise ValueError(
                f"{where} has an answer of {longest} tokens, but the decoder of {self.backbone.source} has {limit} "
                "positions; shorten the answer or leave the row out"
            )

    def check_candidates(self, words: Sequence[str], candidates: Candidates) -> None:
        """As of every model, and each must fit the decoder's positions."""
        super().check_candidates(words, candidates)
        limit = self.backbone.max_answer_positions
        for word, ids in zip(words, candidates, strict=True):
            if limit is not None and len(self.target(ids)) > limit:
                raise ValueError(
                    f"the label word {word[:60]!r} has {len(self.target(ids))} tokens, but the decoder of "
                    f"{self.backbone.source} has {limit} positions; use a shorter one"
                )

    def forward(
        self,
        input_ids: Ids,
        attention_mask: Mask = None,
        labels: Labels | None = None,
        prompts: Prompts = None,
        index: Index = None,
    ) -> Seq2SeqLMOutput:
        """Logits of the labels and their mean cross-entropy in float32; without labels, of the first token alone.

        `labels` are the answer's tokens as `target` gives them, -100 behind the shorter ones; the decoder's input is
        made from them by the model's own shift.

        Raises:
            ValueError: no label at all, or -100 in front of one.
        """
        if labels is None:
            read = self._read(input_ids, attention_mask, prompts, index)
            return Seq2SeqLMOutput(logits=self._decode(read, self._begin(input_ids)))
        logits, targets = self.label_logits(input_ids, attention_mask, labels, prompts, index)
        return Seq2SeqLMOutput(loss=mean_loss(logits, targets), logits=logits)

    def label_logits(
        self, input_ids: Ids, attention_mask: Mask, labels: Labels, prompts: Prompts = None, index: Index = None
    ) -> tuple[Float[Tensor, "batch target vocab"], Int[Tensor, "batch target"]]:
        """The decoder's logits at each label, and the labels; raises as `forward` does."""
        wanted = labels != -100
        if not bool(wanted.any()):
            raise ValueError("no row has a label; give at least one label other than -100")
        if bool((wanted[:, 1:] & ~wanted[:, :-1]).any()):
            raise ValueError("labels have -100 in front of a token; put the labels' padding behind them")
        self.refuse_long_answer(int(wanted.sum(1).max()))
        read = self._read(input_ids, attention_mask, prompts, index)
        return self._decode(read, self.backbone.model.prepare_decoder_input_ids_from_labels(labels=labels)), labels

    def score(
        self, input_ids: Ids, attention_mask: Mask, candidates: Candidates, prompts: Prompts = None, index: Index = None
    ) -> Float[Tensor, "batch candidate"]:
        """Log-probability of each candidate and of the end of sequence behind it: one pass of the encoder for all.

        The decoder runs in parts of bounded memory, over keys and values that are not copied for a candidate. A forced
        first token is fed and not scored.
        """
        if not candidates or not all(candidates):
            raise ValueError(f"candidates are {list(candidates)}; give at least one, each with at least one token")
        read = self._read(input_ids, attention_mask, prompts, index)
        given = [self.target(candidate)[len(self._first) :] for candidate in candidates]
        self.refuse_long_answer(len(self._first) + max(map(len, given)))
        forced = torch.tensor(self._first, dtype=torch.long, device=input_ids.device).expand(len(input_ids), -1)
        logits = self._decode(read, torch.cat([self._begin(input_ids), forced], 1))[:, -1].float()
        scores = logits.log_softmax(-1)[:, [ids[0] for ids in given]]
        more = [which for which, ids in enumerate(given) if len(ids) > 1]
        if not more:
            return scores
        rest = self._score_rest(read, [given[which] for which in more])
        return scores.index_add(1, torch.tensor(more, device=scores.device), rest)

    def _score_rest(self, read: _Read, targets: Candidates) -> Float[Tensor, "batch candidate"]:
        """Log-probability of all tokens but the first of each: targets are rows of the decoder over shared states."""
        own, cross = (
            [(layer.keys, layer.values) for layer in cache.layers]
            for cache in (read.cache.self_attention_cache, read.cache.cross_attention_cache)
        )
        model = self.backbone.model
        folds = attention.is_installed(model)

        def scores(rows: slice, part: Candidates) -> Tensor:
            padded, real = pad_batch(part, read.mask.device)
            mask, count = read.mask[rows], len(part)
            before = torch.ones(len(mask) * count, own[0][0].shape[2], dtype=torch.long, device=mask.device)
            cache = EncoderDecoderCache(
                Cache(layers=[SharedLayer(keys[rows], values[rows], count) for keys, values in own]),
                Cache(layers=[SharedLayer(keys[rows], values[rows], 1 if folds else count) for keys, values in cross]),
            )
            logits: Tensor = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=read.states[rows]),
                attention_mask=mask.bool()[:, None, None] if folds else mask.repeat_interleave(count, 0),
                decoder_input_ids=padded[:, :-1].repeat(len(mask), 1),
                decoder_attention_mask=torch.cat([before, real[:, :-1].repeat(len(mask), 1)], 1),
                past_key_values=cache,
                use_cache=True,
            ).logits
            return LabelTree.of(part).scores(logits.view(len(mask), count, *logits.shape[1:]), tree=False)

        return in_parts(scores, targets, len(read.mask), model, 0 if folds else read.mask.shape[1])

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
        """Token by token, greedy or sampled; a forced first token is given out like any other.

        A row whose logits are no numbers finishes: with the first token of `stop`, or -1 where that is empty.
        """
        ends = torch.tensor(self.end_of_sequence() if stop is None else list(stop), dtype=torch.long)
        ends = ends.to(input_ids.device)
        self.refuse_long_answer(max_new_tokens)
        over = int(ends[0]) if len(ends) else -1
        choose = Chooser(sampling or Sampling(), input_ids.device)
        with torch.no_grad():
            read = self._read(input_ids, attention_mask, prompts, index)
            done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
            fed = self._begin(input_ids)
            token = fed[:, 0]
        for step in range(max_new_tokens):
            with torch.no_grad():  # not around the yield: whoever asks for the tokens keeps its own mode
                logits = self._decode(read, fed)[:, -1]
                if step < len(self._first):
                    new = torch.full_like(token, self._first[step])
                else:  # drawing from NaN, the largest of all, would fail; on a GPU together with all that comes after
                    finite = logits.max(-1).values.isfinite()
                    new = choose(logits.masked_fill(~finite[:, None], 0.0)).masked_fill(~finite, over)
                token = torch.where(done, token, new)
                done = done | torch.isin(token, ends) | (token < 0)
            yield token
            if fsdp.all_done(self.backbone.model, done):
                return
            fed = token[:, None].clamp(min=0)

    @torch.no_grad()
    def beam(
        self,
        input_ids: Ids,
        attention_mask: Mask = None,
        *,
        beams: int = 4,
        max_new_tokens: int = 64,
        prompts: Prompts = None,
        index: Index = None,
    ) -> Int[Tensor, "batch target"]:
        """The likeliest answer that transformers' beam search finds for each row, padded behind.

        Raises:
            ValueError: `beams` below 1.
        """
        if beams < 1:
            raise ValueError(f"beams is {beams}; it must be at least 1")
        self.refuse_long_answer(max_new_tokens)
        read = self._read(input_ids, attention_mask, prompts, index)
        found = self.backbone.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=read.states),
            attention_mask=read.mask,
            num_beams=beams,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.end_of_sequence() or None,
        )
        answers: Tensor = found[:, 1:]  # without the decoder's start
        return answers

    def _read(self, input_ids: Ids, attention_mask: Mask, prompts: Prompts, index: Index) -> _Read:
        """The encoder's states of prompts and text, and an empty cache for the decoder."""
        text = align_padding(input_ids, checked_mask(input_ids, attention_mask), pads="behind")
        if self.prompt_attention == "self":
            return self._isolated(prompts, index, text)
        rows = insert_prompts(
            self, resolve(self, prompts), index, text, lead=self._lead(text), limit=self.backbone.max_positions
        )
        return self._encoded(rows)

    def _isolated(self, prompts: Prompts, index: Index, text: Rows) -> _Read:
        """The same of prompts that see themselves alone: each is run once, and every row goes on from its states."""
        embeds, layout = lay_out(self, prompts, index, text, self.backbone.max_positions)
        states = t5.run(self.backbone.model.get_encoder(), embeds, layout)
        rows, mask = layout.rows.pad(states), text.mask
        if layout.prompts is not None:
            before = prompts.last if isinstance(prompts, EncoderPrefixStates) else layout.prompts.pad(states)
            assert before is not None
            rows = torch.cat([before[layout.index], rows], 1)
            mask = torch.cat([layout.prompts.mask[layout.index].long(), mask], 1)
        return _Read(rows, mask, EncoderDecoderCache(DynamicCache(), DynamicCache()))

    def _encoded(self, rows: RowsWithPrompts) -> _Read:
        states = self.backbone.model.get_encoder()(inputs_embeds=rows.embeds, attention_mask=rows.mask)[0]
        return _Read(states, rows.mask, EncoderDecoderCache(DynamicCache(), DynamicCache()))

    def _lead(self, text: Rows) -> int | Int[Tensor, "batch 1"]:
        """Tokens in front of the prompt; behind a text it still stands in front of the end of sequence."""
        if self.prompt_position != "suffix":
            return 0 if self.prompt_position == "prefix" else 1
        lengths = text.mask.sum(1, keepdim=True)
        ends = torch.tensor(self.end_of_sequence(), dtype=torch.long, device=text.ids.device)
        return lengths - torch.isin(text.ids.gather(1, lengths - 1), ends).long()

    def _decode(self, read: _Read, ids: Int[Tensor, "batch more"]) -> Float[Tensor, "batch more vocab"]:
        """Logits of the decoder's next tokens; `read`'s cache grows by them."""
        logits: Tensor = self.backbone.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=read.states),
            attention_mask=read.mask,
            decoder_input_ids=ids,
            past_key_values=read.cache,
            use_cache=True,
        ).logits
        return logits

    def _begin(self, ids: Ids) -> Int[Tensor, "batch 1"]:
        """What the decoder is fed first: the model's shift of an end of sequence (mBART starts with it)."""
        labels = torch.full_like(ids[:, :1], (self.end_of_sequence() or [0])[0])
        start: Tensor = self.backbone.model.prepare_decoder_input_ids_from_labels(labels=labels)
        return start

    def refuse_long_answer(self, longest: int) -> None:
        """Refuse to write more tokens than the decoder has positions for.

        Raises:
            ValueError: naming both numbers.
        """
        limit = self.backbone.max_answer_positions
        if limit is not None and longest > limit:
            raise ValueError(
                f"an answer of {longest} tokens does not fit the {limit} positions of {self.backbone.source}; ask for "
                "fewer (max_new_tokens)"
            )

    def _check_exact(self) -> bool:
        """Compare rows of a mixed batch, and their answers step by step, with each alone, once a model."""
        how, model = "padding behind the row", self.backbone.model
        with refusing(self.backbone, how):
            given = sample(self.backbone)
            ids, mask = given.batch(self.backbone.device)
            text = align_padding(ids, mask, pads="behind")
            rows = insert_prompts(
                self, prompt_embeddings(self, given.prompts), given.prompt_index, text, lead=0, limit=None
            )
            begin = self._begin(ids)
            follow = torch.tensor(given.answer, device=ids.device).expand(len(ids), -1)
            fed = torch.cat([begin, follow], 1)
            at_once = self._decode(self._encoded(rows), fed)
            read = self._encoded(rows)
            by_step = torch.cat([self._decode(read, fed[:, step : step + 1]) for step in range(fed.shape[1])], 1)
            for row, tokens in enumerate(given.texts):
                own = model.get_input_embeddings()(torch.tensor(tokens, device=ids.device))
                embeds = torch.cat([given.prompt(row).to(own), own])[None]
                alone = model(inputs_embeds=embeds, decoder_input_ids=fed[row : row + 1]).logits[0]
                for ours in (at_once, by_step):
                    refuse_different(self.backbone, alone, ours[row], how)
        return True
