"""The frozen model: loading, precision, quantization, and the facts that a prompt may know of it."""

from softprompt.backbones.backbone import Architecture, Backbone, fitting_dtype, load, measured_dtype

__all__ = ["Architecture", "Backbone", "fitting_dtype", "load", "measured_dtype"]
