"""Prompts in an encoder-decoder's input (T5, mT5, FLAN-T5, BART and their relatives)."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from softprompt.backbones import fsdp
from softprompt.backbones.kernels import attention, t5
from softprompt.models.base import PromptedModel
from softprompt.models.config_checks import check_batch_independence
from softprompt.models.encoder_prefix import EncoderPrefixStates, pack_with_prompts
from softprompt.models.inline import PromptEmbeddings, RowsWithPrompts, insert_prompts
from softprompt.models.input_checks import check_not_empty, check_token_ids
from softprompt.models.inputs import Candidates, Ids, Inputs, Labels
from softprompt.models.label_tree import LabelTree, SharedLayer, in_passes
from softprompt.models.padding import Rows, align_padding, pad_batch
from softprompt.models.sampling import Chooser, Sampling
from softprompt.models.verify import cached_check, check_close, model_errors_refused, sample
from softprompt.prompts import SoftPrompt


class _Encoded(NamedTuple):
    """The encoder's output for a batch, and the decoder's cache so far."""

    states: Float[Tensor, "batch total dim"]
    mask: Int[Tensor, "batch total"]
    cache: EncoderDecoderCache


@final
class EncoderDecoder(PromptedModel):
    """A prompt in the encoder's input, by default in front; the decoder sees it through its cross-attention.

    An answer ends with the end of sequence, as these models were trained to end theirs; where the checkpoint forces a
    first token (BART's `<s>`, mBART's language), an answer begins with it.

    `forward` without labels gives the logits of the answer's first token alone. `labels` are the answer's tokens as
    `target` gives them, padded on the right with -100; the decoder's input is made from them by the model's own shift.

    Costs one pass of the encoder over prompt and text per call; candidates and generated tokens share it, and the
    cross-attention's keys and values too. Guarantees the outputs and gradients of `[prompt; text]` run as one row of
    its own, whatever the padding and the lengths of the batch's other prompts.

    Raises:
        ValueError: the model has no encoder to call by itself, or padding changes its results.
    """

    appends_eos = True
    generates = True
    peft_task_type = "SEQ_2_SEQ_LM"
    prompt_positions = ("prefix", "after_bos", "suffix")
    supports_self_attention = True

    def _setup(self) -> None:
        backbone, model = self.backbone, self.backbone.model
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise ValueError(
                f"{backbone.source} ({model.config.model_type}) does not say how its decoder's input is made from "
                "labels; choose a text-to-text model such as T5 or BART"
            )
        forced = model.generation_config.forced_bos_token_id
        self._forced: tuple[int, ...] = () if forced is None else (int(forced),)
        if self.prompt_attention == "self" and not t5.is_supported(model.get_encoder()):
            raise ValueError(
                f"{backbone.source} ({model.config.model_type}) is not a T5 or mT5, the only encoder-decoders that "
                "prompt_attention=self works with; use prompt_attention=full"
            )
        self.supports_fsdp = self.prompt_attention != "self"
        check_batch_independence(backbone)
        cached_check(model, "padding", self._check_exact)

    def prepare(self, prompts: Sequence[SoftPrompt]) -> PromptEmbeddings | EncoderPrefixStates:
        """The prompts' vectors, since all else depends on the text; with `prompt_attention="self"` their states."""
        if self.prompt_attention == "self":
            return EncoderPrefixStates.compute(self, prompts, partial(t5.run, self.backbone.model.get_encoder()))
        return PromptEmbeddings.compute(self, prompts)

    def target(self, answer: Sequence[int]) -> tuple[int, ...]:
        """The answer with the forced first token, if there is one, and the end of sequence, once each."""
        ends = self.end_of_sequence()
        front = () if tuple(answer[:1]) == self._forced else self._forced
        return (*front, *answer, *(() if answer and answer[-1] in ends else ends[:1]))

    def check_row(self, input_ids: Sequence[int], answer_ids: Sequence[int], where: str) -> None:
        """Also refuse an answer that does not fit the decoder's positions, which it has to itself."""
        super().check_row(input_ids, answer_ids, where)
        check_token_ids(self.backbone, answer_ids, where)
        if not answer_ids:
            return
        longest, limit = len(self.target(answer_ids)), self.backbone.max_answer_positions
        if limit is not None and longest > limit:
            raise ValueError(
                f"{where} has an answer of {longest} tokens, but the decoder of {self.backbone.source} has {limit} "
                "positions; shorten the answer or leave the row out"
            )

    def check_candidates(self, label_words: Sequence[str], candidates: Candidates) -> None:
        """Also refuse label words that do not fit the decoder's positions."""
        super().check_candidates(label_words, candidates)
        limit = self.backbone.max_answer_positions
        for word, ids in zip(label_words, candidates, strict=True):
            if limit is not None and len(self.target(ids)) > limit:
                raise ValueError(
                    f"the label word {word[:60]!r} has {len(self.target(ids))} tokens, but the decoder of "
                    f"{self.backbone.source} has {limit} positions; use a shorter one"
                )

    def check_answer_length(self, longest: int) -> None:
        """Refuse answers of more tokens than the decoder has positions.

        Raises:
            ValueError: naming both numbers.
        """
        limit = self.backbone.max_answer_positions
        if limit is not None and longest > limit:
            raise ValueError(
                f"an answer of {longest} tokens does not fit the {limit} positions of {self.backbone.source}; ask for "
                "fewer (max_new_tokens)"
            )

    def _logits(self, inputs: Inputs) -> Float[Tensor, "batch 1 vocab"]:
        return self._decode(self._encode(inputs), self._decoder_start(inputs.rows))

    def _output(self, logits: Tensor, loss: Tensor | None) -> Seq2SeqLMOutput:
        return Seq2SeqLMOutput(loss=loss, logits=logits)

    def _label_logits(
        self, inputs: Inputs, labels: Labels
    ) -> tuple[Float[Tensor, "batch target vocab"], Int[Tensor, "batch target"]]:
        labeled = labels != -100
        if not bool(labeled.any()):
            raise ValueError("no row has a label; give at least one label other than -100")
        if bool((labeled[:, 1:] & ~labeled[:, :-1]).any()):
            raise ValueError("labels have -100 before a token; pad labels on the right")
        self.check_answer_length(int(labeled.sum(1).max()))
        encoded = self._encode(inputs)
        return self._decode(encoded, self.backbone.model.prepare_decoder_input_ids_from_labels(labels=labels)), labels

    def _score(self, inputs: Inputs, candidates: Candidates) -> Float[Tensor, "batch candidate"]:
        """Log-probability of each candidate and of the end of sequence after it: one pass of the encoder for all.

        The decoder runs in passes of bounded memory, over keys and values that are not copied for each candidate. A
        forced first token is fed and not scored.
        """
        check_not_empty(candidates)
        encoded, ids = self._encode(inputs), inputs.rows
        targets = [self.target(candidate)[len(self._forced) :] for candidate in candidates]
        self.check_answer_length(len(self._forced) + max(map(len, targets)))
        forced = torch.tensor(self._forced, dtype=torch.long, device=ids.device).expand(len(ids), -1)
        logits = self._decode(encoded, torch.cat([self._decoder_start(ids), forced], 1))[:, -1].float()
        scores = logits.log_softmax(-1)[:, torch.tensor([target[0] for target in targets], device=ids.device)]
        longer = [number for number, target in enumerate(targets) if len(target) > 1]
        if not longer:
            return scores
        rest = self._score_rest(encoded, [targets[number] for number in longer])
        return scores.index_add(1, torch.tensor(longer, device=scores.device), rest)

    def _score_rest(self, encoded: _Encoded, targets: Candidates) -> Float[Tensor, "batch candidate"]:
        """Log-probability of all tokens but the first of each target: targets are decoder rows over shared states."""
        self_kv, cross_kv = (
            [(layer.keys, layer.values) for layer in cache.layers]
            for cache in (encoded.cache.self_attention_cache, encoded.cache.cross_attention_cache)
        )
        model = self.backbone.model
        groups_rows = attention.is_installed(model)  # candidates then share their row's cross-attention keys

        def scores(rows: slice, part: Candidates) -> Tensor:
            padded, real = pad_batch(part, encoded.mask.device)
            mask, count = encoded.mask[rows], len(part)
            before = torch.ones(len(mask) * count, self_kv[0][0].shape[2], dtype=torch.long, device=mask.device)
            times = 1 if groups_rows else count
            cache = EncoderDecoderCache(
                Cache(layers=[SharedLayer(keys[rows], values[rows], count) for keys, values in self_kv]),
                Cache(layers=[SharedLayer(keys[rows], values[rows], times) for keys, values in cross_kv]),
            )
            logits: Tensor = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded.states[rows]),
                attention_mask=mask.bool()[:, None, None] if groups_rows else mask.repeat_interleave(count, 0),
                decoder_input_ids=padded[:, :-1].repeat(len(mask), 1),
                decoder_attention_mask=torch.cat([before, real[:, :-1].repeat(len(mask), 1)], 1),
                past_key_values=cache,
                use_cache=True,
            ).logits
            return LabelTree.of(part).scores(logits.view(len(mask), count, *logits.shape[1:]), tree=False)

        return in_passes(scores, targets, len(encoded.mask), model, 0 if groups_rows else encoded.mask.shape[1])

    def _generate(
        self, inputs: Inputs, max_new_tokens: int, sampling: Sampling, stop: Sequence[int] | None
    ) -> Iterator[Int[Tensor, " batch"]]:
        """A forced first token is given out like any other."""
        ids = inputs.rows
        stop = self.end_of_sequence() if stop is None else stop
        ends = torch.tensor(list(stop), dtype=torch.long, device=ids.device)
        self.check_answer_length(max_new_tokens)
        choose = Chooser(sampling, ids.device, overflow=stop[0] if stop else -1)
        with torch.no_grad():
            encoded = self._encode(inputs)
            done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
            fed = self._decoder_start(ids)
            token = fed[:, 0]
        for step in range(max_new_tokens):
            with torch.no_grad():  # not around the yield: the caller keeps its own grad mode
                logits = self._decode(encoded, fed)[:, -1]
                new = torch.full_like(token, self._forced[step]) if step < len(self._forced) else choose(logits)
                token = torch.where(done, token, new)
                done = done | torch.isin(token, ends) | (token < 0)
            yield token
            if fsdp.all_done(self.backbone.model, done):
                return
            fed = token[:, None].clamp(min=0)

    def _encode(self, inputs: Inputs) -> _Encoded:
        """The encoder's states of prompts and text, and an empty cache for the decoder."""
        text, limit = self.text(inputs), self.backbone.max_positions
        if self.prompt_attention == "self":
            return self._encode_self_attention(inputs, text)
        prepared = self.resolve(inputs.prompts, PromptEmbeddings)
        return self._encode_rows(insert_prompts(self, prepared, inputs.prompt_index, text, self._lead(text), limit))

    def _encode_self_attention(self, inputs: Inputs, text: Rows) -> _Encoded:
        """The same with `prompt_attention="self"`: each prompt runs once, and every row attends to its states."""
        embeds, layout = pack_with_prompts(self, inputs.prompts, inputs.prompt_index, text, self.backbone.max_positions)
        states = t5.run(self.backbone.model.get_encoder(), embeds, layout)
        rows, mask = layout.rows.pad(states), text.mask
        if layout.prompts is not None:
            cached = inputs.prompts if isinstance(inputs.prompts, EncoderPrefixStates) else None
            before = cached.last if cached else layout.prompts.pad(states)
            assert before is not None
            rows = torch.cat([before[layout.index], rows], 1)
            mask = torch.cat([layout.prompts.mask[layout.index].long(), mask], 1)
        return _Encoded(rows, mask, EncoderDecoderCache(DynamicCache(), DynamicCache()))

    def _encode_rows(self, rows: RowsWithPrompts) -> _Encoded:
        states = self.backbone.model.get_encoder()(inputs_embeds=rows.embeds, attention_mask=rows.mask)[0]
        return _Encoded(states, rows.mask, EncoderDecoderCache(DynamicCache(), DynamicCache()))

    def _lead(self, text: Rows) -> int | Int[Tensor, "batch 1"]:
        """Tokens before the prompt; a prompt after the text is still before its end of sequence."""
        if self.prompt_position != "suffix":
            return 0 if self.prompt_position == "prefix" else 1
        lengths = text.mask.sum(1, keepdim=True)
        ends = torch.tensor(self.end_of_sequence(), dtype=torch.long, device=text.ids.device)
        return lengths - torch.isin(text.ids.gather(1, lengths - 1), ends).long()

    def _decode(self, encoded: _Encoded, ids: Int[Tensor, "batch more"]) -> Float[Tensor, "batch more vocab"]:
        """Logits after the decoder's next tokens; the cache in `encoded` grows by them."""
        logits: Tensor = self.backbone.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.states),
            attention_mask=encoded.mask,
            decoder_input_ids=ids,
            past_key_values=encoded.cache,
            use_cache=True,
        ).logits
        return logits

    def _decoder_start(self, ids: Ids) -> Int[Tensor, "batch 1"]:
        """The decoder's first input token: the model's shift of an end of sequence (mBART starts with it)."""
        labels = torch.full_like(ids[:, :1], (self.end_of_sequence() or [0])[0])
        start: Tensor = self.backbone.model.prepare_decoder_input_ids_from_labels(labels=labels)
        return start

    def _check_exact(self) -> bool:
        """Compare rows of a mixed batch, and their answers step by step, with each row alone."""
        how, model = "padding after the row", self.backbone.model
        with model_errors_refused(self.backbone, how):
            probe = sample(self.backbone)
            ids, mask = probe.batch(self.backbone.device)
            text = align_padding(ids, mask, "right")
            prepared = PromptEmbeddings.compute(self, probe.prompts)
            rows = insert_prompts(self, prepared, probe.prompt_index, text, lead=0, limit=None)
            answer = torch.tensor(probe.answer, device=ids.device).expand(len(ids), -1)
            fed = torch.cat([self._decoder_start(ids), answer], 1)
            at_once = self._decode(self._encode_rows(rows), fed)
            encoded = self._encode_rows(rows)
            by_step = torch.cat([self._decode(encoded, fed[:, step : step + 1]) for step in range(fed.shape[1])], 1)
            for row, tokens in enumerate(probe.texts):
                embeds = model.get_input_embeddings()(torch.tensor(tokens, device=ids.device))
                embeds = torch.cat([probe.prompt(row).to(embeds), embeds])[None]
                single = model(inputs_embeds=embeds, decoder_input_ids=fed[row : row + 1]).logits[0]
                for logits in (at_once, by_step):
                    check_close(self.backbone, single, logits[row], how)
        return True
