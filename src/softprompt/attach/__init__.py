"""How a prompt meets an architecture: one file each, one line in `ATTACHMENTS`."""

from softprompt.attach.base import Attachment, Prepared
from softprompt.attach.causal import Causal
from softprompt.attach.sampling import Sampling
from softprompt.backbone import Architecture, Backbone
from softprompt.prompts import SoftPrompt

ATTACHMENTS: dict[Architecture, type[Attachment]] = {
    "causal": Causal,
}
"""Which attachment fits which architecture."""


def attach(backbone: Backbone, prompt: SoftPrompt | None = None) -> Attachment:
    """`prompt` in front of `backbone`, as an `nn.Module` for any training loop; none: the untouched model.

    Raises:
        ValueError: there is no attachment for the architecture, or the prompt does not fit the backbone.
    """
    if backbone.architecture not in ATTACHMENTS:
        raise ValueError(
            f"{backbone.source} is a model of the kind {backbone.architecture}; prompts can be attached to "
            f"{', '.join(ATTACHMENTS)}"
        )
    return ATTACHMENTS[backbone.architecture](backbone, prompt)


__all__ = ["ATTACHMENTS", "Attachment", "Prepared", "Sampling", "attach"]
