"""Prompt methods: one file each, found by walking this folder; `METHODS` has them all by name."""

import importlib
import pkgutil

from softprompt.prompts.base import METHODS, Folded, Host, PromptConfig, PromptOnly, SoftPrompt

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Folded", "Host", "PromptConfig", "PromptOnly", "SoftPrompt"]
