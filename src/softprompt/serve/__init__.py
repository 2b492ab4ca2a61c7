"""Serves many prompts over one backbone: the engine, an HTTP service, and a web page to try it."""

from softprompt.serve.engine.engine import Engine, EngineStatus
from softprompt.serve.engine.limits import Limits
from softprompt.serve.engine.request import (
    Cancelled,
    ClassifyOutput,
    EngineClosed,
    EngineRequest,
    GenerateOutput,
    QueueFull,
)
from softprompt.serve.prompts.entry import PromptEntry

__all__ = [
    "Cancelled",
    "ClassifyOutput",
    "Engine",
    "EngineClosed",
    "EngineRequest",
    "EngineStatus",
    "GenerateOutput",
    "Limits",
    "PromptEntry",
    "QueueFull",
]
