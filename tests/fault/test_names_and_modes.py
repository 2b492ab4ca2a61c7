"""Names chosen by the user, which become folders and addresses; and the permissions of written files."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from softprompt import files
from softprompt.tasks import Task

REFUSED = {
    "": "it is empty",
    ".": "begins with a dot",
    "..": "begins with a dot",
    ".hidden": "begins with a dot",
    "a/b": "contains '/'",
    "../above": "begins with a dot",
    "a\\b": "contains '.+'",
    "c:d": "contains ':'",
    "what?": "contains '\\?'",
    "end ": "begins or ends with a space",
    "\u3000end": "begins or ends with a space",
    "end.": "ends with a dot",
    "two\nlines": "which is invisible",
    "null\0": "which is invisible",
    "bell\x07": "which is invisible",
    "\u202egpj.exe": "which is invisible",
    "half\ud800": "which is invisible",
    "CON": "name of a device",
    "nul.txt": "name of a device",
    "Lpt1 .x": "name of a device",
    "a" * 201: "has 201 bytes",
    "\u0436" * 101: "has 202 bytes",
}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_a_name_that_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"^run name .* is not a plain folder name: .*{REFUSED[name]}.*; choose another"
    ):
        files.check_name(name, "run name")


@pytest.mark.parametrize(
    "name",
    [
        "rte-dpt-0",
        "отзывы",
        "评论",
        "\u0646\u0645\u06cc\u200c\u062f\u0627\u0646\u0645",
        "e\u0301te\u0301",
        "a b",
        "console",
        "v1.2",
        "\u0436" * 100,
    ],
    ids=ascii,
)
def test_a_name_of_any_alphabet_is_taken_and_makes_a_folder(name: str, tmp_path: Path) -> None:
    assert files.check_name(name, "run name") == name
    with files.atomic_write(tmp_path / f"{name}-llamacpp-2") as draft:
        draft.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}-llamacpp-2"]


@pytest.mark.parametrize("name", ["../escape", "a/b", "NUL", "two\nlines", "x" * 300])
def test_a_tasks_name_is_a_folders_too(name: str) -> None:
    with pytest.raises(ValueError, match=r"a task's name .* is not a plain folder name"):
        Task(name=name, template="{text}", target="text", metrics=("exact_match",))


@pytest.mark.parametrize("sign", ["x", "\u0436", "评"])
def test_a_file_with_the_longest_name_of_the_disk(sign: str, tmp_path: Path) -> None:
    """The draft's name must not exceed the limit either."""
    name = sign * (255 // len(sign.encode()))
    files.write_text(tmp_path / name, "whole")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "whole")]
    with pytest.raises(OSError, match="too long") as caught:
        files.write_text(tmp_path / f"{name}{sign}", "too long")
    assert caught.value.errno == errno.ENAMETOOLONG
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o027, 0o640)])
def test_every_file_is_as_readable_as_the_umask_says(mask: int, mode: int, tmp_path: Path) -> None:
    """safetensors creates files with mode 0600 whatever the umask is."""
    with umask(mask):
        files.write_tensors(tmp_path / "single.safetensors", {"x": torch.zeros(1)})
        with files.atomic_write(tmp_path / "folder") as draft:
            (draft / "inner").mkdir(parents=True)
            save_file({"x": torch.zeros(1)}, draft / "inner" / "model.safetensors")
            (draft / "config.json").write_text("{}")
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert stat.S_IMODE(file.stat().st_mode) == mode, file
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask
    assert len(list(tmp_path.iterdir())) == 2


def test_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real.jsonl").write_text("old")
    for link, target in (("link.jsonl", "real.jsonl"), ("to-nothing.jsonl", "new.jsonl")):
        (tmp_path / link).symlink_to(target)
        files.write_text(tmp_path / link, "new")
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / target).read_text() == "new"


def test_pipe_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.write_text(pipe, "rows\n")
        assert os.read(reader, 100) == b"rows\n"
    finally:
        os.close(reader)
    with pytest.raises(OSError, match="is a device or a pipe, which a file cannot replace; give the path of a file"):
        files.write_tensors(pipe, {"a": torch.zeros(1)})
    assert stat.S_ISFIFO(pipe.stat().st_mode)
