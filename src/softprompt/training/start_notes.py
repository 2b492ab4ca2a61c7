"""Notes on where a prompt's training starts, and how closely the method can represent that."""

from softprompt.prompts import SoftPrompt
from softprompt.prompts.deep import Deep

_ROUNDING = 1e-4
"""A prompt this close to its start, relative to the start's size, is the start."""


def init_prompt_note(name: str, prompt: SoftPrompt, source: SoftPrompt) -> str:
    """How closely `prompt` represents the prompt that it starts from.

    Args:
        name: what the user called that prompt.
        prompt: before its first step.
        source: the prompt to start from; a shallow one may be the start of a deep one.
    """
    if prompt.num_matrices != source.num_matrices:
        return f"starting from the keys and values of {name}{_deep_error(prompt)}"
    target = source.prompt().detach().cpu()
    error = float((prompt.prompt().detach().cpu() - target).norm() / target.norm())
    return f"starting from {name}, represented to a relative error of {error:.3g}"


def inexact_start_note(prompt: SoftPrompt | None) -> str:
    """How far a decoder's deep prompt starts from the keys and values of the shallow one; empty where it starts there.

    Args:
        prompt: without a prompt to start from, before its first step.
    """
    error = _deep_error(prompt)
    return f"starting from the keys and values of a shallow prompt{error}" if error else ""


def _deep_error(prompt: SoftPrompt | None) -> str:
    if not isinstance(prompt, Deep) or prompt.start_error is None or prompt.start_error <= _ROUNDING:
        return ""
    return f", represented to a relative error of {prompt.start_error:.3g}"
