"""The frozen model: loading, precision, quantization, and what a prompt method may know about it."""

from softprompt.backbones.backbone import Backbone, load
from softprompt.backbones.embeddings import load_embeddings
from softprompt.backbones.precision import measured_dtype, resolve_dtype
from softprompt.backbones.source import Architecture

__all__ = ["Architecture", "Backbone", "load", "load_embeddings", "measured_dtype", "resolve_dtype"]
