"""The choices of settings, as literals, a check of numbers, and warnings.

Kept apart from the code that uses them, so that commands start quickly.
"""

import dataclasses
import math
from typing import Any, Literal, final

Dtype = Literal["auto", "float32", "bfloat16", "float16", "nf4"]
"""What a backbone computes in. `auto`: bfloat16 where the device multiplies it faster than float32; `nf4`: bfloat16,
with the linear layers stored in 4 bits per weight to save memory (extra `quantize`)."""
DecodeWeights = Literal["auto", "original", "prepacked", "int8", "int4"]
"""The weights that decoding on a CPU reads. `original`: the model's own. `prepacked`: a copy in the order in which
oneDNN's kernels read it; results are equal up to rounding. `int8`, `int4`: a copy with 8 bits per weight and a scale
for each output channel, or 4 bits with a scale and an offset for every 32 weights (the head in 8 bits); texts may
differ. `auto`: `prepacked` where the model allows it and the copy takes at most 1 GiB, else `original`."""
Baseline = Literal["none", "lora", "full", "head"]
"""`lora`: low-rank updates of the model's projections; `full`: every weight; `head`: only the head, where one
is trained (in a vision model, or an encoder without a vocabulary head)."""
Protocol = Literal["heldout", "paper"]
"""How an official validation split is used: half for selection and half for the report, or all of it for both."""
PromptPosition = Literal["prefix", "after_bos", "suffix"]
"""Where a prompt is inserted: before the text (in an encoder after its [CLS], which stays first), after the text's
first token (a decoder's beginning of sequence), or after the text (before the answer, an encoder's mask, and closing
tokens)."""
PromptAttention = Literal["full", "self"]
"""What a prompt's positions attend to in a bidirectional model: the text too, or only the prompt."""
Pool = Literal["cls", "patches"]
"""What a head reads from an image: the last state of [CLS], or the mean over the patches."""
Augment = Literal["none", "crop", "crop+flip"]
"""What is applied to a training image each time it is used: a random crop, and a mirror image half of the time."""


@final
class LoadingWarning(UserWarning):
    """What a user should know about a loaded model; the command line shows it as a note."""


@final
class TruncationWarning(UserWarning):
    """Rows that are scored or answered were cut to the input's limit; the command line shows it as a note."""


def unusual_layout(prompt_position: PromptPosition, prompt_attention: PromptAttention) -> str:
    """A prompt position or attention that other software does not support, in words; empty for the usual one."""
    position = {"prefix": "", "after_bos": "after the text's first token", "suffix": "after the text"}[prompt_position]
    return position or ("attending to itself only" if prompt_attention == "self" else "")


def check_finite(settings: Any) -> None:
    """Check that no field of a dataclass is an infinite number or NaN, which JSON, and so a run's record, cannot hold.

    Raises:
        ValueError: one is, naming the field, its value and its default.
    """
    for item in dataclasses.fields(settings):
        value, default = getattr(settings, item.name), item.default
        if isinstance(value, float) and not math.isfinite(value):
            hint = f" ({default} is the default)" if isinstance(default, int | float) else ", or left out"
            raise ValueError(f"{item.name} is {value}; it must be a finite number{hint}")
