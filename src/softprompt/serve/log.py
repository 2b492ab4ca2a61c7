"""Logging to stderr, one JSON object per line; the texts that users send only if asked for."""

import json
import logging
import traceback
from typing import final


@final
class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object; its `fields` become keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        line = {"at": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            # Without the error's message, which may quote what a user sent.
            error = record.exc_info[1]
            line["error"] = type(error).__name__
            line["frames"] = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        return json.dumps(line)


def configure_logging() -> None:
    """Send the service's log and uvicorn's warnings to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name, level in (("softprompt.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
