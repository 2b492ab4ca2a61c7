"""A frozen model with a prompt: the interface that every architecture has."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompt.backbones import Backbone
from softprompt.models.input_checks import check_attachment, check_token_ids, checked_index, checked_mask
from softprompt.models.inputs import (
    Candidates,
    Ids,
    Index,
    Inputs,
    Labels,
    Mask,
    Pixels,
    PreparedPrompts,
    PreparedT,
    Prompts,
)
from softprompt.models.padding import PaddingSide, Rows, align_padding
from softprompt.models.sampling import Sampling, end_of_sequence
from softprompt.prompts import SoftPrompt
from softprompt.types import Pool, PromptAttention, PromptPosition


class PromptedModel(nn.Module, ABC):
    """A prompt in front of a frozen backbone, as a module whose only parameters are the prompt's and its head's.

    The backbone is deliberately not a submodule: `state_dict`, `parameters`, `train` and `to` concern what is trained.

    Every call takes `input_ids` (or pixels); `attention_mask`, 1 at tokens and 0 at padding on either side (default:
    no padding); `prompts` (default: the model's own) and, with several of them, `index`, the prompt of each row. A
    decoder's `labels` have the shape of `input_ids`, are not shifted, and are -100 where there is no loss; an encoder-
    decoder's are the answer's tokens, a head's one class per row. Arguments that do not fit each other or the model
    raise a ValueError. Nothing is remembered between calls, so threads may share a model.

    Args:
        head: classifies where the backbone has no vocabulary head; trained with the prompt.
        tuned: weights of the backbone that a baseline trains; see `baselines.tune`.

    Raises:
        ValueError: prompt position, attention or head do not fit the backbone, or the model is not exact with prompts.
    """

    appends_eos: ClassVar[bool]
    """The text ends with the tokenizer's closing tokens and the answer is separate; else the answer continues it."""
    answer_in_sequence: bool = False
    """The answer's tokens are among the input's: after the text, or at a mask in it."""
    generates: ClassVar[bool] = False
    """Answers are generated texts; else one token or class per row."""
    decoder_only: ClassVar[bool] = False
    """Rows continue from their prompt's keys and values, and enter or leave a running batch (see `serve`)."""
    padding_side: ClassVar[PaddingSide] = "right"
    """The side on which padding does not change the outputs."""
    max_label_tokens: ClassVar[int | None] = None
    """Most tokens of a label word; None: any number."""
    peft_task_type: ClassVar[str | None] = None
    """PEFT's name for the task; None if PEFT does not put prompts where we do."""
    prompt_positions: ClassVar[tuple[PromptPosition, ...]] = ("prefix",)
    """Where a prompt may be in the input."""
    supports_self_attention: ClassVar[bool] = False
    """Prompts may attend to themselves alone (`prompt_attention="self"`), and then run once for all rows."""
    supports_self_attention_dropout: ClassVar[bool] = False
    """Such prompts can be trained with the backbone's dropout on."""
    supports_gradient_checkpointing: bool = True
    """The backward pass can run layers again instead of keeping their activations."""
    supports_fsdp: bool = True
    """Layers are called as modules, so FSDP can shard them."""
    supports_prefix_sharing: bool = False
    """`with_shared_prefix` computes a prefix that texts share once."""
    head_rate: ClassVar[float] = 0.5
    """Learning rate of the group `head`, relative to the prompt's; MiniLM learned best with 0.5 (of 0.02, 0.1, 0.5)."""

    backbone: Backbone
    tuned: nn.Module | None
    head: nn.Module | None

    def __init__(
        self,
        backbone: Backbone,
        prompt: SoftPrompt | None,
        head: nn.Module | None = None,
        tuned: nn.Module | None = None,
        prompt_position: PromptPosition = "prefix",
        prompt_attention: PromptAttention = "full",
    ) -> None:
        super().__init__()
        check_attachment(self, backbone, head is not None, prompt_position, prompt_attention)
        self.prompt_position, self.prompt_attention = prompt_position, prompt_attention
        self.backbone = backbone
        self.prompt = prompt
        self.head = head
        self.tuned = tuned
        self._setup()

    @abstractmethod
    def _setup(self) -> None:
        """Check that the backbone is exact with prompts, and choose how rows run; raises what `__init__` raises."""

    @classmethod
    def needs_head(cls, backbone: Backbone) -> bool:
        """Whether the backbone has no vocabulary head, and answers through a head that is trained with the prompt."""
        return False

    @classmethod
    def fresh_head(cls, backbone: Backbone, classes: int, generator: torch.Generator, pool: Pool) -> nn.Module | None:
        """The head to train where the backbone needs one; see `softprompt.models.fresh_head`."""
        return None

    @classmethod
    def row_limit(cls, backbone: Backbone) -> int | None:
        """Maximum positions of a row with its prompt, and its answer if that is in the row; None: no limit."""
        return backbone.max_positions

    @abstractmethod
    def prepare(self, prompts: Sequence[SoftPrompt]) -> PreparedPrompts:
        """Everything about `prompts` that does not depend on an input; gradients flow through it unless switched off.

        Pass the result, on the backbone's device, as `prompts` to share one computation among many calls.

        Raises:
            ValueError: a prompt does not fit the backbone or the model.
        """

    def with_shared_prefix(
        self, prompts: Prompts, prefixes: Sequence[Sequence[int]], index: Index = None
    ) -> PreparedPrompts:
        """Prompts followed by the tokens that texts begin with; pass the result with the rest of the texts.

        Args:
            prompts: as in every call, or the result of an earlier `with_shared_prefix`.
            prefixes: at least one token each; several may follow one prompt.
            index: the prompt of each prefix, where there are several prompts.

        Raises:
            ValueError: the model cannot do that (`supports_prefix_sharing`), or a prefix is empty.
        """
        raise ValueError(
            f"{self.backbone.source} ({self.backbone.architecture}) does not support shared prefixes; give full texts"
        )

    def forward(
        self,
        input_ids: Ids | Pixels,
        attention_mask: Mask = None,
        labels: Labels | None = None,
        prompts: Prompts = None,
        index: Index = None,
    ) -> Any:
        """A transformers ModelOutput with `logits` and, for `labels`, `loss`: the mean cross-entropy, float32.

        Logits are `[batch, seq, vocab]` without the prompt's positions, or a head's `[batch, classes]`. With labels
        (their shapes: see the class) only the columns that predict one are computed.
        """
        inputs = Inputs(input_ids, attention_mask, prompts, index)
        if labels is None:
            return self._output(self._logits(inputs), None)
        logits, targets = self._label_logits(inputs, labels)
        labeled = targets != -100
        loss = nn.functional.cross_entropy(logits[labeled].float(), targets[labeled])
        return self._output(logits, loss)

    def label_logits(
        self,
        input_ids: Ids | Pixels,
        attention_mask: Mask,
        labels: Labels,
        prompts: Prompts = None,
        index: Index = None,
    ) -> tuple[Float[Tensor, "batch kept classes"], Int[Tensor, "batch kept"]]:
        """The logits that predict the labels, and the labels; -100 where a row has none in that column."""
        return self._label_logits(Inputs(input_ids, attention_mask, prompts, index), labels)

    def losses(
        self,
        input_ids: Ids | Pixels,
        attention_mask: Mask,
        labels: Labels,
        prompts: Prompts = None,
        index: Index = None,
    ) -> Float[Tensor, " batch"]:
        """Each row's loss, float32: the sum of the cross-entropies at its labels."""
        logits, targets = self._label_logits(Inputs(input_ids, attention_mask, prompts, index), labels)
        labeled = targets != -100
        losses = nn.functional.cross_entropy(logits[labeled].float(), targets[labeled], reduction="none")
        return losses.new_zeros(targets.shape).masked_scatter(labeled, losses).sum(1)

    def score(
        self,
        input_ids: Ids | Pixels,
        attention_mask: Mask,
        candidates: Candidates,
        prompts: Prompts = None,
        index: Index = None,
    ) -> Float[Tensor, "batch candidate"]:
        """Each candidate's log-probability (natural, float32) as the answer to each row: the sum over its tokens."""
        return self._score(Inputs(input_ids, attention_mask, prompts, index), candidates)

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
        """The next token of every row, step by step; a finished row repeats its stop token.

        A row whose logits are not finite finishes with the first token of `stop`, or -1 where that is empty.

        Args:
            sampling: None: greedy.
            stop: the ids that finish a row; None: the backbone's end of sequence. Ends when every row has finished.

        Raises:
            ValueError: the model does not generate.
        """
        inputs = Inputs(input_ids, attention_mask, prompts, index)
        return self._generate(inputs, max_new_tokens, sampling or Sampling(), stop)

    @abstractmethod
    def _logits(self, inputs: Inputs) -> Tensor:
        """The logits of `forward` without labels."""

    @abstractmethod
    def _label_logits(self, inputs: Inputs, labels: Labels) -> tuple[Tensor, Tensor]:
        """See `label_logits`."""

    @abstractmethod
    def _output(self, logits: Tensor, loss: Tensor | None) -> Any:
        """The ModelOutput of `forward`."""

    @abstractmethod
    def _score(self, inputs: Inputs, candidates: Candidates) -> Tensor:
        """See `score`."""

    def _generate(
        self, inputs: Inputs, max_new_tokens: int, sampling: Sampling, stop: Sequence[int] | None
    ) -> Iterator[Tensor]:
        """See `generate`."""
        raise ValueError(
            f"{self.backbone.source} ({self.backbone.architecture}) does not generate; choose a classification, or a "
            "decoder"
        )

    def target(self, answer: Sequence[int]) -> tuple[int, ...]:
        """The answer's tokens as the model is trained to give them: the `labels`, and what `score` scores."""
        return tuple(answer)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The prompt's learning-rate groups, and `head` and `tuned` where the model has them."""
        groups = {} if self.prompt is None else self.prompt.groups()
        modules = {"head": self.head, "tuned": self.tuned}
        return groups | {name: list(module.parameters()) for name, module in modules.items() if module is not None}

    def folded(self) -> "PromptedModel":
        """The same model with its prompt folded, for inference."""
        prompt = None if self.prompt is None else self.prompt.fold().to(self.backbone.device)
        return type(self)(self.backbone, prompt, self.head, self.tuned, self.prompt_position, self.prompt_attention)

    def text(self, inputs: Inputs) -> Rows:
        """The token rows of a call, padded on the side that the architecture takes."""
        return align_padding(inputs.rows, checked_mask(inputs.rows, inputs.mask), self.padding_side)

    def prompts_of(self, prompts: Prompts) -> Sequence[SoftPrompt]:
        """The prompts of a call; by default the model's own."""
        if prompts is None:
            return [] if self.prompt is None else [self.prompt]
        return prompts.prompts if isinstance(prompts, PreparedPrompts) else prompts

    def resolve(self, prompts: Prompts, kind: type[PreparedT]) -> PreparedT:
        """The prompts of a call, prepared.

        Raises:
            ValueError: they were prepared for a model of another kind.
        """
        prepared = prompts if isinstance(prompts, PreparedPrompts) else self.prepare(self.prompts_of(prompts))
        if not isinstance(prepared, kind):
            raise ValueError(
                f"{type(prepared).__name__} was prepared for another architecture, prompt position or prompt "
                "attention; prepare the prompts again"
            )
        return prepared

    def token_embeddings(
        self, prompts: Sequence[SoftPrompt], index: Index, ids: Ids, positions: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq dim"]:
        """The embeddings of the rows' own tokens, each row's shifted by its prompt, in the backbone's dtype."""
        if bool(((ids < 0) | (ids >= self.backbone.vocab_size)).any()):
            check_token_ids(self.backbone, ids.flatten().tolist(), "a row")
        embeds = self.backbone.model.get_input_embeddings()(ids)
        if not prompts:
            return embeds
        if all(prompt is prompts[0] for prompt in prompts):
            with torch.autocast(embeds.device.type, enabled=False):
                return prompts[0].shift(embeds.float(), ids, positions).to(embeds.dtype)
        index = checked_index(index, len(prompts), ids)
        result = embeds.float()
        for number, prompt in enumerate(prompts):
            rows = (index == number).nonzero()[:, 0]
            if len(rows):
                with torch.autocast(embeds.device.type, enabled=False):
                    result = result.index_copy(0, rows, prompt.shift(result[rows], ids[rows], positions[rows]))
        return result.to(embeds.dtype)

    def prompt_embeddings(self, prompts: Sequence[SoftPrompt]) -> list[Float[Tensor, "_ dim"]]:
        """Each prompt's virtual tokens, float32, on the backbone's device.

        Raises:
            ValueError: a prompt's width is not this backbone's, or it has more matrices than this one takes.
        """
        with torch.autocast(self.backbone.device.type, enabled=False):  # prompts are float32, whoever calls
            vectors = [prompt.prompt().to(self.backbone.device) for prompt in prompts]
        for prompt, matrix in zip(prompts, vectors, strict=True):
            self.backbone.check_prompt(matrix, prompt.num_matrices)
        return vectors

    def end_of_sequence(self) -> list[int]:
        """The ids that end a generation; empty where neither the tokenizer nor the model names one."""
        return end_of_sequence(self.backbone)

    @property
    def max_row(self) -> int | None:
        """See `row_limit`."""
        return self.row_limit(self.backbone)

    @cached_property
    def prompt_length(self) -> int:
        """Positions that the model's own prompt takes in a row."""
        with torch.no_grad():
            return 0 if self.prompt is None else len(self.prompt.prompt()) // self.prompt.num_matrices

    def check_row(self, input_ids: Sequence[int], answer_ids: Sequence[int], where: str) -> None:
        """Refuse a row that the model cannot run, before anything is written.

        Args:
            input_ids: the text's tokens.
            answer_ids: the answer's tokens; empty where there is none.
            where: the row's name for the message, as "row 21 of train".

        Raises:
            ValueError: a token without an embedding, or more positions than the model or the prompt has.
        """
        check_token_ids(self.backbone, input_ids, where)
        # The answer's last token is predicted and never fed.
        fed = len(input_ids) + (max(len(answer_ids) - 1, 0) if self.answer_in_sequence else 0)
        if self.answer_in_sequence:
            check_token_ids(self.backbone, answer_ids, where)
        if self.max_row is not None and self.prompt_length + fed > self.max_row:
            raise ValueError(
                f"{where} has {self.prompt_length + fed} positions ({self.prompt_length} of the prompt, "
                f"{len(input_ids)} of the text"
                f"{f', {len(answer_ids)} of the answer' if self.answer_in_sequence else ''}), "
                f"but {self.backbone.source} has {self.max_row}; shorten its answer, leave the row out, or lower "
                "max_input_tokens or the prompt's length"
            )
        max_input_length = None if self.prompt is None else self.prompt.max_input_length
        if max_input_length is not None and fed > max_input_length:
            raise ValueError(
                f"{where} has {fed} tokens with its answer, but the prompt has offsets for {max_input_length}; shorten "
                "its answer, leave the row out, or give the prompt more positions"
            )

    def check_candidates(self, label_words: Sequence[str], candidates: Candidates) -> None:
        """Refuse label words that the model cannot answer with, before anything is written.

        Args:
            candidates: the tokens of each.

        Raises:
            ValueError: a word has a token without an embedding, or too many tokens.
        """
        for word, ids in zip(label_words, candidates, strict=True):
            check_token_ids(self.backbone, ids, f"the label word {word!r}")

    def check_answer_length(self, longest: int) -> None:
        """Refuse answers with more tokens than the decoder has positions (encoder-decoders)."""

    def check_length(self, longest: int, limit: int | None) -> None:
        """Refuse rows of more positions than the model has."""
        if limit is not None and longest > limit:
            raise ValueError(
                f"a row has {longest} positions with its prompt and answer, but {self.backbone.source} has {limit}; "
                "shorten the rows (max_input_tokens) or the prompt (length)"
            )
