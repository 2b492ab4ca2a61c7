"""A checkpoint with more tokens than its backbone: prompts as embedding rows, and a head that does not say them."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softprompt.backbones import Backbone
from softprompt.export.base import embedding_scale

NEVER = -1e4
"""The bias of a token that is never said: its probability is exactly 0 in every type, and no sum becomes NaN."""


@torch.no_grad()
def grown(backbone: Backbone, rows: Float[Tensor, "new dim"], gap: int, quiet: int) -> Any:
    """A model that shares every weight with the backbone's but the embedding table and the head, which have new rows.

    The old rows of the head keep their bits, so whatever is said of the old tokens stays as it was. What the new ones
    are given depends on the head:

    - A head with a bias (BART's `final_logits_bias`, Phi's `lm_head.bias`) gets one that no token survives: exact,
      tied or not.
    - A head without one cannot be exact by weights alone: behind an RMS norm the last state reaches `h` and `-h` alike,
      so no row is far below the others for every `h` (a row of zeros least of all: its logit 0 beats every negative
      one). A tied head would be worse still, for its new rows would be the prompts themselves, which are long. So the
      head is untied, and each new row is a copy of the row of `quiet`, the token that the model was least ready to say
      anywhere in the probe: trained down by every text that the model has read, and of a length that quantises well.
      What makes it exact is the suppression of the new ids, which the caller writes into the generation config.

    Args:
        rows: the new tokens' vectors, as the model sees them.
        gap: ids between the table's end and the first new token, of no meaning.
        quiet: an id of the old vocabulary.
    """
    model = backbone.model
    tables = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    shared = {id(weight): weight for weight in model.parameters() if id(weight) not in tables}
    new = copy.deepcopy(model, shared)
    old = len(model.get_input_embeddings().weight)
    new.resize_token_embeddings(old + gap + len(rows), mean_resizing=False)
    embedding, head = new.get_input_embeddings(), new.get_output_embeddings()
    biases = [getattr(head, "bias", None), getattr(new, "final_logits_bias", None)]
    if all(bias is None for bias in biases):
        if head.weight is embedding.weight:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            _say_untied(new)
        head.weight[old:] = head.weight[quiet]
    for bias in biases:
        if bias is not None:
            bias[..., old:] = NEVER
    embedding.weight[old:] = 0
    embedding.weight[old + gap :] = (rows / (embedding_scale(backbone) or 1.0)).to(embedding.weight)
    return new


def _say_untied(model: Any) -> None:
    """Say in the config that head and table are two, where its class lets one say so.

    T5's does not: it reads a false value as another thing (the scale of the decoder's outputs), says true whatever it
    is given, and loads two tables where the file has two.
    """
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        if not type(config)(tie_word_embeddings=False).tie_word_embeddings:
            config.tie_word_embeddings = False
