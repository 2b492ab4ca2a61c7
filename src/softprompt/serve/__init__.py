"""Serves many prompts over one backbone: the engine, an HTTP service, and a web page to try it."""

from softprompt.serve.engine.base import BaseEngine, EngineStatus
from softprompt.serve.engine.engine import Engine
from softprompt.serve.engine.limits import Limits
from softprompt.serve.engine.request import (
    Cancelled,
    ClassifyOutput,
    EngineClosed,
    EngineRequest,
    EngineUnavailable,
    GenerateOutput,
    QueueFull,
)
from softprompt.serve.engine.vllm import VllmEngine
from softprompt.serve.prompts.entry import PromptEntry

__all__ = [
    "BaseEngine",
    "Cancelled",
    "ClassifyOutput",
    "Engine",
    "EngineClosed",
    "EngineRequest",
    "EngineStatus",
    "EngineUnavailable",
    "GenerateOutput",
    "Limits",
    "PromptEntry",
    "QueueFull",
    "VllmEngine",
]
