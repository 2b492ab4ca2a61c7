"""Where a prompt's first values come from, named by their source. All in units of the host's embedding RMS."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softprompt.prompts.base import Host

Init = Literal["vocab", "uniform", "text", "words"]
"""`vocab`: rows of random tokens; `uniform`: U(-0.5, 0.5); `text`: of a given text; `words`: of the task's answers."""


def initial_rows(
    init: Init, text: str, length: int, host: Host, generator: torch.Generator
) -> Float[Tensor, "length dim"]:
    """`length` starting vectors in units of the host's RMS.

    Raises:
        ValueError: `text` without a text, a text with `init` other than `text`, `words` for a task without words, or
            a warm start of another length.
    """
    check_init(init, text)
    if host.start is not None:
        return given_rows(host, length)
    if init == "uniform":
        return torch.rand(length, host.dim, generator=generator) - 0.5
    if init == "vocab":
        rows = host.sample(length, generator)
    elif init == "text":
        rows = host.embed(text, length)
    else:
        if not host.words:
            raise ValueError("init is 'words', but the task has no label words; use 'vocab' or 'text'")
        rows = host.embed("".join(host.words), length)
    return rows / host.rms


def initial_matrix(
    init: Init, text: str, length: int, host: Host, generator: torch.Generator, scale: float
) -> Float[Tensor, "length dim"]:
    """`length` starting vectors in units of `scale`; `uniform` is U(-0.5, 0.5) of them, whatever the scale.

    Raises:
        ValueError: as `initial_rows`.
    """
    rows = initial_rows(init, text, length, host, generator)
    return rows if init == "uniform" and host.start is None else rows * (host.rms / scale)


def given_rows(host: Host, length: int) -> Float[Tensor, "length dim"]:
    """The host's warm start in units of its RMS.

    Raises:
        ValueError: it has another shape than the prompt.
    """
    if host.start is None or host.start.shape != (length, host.dim):
        shape = None if host.start is None else tuple(host.start.shape)
        raise ValueError(
            f"the prompt to start from is {shape} and the new one {(length, host.dim)}; "
            "give it the same length, and the backbone it was trained on"
        )
    return host.start / host.rms


def check_init(init: Init, text: str) -> None:
    """Refuse a text without `init='text'`, and the other way round."""
    if (init == "text") != bool(text):
        raise ValueError(f"init is {init!r} and init_text is {text!r}; a text goes with init 'text', and only with it")


def factorise(
    rows: Float[Tensor, "length dim"], rank: int, generator: torch.Generator
) -> tuple[Float[Tensor, "length rank"], Float[Tensor, "rank dim"]]:
    """The best rank-`rank` product for `rows` (truncated SVD), its singular values shared evenly by both factors.

    Directions that `rows` do not have (repeated text, say) start as small noise on both sides, so that they can learn.

    Reference: Eckart and Young, 1936.
    """
    left, values, right = torch.linalg.svd(rows.double(), full_matrices=False)
    if (spare := rank - len(values)) > 0:  # more directions than the rows can have
        values = nn.functional.pad(values, (0, spare))
        left, right = nn.functional.pad(left, (0, spare)), nn.functional.pad(right, (0, 0, 0, spare))
    root = values[:rank].sqrt()
    left, right = left[:, :rank] * root, root[:, None] * right[:rank]
    missing = values[:rank] <= values[0] * 1e-6
    if missing.any():
        noise = 0.1 * float(values[0].sqrt())
        count = int(missing.sum())
        left[:, missing] = noise * torch.randn(len(rows), count, generator=generator).double() / len(rows) ** 0.5
        right[missing] = noise * torch.randn(count, rows.shape[1], generator=generator).double() / rows.shape[1] ** 0.5
    return left.float().contiguous(), right.float().contiguous()


def check_scale(scale: float | None) -> None:
    """Refuse a scale that would put nothing, or nonsense, in front of the input."""
    if scale is not None and not (0 < scale < float("inf")):
        raise ValueError(f"scale is {scale}; it must be a positive number, or none for the host's embedding RMS")
