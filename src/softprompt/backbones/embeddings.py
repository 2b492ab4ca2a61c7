"""A backbone of which only the embedding table is in memory: for prompts in front of a model that runs elsewhere."""

import torch

from softprompt.backbones import loading, quantization
from softprompt.backbones.backbone import Backbone
from softprompt.backbones.checkpoint import load_table
from softprompt.backbones.source import architecture_of, auto_class_of, locate, read_config
from softprompt.types import Dtype


def load_embeddings(source: str, *, dtype: Dtype = "auto") -> Backbone:
    """Load the tokenizer and the embedding table of a decoder that runs elsewhere, as a backbone that cannot run.

    Its `hash` reads the other weights from disk, one tensor at a time.

    Args:
        source: as in `load`.
        dtype: of the table; `auto` is the checkpoint's own.

    Raises:
        FileNotFoundError: there is no model at `source`.
        ValueError: it is not a decoder of text, its table cannot be read alone, or `dtype` quantizes.
    """
    if dtype in quantization.KINDS:
        raise ValueError(f"dtype is {dtype!r}, but a table is not quantized; use float32, bfloat16, float16 or auto")
    folder, base, note = locate(source)
    config = read_config(folder, source)
    architecture = architecture_of(config)
    if architecture != "causal" or loading.is_multimodal(config):
        raise ValueError(
            f"{source} ({config.model_type}) is not a decoder of text, the only kind of model that takes a prompt's "
            "vectors where it runs elsewhere; serve it with the local engine"
        )
    stored = getattr(config, "dtype", None)
    if dtype == "auto":
        torch_dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    else:
        torch_dtype = getattr(torch, dtype)
    model, checkpoint = load_table(auto_class_of(architecture, config), folder, source, config, torch_dtype)
    tokenizer = loading.load_tokenizer(folder, source, config, int(model.get_input_embeddings().weight.shape[0]))
    return Backbone(model, tokenizer, source, base, architecture, note=note, checkpoint=checkpoint)
