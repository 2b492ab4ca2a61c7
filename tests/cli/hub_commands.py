"""Runs commands in one process, whose environment says where the Hub is: huggingface_hub reads it once, on import."""

import contextlib
import io
import json
import os
import sys

import httpx

from softprompt.cli import main


def run(arguments: list[str]) -> dict[str, object]:
    if arguments == ["hub goes down"]:
        return {"status": httpx.get(f"{os.environ['HF_ENDPOINT']}/down").status_code}
    if arguments[0] == "folders":
        from softprompt.serve.config import ServeConfig

        return {"folders": [[name, str(path)] for name, path in ServeConfig(sources=tuple(arguments[1:])).folders()]}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    lines = out.getvalue().splitlines()
    return {"status": status, "said": json.loads(lines[-1]) if lines else None, "error": err.getvalue()}


if __name__ == "__main__":
    results = [run(arguments) for arguments in json.loads(sys.argv[1])]
    print(json.dumps(results))
