"""Tables in CSV, TSV, JSON, JSONL and Parquet files, read completely or refused with the row's number.

Nothing is guessed or dropped: every cell of a CSV or TSV is text (`NA` is not missing, `007` is not a number), and
every ragged or empty row is an error. Columns that the task does not read may contain anything.
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
from datasets import Dataset

from softprompt.backbones import image_processor
from softprompt.tasks.task import Task
from softprompt.tasks.template import check_characters, format_hint

Columns = dict[str, list[Any]]

Table = tuple[Sequence[str], Columns]
"""The names of all columns, and the cells of those that are read."""

IDS = ("id", "ID", "Id", "_id", "idx", "guid", "uid", "uuid")
"""Names of columns that identify rows."""

_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}


def read_rows(
    path: Path,
    columns: Iterable[str] | None = None,
    *,
    optional: Collection[str] = (),
    purpose: str = "",
    as_json: str = "",
) -> Dataset:
    """Read the rows of a file, in order.

    Args:
        columns: read only these; None: read all.
        optional: columns to read as well, if they exist and can be read.
        purpose: what the columns are for, added to the error about a missing one.
        as_json: a column whose lists and objects are kept as JSON text, so that they need not be of one form.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not of the kind that its name says, is empty, lacks a column, or has an unreadable row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of a CSV, TSV, JSON, JSONL or Parquet file")
    kind = _kind(path)
    if kind not in _READ:
        raise ValueError(
            f"{path} ends in {kind or 'nothing'!r}, which is not read; give {', '.join(sorted(_READ))}, "
            f"optionally followed by {', '.join(sorted(_UNPACK))}"
        )
    needed = None if columns is None else tuple(dict.fromkeys(columns))
    names, table = _READ[kind](path, _content(path, kind), None if needed is None else {*needed, *optional})
    if not names:
        raise ValueError(f"{path} has no rows; give a file with at least one")
    missing = [name for name in needed or () if name not in names]
    if needed is None or missing:
        _check_names(path, names)
    if missing:
        known, hint = ", ".join(map(repr, names)), format_hint(missing[0], names)
        raise ValueError(f"{path} has no column {missing[0]!r}{purpose}; it has {known}{hint}")
    repeated = {name for name, count in Counter(names).items() if count > 1}
    if wrong := [name for name in (names if needed is None else needed) if name in repeated]:
        raise ValueError(f"{path} has two columns named {wrong[0]!r}; name every column that is read differently")
    if not any(table.values()):
        raise ValueError(f"{path} has no rows; give a file with at least one")
    readable: Columns = {}
    for name, values in table.items():
        is_needed = needed is None or name in needed
        if name == as_json:
            values = [json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for v in values]
        try:
            if is_needed or name not in repeated:
                readable[name] = _cells(path, name, values)
        except ValueError:
            if is_needed:
                raise
    return Dataset.from_dict(readable)


_ROW = "softprompt: row"
"""The added column of each row's number in the user's file."""


def numbered(rows: Dataset, origin: str) -> Dataset:
    """The rows with their numbers in `origin`, which stay correct when rows are split and sampled."""
    result = rows.add_column(_ROW, list(range(1, len(rows) + 1)))
    result.info.dataset_name = origin
    return result


def row_number(row: Mapping[str, Any], index: int) -> int:
    """The row's number in its file, counted from 1; for a row that is from no file, `index + 1`."""
    return int(row.get(_ROW, index + 1))


def row_name(rows: Any, row: Mapping[str, Any], index: int) -> str:
    """The name in errors of the row at `index` of `rows`: `row 43 of train.csv`."""
    origin = row_origin(rows)
    return f"row {row_number(row, index)}" + (f" of {origin}" if origin else "")


def row_origin(rows: Any) -> str:
    """The name of the file that the rows are from; empty if they are from none."""
    return str(rows.info.dataset_name or "") if isinstance(rows, Dataset) and _ROW in rows.column_names else ""


def row_id(task: Task, row: Mapping[str, Any]) -> str | int:
    """What identifies the row: its id if the file has a column in `IDS`, else a hash of its input."""
    file_id = next((row[name] for name in IDS if name not in task.columns and row.get(name) not in (None, "")), None)
    if isinstance(file_id, str | int):
        return file_id
    if task.image:
        return image_processor.digest(row[task.image])[:16]
    inputs = {name: row[name] for name in task.inputs}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _check_names(path: Path, names: Sequence[str]) -> None:
    for column, name in enumerate(names, start=1):
        if not name.strip() or names.index(name) != column - 1:
            reason = "has the name of an earlier one" if name.strip() else "has no name"
            raise ValueError(f"column {column} ({name!r}) of {path} {reason}; name every column differently")


def task_rows(task: Task, path: Path, *, answers: bool = True) -> Dataset:
    """Read a file's columns that the task uses, and any column in `IDS`.

    Args:
        answers: read the columns of answers and groups too, not only those of the input.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`.
    """
    columns, purpose = task.columns if answers else task.inputs, f", which task {task.name!r} reads"
    return read_rows(path, columns, optional=IDS, purpose=purpose, as_json=task.messages)


def _cells(path: Path, name: str, values: list[Any]) -> list[Any]:
    """Cells that fit one Arrow column: integers mixed with floats, or too large, become text.

    Floats that are whole numbers beside integers are integers: in JSON, 1 and 1.0 are one number.
    """
    kinds = {type(value) for value in values if value is not None}
    large = int in kinds and any(type(value) is int and not -(2**63) <= value < 2**63 for value in values)
    if kinds == {int, float} or (large and kinds <= {int, float}):
        # In a column of floats, 1 would become 1.0, and a large integer would be rounded.
        values = [None if value is None or value != value else value for value in values]
        if all(value is None or type(value) is int or value.is_integer() for value in values):
            values = [None if value is None else int(value) for value in values]
        if large or any(isinstance(value, float) for value in values):
            values = [None if value is None else str(value) for value in values]
    try:
        pyarrow.array(values)
    except UnicodeEncodeError:
        for number, value in enumerate(values, start=1):
            check_characters(value, name, f"row {number} of {path}")
        raise ValueError(f"column {name!r} of {path} has half a character in a nested value; take it out") from None
    except (pyarrow.ArrowException, OverflowError) as error:
        raise ValueError(f"column {name!r} of {path} mixes kinds of values ({error}); make them all text") from None
    return values


def records(rows: Dataset | Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Iterate over rows; a `Dataset` is read in chunks of 1,000, which is much faster than row by row."""
    if not isinstance(rows, Dataset):
        yield from rows
        return
    for chunk in rows.iter(1000):
        for values in zip(*chunk.values(), strict=True):
            yield dict(zip(chunk, values, strict=True))


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _UNPACK:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _content(path: Path, kind: str) -> bytes:
    """The decompressed bytes, after a check that their format is what the file's name says."""
    content = path.read_bytes()
    suffix = path.suffix.lower()
    if suffix in _UNPACK:
        try:
            content = _UNPACK[suffix](content)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{path} is not a complete {suffix} file ({error}); write it again or rename it") from None
    formats = {
        b"PAR1": "Parquet",
        b"\x1f\x8b": "gzip",
        b"BZh": "bzip2",
        b"\xfd7zXZ": "xz",
        b"PK\x03\x04": "a zip or Excel",
    }
    detected = next((name for magic, name in formats.items() if content.startswith(magic)), "")
    if detected != ("Parquet" if kind == ".parquet" else ""):
        raise ValueError(
            f"{path} is named {kind} but contains {detected or 'no Parquet'} data; rename it or convert it"
        )
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


def _csv(path: Path, content: bytes, read: Collection[str] | None, delimiter: str = ",") -> Table:
    text = _text(path, content)
    if _is_json(text):
        raise ValueError(f"{path} is named {_kind(path)} but contains JSON; rename it to .json or .jsonl")
    if "\0" in text:
        raise ValueError(
            f"line {text[: text.index(chr(0))].count(chr(10)) + 1} of {path} has a zero byte; it is not text"
        )
    lines = _csv_rows(path, text, delimiter)
    header = next(lines, [])
    columns: Columns = {name: [] for name in header if read is None or name in read}
    for number, row in enumerate(lines, start=1):
        if not any(cell.strip() for cell in row):
            raise ValueError(f"row {number} of {path} is empty; take it out")
        if len(row) != len(header):
            raise ValueError(
                f"row {number} of {path} has {len(row)} cells, but there are {len(header)} columns; "
                "quote a cell with the delimiter in it"
            )
        for name, cell in zip(header, row, strict=True):
            if name in columns:
                columns[name].append(cell)
    return header, columns


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[list[str]]:
    """Rows of cells; strict, and without line breaks in TSV cells: a stray quotation mark would swallow whole rows."""
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


def _tsv(path: Path, content: bytes, read: Collection[str] | None) -> Table:
    return _csv(path, content, read, delimiter="\t")


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


def _json(path: Path, content: bytes, read: Collection[str] | None) -> Table:
    """An array of objects; without an opening bracket, JSON lines."""
    text = _text(path, content)
    if not text.lstrip().startswith("["):
        return _jsonl(path, content, read)
    try:
        return _columns(path, _parsed(text), read)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} of {path} is not JSON ({error.msg}); correct it") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deep to be read; write an array of flat objects") from None


def _jsonl(path: Path, content: bytes, read: Collection[str] | None) -> Table:
    # Not splitlines: it also splits at characters such as U+2028, which JSON allows inside a string.
    lines = _text(path, content).rstrip().split("\n")
    rows = []
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        if not line.strip():
            raise ValueError(f"row {number} of {path} is empty; take it out")
        try:
            rows.append(_parsed(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"row {number} of {path} is not JSON ({error.msg}); write one object a line") from None
        except RecursionError:
            raise ValueError(f"row {number} of {path} is nested too deep to be read; write a flat object") from None
    return _columns(path, rows, read)


def _parsed(text: str) -> Any:
    # Python refuses to parse integers of more than 4,300 digits; one may be in a column that the task does not read.
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 4300 else digits)


def _columns(path: Path, rows: list[Any], read: Collection[str] | None) -> Table:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {path} is a {type(row).__name__}; write an object with a key a column")
        if not row:
            raise ValueError(f"row {number} of {path} is empty; take it out")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names, {name: [row.get(name) for row in rows] for name in names if read is None or name in read}


def _parquet(path: Path, content: bytes, read: Collection[str] | None) -> Table:
    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).read()
        names = list(table.column_names)
        # By index: a name with a dot would be taken for a nested column, and a name may occur twice.
        indices = {name: index for index, name in enumerate(names) if read is None or name in read}
        return names, {name: table.column(index).to_pylist() for name, index in indices.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a complete Parquet file ({error}); write it again") from None


_READ: dict[str, Callable[[Path, bytes, Collection[str] | None], Table]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
