"""Prompts in a decoder-only model: a prompt in front of the text is computed once for the whole batch.

Prompt positions attend to prompt positions only, so running them once and letting every row attend to their keys and
values is exact, gradients included. Rows in training, and scored rows through our fused layers, run packed without
padding (`varlen.py`); other layers get `prompt, padding, text` with explicit positions.

A prompt after a text's first token or after the text runs in every row, and so does any prompt of a model that counts
positions by column (MPT).
"""

from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutput

from softprompt.backbones import Backbone, fsdp
from softprompt.backbones.kernels import llama, llama_cached
from softprompt.backbones.kernels.packed_linear import PackedWeights
from softprompt.models.base import PromptedModel
from softprompt.models.batch_layout import BatchLayout, choose_layout
from softprompt.models.config_checks import check_batch_independence, check_decoder, sliding_window
from softprompt.models.decode_state import DecodeState
from softprompt.models.deep_kv import any_deep, check_deep, deep_prefixes
from softprompt.models.inline import PromptEmbeddings, insert_prompts
from softprompt.models.input_checks import check_not_empty, checked_index
from softprompt.models.inputs import Candidates, Ids, Index, Inputs, Labels, Mask, PreparedPrompts, Prompts
from softprompt.models.kv_buffer import ROOM
from softprompt.models.kv_prefix import KVPrefixBatch
from softprompt.models.label_tree import score_rest
from softprompt.models.padding import Rows, align_padding, length_mask, pad_batch
from softprompt.models.sampling import Chooser, Sampling
from softprompt.models.varlen import varlen_logits
from softprompt.prompts import SoftPrompt


@final
class Causal(PromptedModel):
    """A prompt in front of a decoder-only model's text; the prompt itself has no logits.

    `forward` without labels gives logits of shape `[batch, seq, vocab]`, at the columns of `input_ids`. With `labels`
    (the tokens themselves) the head runs at label positions alone: logits are `[batch, kept, vocab]`, one column for
    each (after moving padding to the left) in which any row has a label.

    A training step costs one pass over the text and one over the prompt, at batch 1; at inference `prepare` runs the
    prompt once. Guarantees outputs and gradients of `[prompt; text]` run as one row, whatever the padding.

    Raises:
        ValueError: the model has state other than attention's keys and values, or its prefix is not exact.
    """

    appends_eos = False
    answer_in_sequence = True
    generates = True
    decoder_only = True
    padding_side = "left"
    peft_task_type = "CAUSAL_LM"
    prompt_positions = ("prefix", "after_bos", "suffix")
    layout: BatchLayout
    """How prompts and rows run together; the fastest that is exact."""

    def _setup(self) -> None:
        model = self.backbone.model
        self.window = sliding_window(self.backbone)
        """The narrowest attention window; no row may be wider. None where there is none."""
        check_decoder(self.backbone)
        check_batch_independence(self.backbone)
        runs_frozen = self.tuned is None and not self.backbone.embeddings_only
        self._has_fused_layers = runs_frozen and llama.is_supported(model)
        if self.tuned is not None and self.backbone.decode_weights not in ("auto", "original"):
            raise ValueError("decode_weights packs the model's own weights, but this run trained others; leave it out")
        self.packed: PackedWeights | None = None
        """The backbone's packed weights, once the model has been checked with its own."""
        self.layout = choose_layout(self, fused=self._has_fused_layers)
        self.supports_prefix_sharing = self.layout != "inline" and self.window is None and not fsdp.is_sharded(model)
        deep = any_deep(self.prompts_of(None))
        # Rows that are not packed continue from a cache, which a second run of the layers would write to again.
        self.supports_gradient_checkpointing = self.layout == "packed" and not deep
        if deep:
            self.kv_prefixes(self.prompts_of(None))  # refuses what does not fit
        if self._has_fused_layers and not fsdp.is_sharded(model):
            self.packed = self.backbone.packed

    @classmethod
    def row_limit(cls, backbone: Backbone) -> int | None:
        """Positions that a row may have with prompt and answer: those of the model, and of its attention window."""
        limits = (backbone.max_positions, sliding_window(backbone))
        return min((limit for limit in limits if limit is not None), default=None)

    def prepare(self, prompts: Sequence[SoftPrompt]) -> KVPrefixBatch | PromptEmbeddings:
        """The prompts' keys and values; their vectors where prompts run in every row."""
        return PromptEmbeddings.compute(self, prompts) if self._runs_inline(prompts) else self.kv_prefixes(prompts)

    def kv_prefixes(self, prompts: Sequence[SoftPrompt]) -> KVPrefixBatch:
        """The prompts' keys and values: computed from their vectors, or a deep prompt's own.

        Raises:
            ValueError: deep prompts beside shallow ones, or where the model has no prefix of keys and values.
        """
        device, vectors = self.backbone.device, self.prompt_embeddings(prompts)
        if any_deep(prompts):
            check_deep(self.backbone, prompts, self.layout == "inline", self.prompt_position)
            return deep_prefixes(self.backbone, prompts, vectors)
        if not vectors:
            empty = torch.ones(1, 0, dtype=torch.long, device=device)
            return KVPrefixBatch([], (), empty, None, empty.sum(1))
        lengths = torch.tensor([len(matrix) for matrix in vectors], device=device)
        padded = nn.utils.rnn.pad_sequence(vectors, True)
        mask, cache = length_mask(lengths, padded.shape[1]), DynamicCache()
        last = torch.unique(lengths) - 1
        logits = self._run(padded.to(self.backbone.dtype), cache, mask, last)
        logits = logits[torch.arange(len(padded), device=device), torch.searchsorted(last, lengths - 1)]
        return KVPrefixBatch.from_cache(list(prompts), cache, mask, logits, torch.zeros_like(lengths))

    def prompt_embeddings(self, prompts: Sequence[SoftPrompt]) -> list[Float[Tensor, "_ dim"]]:
        """See `PromptedModel`; a prompt without vectors is refused, since its rows would take another one's."""
        vectors = super().prompt_embeddings(prompts)
        if not all(map(len, vectors)):
            raise ValueError("a prompt has no vectors; leave it out, and the rows run without a prompt")
        return vectors

    def with_shared_prefix(
        self, prompts: Prompts, prefixes: Sequence[Sequence[int]], index: Index = None
    ) -> PreparedPrompts:
        """Prompts followed by the tokens that texts begin with, whose keys and values are computed once too."""
        if not self.supports_prefix_sharing:
            return super().with_shared_prefix(prompts, prefixes, index)
        if not prefixes or not all(prefixes):
            raise ValueError(f"the prefixes are {list(prefixes)}; give at least one, each with at least one token")
        prepared = self.resolve(prompts, KVPrefixBatch)
        text = align_padding(*pad_batch(prefixes, self.backbone.device))
        index = checked_index(index, len(prepared.mask), text.ids)
        state = self._prefill(text, prepared, index, keep=torch.tensor([-1], device=text.ids.device))
        passed = [prepared.prompts[number] for number in index.tolist()] if prepared.prompts else []
        return KVPrefixBatch.from_cache(passed, state.cache, state.mask, state.logits[:, -1], state.next_position[:, 0])

    def _logits(self, inputs: Inputs) -> Float[Tensor, "batch seq vocab"]:
        text = self.text(inputs)
        logits = self._prefill(text, self._resolved(inputs.prompts), inputs.prompt_index, keep=None).logits
        result = logits.new_zeros(*inputs.rows.shape, logits.shape[-1])
        return result.scatter(1, text.order[..., None].expand_as(logits), logits)

    def _output(self, logits: Tensor, loss: Tensor | None) -> CausalLMOutput:
        return CausalLMOutput(loss=loss, logits=logits)

    def _label_logits(
        self, inputs: Inputs, labels: Labels
    ) -> tuple[Float[Tensor, "batch kept vocab"], Int[Tensor, "batch kept"]]:
        if labels.shape != inputs.rows.shape:
            raise ValueError(
                f"labels are {tuple(labels.shape)} and input_ids {tuple(inputs.rows.shape)}; make them equal"
            )
        text = self.text(inputs)
        aligned = labels.gather(1, text.order).masked_fill(text.mask == 0, -100)
        columns = (aligned != -100).any(0).nonzero()[:, 0]
        if not len(columns):
            raise ValueError("no row has a label; give at least one label other than -100")
        fed = text.before(int(columns[-1]))  # a row's last answer predicts nothing
        logits, unpredicted = self._predicting_logits(
            fed, columns, inputs.prompts, inputs.prompt_index, aligned[:, : fed.ids.shape[1]]
        )
        targets = aligned[:, columns]
        if unpredicted:
            targets = targets.masked_fill(text.is_first_token()[:, columns], -100)
        return logits, targets

    def _score(self, inputs: Inputs, candidates: Candidates) -> Float[Tensor, "batch candidate"]:
        """One pass over the text for all candidates; longer ones add a pass over their label tree."""
        check_not_empty(candidates)
        text, prompts, index = self.text(inputs), inputs.prompts, inputs.prompt_index
        longest = max(len(candidate) for candidate in candidates)
        first = torch.tensor([candidate[0] for candidate in candidates], device=text.ids.device)
        if longest == 1 and self._layout_of(prompts) == "packed":
            end = torch.tensor([text.ids.shape[1]], device=text.ids.device)
            logits = self._predicting_logits(text, end, prompts, index)[0][:, 0]
            return logits.float().log_softmax(-1)[:, first]
        last = torch.tensor([-1], device=text.ids.device)
        state = self._prefill(text, self._resolved(prompts), index, keep=last, room=longest - 1)
        scores = state.logits[:, 0].float().log_softmax(-1)[:, first]
        longer = [number for number, candidate in enumerate(candidates) if len(candidate) > 1]
        if not longer:
            return scores
        rest = score_rest(self, state, [candidates[number] for number in longer])
        return scores.index_add(1, torch.tensor(longer, device=scores.device), rest)

    def _generate(
        self, inputs: Inputs, max_new_tokens: int, sampling: Sampling, stop: Sequence[int] | None
    ) -> Iterator[Int[Tensor, " batch"]]:
        ids = inputs.rows
        stop = self.end_of_sequence() if stop is None else stop
        choose = Chooser(sampling, ids.device, overflow=stop[0] if stop else -1)
        with torch.no_grad():
            state = self.prefill(ids, inputs.mask, inputs.prompts, inputs.prompt_index, room=max(max_new_tokens - 1, 0))
            done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
            token = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
            ends = torch.tensor(list(stop), dtype=torch.long, device=token.device)
        for step in range(max_new_tokens):
            with torch.no_grad():  # not around the yield: the caller keeps its own grad mode
                if step:
                    state = self.decode(state.with_room(min(ROOM, max_new_tokens - step)), token[:, None].clamp(min=0))
                token = torch.where(done, token, choose(state.logits[:, -1]))
                done = done | torch.isin(token, ends) | (token < 0)
            yield token
            if fsdp.all_done(self.backbone.model, done):
                return

    def prefill(
        self, input_ids: Ids, attention_mask: Mask, prompts: Prompts = None, index: Index = None, room: int = 0
    ) -> DecodeState:
        """Run texts after their prompts; the logits are those of the next token.

        Args:
            room: tokens that will follow, counted against the model's positions.
        """
        text = self.text(Inputs(input_ids, attention_mask, prompts, index))
        last = torch.tensor([-1], device=text.ids.device)
        if self.packed is not None:
            self.packed.refresh()
        packed = self.packed if self.packed and self.packed.is_exact else None
        return self._prefill(text, self._resolved(prompts), index, keep=last, room=room, packed=packed)

    def decode(
        self, state: DecodeState, ids: Int[Tensor, "batch more"], real: Int[Tensor, "batch more"] | None = None
    ) -> DecodeState:
        """Run further tokens of a batch; `real` is 0 at padding after them."""
        more = ids.shape[1]
        mask = torch.cat([state.mask, torch.ones_like(ids) if real is None else real], 1)
        positions = state.next_position + torch.arange(more, device=ids.device)
        embeds = self.token_embeddings(state.prompts, state.prompt_index, ids, positions)
        if self.packed is not None and not self.packed.is_exact and not self.runs_fused_over_cache:
            raise ValueError(
                f"decode_weights is {self.backbone.decode_weights!r}, but packed weights decode without gradients, "
                "autocast, or hooks on the layers; leave it out"
            )
        return state.after(mask, self._run(embeds, state.cache, mask, 0, self.packed))

    def _predicting_logits(
        self,
        text: Rows,
        columns: Int[Tensor, " kept"],
        prompts: Prompts,
        index: Index,
        labels: Int[Tensor, "batch seq"] | None = None,
    ) -> tuple[Float[Tensor, "batch kept vocab"], bool]:
        """The logits that predict the tokens in `columns`, and whether nothing predicts a row's first token.

        A token is predicted at the position before it, and a row's first token by its prompt. A column after the text
        is predicted by its last token.
        """
        if self._layout_of(prompts) == "packed":
            return self._packed_logits(text, columns, prompts, index)
        prepared, seq = self._resolved(prompts), text.ids.shape[1]
        if isinstance(prepared, PromptEmbeddings):
            state = self._prefill(text, prepared, index, keep=columns - 1 - seq, labels=labels)
            return state.logits, self.prompt_position == "after_bos"  # elsewhere a prompt is before the first token
        state = self._prefill(text, prepared, index, keep=(columns - 1).clamp(min=0) - seq)
        return self._with_first_logits(state.logits, text, columns, prepared, index)

    def _packed_logits(
        self, text: Rows, columns: Int[Tensor, " kept"], prompts: Prompts, index: Index
    ) -> tuple[Float[Tensor, "batch kept vocab"], bool]:
        """`_predicting_logits` in one pass without padding."""
        live = None if isinstance(prompts, PreparedPrompts) else self.prompts_of(prompts)
        prefixes = self.resolve(prompts, KVPrefixBatch) if live is None or any_deep(live) else live
        logits = varlen_logits(
            self, text, columns, prefixes, index, lambda most: self._check_width(most, most), fused=self._is_fused
        )
        if isinstance(prefixes, KVPrefixBatch):
            return self._with_first_logits(logits, text, columns, prefixes, index)
        return logits, not prefixes

    def _with_first_logits(
        self,
        logits: Float[Tensor, "batch kept vocab"],
        text: Rows,
        columns: Int[Tensor, " kept"],
        prepared: KVPrefixBatch,
        index: Index,
    ) -> tuple[Float[Tensor, "batch kept vocab"], bool]:
        """`logits` with those of each row's first token from its prompt, and whether its prompt has none."""
        is_first = nn.functional.pad(text.is_first_token(), (0, 1))[:, columns]
        index = checked_index(index, len(prepared.mask), text.ids)
        return prepared.with_first_logits(logits, is_first, index), prepared.logits is None

    def _layout_of(self, prompts: Prompts) -> BatchLayout:
        """How a pass with `prompts` runs: by `layout`, but keys and values are packed by the fused layers alone."""
        passed = self.prompts_of(prompts)
        if self.layout != "packed":
            return "inline" if self._runs_inline(passed) else "cached"
        has_states = isinstance(prompts, PreparedPrompts) or any_deep(passed)
        return "cached" if has_states and not self._is_fused else "packed"

    def _runs_inline(self, prompts: Sequence[SoftPrompt]) -> bool:
        return self.layout == "inline" and len(prompts) > 0 and not any_deep(prompts)

    def _resolved(self, prompts: Prompts) -> KVPrefixBatch | PromptEmbeddings:
        is_inline = self._runs_inline(self.prompts_of(prompts))
        return self.resolve(prompts, PromptEmbeddings) if is_inline else self.resolve(prompts, KVPrefixBatch)

    def _prefill(
        self,
        text: Rows,
        prepared: KVPrefixBatch | PromptEmbeddings,
        index: Index,
        keep: Int[Tensor, " kept"] | None,
        room: int = 0,
        labels: Int[Tensor, "batch seq"] | None = None,
        packed: PackedWeights | None = None,
    ) -> DecodeState:
        """Run texts with their prompts, from the prompts' keys and values where those are computed ahead.

        Args:
            keep: columns that the head runs at, counted from the end and so negative; None: all of the text's.
            labels: labels of `text`; a prompt after the text is put before the first of them.
        """
        logits_to_keep, next_position = 0 if keep is None else keep, text.mask.sum(1, keepdim=True)
        if isinstance(prepared, PromptEmbeddings):
            right_padded = align_padding(text.ids, text.mask, "right")
            rows = insert_prompts(self, prepared, index, right_padded, self._lead(text, labels), None).left_padded()
            cache, mask = DynamicCache(), rows.mask
            self._check_width(int(mask.sum(1).max()) + room, mask.shape[1] + room)
            logits = self._run(rows.embeds, cache, mask, logits_to_keep, packed)
            if keep is None:
                columns = rows.is_text.long().argsort(dim=1, stable=True)[:, -text.ids.shape[1] :]
                logits = logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1]))
            return DecodeState(cache, mask, logits, next_position, prepared.prompts, index)
        index = checked_index(index, len(prepared.mask), text.ids)
        cache, mask = prepared.cache(index), torch.cat([prepared.mask[index], text.mask], 1)
        self._check_width(int(mask.sum(1).max()) + room, mask.shape[1] + room)
        before = prepared.token_counts[index][:, None]
        embeds = self.token_embeddings(prepared.prompts, index, text.ids, before + text.positions())
        logits = self._run(embeds, cache, mask, logits_to_keep, packed)
        return DecodeState(cache, mask, logits, before + next_position, prepared.prompts, index)

    def _lead(self, text: Rows, labels: Int[Tensor, "batch seq"] | None) -> int | Int[Tensor, "batch 1"]:
        """Each row's tokens before its prompt: none, its first one, or all before its first label."""
        if self.prompt_position != "suffix":
            return 0 if self.prompt_position == "prefix" else 1
        before = text.mask if labels is None else text.mask * ((labels != -100).cumsum(1) == 0)
        return before.sum(1, keepdim=True)

    def _run(
        self,
        embeds: Float[Tensor, "batch seq dim"],
        cache: Cache,
        mask: Int[Tensor, "batch total"],
        keep: Int[Tensor, " kept"] | int,
        packed: PackedWeights | None = None,
    ) -> Float[Tensor, "batch kept vocab"]:
        """The model's logits after what is in the cache, in the columns `keep` (0: all); the cache grows by `embeds`.

        Args:
            packed: weights that the fused layers multiply with instead of the model's own.
        """
        if self.runs_fused_over_cache:
            columns = slice(None) if isinstance(keep, int) else keep
            return llama_cached.run(self.backbone.model, embeds, cache, mask, columns, packed)
        output = self.backbone.model(
            inputs_embeds=embeds,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            **self.attention_arguments(mask, embeds.shape[1]),
        )
        logits: Tensor = output.logits
        return logits

    def attention_arguments(self, mask: Int[Tensor, "row total"], length: int) -> dict[str, Any]:
        """The mask, and the positions of the last `length` columns where the model takes positions."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - length :]
        takes_positions = "position_ids" in self.backbone.forward_arguments
        return {"attention_mask": mask} | ({"position_ids": positions} if takes_positions else {})

    @property
    def runs_fused_over_cache(self) -> bool:
        """Whether passes over a KV cache run through `llama_cached`: our layers, and no gradients."""
        return self._runs_fused(linears=False) and not torch.is_grad_enabled()

    @property
    def _is_fused(self) -> bool:
        """Whether layers run through `llama.run`."""
        return self._runs_fused(linears=True)

    def _runs_fused(self, *, linears: bool) -> bool:
        """Whether our layers, which have no dropout, compute in one dtype and call no hooks, do what the model does."""
        model, device = self.backbone.model, self.backbone.device
        is_plain = not model.training and not torch.is_autocast_enabled(device.type)
        return self._has_fused_layers and is_plain and llama.is_intact(model, linears=linears)

    def _check_width(self, longest: int, width: int) -> None:
        """Refuse rows of more positions than the model has, or wider than its attention window with their padding."""
        self.check_length(longest, self.backbone.max_positions)
        if self.window is not None and width > self.window:
            raise ValueError(
                f"rows of {width} positions with prompt and padding exceed the sliding window of {self.window} of "
                f"{self.backbone.source}, beyond which a shared prefix is not exact; shorten the rows"
            )
