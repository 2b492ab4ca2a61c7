"""Writes that are whole or not at all: a temporary name beside the place, fsync, rename."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft's path beside `path`; it takes `path`'s place when the block ends well, else it is removed.

    The draft may become a file or a folder. A folder replaces only a place where there is none.

    Raises:
        OSError: the disk is full, or the place cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        for file in [draft, *draft.rglob("*")] if draft.is_dir() else [draft]:
            _sync(file)
        draft.replace(path)
        _sync(path.parent)
    except BaseException:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`text` as the whole content of `path`, at once."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
