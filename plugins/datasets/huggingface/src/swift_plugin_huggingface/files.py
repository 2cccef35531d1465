"""Reads one data file: jsonl, json, csv, tsv, txt, parquet and arrow. Each row comes with its file and line.

A raw row is a parser and its arguments, such as `(_parse, "rows.jsonl", 12, b"{...}")`: cheap to make, to skip and to pass to
another process, which `parse`s it into a record. Files are streamed, except a .json file that holds one list or object.
A bad line is a record with its reason; a file that cannot be read at all is a RequestError.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from swift_core.errors import RequestError
from swift_core.types import Record

from swift_plugin_huggingface.messages import kind

Raw = tuple[Any, ...]
Reader = Callable[[Path, str], Iterator[Raw]]
BROKEN_FILE = (OSError, EOFError, zlib.error)  # what a damaged or unreadable file raises while it is read
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that is half a character unless its other half follows
PLAIN = frozenset(range(0x21, 0x7F))  # bytes that are characters of their own, and no blanks
CELL_LIMIT = 2**31 - 1  # characters of one csv cell; the standard library stops at 131,072


def suffix(path: Path) -> str:
    """The ending that says a file's form, without `.gz`: `rows.jsonl.gz` -> `.jsonl`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def read_file(path: Path) -> Iterator[Raw]:
    """The raw rows of a file, in its order. `where` reads `rows.jsonl:12` for lines, `rows.json: row 12` for others.

    Raises RequestError when the form is unknown, or when the file cannot be read or decoded.
    """
    name = str(path)
    try:
        yield from reader_of(path)(path, name)
    except UnicodeDecodeError as err:
        raise _not_text(name, err) from None
    except BROKEN_FILE as err:
        raise RequestError(f"dataset {name!r} cannot be read: {' '.join(str(err).split())}") from None


def parse(raw: Raw) -> Record:
    """The record of a raw row. Raises RequestError where its file is not text."""
    try:
        found: Record = raw[0](*raw[1:])
    except UnicodeDecodeError as err:
        raise _not_text(raw[1], err) from None
    return found


def _not_text(name: str, err: UnicodeDecodeError) -> RequestError:
    byte = f"0x{err.object[err.start]:02x}"
    return RequestError(f"dataset {name!r}: not UTF-8 text (byte {byte}). Convert it, such as: iconv -f latin1")


def reader_of(path: Path) -> Reader:
    """The reader of a file's form, by its ending. Raises RequestError when there is none."""
    reader = READERS.get(suffix(path))
    packed = path.suffix.lower() == ".gz"
    if reader is None or (packed and suffix(path) in (".parquet", ".arrow")):
        shown = "".join(path.suffixes[-2:] if packed else path.suffixes[-1:]) or "a name without an ending"
        known = f"{', '.join(READERS)}; text forms also .gz"
        raise RequestError(f"dataset {str(path)!r}: cannot tell the form of {shown}. Known: {known}")
    return reader


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line that is not blank. Only a newline ends a line, never U+2028 or its like."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            # a line that begins with a letter or a bracket is not blank, and needs no decoding to tell
            if line[0] in PLAIN or _text(line, number).strip():
                yield number, line


def _text(line: bytes, number: int) -> str:
    return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")


def _jsonl(path: Path, name: str) -> Iterator[Raw]:
    return ((_parse, name, number, line) for number, line in _lines(path))


def _parse(name: str, number: int, line: bytes) -> Record:
    text, where = _text(line, number), f"{name}:{number}"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as err:
        return Record({}, where, f"not valid JSON: {err}")
    return _record(where, value, b"\\u" in line and SURROGATE.search(text) is not None)


def _record(where: str, value: Any, escaped: bool) -> Record:
    """A record of a parsed value. `escaped`: its text had surrogate escapes, so it may hold half a character."""
    if not isinstance(value, dict):
        return Record({}, where, f"a row must be an object with keys, not {kind(value)}")
    if escaped:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Record({}, where, "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return Record(value, where)


def _json(path: Path, name: str) -> Iterator[Raw]:
    """A list of rows, `{"data": [rows]}`, one row, or one object a line."""
    if _is_one_object_a_line(path):
        yield from _jsonl(path, name)
        return
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as err:
        raise RequestError(f"dataset {name!r}: not valid JSON at line {err.lineno}, column {err.colno}: {err.msg}") from None
    except RecursionError:
        raise RequestError(f"dataset {name!r}: not readable JSON: nested too deep") from None
    escaped = SURROGATE.search(text) is not None
    del text
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        yield _record, f"{name}: row {number}", row, escaped


def _is_one_object_a_line(path: Path) -> bool:
    """Whether the first line of a .json file is a whole object, and another line follows."""
    lines = _lines(path)
    first, second = next(lines, None), None
    if first and (text := _text(first[1], 1)).lstrip().startswith("{"):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return False
        second = next(lines, None)
    return second is not None


def _table(delimiter: str) -> Reader:
    """A reader of tables whose first line names the columns."""

    def read(path: Path, name: str) -> Iterator[Raw]:
        csv.field_size_limit(CELL_LIMIT)
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(rows, None)
            if header is None:
                return
            if len(set(header)) < len(header):
                raise RequestError(f"dataset {name!r}: two columns have the same name: {', '.join(header)}")
            while True:
                line = rows.line_num + 1  # a quoted cell may hold line breaks: a row stands where it begins
                try:
                    cells = next(rows, None)
                except csv.Error as err:
                    raise RequestError(f"dataset {name!r}: line {line} is not a valid row: {err}") from None
                if cells is None:
                    return
                if cells:
                    yield _cells, name, line, header, cells

    return read


def _cells(name: str, line: int, header: list[str], cells: list[str]) -> Record:
    where = f"{name}:{line}"
    if len(cells) != len(header):
        return Record({}, where, f"{len(cells)} cells; the header names {len(header)} columns")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    if "label" in row:  # tables hold text only, and a label is true, false, a number or a list
        label = row["label"].strip()
        with contextlib.suppress(ValueError):
            row["label"] = json.loads(label.lower() if label.lower() in ("true", "false") else label)
    return Record(row, where)


def _txt(path: Path, name: str) -> Iterator[Raw]:
    return ((_plain, name, number, line) for number, line in _lines(path))


def _plain(name: str, number: int, line: bytes) -> Record:
    return Record({"text": _text(line, number)}, f"{name}:{number}")


def _parquet(path: Path, name: str) -> Iterator[Raw]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from table_rows(file.iter_batches(batch_size=1024), name)
    except pyarrow.ArrowException as err:
        raise RequestError(f"dataset {name!r} is not a readable parquet file: {' '.join(str(err).split())}") from None


def _arrow(path: Path, name: str) -> Iterator[Raw]:
    """Arrow's stream form, which the datasets library writes, or its file form."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                file = pyarrow.ipc.open_file(source)
                yield from table_rows((file.get_batch(n) for n in range(file.num_record_batches)), name)
            else:
                source.seek(0)
                yield from table_rows(pyarrow.ipc.open_stream(source), name)
    except pyarrow.ArrowException as err:
        raise RequestError(f"dataset {name!r} is not a readable arrow file: {' '.join(str(err).split())}") from None


def table_rows(batches: Any, name: str) -> Iterator[Raw]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield _row, name, number, row


def _row(name: str, number: int, row: Any) -> Record:
    return Record(without_nulls(row), f"{name}: row {number}")


def without_nulls(value: Any) -> Any:
    """`value` without the keys whose value is null: columnar files write one for each key that any other row has."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


READERS: dict[str, Reader] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _table(","), ".tsv": _table("\t"), ".txt": _txt,
    ".parquet": _parquet, ".arrow": _arrow,
}  # fmt: skip
