"""How prompts meet a frozen model: the interface of every architecture."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from softprompt.backbones import Backbone
from softprompt.models.padding import row_index
from softprompt.models.sampling import Sampling
from softprompt.prompts import SoftPrompt
from softprompt.types import PromptAttention, PromptPosition


class Prepared(ABC):
    """Prompts made ready for one backbone, as a value: what does not depend on the input, computed once."""

    prompts: Sequence[SoftPrompt]


Ids = Int[Tensor, "batch seq"]
"""A batch's tokens."""
Mask = Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None
"""1 at tokens, 0 at padding; none: all are tokens."""
Labels = Int[Tensor, "batch target"]
"""What a row should answer; -100 where it should nothing."""
Candidates = Sequence[Sequence[int]]
"""The tokens of each possible answer."""
Prompts = Sequence[SoftPrompt] | Prepared | None
"""Those of a call; none: the attachment's own."""
Index = Int[Tensor, " batch"] | None
"""Which of several prompts each row takes."""


class PromptedModel(nn.Module, ABC):
    """A prompt in front of a frozen backbone, as a module whose only parameters are the prompt's and its head's.

    The backbone is deliberately no submodule: `state_dict`, `parameters`, `train` and `to` concern what is trained.

    Every call takes `prompts` (default: the attachment's own) and, with several of them, `index`, the prompt of each
    row. Nothing is remembered between calls, so threads may share an attachment.
    """

    appends_eos: ClassVar[bool]
    """The text ends with the tokenizer's closing tokens, and the answer stands apart from it; else it goes on there."""
    answer_in_sequence: bool = False
    """The answer's tokens are among the input's own: behind the text, or at a mask in it."""
    prompt_positions: ClassVar[tuple[PromptPosition, ...]] = ("prefix",)
    """Where a prompt may stand."""
    supports_self_attention: ClassVar[bool] = False
    """Prompts may be isolated from the text, and then run once for all rows."""
    supports_self_attention_dropout: ClassVar[bool] = False
    """They can be trained with the model's own dropout on."""
    deep: ClassVar[bool] = False
    """Prompts of several layers fit; else only those that enter with the input."""
    supports_gradient_checkpointing: bool = True
    """Layers can be computed again in the backward pass (gradient checkpointing)."""
    supports_fsdp: bool = True
    """Layers can be run by their own call, so that each of several processes may hold a part of their weights."""
    supports_prefix_sharing: bool = False
    """Beginnings that texts share can be read once for all of them, by `with_shared_prefix`."""
    head_rate: ClassVar[float] = 0.5
    """Learning rate of the group `head`, relative to the prompt's; MiniLM learned best with it of 0.02, 0.1, 0.5."""

    backbone: Backbone
    tuned: nn.Module | None
    """Weights of the backbone's own that a baseline trains; none for a prompt, whose backbone is frozen."""
    head: nn.Module | None
    """What turns an encoder's output into classes where it has no words to answer with; trained with the prompt."""

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
        if prompt_attention != "full" and not (self.supports_self_attention and prompt_position == "prefix"):
            raise ValueError(
                f"the prompt of {backbone.source} ({backbone.architecture}) cannot be isolated {prompt_position!r}; "
                "prompts in front of an encoder's or an encoder-decoder's text can, and a decoder's is so already"
            )
        if prompt_position not in self.prompt_positions:
            wrong = f"the prompt of {backbone.source} ({backbone.architecture}) cannot stand {prompt_position!r}"
            raise ValueError(f"{wrong}; it can stand {' or '.join(map(repr, self.prompt_positions))}")
        self.prompt_position, self.prompt_attention = prompt_position, prompt_attention
        self.backbone = backbone
        self.prompt = prompt
        self.head = head
        self.tuned = tuned

    @abstractmethod
    def prepare(self, prompts: Sequence[SoftPrompt]) -> Prepared:
        """Everything about `prompts` that no input changes; gradients flow through it unless switched off.

        Pass the result as `prompts` to answer many calls from one computation.
        """

    def with_shared_prefix(
        self, prompts: Prompts, beginnings: Sequence[Sequence[int]], index: Index = None
    ) -> Prepared:
        """Prompts with beginnings of texts behind them, made ready: to be given with what is left of the texts.

        Args:
            prompts: as in every call, and what was extended before too.
            beginnings: at least one token each.
            index: which of several prompts each beginning stands behind.

        Raises:
            ValueError: it cannot do that (`supports_prefix_sharing`), or a beginning is empty.
        """
        raise ValueError(
            f"in {self.backbone.source} ({self.backbone.architecture}) the prompt and a text's beginning are not read "
            "apart from its rest; give the whole text"
        )

    @abstractmethod
    def forward(
        self,
        input_ids: Ids,
        attention_mask: Mask = None,
        labels: Labels | None = None,
        prompts: Prompts = None,
        index: Index = None,
    ) -> Any:
        """A transformers ModelOutput with `logits`, and `loss` where `labels` are given (-100: no label)."""

    @abstractmethod
    def label_logits(
        self, input_ids: Ids, attention_mask: Mask, labels: Labels, prompts: Prompts = None, index: Index = None
    ) -> tuple[Float[Tensor, "batch kept classes"], Int[Tensor, "batch kept"]]:
        """The logits that predict the labels, and what they should say; -100 where a row has no label of its own."""

    def losses(
        self,
        input_ids: Ids | Float[Tensor, "batch channel height width"],
        attention_mask: Mask,
        labels: Labels,
        prompts: Prompts = None,
        index: Index = None,
    ) -> Float[Tensor, " batch"]:
        """Each row's loss, float32: the sum of the cross-entropies at its labels."""
        logits, targets = self.label_logits(input_ids, attention_mask, labels, prompts, index)
        at = targets != -100
        each = nn.functional.cross_entropy(logits[at].float(), targets[at], reduction="none")
        return each.new_zeros(targets.shape).masked_scatter(at, each).sum(1)

    @abstractmethod
    def score(
        self, input_ids: Ids, attention_mask: Mask, candidates: Candidates, prompts: Prompts = None, index: Index = None
    ) -> Float[Tensor, "batch candidate"]:
        """Log-probability, float32, of each candidate's tokens as the answer to each row."""

    @abstractmethod
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
        """One token a row and step, as soon as it is known; a finished row repeats its stop token.

        `stop`: the ids that finish a row; none: the backbone's end of sequence. Ends when every row has finished.
        """

    @abstractmethod
    def target(self, answer: Sequence[int]) -> tuple[int, ...]:
        """An answer's tokens as the model was trained to give them: what `labels` hold, and what `score` scores."""

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The prompt's learning-rate groups, and `head` and `tuned` where there are such."""
        groups = {} if self.prompt is None else self.prompt.groups()
        others = {"head": self.head, "tuned": self.tuned}
        return groups | {name: list(other.parameters()) for name, other in others.items() if other is not None}

    def folded(self) -> "PromptedModel":
        """The same with its prompt folded, for use."""
        prompt = None if self.prompt is None else self.prompt.fold().to(self.backbone.device)
        return type(self)(self.backbone, prompt, self.head, self.tuned, self.prompt_position, self.prompt_attention)

    def resolve(self, prompts: Prompts) -> Prepared:
        """`prompts` made ready, or the attachment's own."""
        if isinstance(prompts, Prepared):
            return prompts
        if prompts is None:
            prompts = [] if self.prompt is None else [self.prompt]
        return self.prepare(prompts)

    def shifted(
        self, prompts: Sequence[SoftPrompt], index: Index, ids: Ids, positions: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq dim"]:
        """The rows' own embeddings, each as its prompt wants them, in the backbone's dtype."""
        if bool(((ids < 0) | (ids >= self.backbone.vocab_size)).any()):
            refuse_unknown(self.backbone, ids.flatten().tolist(), "a row")
        embeds = self.backbone.model.get_input_embeddings()(ids)
        if not prompts:
            return embeds
        if all(prompt is prompts[0] for prompt in prompts):
            with torch.autocast(embeds.device.type, enabled=False):
                return prompts[0].shift(embeds.float(), ids, positions).to(embeds.dtype)
        rows = row_index(index, len(prompts), ids)
        result = embeds.float()
        for which, prompt in enumerate(prompts):
            mine = (rows == which).nonzero()[:, 0]
            if len(mine):
                with torch.autocast(embeds.device.type, enabled=False):
                    result = result.index_copy(0, mine, prompt.shift(result[mine], ids[mine], positions[mine]))
        return result.to(embeds.dtype)

    def prompt_embeddings(self, prompts: Sequence[SoftPrompt]) -> list[Float[Tensor, "_ dim"]]:
        """Each prompt's virtual tokens, float32.

        Raises:
            ValueError: a prompt that is as wide as another backbone's embeddings, or for several layers of one that
                takes it at the first alone.
        """
        with torch.autocast(self.backbone.device.type, enabled=False):  # prompts are float32, whoever calls
            found = [prompt.prompt().to(self.backbone.device) for prompt in prompts]
        if not self.deep and (depth := max([prompt.depth for prompt in prompts], default=1)) > 1:
            raise ValueError(
                f"the prompt is for {depth} layers, and in {self.backbone.source} one enters with the input alone; "
                "deep prompts are for vision models"
            )
        for matrix in found:
            if matrix.shape[1] != self.backbone.dim:
                raise ValueError(
                    f"the prompt is {matrix.shape[1]} wide, but {self.backbone.source} embeds in {self.backbone.dim}; "
                    "it was trained for another backbone"
                )
        return found

    def end_of_sequence(self) -> list[int]:
        """The ids that end a generation; none where neither the tokenizer nor the model names one.

        First the tokenizer's, which ends the answers that a prompt is trained on; then those of the model's generation
        config (a chat model has several), and its config's where the tokenizer takes them for special tokens: a config
        that does not name an end has its class's default, which may be a word.
        """
        model, tokenizer = self.backbone.model, self.backbone.tokenizer
        generation = getattr(model, "generation_config", None)
        special = {*getattr(tokenizer, "all_special_ids", ()), *_added_special(tokenizer)}
        of_config = _as_list(getattr(model.config, "eos_token_id", None))
        ids = [
            *_as_list(getattr(tokenizer, "eos_token_id", None)),
            *_as_list(getattr(generation, "eos_token_id", None)),
            *(one for one in of_config if generation is None or one in special),
        ]
        return list(dict.fromkeys(ids))

    @property
    def max_row(self) -> int | None:
        """Positions that a row may have with its prompt, and with its answer where that is in the row."""
        return self.backbone.max_positions

    @cached_property
    def prompt_length(self) -> int:
        """Positions of the attachment's own prompt in a row."""
        with torch.no_grad():
            return 0 if self.prompt is None else len(self.prompt.prompt())

    def check_row(self, input_ids: Sequence[int], answer_ids: Sequence[int], where: str) -> None:
        """Refuse a row that this model cannot be trained on or asked, before anything is written.

        Args:
            input_ids: the text's tokens.
            answer_ids: the answer's; empty where there is none.
            where: what the message calls the row, as "row 21 of train".

        Raises:
            ValueError: a token that the model has no embedding for, or more positions than it has.
        """
        refuse_unknown(self.backbone, input_ids, where)
        # The answer's last token is predicted and never fed.
        fed = len(input_ids) + (max(len(answer_ids) - 1, 0) if self.answer_in_sequence else 0)
        if self.answer_in_sequence:
            refuse_unknown(self.backbone, answer_ids, where)
        if self.max_row is not None and self.prompt_length + fed > self.max_row:
            raise ValueError(
                f"{where} has {self.prompt_length + fed} positions ({self.prompt_length} of the prompt, "
                f"{len(input_ids)} of the text"
                f"{f', {len(answer_ids)} of the answer' if self.answer_in_sequence else ''}), "
                f"but {self.backbone.source} has {self.max_row}; shorten its answer, leave the row out, or lower "
                "max_tokens or the prompt's length"
            )
        max_input_length = None if self.prompt is None else self.prompt.max_input_length
        if max_input_length is not None and fed > max_input_length:
            raise ValueError(
                f"{where} has {fed} tokens with its answer, but the prompt has offsets for {max_input_length}; shorten "
                "its answer, leave the row out, or give the prompt more positions"
            )

    def check_candidates(self, words: Sequence[str], candidates: Candidates) -> None:
        """Refuse label words that this model cannot answer with, before anything is written.

        Args:
            words: their texts.
            candidates: the tokens of each.

        Raises:
            ValueError: a word with a token that the model has no embedding for, or that does not fit.
        """
        for word, ids in zip(words, candidates, strict=True):
            refuse_unknown(self.backbone, ids, f"the label word {word!r}")

    def refuse_long_answer(self, longest: int) -> None:
        """Refuse to write more tokens than fit apart from the text; what is written behind it is counted with it."""

    def refuse_long(self, longest: int, limit: int | None) -> None:
        """Refuse rows of more positions than the model has, where it has a limit."""
        if limit is not None and longest > limit:
            raise ValueError(
                f"a row has {longest} positions with its prompt and answer, but {self.backbone.source} has {limit}; "
                "shorten the rows (max_tokens) or the prompt (length)"
            )


def refuse_unknown(backbone: Backbone, ids: Sequence[int], where: str, name: str = "") -> None:
    """Refuse tokens that the model has no embedding for: added to the tokenizer, and the model was not resized.

    Args:
        where: what has the tokens, for the message.
        name: what the message calls the backbone; its source by default.

    Raises:
        ValueError: naming the first such token by its text.
    """
    size = backbone.vocab_size if ids else 0  # an image has no tokens
    for one in ids:
        if not 0 <= one < size:
            text = backbone.tokenizer.convert_ids_to_tokens(one) if one >= 0 else None
            raise ValueError(
                f"{where} has the token {text!r} ({one}), for which {name or backbone.source} has no embedding (its "
                f"ids are 0 to {size - 1}); take the token out, or resize the model and train that embedding first"
            )


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _added_special(tokenizer: Any) -> list[int]:
    """Ids of added tokens that are marked special, as chat models' turn ends are."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return [int(number) for number, token in added.items() if getattr(token, "special", False)]


def mean_loss(logits: Float[Tensor, "batch kept classes"], targets: Int[Tensor, "batch kept"]) -> Float[Tensor, ""]:
    """The mean cross-entropy, float32, at the targets other than -100."""
    at = targets != -100
    return nn.functional.cross_entropy(logits[at].float(), targets[at])
