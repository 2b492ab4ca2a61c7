"""The built-in tasks; importing this package registers them."""

from softprompt.tasks.builtin import boolq, glue, mnist, sentiment, superglue

__all__ = ["boolq", "glue", "mnist", "sentiment", "superglue"]
