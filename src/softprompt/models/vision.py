"""Prompts in front of a vision transformer's patches (ViT, DeiT, DINOv2): `[CLS] prompt patches`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from softprompt.backbones import Backbone, vit
from softprompt.models.base import PromptedModel
from softprompt.models.heads import Pooling, linear_head
from softprompt.models.input_checks import check_class_count, checked_index
from softprompt.models.inputs import Candidates, Index, Inputs, Labels, Pixels, PreparedPrompts, Prompts
from softprompt.models.padding import length_mask
from softprompt.models.verify import cached_check, check_close, model_errors_refused
from softprompt.prompts import Folded, SoftPrompt
from softprompt.types import Pool

_LONG_PROMPT = 32
"""Tokens of the longer prompt of a check."""


@final
@dataclass(frozen=True)
class LayerPromptEmbeddings(PreparedPrompts):
    """Several prompts' virtual tokens by layer, padded to the longest."""

    prompts: Sequence[SoftPrompt]
    vectors: Float[Tensor, "prompt layer longest dim"]
    """float32; one prompt without tokens for a model without a prompt."""
    mask: Bool[Tensor, "prompt longest"]
    """True where a prompt has a token."""


@final
class Vision(PromptedModel):
    """A prompt between [CLS] (with DeiT's distillation token, DINOv2's registers) and the patches, without positions.

    A shallow prompt enters with the patches and runs through every layer; a deep one of n matrices is replaced before
    each of the first n layers by that layer's own. `head` takes the normalized last hidden states of [CLS] and the
    patches (`[batch, 1 + patches, hidden]`) and gives logits; `fresh_head` makes one.

    Inputs are pixels as the backbone's processor makes them, of any size that is a whole number of patches, without an
    attention mask. `forward` gives the head's logits, `[batch, classes]`, float32; `labels` are one column of classes.

    Costs one pass over prompt and patches. Guarantees the outputs and gradients of the prompt's vectors inserted
    between the model's own.
    Reference: Jia et al. 2022, "Visual Prompt Tuning".
    Differs: no dropout on the prompt; each layer's prompt starts at the size of that layer's own inputs.

    Raises:
        ValueError: there is no head, the prompt changes the input's own embeddings or is deeper than the model, or the
            model's layers do not run one after another.
    """

    appends_eos = True
    head_rate = 0.1  # DINOv2's states are large: at 0.5, a rate that suits the prompt makes the head diverge

    @classmethod
    def needs_head(cls, backbone: Backbone) -> bool:
        """Always."""
        return True

    @classmethod
    def fresh_head(cls, backbone: Backbone, classes: int, generator: torch.Generator, pool: Pool) -> nn.Module:
        """A linear head over pooled states."""
        return nn.Sequential(Pooling(pool), linear_head(backbone, classes, generator))

    def _setup(self) -> None:
        if self.prompt is not None:
            _check_prompt(self.backbone, self.prompt)
        cached_check(self.backbone.model, "layers", self._check_exact)

    def prepare(self, prompts: Sequence[SoftPrompt]) -> LayerPromptEmbeddings:
        """The prompts' vectors; everything else depends on the image.

        Raises:
            ValueError: prompts for different numbers of layers, or for another backbone.
        """
        device, dim = self.backbone.device, self.backbone.dim
        counts = {prompt.num_matrices for prompt in prompts} or {1}
        if len(counts) > 1:
            raise ValueError(f"prompts of {sorted(counts)} matrices are in one call; run each number on its own")
        [num_layers] = counts
        by_layer = [matrix.view(num_layers, -1, dim) for matrix in self.prompt_embeddings(prompts)]
        by_layer = by_layer or [torch.zeros(num_layers, 0, dim, device=device)]
        lengths = torch.tensor([matrix.shape[1] for matrix in by_layer], device=device)
        longest = int(lengths.max())
        vectors = [nn.functional.pad(matrix, (0, 0, 0, longest - matrix.shape[1])) for matrix in by_layer]
        return LayerPromptEmbeddings(list(prompts), torch.stack(vectors), length_mask(lengths, longest).bool())

    def check_row(self, input_ids: Sequence[int], answer_ids: Sequence[int], where: str) -> None:
        """Nothing: an image has no tokens, and whether it can be read shows when it is decoded."""

    def check_candidates(self, label_words: Sequence[str], candidates: Candidates) -> None:
        """Nothing: a head ignores label words."""

    def hidden_states(
        self, pixels: Pixels, prompts: Prompts = None, index: Index = None
    ) -> Float[Tensor, "batch token hidden"]:
        """The model's normalized last hidden states without the prompt's: leading tokens and patches."""
        prepared, model = self.resolve(prompts, LayerPromptEmbeddings), self.backbone.model
        pixels = pixels.to(self.backbone.device)
        images = torch.zeros(len(pixels), 1, dtype=torch.long, device=pixels.device)
        index = checked_index(index, max(len(prepared.prompts), 1), images)
        states, lead = vit.embed(model, pixels), vit.num_prefix_tokens(model)
        longest = prepared.vectors.shape[2]
        visible = _visible(prepared.mask[index], lead, states.shape[1])
        mask = None if visible is None else vit.attention_mask(model, visible, states.dtype)
        # A lookup in float32: its gradient sums over the rows before anything is rounded to the backbone's dtype.
        vectors = prepared.vectors[index]
        for number, layer in enumerate(vit.layers(model)):
            if number < vectors.shape[1]:
                front, patches = states[:, :lead], states[:, lead + (longest if number else 0) :]
                states = torch.cat([front, vectors[:, number].to(states.dtype), patches], 1)
            states = vit.run_layer(layer, states, mask)
        normalized: Tensor = model.layernorm(torch.cat([states[:, :lead], states[:, lead + longest :]], 1))
        return normalized

    def _logits(self, inputs: Inputs) -> Float[Tensor, "batch 1 classes"]:
        if inputs.mask is not None:
            raise ValueError("an attention mask is given with images, which have no padding; leave it out")
        assert self.head is not None
        states = self.hidden_states(inputs.rows, inputs.prompts, inputs.prompt_index).float()
        patches = states[:, vit.num_prefix_tokens(self.backbone.model) :]
        logits: Tensor = self.head(torch.cat([states[:, :1], patches], 1))
        return logits.float()[:, None]

    def _label_logits(
        self, inputs: Inputs, labels: Labels
    ) -> tuple[Float[Tensor, "batch 1 classes"], Int[Tensor, "batch 1"]]:
        return self._logits(inputs), labels

    def _output(self, logits: Tensor, loss: Tensor | None) -> ImageClassifierOutput:
        return ImageClassifierOutput(loss=loss, logits=logits[:, 0])

    def _score(self, inputs: Inputs, candidates: Candidates) -> Float[Tensor, "batch candidate"]:
        """Log-probability of each class in order, whatever the candidates' tokens."""
        scores = self._logits(inputs)[:, 0].log_softmax(-1)
        check_class_count(scores.shape[1], candidates)
        return scores

    def _check_exact(self) -> bool:
        """Compare with the model's own forward, so that an unusual model is refused instead of wrong.

        That has no prompts, so rows with prompts of unequal length are compared with each row alone, which needs no
        mask.
        """
        model, how = self.backbone.model, "its layers run one by one"
        with model_errors_refused(self.backbone, how):
            side = model.config.image_size if isinstance(model.config.image_size, int) else model.config.image_size[0]
            side = min(int(side) // vit.patch_size(model), 4) * vit.patch_size(model)
            pixels = torch.randn(3, model.config.num_channels, side, side, generator=torch.Generator().manual_seed(0))
            pixels = pixels.to(self.backbone.device)
            states = self.hidden_states(pixels, [])
            for row in range(len(pixels)):
                single = vit.run(model, pixels[row : row + 1])[0]
                check_close(self.backbone, single, states[row], how, "states")
        with model_errors_refused(self.backbone, how := "prompts of unequal length in one batch"):
            vectors = vit.embed(model, pixels[:1])[0].float().cpu()
            # So long that the padding of the short one changes every state if attention sees it.
            prompts = [Folded(vectors[:1]), Folded(vectors.repeat(-(-_LONG_PROMPT // len(vectors)), 1)[:_LONG_PROMPT])]
            states = self.hidden_states(pixels[:2], prompts, torch.tensor([0, 1], device=pixels.device))
            for row, prompt in enumerate(prompts):
                single = self.hidden_states(pixels[row : row + 1], [prompt])[0]
                check_close(self.backbone, single, states[row], how, "states")
        return True


def _check_prompt(backbone: Backbone, prompt: SoftPrompt) -> None:
    """Refuse a prompt that shifts token embeddings, or is for more layers than the model has."""
    if not prompt.fold().plain:
        raise ValueError(
            "this method also changes the input's own embeddings by a token's position or id, but an image has no "
            "tokens; choose one that folds to a prompt alone (see: softprompt list methods)"
        )
    if prompt.num_matrices > backbone.max_matrices:
        raise ValueError(
            f"the prompt is for {prompt.num_matrices} layers, but {backbone.source} has {backbone.max_matrices}"
        )


def _visible(
    is_prompt: Bool[Tensor, "batch longest"], lead: int, tokens: int
) -> Bool[Tensor, "batch 1 total total"] | None:
    """What each token attends to: all but the padding of shorter prompts; None where that is everything."""
    # With a mask a CPU takes our own attention, whose backward makes a step a quarter faster.
    training = torch.is_grad_enabled() and is_prompt.device.type == "cpu"
    if bool(is_prompt.all()) and not training:
        return None
    visible = torch.ones(len(is_prompt), tokens, dtype=torch.bool, device=is_prompt.device)
    row = torch.cat([visible[:, :lead], is_prompt, visible[:, lead:]], 1)
    return row[:, None, None].expand(-1, 1, row.shape[1], -1)
