"""Many prompts from one backbone: the engine, its service over HTTP, and a page to try it."""

from softprompt.serve.engine.engine import Engine
from softprompt.serve.engine.request import (
    Cancelled,
    ClassifyOutput,
    EngineClosed,
    EngineRequest,
    GenerateOutput,
    QueueFull,
)
from softprompt.serve.limits import Limits, Status
from softprompt.serve.prompts.entry import PromptEntry

__all__ = [
    "Cancelled",
    "ClassifyOutput",
    "Engine",
    "EngineClosed",
    "EngineRequest",
    "GenerateOutput",
    "Limits",
    "PromptEntry",
    "QueueFull",
    "Status",
]
