"""No name that the vocabulary retired is defined in the package: in code, as a flag, or as a JSON key."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

import softprompt
from softprompt.config import Experiment, TrainingConfig
from softprompt.prompts import METHODS

SOURCE = Path(softprompt.__file__).parent
PACKAGES = sorted(path.name for path in SOURCE.iterdir() if path.is_dir() and (path / "__init__.py").is_file())
MODULES = sorted(path.name for path in SOURCE.glob("*.py"))
each_package = pytest.mark.parametrize("package", [*PACKAGES, *MODULES])

_NAMES = """
found given told own which one some wanted whole place places placed words seen unseen shown served held kept keeps
chosen choice named speaks joined evened each alone together within over outside behind hidden alike again anew stale
standing chance chances seeing follow advance turn turns reading readings beginning beginnings begun worth

untouched optimiser optimise means means_of by_means_of meeting passes in_turn extended extends recomputes shards closed
ticket tickets waiting gate access writing written writer shelf follower answering settled outcome swept packing
attachment attachments matrices layered watcher silent material tested replacing grown never_said
"""
NAMES = frozenset(_NAMES.split())
"""First words that say nothing about a value, then names for which the field has a term.

Compared in lower case, without underscores at either end.
"""

_FLAGS = """
untouched place attend start together address cluster batch accumulate evaluate_every warmup decay clip max_tokens front
behind words low high others
"""
FLAGS = frozenset(_FLAGS.split())
"""Fields of the command line's dataclasses and parameters of its commands that were renamed."""

_KEYS = """
untouched low high others caution words place front behind whole after_first joint isolated start attend together
evaluate_every accumulate warmup decay clip
"""
KEYS = frozenset(_KEYS.split())
"""Keys of JSON records that were renamed."""

ALLOWED: dict[tuple[str, str], str] = {
    ("analysis/rank/gradient.py", "start"): "the point of a run at which a gradient is taken, beside step N",
    ("analysis/rank/loaded_prompt.py", "start"): "the prompt before the first step, not the flag --start",
    ("analysis/report/learning_curves.py", "means"): "means over seeds",
    ("analysis/report/plots.py", "means"): "means over seeds",
    ("analysis/report/statistics.py", "low"): "the end of an interval of any statistic, not a key of results",
    ("analysis/report/statistics.py", "high"): "the end of an interval of any statistic, not a key of results",
    ("backbones/kernels/llama.py", "gate"): "transformers' gate_proj of the MLP, not a service's middleware",
    ("backbones/kernels/llama_cached.py", "gate"): "transformers' gate_proj of the MLP, not a service's middleware",
    ("backbones/loading.py", "shards"): "the files of a sharded checkpoint, not FSDP",
    ("export/client.py", "choice"): "OpenAI's own field",
    ("export/gguf.py", "extended"): "an extended vocabulary, as the vocabulary calls it",
    ("export/gguf_writer.py", "writer"): "a gguf.GGUFWriter",
    ("export/vocab.py", "extended"): "an extended vocabulary, as the vocabulary calls it",
    ("prompts/base.py", "start"): "the matrix a method starts from, not the flag --start",
    ("serve/engine/base.py", "closed"): "whether the engine is, as of a file or a socket",
    ("serve/engine/engine.py", "closed"): "whether the engine is, as of a file or a socket",
    ("serve/engine/vllm.py", "closed"): "whether the engine is, as of a file or a socket",
    ("serve/engine/vllm.py", "_closed"): "whether the engine is, as of a file or a socket",
    ("serve/engine/vllm_server.py", "choice"): "an element of OpenAI's `choices`",
    ("serve/engine/scheduler.py", "closed"): "whether the scheduler is, as of a file or a socket",
    ("serve/engine/scheduler.py", "_closed"): "whether the scheduler is, as of a file or a socket",
    ("serve/api/openai.py", "choice"): "an element of OpenAI's `choices`",
    ("serve/api/openai.py", "_choice"): "an element of OpenAI's `choices`",
    ("serve/api/openai.py", "_Choice"): "an element of OpenAI's `choices`",
    ("sweep/space.py", "low"): "the bound of a range, as in Optuna's suggest_float, not a confidence interval",
    ("sweep/space.py", "high"): "the bound of a range, as in Optuna's suggest_float, not a confidence interval",
    ("sweep/space.py", "warmup"): "a search's first trials, not the learning rate's",
}
"""Exceptions as `(file, name)`, each with the reason."""


def defined_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names of functions, classes, parameters, variables and attributes, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name, node.lineno


def json_keys(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Texts that are keys of dictionary literals, or keywords of `dict(...)`, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key in node.keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value, key.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
            yield from ((keyword.arg, node.lineno) for keyword in node.keywords if keyword.arg)


def flags(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Parameters of the command functions, whose names end in `_` or are those of the command, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_"):
            yield from ((arg.arg, arg.lineno) for arg in [*node.args.args, *node.args.kwonlyargs])


def files_of(package: str) -> list[Path]:
    path = SOURCE / package
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def record_fields(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Annotated names in the bodies of classes, which are the keys of their JSON, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    yield statement.target.id, statement.lineno


def retired(path: Path) -> list[str]:
    """Every retired name that a file defines, as `file:line name`."""
    tree = ast.parse(path.read_text())
    file = str(path.relative_to(SOURCE))
    names = [(name, line) for name, line in defined_names(tree) if name.strip("_").lower() in NAMES]
    names += [(name, line) for name, line in [*json_keys(tree), *record_fields(tree)] if name in KEYS]
    if file.startswith("cli/"):
        names += [(name, line) for name, line in flags(tree) if name in FLAGS]
    return sorted({f"{file}:{line} {name}" for name, line in names if (file, name) not in ALLOWED})


@each_package
def test_package_defines_no_retired_name(package: str) -> None:
    assert [name for file in files_of(package) for name in retired(file)] == []


@pytest.mark.parametrize("config", [Experiment, TrainingConfig, *METHODS.values()], ids=lambda config: config.__name__)
def test_flags_have_no_retired_name(config: type) -> None:
    """The fields are the flags of `softprompt train`."""
    assert {field.name for field in dataclasses.fields(config)} & FLAGS == set()


def test_allowed_names_still_exist() -> None:
    unused = []
    for file, name in ALLOWED:
        tree = ast.parse((SOURCE / file).read_text())
        if name not in {other for other, _ in [*defined_names(tree), *json_keys(tree)]}:
            unused.append((file, name))
    assert unused == []


@pytest.mark.parametrize(
    "code",
    [
        "found = 1",
        "def f(wanted): pass",
        "class Ticket: pass",
        "self._whole = 1",
        "for one in rows: pass",
        "async def settled(): pass",
        "import numpy as own",
        "try: pass\nexcept E as given: pass",
        'results = {"low": 0.1}',
        "class Score:\n    others: int",
        "dict(caution=1)",
        "[place for place in rows]",
        "lambda words: words",
    ],
)
def test_retired_names_are_detected(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: code)
    assert retired(SOURCE / "training" / "trainer.py")
