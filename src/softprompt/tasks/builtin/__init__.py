"""The built-in tasks; importing this package registers them."""

from softprompt.tasks.builtin import boolq, glue, sentiment, superglue

__all__ = ["boolq", "glue", "sentiment", "superglue"]
