"""Rows of a file: CSV, TSV, JSON, JSONL and Parquet, read whole or refused with the row's number.

Nothing is guessed and nothing is dropped: every cell of a CSV or TSV is text as it stands (no `NA` becomes missing, no
`007` a number), every ragged or empty row is an error.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
from datasets import Dataset

Columns = dict[str, list[Any]]

_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}


def read_rows(path: Path) -> Dataset:
    """The rows of the file, in their order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not what its name says, is empty, or has a row that cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of a CSV, TSV, JSON, JSONL or Parquet file")
    kind = _kind(path)
    if kind not in _READ:
        raise ValueError(
            f"{path} ends in {kind or 'nothing'!r}, which is not read; give {', '.join(sorted(_READ))}, "
            f"also with {', '.join(sorted(_UNPACK))} behind it"
        )
    columns = _READ[kind](path, _content(path, kind))
    if not columns or not any(columns.values()):
        raise ValueError(f"{path} has no rows; give a file with at least one")
    for name, values in columns.items():
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError) as error:
            raise ValueError(f"column {name!r} of {path} mixes kinds of values ({error}); make them all text") from None
    return Dataset.from_dict(columns)


def records(rows: Dataset | Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows one by one; a table's are read a thousand at a time, which is many times as fast as going through it."""
    if not isinstance(rows, Dataset):
        yield from rows
        return
    for part in rows.iter(1000):
        for values in zip(*part.values(), strict=True):
            yield dict(zip(part, values, strict=True))


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _UNPACK:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _content(path: Path, kind: str) -> bytes:
    """The unpacked bytes, checked against what the name promises."""
    content = path.read_bytes()
    suffix = path.suffix.lower()
    if suffix in _UNPACK:
        try:
            content = _UNPACK[suffix](content)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole {suffix} file ({error}); write it anew or rename it") from None
    signs = {
        b"PAR1": "Parquet",
        b"\x1f\x8b": "gzip",
        b"BZh": "bzip2",
        b"\xfd7zXZ": "xz",
        b"PK\x03\x04": "a zip or Excel",
    }
    found = next((name for sign, name in signs.items() if content.startswith(sign)), "")
    if found != ("Parquet" if kind == ".parquet" else ""):
        raise ValueError(f"{path} is called {kind} but holds {found or 'no Parquet'} data; rename it or convert it")
    return content


def _text(path: Path, content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16 text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line} of {path} has the byte 0x{content[error.start]:02x}, which is not UTF-8; save it as UTF-8"
        ) from None


def _csv(path: Path, content: bytes, delimiter: str = ",") -> Columns:
    text = _text(path, content)
    if _is_json(text):
        raise ValueError(f"{path} is called {_kind(path)} but holds JSON; rename it to .json or .jsonl")
    if "\0" in text:
        raise ValueError(
            f"line {text[: text.index(chr(0))].count(chr(10)) + 1} of {path} has a zero byte; it is no text"
        )
    lines = _csv_rows(path, text, delimiter)
    header = next(lines, [])
    for column, name in enumerate(header, start=1):
        if not name.strip() or header.index(name) != column - 1:
            reason = "has the name of an earlier one" if name.strip() else "has no name"
            raise ValueError(f"column {column} ({name!r}) of {path} {reason}; name every column differently in line 1")
    columns: Columns = {name: [] for name in header}
    for number, row in enumerate(lines, start=1):
        if not any(cell.strip() for cell in row):
            raise ValueError(f"row {number} of {path} is empty; take it out")
        if len(row) != len(header):
            raise ValueError(
                f"row {number} of {path} has {len(row)} cells, but there are {len(header)} columns; "
                "quote a cell with the delimiter in it"
            )
        for name, cell in zip(header, row, strict=True):
            columns[name].append(cell)
    return columns


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[list[str]]:
    """`strict`, and no line breaks in a TSV's cells: else a stray quotation mark swallows the rows up to the next."""
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), delimiter=delimiter, strict=True)
    number = 0
    try:
        for number, row in enumerate(reader):
            if delimiter == "\t" and any("\n" in cell for cell in row):
                raise ValueError(
                    f"row {number} of {path} has a quotation mark that runs over the line's end; "
                    "double the marks inside a quoted cell, or save the file as CSV"
                )
            yield row
    except csv.Error as error:
        raise ValueError(
            f"line {reader.line_num} of {path} cannot be read ({error}); "
            "double the quotation marks inside a quoted cell"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _tsv(path: Path, content: bytes) -> Columns:
    return _csv(path, content, delimiter="\t")


def _is_json(text: str) -> bool:
    if not text.lstrip().startswith(("{", "[")):
        return False
    for candidate in (text.lstrip().split("\n", 1)[0], text):
        try:
            json.loads(candidate)
            return True
        except json.JSONDecodeError:
            continue
    return False


def _json(path: Path, content: bytes) -> Columns:
    """An array of objects; with no bracket in front, JSON lines."""
    text = _text(path, content)
    if not text.lstrip().startswith("["):
        return _jsonl(path, content)
    try:
        return _columns(path, json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} of {path} is not JSON ({error.msg}); correct it") from None


def _jsonl(path: Path, content: bytes) -> Columns:
    # Not splitlines: it also breaks at characters such as U+2028, which JSON allows inside a string.
    lines = _text(path, content).rstrip().split("\n")
    rows = []
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        if not line.strip():
            raise ValueError(f"row {number} of {path} is empty; take it out")
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"row {number} of {path} is not JSON ({error.msg}); write one object a line") from None
    return _columns(path, rows)


def _columns(path: Path, rows: list[Any]) -> Columns:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {path} is a {type(row).__name__}; write an object with a key a column")
        if not row:
            raise ValueError(f"row {number} of {path} is empty; take it out")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _parquet(path: Path, content: bytes) -> Columns:
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole Parquet file ({error}); write it anew") from None
    if len(set(table.column_names)) != len(table.column_names):
        raise ValueError(f"{path} has two columns of one name; name every column differently")
    columns: Columns = table.to_pydict()
    return columns


_READ: dict[str, Callable[[Path, bytes], Columns]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
