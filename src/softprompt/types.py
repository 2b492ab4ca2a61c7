"""The words that settings choose among, apart from what they choose, so that a command line is known at once."""

from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16", "nf4"]
"""What a backbone computes in; `auto`: bfloat16 where the device multiplies it faster than float32; `nf4`: bfloat16,
and its linear layers hold 4 bits a weight, where memory is short (extra `quantize`)."""
Baseline = Literal["none", "lora", "full", "head"]
"""`lora`: low-rank updates of the model's projections; `full`: every weight; `head`: the encoder's head alone."""
Protocol = Literal["heldout", "paper"]
"""What an official validation split is for: half to select and half to report, or the whole of it for both."""
PromptPosition = Literal["prefix", "after_bos", "suffix"]
"""Where a prompt stands in the input: in front of the text (in an encoder behind its [CLS], which stays first), behind
the text's first token (a decoder's beginning of sequence), or behind the text (and in front of the answer, an encoder's
mask, and closing tokens)."""
PromptAttention = Literal["full", "self"]
"""What a prompt's places see in a model that reads both ways: the text too, or the prompt alone."""
Pool = Literal["cls", "patches"]
"""What a head sees of an image: the last state of [CLS], or the mean of the patches'."""
Augment = Literal["none", "crop", "crop+flip"]
"""What happens to a training image each time that it is seen: a random crop, and a mirror image half of the time."""


def unusual_layout(prompt_position: PromptPosition, prompt_attention: PromptAttention) -> str:
    """How a prompt lies in the input, where that is not the way of other software; else empty."""
    where = {"prefix": "", "after_bos": "behind the text's first token", "suffix": "behind the text"}[prompt_position]
    return where or ("isolated from the text" if prompt_attention == "self" else "")
