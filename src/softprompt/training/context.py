"""The context of a distillation: the text that an experiment names, and the teacher that reads it."""

from pathlib import Path

from softprompt.backbones import Backbone
from softprompt.config import Experiment
from softprompt.models import attach, model_class
from softprompt.models.teacher import Teacher
from softprompt.tasks import SEPARATOR, encode_context


def read_context(experiment: Experiment, demonstrations: str = "") -> str:
    """The text to distil: that of the file `context`, the demonstrations, or both; empty if there is neither.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no UTF-8 text, or has no text.
    """
    texts = [demonstrations] if demonstrations else []
    if experiment.context is not None:
        if not Path(experiment.context).is_file():
            raise FileNotFoundError(
                f"there is no file {experiment.context}; give the path of a text file as the context"
            )
        try:
            text = Path(experiment.context).read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{experiment.context} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
        if not text:
            raise ValueError(f"{experiment.context} has no text; give a context that says something")
        texts.insert(0, text)
    return SEPARATOR.join(texts)


def make_teacher(context: str, backbone: Backbone) -> Teacher:
    """The frozen model with `context` in front of each row.

    Raises:
        ValueError: a backbone that does not answer in words, or a context that is as long as the backbone's positions.
    """
    if model_class(backbone).needs_head(backbone):
        raise ValueError(
            f"{backbone.source} does not answer in words, so with a context in front it is no teacher; use a decoder, "
            "an encoder-decoder or a masked language model"
        )
    model = attach(backbone)
    ids, leading = encode_context(backbone.tokenizer, context)
    if model.max_row is not None and len(ids) >= model.max_row:
        raise ValueError(
            f"the context has {len(ids)} tokens, and {backbone.source} has {model.max_row} positions; shorten it"
        )
    return Teacher(model, ids, leading)
