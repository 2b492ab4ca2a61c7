"""What a generation asks of its logits: log-probabilities to report, and changes before the next token is chosen."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor


@final
class TokenLogprob(NamedTuple):
    """A token's log-probability, and the most likely tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """Token ids and log-probabilities, the most likely first."""


def token_logprobs(
    logits: Float[Tensor, "token vocab"], tokens: Sequence[int], num_top: int
) -> tuple[TokenLogprob, ...]:
    """The log-probabilities of tokens under the logits that predict them, in float32.

    Args:
        num_top: how many of the most likely tokens are reported for each.
    """
    logprobs = logits.float().log_softmax(-1)
    token_values = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(num_top, logprobs.shape[-1]), -1)
    tops = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return tuple(map(TokenLogprob, tokens, token_values, tops))


@final
class LogitAdjuster:
    """Adds OpenAI's `logit_bias` to one row's logits, and subtracts its penalties for tokens that were generated.

    With c the number of times that a token was generated: logit + bias - frequency_penalty * c - presence_penalty *
    (c > 0). The input's tokens do not count.

    Args:
        bias: by token id.
    """

    def __init__(
        self, bias: Mapping[int, float], presence_penalty: float, frequency_penalty: float, device: torch.device
    ) -> None:
        self._ids = torch.tensor(list(bias), dtype=torch.long, device=device)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        self._presence_penalty, self._frequency_penalty = presence_penalty, frequency_penalty

    def __call__(self, logits: Float[Tensor, "one vocab"], generated: Sequence[int]) -> Float[Tensor, "one vocab"]:
        """The changed logits, in float32."""
        logits = logits.float().clone()
        logits[0, self._ids] += self._bias
        if generated and (self._presence_penalty or self._frequency_penalty):
            counts = Counter(generated)
            ids = torch.tensor(list(counts), device=logits.device)
            penalties = [self._presence_penalty + self._frequency_penalty * count for count in counts.values()]
            logits[0, ids] -= torch.tensor(penalties, device=logits.device)
        return logits
