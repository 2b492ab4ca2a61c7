"""A command as a user types it, with its exit code and what it printed."""

import contextlib
import io
import json
from typing import Any, NamedTuple

from softprompt.cli import main


class Called(NamedTuple):
    code: int
    out: list[str]
    err: str

    @property
    def result(self) -> Any:
        """The last line of stdout, of a command that succeeded."""
        assert self.code == 0, self.err
        return json.loads(self.out[-1])

    @property
    def sentence(self) -> str:
        """The one sentence of a command that failed."""
        assert self.code == 1
        assert self.out == []
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        sentences = [line for line in lines if line.startswith("softprompt: ")]
        assert sentences == lines[-1:]
        assert "--debug shows where" not in sentences[0], f"no sentence for this error: {sentences[0]}"
        return sentences[0]


def call(*arguments: object) -> Called:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Called(code, out.getvalue().splitlines(), err.getvalue())
