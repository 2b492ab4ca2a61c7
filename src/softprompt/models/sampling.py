"""How the next token is chosen, and which tokens end a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from softprompt.backbones import Backbone


@final
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the most likely one, or a random draw.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    """0 takes the most likely token; above, logits are divided by it before drawing."""
    top_k: int = 0
    """Draw among the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities sum to this."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or above")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k is {self.top_k} and top_p is {self.top_p}; they must be >= 0 and in (0, 1]")


@final
class Chooser:
    """The next token of each row, greedy or drawn from a seeded generator.

    Args:
        overflow: the token of a row whose largest logit is not finite (argmax returns NaN if there is one); sampling
            from it would fail, on a GPU with everything after it.
    """

    def __init__(self, sampling: Sampling, device: torch.device, overflow: int = -1) -> None:
        self._sampling, self._overflow = sampling, overflow
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._warpers = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        self._warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []

    def __call__(self, logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
        """One token per row."""
        tokens = logits.argmax(-1)  # NaN, where there is any
        finite = logits.gather(-1, tokens[:, None])[:, 0].isfinite()
        if self._sampling.temperature:
            tokens = self._draw(logits.masked_fill(~finite[:, None], 0.0))
        return tokens.masked_fill(~finite, self._overflow)

    def _draw(self, logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
        # Below this, dividing would overflow to NaN, and any two different logits are far apart already.
        scores = logits.float() / max(self._sampling.temperature, 1e-6)
        for warper in self._warpers:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator)[:, 0]


def end_of_sequence(backbone: Backbone) -> list[int]:
    """The ids that end a generation; empty where neither the tokenizer nor the model names one.

    First the tokenizer's, which ends the answers that a prompt is trained on; then those of the model's generation
    config (a chat model has several), and its config's where the tokenizer takes them for special tokens: a config
    that does not name an end has its class's default, which may be an ordinary word.
    """
    model, tokenizer = backbone.model, backbone.tokenizer
    generation = getattr(model, "generation_config", None)
    special = special_ids(tokenizer)
    of_config = _as_list(getattr(model.config, "eos_token_id", None))
    ids = [
        *_as_list(getattr(tokenizer, "eos_token_id", None)),
        *_as_list(getattr(generation, "eos_token_id", None)),
        *(eos for eos in of_config if generation is None or eos in special),
    ]
    return list(dict.fromkeys(ids))


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that are not part of a text: the tokenizer's own, and added tokens marked special, as chat models' ends.

    These are the ids that decoding with `skip_special_tokens` leaves out.
    """
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    marked = (int(number) for number, token in added.items() if getattr(token, "special", False))
    return frozenset((*getattr(tokenizer, "all_special_ids", ()), *marked))


def before_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """A generated row's tokens before the first of `ends`, which it repeats until its whole batch has finished."""
    return list(takewhile(lambda token: token not in ends, tokens))


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
