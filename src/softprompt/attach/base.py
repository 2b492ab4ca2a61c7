"""How prompts meet a frozen model: the interface of every architecture."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from softprompt.attach.rows import row_index
from softprompt.attach.sampling import Sampling
from softprompt.backbone import Backbone
from softprompt.prompts import SoftPrompt


class Prepared(ABC):
    """Prompts made ready for one backbone, as a value: what does not depend on the input, computed once."""

    prompts: Sequence[SoftPrompt]


class Attachment(nn.Module, ABC):
    """A prompt in front of a frozen backbone, as a module whose only parameters are the prompt's.

    The backbone is deliberately no submodule: `state_dict`, `parameters`, `train` and `to` concern the prompt alone.

    Every call takes `prompts` (default: the attachment's own) and, with several of them, `index`, the prompt of each
    row. Nothing is remembered between calls, so threads may share an attachment.
    """

    backbone: Backbone

    def __init__(self, backbone: Backbone, prompt: SoftPrompt | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.prompt = prompt

    @abstractmethod
    def prepare(self, prompts: Sequence[SoftPrompt]) -> Prepared:
        """Everything about `prompts` that no input changes; gradients flow through it unless switched off.

        Pass the result as `prompts` to answer many calls from one computation.
        """

    @abstractmethod
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None = None,
        labels: Int[Tensor, "batch target"] | None = None,
        prompts: Sequence[SoftPrompt] | Prepared | None = None,
        index: Int[Tensor, " batch"] | None = None,
    ) -> Any:
        """A transformers ModelOutput with `logits`, and `loss` where `labels` are given (-100: no label)."""

    @abstractmethod
    def score(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None,
        candidates: Sequence[Sequence[int]],
        prompts: Sequence[SoftPrompt] | Prepared | None = None,
        index: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch candidate"]:
        """Log-probability, float32, of each candidate's tokens as the answer to each row."""

    @abstractmethod
    def generate(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[int] | None = None,
        prompts: Sequence[SoftPrompt] | Prepared | None = None,
        index: Int[Tensor, " batch"] | None = None,
    ) -> Iterator[Int[Tensor, " batch"]]:
        """One token a row and step, as soon as it is known; a finished row repeats its stop token.

        `stop`: the ids that finish a row; none: the backbone's end of sequence. Ends when every row has finished.
        """

    def chosen(self, prompts: Sequence[SoftPrompt] | Prepared | None) -> Prepared:
        """`prompts` made ready, or the attachment's own."""
        if isinstance(prompts, Prepared):
            return prompts
        if prompts is None:
            prompts = [] if self.prompt is None else [self.prompt]
        return self.prepare(prompts)

    def shifted(
        self,
        prompts: Sequence[SoftPrompt],
        index: Int[Tensor, " batch"] | None,
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq dim"]:
        """The rows' own embeddings, each as its prompt wants them, in the backbone's dtype."""
        embeds = self.backbone.model.get_input_embeddings()(ids)
        if not prompts:
            return embeds
        if len(prompts) == 1:
            return prompts[0].shift(embeds.float(), ids, positions).to(embeds.dtype)
        rows = row_index(index, len(prompts), ids)
        result = embeds.float()
        for which, prompt in enumerate(prompts):
            mine = (rows == which).nonzero()[:, 0]
            if len(mine):
                result = result.index_copy(0, mine, prompt.shift(result[mine], ids[mine], positions[mine]))
        return result.to(embeds.dtype)
