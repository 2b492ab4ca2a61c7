"""Many prompts from one backbone: the engine, its service over HTTP, and a page to try it."""

from softprompt.serve.engine.engine import Engine
from softprompt.serve.engine.request import Cancelled, Chosen, Closed, Full, Ticket, Written
from softprompt.serve.limits import Limits, Status
from softprompt.serve.prompts.entry import Served

__all__ = ["Cancelled", "Chosen", "Closed", "Engine", "Full", "Limits", "Served", "Status", "Ticket", "Written"]
