"""Prompts in a decoder-only model: in front, the prompt's keys and values are computed once for the whole batch.

Prompt positions see prompt positions only, so running them once and letting every row attend to their keys and values
is exact, gradients included. Rows in training, and scored rows behind our own layers, run packed without padding
(`varlen.py`); other layers get `prompt, pads, text` with explicit positions.

A prompt behind a text's first token or behind the text is run in every row; so is MPT's, which numbers columns.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutput

from softprompt.backbones import Backbone, fsdp
from softprompt.backbones.kernels import attention, llama
from softprompt.models.base import Candidates, Ids, Index, Labels, Mask, Prepared, PromptedModel, Prompts, mean_loss
from softprompt.models.decode_state import DecodeState
from softprompt.models.inline import PromptEmbeddings, insert_prompts, prompt_embeddings
from softprompt.models.kv_prefix import Prefix
from softprompt.models.label_tree import score_rest
from softprompt.models.padding import Rows, align_padding, checked_mask, pad_batch, row_index
from softprompt.models.sampling import Chooser, Sampling
from softprompt.models.varlen import varlen_logits
from softprompt.models.verify import Different, refuse_length_bound, refuse_unusual, remembered, sliding_window
from softprompt.models.verify_causal import check_rows, packs_alike
from softprompt.prompts import SoftPrompt
from softprompt.types import PromptAttention, PromptPosition


@final
class Causal(PromptedModel):
    """A prompt in front of a decoder-only model's text.

    Costs a training step one pass over the prompt at batch 1 and over the text; at inference `prepare` pays for the
    prompt once. Guarantees outputs and gradients of `[prompt; text]` run as one row, whatever the padding.

    Raises:
        ValueError: the model keeps state other than attention's keys and values, or its prefix is not exact.
    """

    appends_eos = False
    answer_in_sequence = True
    prompt_positions = ("prefix", "after_bos", "suffix")

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
        self._accepted = frozenset(inspect.signature(backbone.model.forward).parameters)
        self.window = sliding_window(backbone)
        """The narrowest attention window, where there is one: no row may be wider."""
        refuse_unusual(backbone, self._accepted)
        refuse_length_bound(backbone)
        self._by_layer = tuned is None and llama.is_supported(backbone.model)
        self.in_row = prompt_position != "prefix"
        """Whether prompts are run in every row; else their keys and values are computed once for all of them."""
        self.packs = False
        """Whether prompts and rows run packed in training; where not, they run one after the other and slower."""
        self._check_exact()
        self.supports_prefix_sharing = not self.in_row and self.window is None and not fsdp.is_sharded(backbone.model)
        self.supports_gradient_checkpointing = (
            self.packs
        )  # else rows go on from a cache, which would be written to twice

    def _check_exact(self) -> None:
        """Compare mixed batches with rows alone, once a model and place; choose a layout that is exact, or refuse.

        A model that is told positions keeps keys and values of prompts for all rows. One that counts columns instead
        (MPT's ALiBi) is exact where prompt and text are next to each other, so there the prompt runs in every row.
        """
        model = self.backbone.model
        if not self.in_row:

            def shared() -> bool:
                try:
                    check_rows(self, "a shared prefix and neighbours of other lengths")
                except Different:
                    if "position_ids" in self._accepted:
                        raise
                    return False
                return True

            # In bfloat16 a column more or less may hide among roundings; a model that is told positions needs no proof.
            told = "position_ids" in self._accepted or self.backbone.dtype is torch.float32
            self.in_row = not (told and remembered(model, "shared", shared))
        if self.in_row:

            def inline() -> bool:
                check_rows(self, f"prompts in rows of other lengths, {self.prompt_position!r},")
                return True

            remembered(model, f"in row {self.prompt_position}", inline)
            return
        self.packs = "position_ids" in self._accepted and attention.supports_varlen(model)
        self.packs = self.packs and remembered(model, f"packed {self._by_layer}", lambda: packs_alike(self))

    def prepare(self, prompts: Sequence[SoftPrompt]) -> Prefix | PromptEmbeddings:
        """The prompts' keys and values, or their vectors where text stands before them, for any number of calls."""
        if self.in_row and prompts:
            return prompt_embeddings(self, prompts)
        device, found = self.backbone.device, self.prompt_embeddings(prompts)
        if not found:
            empty = torch.ones(1, 0, dtype=torch.long, device=device)
            return Prefix([], (), empty, None, empty.sum(1))
        longest = max(len(matrix) for matrix in found)
        rows = torch.stack([nn.functional.pad(matrix, (0, 0, 0, longest - len(matrix))) for matrix in found])
        lengths = torch.tensor([len(matrix) for matrix in found], device=device)
        mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
        cache = DynamicCache()
        last = torch.unique(lengths) - 1
        logits = self._run(rows.to(self.backbone.dtype), cache, mask, mask, last)
        logits = logits[torch.arange(len(rows)), torch.searchsorted(last, lengths - 1)]
        return Prefix.of(list(prompts), cache, mask, logits, torch.zeros_like(lengths))

    def with_shared_prefix(
        self, prompts: Prompts, beginnings: Sequence[Sequence[int]], index: Index = None
    ) -> Prepared:
        """Prompts with beginnings of texts behind them, whose keys and values are computed once too."""
        if not self.supports_prefix_sharing:
            return super().with_shared_prefix(prompts, beginnings, index)
        if not beginnings or not all(beginnings):
            raise ValueError(f"the beginnings are {list(beginnings)}; give at least one, each with at least one token")
        prepared = self._prepared(prompts)
        assert isinstance(prepared, Prefix)  # as all in front
        text = align_padding(*pad_batch(beginnings, self.backbone.device))
        which = row_index(index, len(prepared.mask), text.ids)
        state = self._read(text, prepared, which, keep=torch.tensor([-1], device=text.ids.device))
        behind = [prepared.prompts[row] for row in which.tolist()] if prepared.prompts else []
        return Prefix.of(behind, state.cache, state.mask, state.logits[:, -1], state.next_position[:, 0])

    def forward(
        self,
        input_ids: Ids,
        attention_mask: Mask = None,
        labels: Labels | None = None,
        prompts: Prompts = None,
        index: Index = None,
    ) -> CausalLMOutput:
        """Logits and loss of the text after its prompt; the prompt itself has no logits.

        Without `labels`, logits are `[batch, seq, vocab]`, placed like `input_ids`. With `labels` (the tokens
        themselves, -100 where none is wanted), the loss is their mean cross-entropy and the head runs at label
        positions alone: logits are `[batch, kept, vocab]`, one column for each place (after moving padding to the
        front) at which any row has a label.
        """
        if labels is None:
            text = align_padding(input_ids, checked_mask(input_ids, attention_mask))
            found = self._read(text, self._prepared(prompts), index, keep=None).logits
            logits = torch.zeros(*input_ids.shape, found.shape[-1], dtype=found.dtype, device=found.device)
            return CausalLMOutput(logits=logits.scatter(1, text.order[..., None].expand_as(found), found))
        logits, targets = self.label_logits(input_ids, attention_mask, labels, prompts, index)
        return CausalLMOutput(loss=mean_loss(logits, targets), logits=logits)

    def label_logits(
        self, input_ids: Ids, attention_mask: Mask, labels: Labels, prompts: Prompts = None, index: Index = None
    ) -> tuple[Float[Tensor, "batch kept vocab"], Int[Tensor, "batch kept"]]:
        """The logits that predict the labels, and the labels, in `forward`'s columns."""
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels are {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)}; make them equal"
            )
        text = align_padding(input_ids, checked_mask(input_ids, attention_mask))
        wanted = labels.gather(1, text.order).masked_fill(text.mask == 0, -100)
        columns = (wanted != -100).any(0).nonzero()[:, 0]
        if not len(columns):
            raise ValueError("no row has a label; give at least one label other than -100")
        read = text.until(int(columns[-1]))  # a row's last answer predicts nothing
        logits, bare = self._predicting(read, columns, prompts, index, wanted[:, : read.ids.shape[1]])
        targets = wanted[:, columns]
        if bare:  # nothing stands before the first token, so nothing predicts it
            targets = targets.masked_fill(text.first()[:, columns], -100)
        return logits, targets

    def score(
        self, input_ids: Ids, attention_mask: Mask, candidates: Candidates, prompts: Prompts = None, index: Index = None
    ) -> Float[Tensor, "batch candidate"]:
        """Log-probability of each candidate after each row: one pass over the text, shared by all candidates.

        Those of several tokens cost a pass over the distinct beginnings of all, in parts of bounded memory.
        """
        if not candidates or not all(candidates):
            raise ValueError(f"candidates are {list(candidates)}; give at least one, each with at least one token")
        text = align_padding(input_ids, checked_mask(input_ids, attention_mask))
        longest = max(len(candidate) for candidate in candidates)
        if longest == 1 and self._may_pack(prompts):
            end = torch.tensor([text.ids.shape[1]], device=text.ids.device)
            logits = self._predicting(text, end, prompts, index)[0][:, 0]
            return logits.float().log_softmax(-1)[:, [candidate[0] for candidate in candidates]]
        last = torch.tensor([-1], device=text.ids.device)
        state = self._read(text, self._prepared(prompts), index, keep=last, room=longest - 1)
        first = torch.tensor([candidate[0] for candidate in candidates], device=text.ids.device)
        scores = state.logits[:, 0].float().log_softmax(-1)[:, first]
        more = [which for which, candidate in enumerate(candidates) if len(candidate) > 1]
        if not more:
            return scores
        rest = score_rest(self, state, [candidates[which] for which in more])
        return scores.index_add(1, torch.tensor(more, device=scores.device), rest)

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
        """Token by token, greedy or sampled, from the keys and values of prompt and text."""
        stop = self.end_of_sequence() if stop is None else stop
        choose = Chooser(sampling or Sampling(), input_ids.device)
        with torch.no_grad():
            state = self.prefill(input_ids, attention_mask, prompts, index, room=max_new_tokens)
            done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
            token = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
            ends = torch.tensor(list(stop), dtype=torch.long, device=token.device)
        for step in range(max_new_tokens):
            with torch.no_grad():  # not around the yield: whoever asks for the tokens keeps its own mode
                if step:
                    state = self.decode(state, token[:, None])
                token = torch.where(done, token, choose(state.logits[:, -1]))
                done = done | torch.isin(token, ends)
            yield token
            if fsdp.all_done(self.backbone.model, done):
                return

    def target(self, answer: Sequence[int]) -> tuple[int, ...]:
        """As it is: it goes on where the text stops."""
        return tuple(answer)

    @property
    def _own_layers(self) -> bool:
        """Whether layers run through `llama.run`: written for one dtype, and so not in somebody's autocast region."""
        return self._by_layer and not torch.is_autocast_enabled(self.backbone.device.type)

    def _may_pack(self, prompts: Prompts) -> TypeGuard[Sequence[SoftPrompt] | Prefix | None]:
        if isinstance(prompts, Prefix):
            return self.packs and self._own_layers and not torch.is_grad_enabled()
        return self.packs and not isinstance(prompts, Prepared)

    def _predicting(
        self,
        text: Rows,
        columns: Int[Tensor, " kept"],
        prompts: Prompts,
        index: Index,
        labels: Int[Tensor, "batch seq"] | None = None,
    ) -> tuple[Float[Tensor, "batch kept vocab"], bool]:
        """The logits that predict the tokens in `columns`, and whether a row's first token has nothing before it.

        A token is predicted one place earlier, and a row's first token by its prompt; the one behind the text too.
        """
        first = nn.functional.pad(text.first(), (0, 1))[:, columns]
        if self._may_pack(prompts):
            own = [] if self.prompt is None else [self.prompt]
            live = own if prompts is None else prompts
            logits = varlen_logits(
                self,
                text,
                columns,
                live,
                index,
                lambda most: self._refuse_beyond(most, most),
                by_layer=self._own_layers,
            )
            if isinstance(live, Prefix):
                which = row_index(index, len(live.mask), text.ids)
                return live.predicting(logits, first, which), live.logits is None
            return logits, not live
        prepared, seq = self._prepared(prompts), text.ids.shape[1]
        if isinstance(prepared, PromptEmbeddings):
            state = self._read(text, prepared, index, keep=columns - 1 - seq, labels=labels)
            return state.logits, self.prompt_position == "after_bos"  # elsewhere a prompt stands before the first token
        state = self._read(text, prepared, index, keep=(columns - 1).clamp(min=0) - seq)
        which = row_index(index, len(prepared.mask), text.ids)
        return prepared.predicting(state.logits, first, which), prepared.logits is None

    def _prepared(self, prompts: Prompts) -> Prefix | PromptEmbeddings:
        prepared = self.resolve(prompts)
        if not isinstance(prepared, PromptEmbeddings if self.in_row and prepared.prompts else Prefix):
            raise ValueError(
                f"{type(prepared).__name__} was prepared for another architecture or place; prepare the prompts again"
            )
        return prepared

    def _places(self, mask: Int[Tensor, "row total"], query: Int[Tensor, "row seq"]) -> dict[str, Any]:
        """Mask and explicit positions of the last `seq` places; models without the latter count the mask itself."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -query.shape[1] :]
        return {"attention_mask": mask} | ({"position_ids": positions} if "position_ids" in self._accepted else {})

    def _read(
        self,
        text: Rows,
        prepared: Prefix | PromptEmbeddings,
        index: Index,
        keep: Int[Tensor, " kept"] | None,
        room: int = 0,
        labels: Int[Tensor, "batch seq"] | None = None,
    ) -> DecodeState:
        """The text with its prompt, from the prompt's keys and values where it stands in front.

        Args:
            keep: places of the head, counted from the end and so negative; none: at each of the text's tokens.
            labels: those of `text`, in front of the first of which a prompt behind the text stands.
        """
        everywhere, next_position = 0 if keep is None else keep, text.mask.sum(1, keepdim=True)
        if isinstance(prepared, PromptEmbeddings):
            behind = align_padding(text.ids, text.mask, pads="behind")
            rows = insert_prompts(self, prepared, index, behind, self._lead(text, labels), None).padded_in_front()
            cache, mask = DynamicCache(), rows.mask
            self._refuse_beyond(int(mask.sum(1).max()) + room, mask.shape[1] + room)
            output = self._run(rows.embeds, cache, mask, mask, everywhere)
            if keep is None:
                own = rows.own.long().argsort(dim=1, stable=True)[:, -text.ids.shape[1] :]
                output = output.gather(1, own[..., None].expand(-1, -1, output.shape[-1]))
            return DecodeState(cache, mask, output, next_position, prepared.prompts, index)
        which = row_index(index, len(prepared.mask), text.ids)
        cache, mask = prepared.cache(which), torch.cat([prepared.mask[which], text.mask], 1)
        self._refuse_beyond(int(mask.sum(1).max()) + room, mask.shape[1] + room)
        before = prepared.read[which][:, None]
        embeds = self.shifted(prepared.prompts, which, text.ids, before + text.positions())
        logits = self._run(embeds, cache, mask, text.mask, everywhere)
        return DecodeState(cache, mask, logits, before + next_position, prepared.prompts, which)

    def _lead(self, text: Rows, labels: Int[Tensor, "batch seq"] | None) -> int | Int[Tensor, "batch 1"]:
        """Each row's tokens in front of its prompt: none, its first one, or all before its first label."""
        if self.prompt_position != "suffix":
            return 0 if self.prompt_position == "prefix" else 1
        own = text.mask if labels is None else text.mask * ((labels != -100).cumsum(1) == 0)
        return own.sum(1, keepdim=True)

    def _run(
        self,
        embeds: Float[Tensor, "batch seq dim"],
        cache: DynamicCache,
        mask: Int[Tensor, "batch total"],
        query: Int[Tensor, "batch seq"],
        keep: Int[Tensor, " kept"] | int,
    ) -> Float[Tensor, "batch kept vocab"]:
        """The model's logits behind what is in the cache, to which it adds."""
        output = self.backbone.model(
            inputs_embeds=embeds,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            **self._places(mask, query),
        )
        logits: Tensor = output.logits
        return logits

    @property
    def max_row(self) -> int | None:
        """Positions that a row may have with prompt and answer: those of the model, and of its attention window."""
        return min((limit for limit in (self.backbone.max_positions, self.window) if limit is not None), default=None)

    def prefill(
        self, input_ids: Ids, attention_mask: Mask, prompts: Prompts = None, index: Index = None, room: int = 0
    ) -> DecodeState:
        """Texts read behind their prompts, to be gone on with by `room` tokens; logits are those of the next one."""
        text = align_padding(input_ids, checked_mask(input_ids, attention_mask))
        last = torch.tensor([-1], device=text.ids.device)
        return self._read(text, self._prepared(prompts), index, keep=last, room=room)

    def decode(
        self, state: DecodeState, ids: Int[Tensor, "batch more"], real: Int[Tensor, "batch more"] | None = None
    ) -> DecodeState:
        """Further tokens after a batch that has been read; `real` marks padding behind them."""
        more = ids.shape[1]
        mask = torch.cat([state.mask, torch.ones_like(ids) if real is None else real], 1)
        embeds = self.shifted(
            state.prompts, state.rows, ids, state.next_position + torch.arange(more, device=ids.device)
        )
        logits = self._run(embeds, state.cache, mask, ids, 0)
        return state._replace(mask=mask, logits=logits, next_position=state.next_position + more)

    def _refuse_beyond(self, longest: int, wide: int) -> None:
        """Refuse rows of `longest` positions, or of `wide` ones with their padding, that the model has no room for."""
        self.refuse_long(longest, self.backbone.max_positions)
        if self.window is not None and wide > self.window:
            raise ValueError(
                f"rows of {wide} positions with prompt and padding exceed the sliding window of {self.window} of "
                f"{self.backbone.source}, beyond which a shared prefix is not exact; shorten the rows"
            )
