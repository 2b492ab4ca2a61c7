"""Prompts in front of a vision transformer's patches (ViT, DeiT, DINOv2): `[CLS] prompt patches`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from softprompt.backbones import Backbone, vit
from softprompt.models.base import Candidates, Index, Labels, Prepared, PromptedModel, Prompts, mean_loss
from softprompt.models.padding import row_index
from softprompt.models.verify import refuse_different, refusing, remembered
from softprompt.prompts import SoftPrompt
from softprompt.types import Pool, PromptAttention, PromptPosition


@final
class Pooling(nn.Module):
    """One vector an image, of the states of [CLS] and the patches."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        if pool not in ("cls", "patches"):
            raise ValueError(f"pool is {pool!r}; it must be 'cls' or 'patches'")
        self.pool = pool

    def forward(self, states: Float[Tensor, "batch token hidden"]) -> Float[Tensor, "batch hidden"]:
        """The first state, or the mean of the others."""
        return states[:, 0] if self.pool == "cls" else states[:, 1:].mean(1)


@final
@dataclass(frozen=True)
class LayerPrompts(Prepared):
    """Several prompts' virtual tokens, layer by layer, filled up to the longest."""

    prompts: Sequence[SoftPrompt]
    vectors: Float[Tensor, "row depth longest dim"]
    """float32; one row of no tokens for a model without a prompt."""
    own: Bool[Tensor, "row longest"]
    """Where a prompt has a token."""


@final
class Vision(PromptedModel):
    """A prompt between [CLS] (with DeiT's distillation token, DINOv2's registers) and the patches, without positions.

    A prompt of depth 1 enters with the patches and runs through every layer; one of depth n is replaced in front of
    each of the first n layers by that layer's own. `head` is a module of the normalised last states, [CLS] and the
    patches without the prompt (`[batch, 1 + patches, hidden]`), that gives logits; `fresh_head` makes one.
    Images are pixels as the backbone's processor makes them, of any size that is a whole number of patches.

    Costs one pass over prompt and patches. Guarantees the outputs and gradients of the prompt's vectors written
    between the model's own.
    Reference: Jia et al. 2022, "Visual Prompt Tuning".
    Differs: no dropout on the prompt; each layer's prompt starts at the size of that layer's own inputs.

    Raises:
        ValueError: there is no head, the prompt changes the input's own embeddings or is deeper than the model, or the
            model's layers do not run one after another.
    """

    appends_eos = True
    deep = True
    head_rate = 0.1  # DINOv2's states are large: of 0.5, a rate that suits the prompt throws the head about

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
        if head is None:
            raise ValueError(
                f"{backbone.source} has no words to answer with; give a head to train, as in "
                "attach(backbone, prompt, head=fresh_head(backbone, classes, generator))"
            )
        if prompt is not None:
            refuse_unfit(backbone, prompt)
        remembered(backbone.model, "layers", self._check_exact)

    def prepare(self, prompts: Sequence[SoftPrompt]) -> LayerPrompts:
        """The prompts' vectors; everything else depends on the image.

        Raises:
            ValueError: prompts of several depths, or for another backbone.
        """
        device, dim = self.backbone.device, self.backbone.dim
        depths = {prompt.depth for prompt in prompts} or {1}
        if len(depths) > 1:
            raise ValueError(f"prompts of depths {sorted(depths)} are in one call; run each depth on its own")
        [depth] = depths
        found = [matrix.view(depth, -1, dim) for matrix in self.prompt_embeddings(prompts)]
        found = found or [torch.zeros(depth, 0, dim, device=device)]
        lengths = torch.tensor([matrix.shape[1] for matrix in found], device=device)
        longest = int(lengths.max())
        vectors = [nn.functional.pad(matrix, (0, 0, 0, longest - matrix.shape[1])) for matrix in found]
        return LayerPrompts(
            list(prompts), torch.stack(vectors), torch.arange(longest, device=device) < lengths[:, None]
        )

    def target(self, answer: Sequence[int]) -> tuple[int, ...]:
        """As it is: the class's number."""
        return tuple(answer)

    def check_row(self, input_ids: Sequence[int], answer_ids: Sequence[int], where: str) -> None:
        """Nothing: an image has no tokens, and whether it can be read is seen when it is decoded."""

    def check_candidates(self, words: Sequence[str], candidates: Candidates) -> None:
        """Nothing: a head does not look at words."""

    def forward(
        self,
        pixels: Float[Tensor, "batch channel height width"],
        attention_mask: Tensor | None = None,
        labels: Labels | None = None,
        prompts: Prompts = None,
        index: Index = None,
    ) -> ImageClassifierOutput:
        """The head's logits, float32; the loss is a mean over the images whose label, one column, is not -100.

        Images have no padding, and an attention mask is refused.
        """
        _refuse_mask(attention_mask)
        logits, loss = self._logits(pixels, prompts, index), None
        if labels is not None:
            loss = mean_loss(logits[:, None], labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def label_logits(
        self,
        pixels: Float[Tensor, "batch channel height width"],
        attention_mask: Tensor | None,
        labels: Labels,
        prompts: Prompts = None,
        index: Index = None,
    ) -> tuple[Float[Tensor, "batch one classes"], Int[Tensor, "batch one"]]:
        """The head's logits and the labels, which are one column."""
        _refuse_mask(attention_mask)
        return self._logits(pixels, prompts, index)[:, None], labels

    def score(
        self,
        pixels: Float[Tensor, "batch channel height width"],
        attention_mask: Tensor | None,
        candidates: Candidates,
        prompts: Prompts = None,
        index: Index = None,
    ) -> Float[Tensor, "batch candidate"]:
        """Log-probability of each class, whatever the candidates hold.

        Raises:
            ValueError: another number of candidates than the head's classes, or an attention mask.
        """
        _refuse_mask(attention_mask)
        scores = self._logits(pixels, prompts, index).log_softmax(-1)
        if scores.shape[1] != len(candidates):
            raise ValueError(
                f"the head tells {scores.shape[1]} classes apart and {len(candidates)} candidates are given; use the "
                "task that it was trained for"
            )
        return scores

    def generate(self, *inputs: Any, **settings: Any) -> Iterator[Int[Tensor, " batch"]]:
        """Nothing: a vision model does not generate.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.backbone.source} is a vision model and does not generate; choose a classification")

    def states(
        self, pixels: Float[Tensor, "batch channel height width"], prompts: Prompts = None, index: Index = None
    ) -> Float[Tensor, "batch token hidden"]:
        """The model's normalised last states without the prompt's: leading tokens and patches."""
        prepared, model = self.resolve(prompts), self.backbone.model
        if not isinstance(prepared, LayerPrompts):
            raise ValueError(
                f"{type(prepared).__name__} was prepared for another architecture; prepare the prompts again"
            )
        pixels = pixels.to(self.backbone.device)
        each = torch.zeros(len(pixels), 1, dtype=torch.long, device=pixels.device)
        rows = row_index(index, max(len(prepared.prompts), 1), each)
        states, first = vit.embed(model, pixels), vit.num_prefix_tokens(model)
        longest = prepared.vectors.shape[2]
        mask = _mask(prepared.own[rows], first, states.shape[1])
        # A lookup in float32: its gradient sums over the rows before anything is rounded to the backbone's dtype.
        vectors = prepared.vectors[rows]
        for number, layer in enumerate(vit.layers(model)):
            if number < vectors.shape[1]:
                front, patches = states[:, :first], states[:, first + (longest if number else 0) :]
                states = torch.cat([front, vectors[:, number].to(states.dtype), patches], 1)
            states = vit.run_layer(layer, states, mask)
        kept: Tensor = model.layernorm(torch.cat([states[:, :first], states[:, first + longest :]], 1))
        return kept

    def _logits(
        self, pixels: Float[Tensor, "batch channel height width"], prompts: Prompts, index: Index
    ) -> Float[Tensor, "batch classes"]:
        assert self.head is not None
        states = self.states(pixels, prompts, index).float()
        first = vit.num_prefix_tokens(self.backbone.model)
        logits: Tensor = self.head(torch.cat([states[:, :1], states[:, first:]], 1))
        return logits.float()

    def _check_exact(self) -> bool:
        """Compare with the model's own forward, once a model, so that an unusual one is refused and not wrong."""
        model, how = self.backbone.model, "its layers run one by one"
        with refusing(self.backbone, how):
            side = model.config.image_size if isinstance(model.config.image_size, int) else model.config.image_size[0]
            side = min(int(side) // vit.patch_size(model), 4) * vit.patch_size(model)
            given = torch.randn(3, model.config.num_channels, side, side, generator=torch.Generator().manual_seed(0))
            given = given.to(self.backbone.device)
            ours = self.states(given, [])
            for row in range(len(given)):
                insert_prompts = vit.run(model, given[row : row + 1])[0]
                refuse_different(self.backbone, insert_prompts, ours[row], how, "states")
        return True


def refuse_unfit(backbone: Backbone, prompt: SoftPrompt) -> None:
    """Refuse a prompt that means nothing to a vision transformer.

    Raises:
        ValueError: it changes the input's own embeddings, or is for more layers than there are.
    """
    if not prompt.fold().plain:
        raise ValueError(
            "this method also changes the input's own embeddings by a token's position or id, and an image has no "
            "tokens; choose one that folds to a prompt alone (see: softprompt list methods)"
        )
    if prompt.depth > backbone.layers:
        raise ValueError(f"the prompt is for {prompt.depth} layers and {backbone.source} has {backbone.layers}")


def _refuse_mask(mask: Tensor | None) -> None:
    if mask is not None:
        raise ValueError("an attention mask is given with images, which have no padding; leave it out")


def _mask(own: Bool[Tensor, "batch longest"], first: int, tokens: int) -> Bool[Tensor, "batch 1 total total"] | None:
    """What each token sees: all but the filling of the shorter prompts; none where that is everything."""
    # Under a mask a CPU takes our own attention, whose backward makes a step a quarter faster.
    training = torch.is_grad_enabled() and own.device.type == "cpu"
    if bool(own.all()) and not training:
        return None
    seen = torch.ones(len(own), tokens, dtype=torch.bool, device=own.device)
    row = torch.cat([seen[:, :first], own, seen[:, first:]], 1)
    return row[:, None, None].expand(-1, 1, row.shape[1], -1)
