"""The frozen model: loading, precision, quantization, and what a prompt method may know about it."""

from softprompt.backbones.backbone import Architecture, Backbone, load
from softprompt.backbones.precision import measured_dtype, resolve_dtype

__all__ = ["Architecture", "Backbone", "load", "measured_dtype", "resolve_dtype"]
