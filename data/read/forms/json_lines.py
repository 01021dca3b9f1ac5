"""JSON: a row a line, or one array or object; told apart by what stands there, not by the file's name."""

import codecs
import functools
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from .. import long_text, readers
from ..long_text import LongText
from ..readers import MISSING, Damaged
from . import opening
from .columns import Columns

LOOKED_AT = 2**20  # bytes at a file's start, for its columns
_JSON = json.JSONDecoder()
_SPACE = re.compile(r"[\s,]*")


def too_long(limit: int) -> Damaged:
    return Damaged(f"it is longer than max_document_bytes = {limit:,}")


def parse_line(line: bytes, columns: Columns) -> Any:
    """Return a JSON line's text; see `Columns.value`. Damaged where it is no JSON object."""
    try:
        row = orjson.loads(line)
    except ValueError as error:
        try:
            row = json.loads(line)  # NaN, and lone surrogates, which are judged as text
        except ValueError as also:
            return Damaged(f"{error}{_remedy(also)}")
    return columns.value(row)


def _remedy(error: ValueError) -> str:
    return ", unless another encoding= is set" if isinstance(error, UnicodeDecodeError) else ""


def parse_long_line(line: bytes | bytearray, columns: Columns) -> Any:
    """Return a long JSON line's value, a text as LongText: Arrow unescapes it without a str."""
    import pyarrow
    import pyarrow.json

    if columns.alone is None:
        return parse_line(line, columns)
    options = pyarrow.json.ParseOptions(
        explicit_schema=pyarrow.schema([(columns.alone, pyarrow.large_string())]), unexpected_field_behavior="ignore"
    )
    try:
        reading = pyarrow.json.ReadOptions(use_threads=False, block_size=len(line) + 1)
        (value,) = pyarrow.json.read_json(pyarrow.BufferReader(line), reading, options).column(0).chunk(0)
    except (pyarrow.ArrowInvalid, ValueError):
        return parse_line(line, columns)  # says what is wrong with it
    if not value.is_valid or len(value.as_buffer()) <= long_text.LONG_BYTES:
        return value.as_py() if value.is_valid else parse_line(line, columns)
    del line
    return LongText(value.as_buffer().to_pybytes())  # a copy: Arrow's own buffers hold twice as much


def parse_lines(lines: list[bytes], columns: Columns, limit: int) -> list:
    """Return the texts of JSON lines; blank lines are no rows, those of more than limit bytes are Damaged."""
    if max(map(len, lines), default=0) > limit:
        parts = [[too_long(limit)] if len(line) > limit else parse_lines([line], columns, limit) for line in lines]
        return [value for part in parts for value in part]
    if (column := columns.alone) is not None:
        try:
            return [row.get(column, MISSING) for row in map(orjson.loads, lines)]
        except (ValueError, AttributeError):
            pass
    return [parse_line(line, columns) for line in lines if line and not line.isspace()]


@dataclass
class JsonLines:
    """The lines of a file that start in [start, end), bytes of its text.

    A position is [byte, rows before it, whether it stands within a line that is passed over].
    """

    name: str
    columns: Columns
    limit: int
    encoding: str | None = None
    start: int = 0
    end: int | None = None
    rows_before: int | None = None

    @property
    def bytes(self) -> int | None:
        whole = self.end if self.end is not None else opening.size(self.name)
        return None if whole is None else whole - self.start

    def _open(self, at: int):
        file = opening.open_bytes(self.name, self.encoding)
        if opening.is_plain(self.name, self.encoding):
            file.seek(at)
        else:
            opening.skip(file, at)
        return file

    def read(self, position: list | None = None) -> Iterator[tuple[list, list]]:
        fresh = position is None
        at, rows, passing = position or (self.start, 0, False)
        if fresh and self.start:
            at, passing = at - 1, True  # the line that holds the byte before start is the part's before this one
        elif self.end is not None and at >= self.end:
            return
        with self._open(at) as file:
            for lines, at, passing in _lines(file, at, passing, self.end, self.limit):  # noqa: B020
                if isinstance(lines, bytearray):  # one long line
                    values = [] if lines.isspace() else [parse_long_line(lines, self.columns)]
                elif isinstance(lines, Damaged):
                    values = [lines]
                else:
                    values = parse_lines(lines, self.columns, self.limit)
                rows += len(values)
                del lines
                yield values, [at, rows, passing]
                del values  # one may be of hundreds of megabytes

    def row(self, position: list | None, index: int) -> int:
        if self.rows_before is None:
            self.rows_before = self._count_before() if self.start else 0
        return self.rows_before + (position[1] if position else 0) + index + 1

    def _count_before(self) -> int:
        """Return the rows of the parts before this one: the lines that start before it."""
        with self._open(0) as file:
            found = _lines(file, 0, False, self.start, self.limit)
            return sum(
                1 if isinstance(lines, bytearray | Damaged) else sum(bool(line.strip()) for line in lines)
                for lines, _, _ in found
            )

    def pieces(self, size: int) -> list["JsonLines"]:
        if not opening.is_plain(self.name, self.encoding):
            return [self]
        whole = opening.size(self.name)
        cuts = [(at, min(at + size, whole)) for at in range(0, whole, size)]
        return [JsonLines(self.name, self.columns, self.limit, self.encoding, *cut) for cut in cuts]


def _lines(file, at: int, passing: bool, end: int | None, limit: int) -> Iterator[tuple]:
    """Yield (whole lines, or one long line as a bytearray, or Damaged; the byte after; whether a line is passed over).

    What is given out together depends on `at` alone: a batch is the same when it is read again.

    at: The byte of the text at which file stands.
    """
    held, first = b"", at == 0  # held: what is read of the lines behind `at`, less than READ_BYTES
    while end is None or at < end or passing:
        block, failed, ended = opening.take(file, readers.READ_BYTES - len(held))
        if first and block.startswith(opening.BOM):
            at, block = len(opening.BOM), block[len(opening.BOM) :]
        first, block = False, held + block
        last = block.rfind(b"\n") + 1
        if passing:
            cut = block.find(b"\n") + 1
            at, passing, held = at + (cut or len(block)), not cut, block[cut:] if cut else b""
        elif last:
            stop = block.find(b"\n", end - at - 1) + 1 if end is not None and at + last >= end else last
            at, held = at + stop, block[stop:]
            yield block[: stop - 1].split(b"\n"), at, False
        elif block and not failed:
            line, cut = bytearray(block), 0
            del block
            while not (cut or failed or ended) and len(line) <= limit:
                block, failed, ended = opening.take(file, readers.READ_BYTES)
                cut = block.find(b"\n") + 1
                line += block[: cut or None]
            held = block[cut:] if cut else b""
            if len(line) > limit:
                at, passing = at + len(line), not cut
                yield too_long(limit), at, passing
            elif not failed:
                at += len(line)
                yield (line if len(line) > long_text.LONG_BYTES else [bytes(line)]), at, False
            del line
        block = None
        if failed:
            raise failed
        if ended and not held:
            return


@dataclass
class JsonValues:
    """The objects of one array, or of objects one after another over several lines; a position counts them."""

    name: str
    columns: Columns
    limit: int
    encoding: str | None = None

    @property
    def bytes(self) -> int | None:
        return opening.size(self.name)

    def read(self, position: int | None = None) -> Iterator[tuple[list, int]]:
        done, values, size = 0, [], 0
        for row, length in self._objects():
            done += 1
            if done > (position or 0):
                values.append(row if isinstance(row, Damaged) else self.columns.value(row))
                size += length
            if size >= readers.READ_BYTES:
                yield values, done
                values, size = [], 0
        if values:
            yield values, done

    def _objects(self) -> Iterator[tuple[Any, int]]:
        """Yield (object, its length); Raises ValueError where what stands there is no JSON, or is too long."""
        decode, text, at, array = codecs.getincrementaldecoder("utf-8")().decode, "", 0, None
        with opening.open_bytes(self.name, self.encoding) as file:
            found = opening.blocks(file)
            while True:
                at = _SPACE.match(text, at).end()
                if array is None and text[at : at + 1] == "[":
                    array, at = True, at + 1
                    continue
                array = array if at == len(text) else bool(array)
                if array and text[at : at + 1] == "]":
                    array, at = False, at + 1
                    continue
                try:
                    row, end = _JSON.raw_decode(text, at)
                except json.JSONDecodeError as error:
                    rest = len(text) - at
                    if "Unterminated string" not in error.msg and error.pos < len(text) - 10:
                        raise ValueError(f"{error.msg} {error.pos - at:,} characters behind it") from None
                    if rest > self.limit:
                        raise ValueError(f"an object is longer than max_document_bytes = {self.limit:,}") from None
                    more = list(itertools.islice(found, 1 + rest // readers.READ_BYTES))
                    if more:
                        text, at = text[at:] + decode(b"".join(more)).removeprefix("\ufeff"), 0
                    elif rest:
                        raise ValueError(f"it is cut off: {error.msg}") from None
                    else:
                        break
                else:
                    yield row, end - at
                    at = end
        if array:
            raise ValueError("it is cut off: the array does not end")

    def row(self, position: int | None, index: int) -> int:
        return (position or 0) + index + 1

    def pieces(self, size: int) -> list["JsonValues"]:
        return [self]


def open_json(name: str, columns: Columns, limit: int, encoding: str | None) -> tuple[Any, list]:
    """Return a file's reader, and what stands in its first megabyte: rows, or Damaged."""
    held, failed = opening.beginning(name, encoding, LOOKED_AT)
    lines = held.split(b"\n")
    first = next((line.strip() for line in lines if line.strip()), b"")
    if first[:1] == b"[" or (first[:1] == b"{" and first[-1:] in b"{[,:" and len(lines) > 1):
        reader = JsonValues(name, columns, limit, encoding)
        rows = []
        try:
            for row, _ in itertools.islice(JsonValues(name, columns, limit, encoding)._objects(), 20):
                rows.append(row)
        except (ValueError, EOFError) as error:
            rows.append(Damaged(str(error)))
        return reader, rows
    if len(held) >= LOOKED_AT - 3 or failed:
        lines.pop()  # not whole
    rows = [_row(line) for line in lines if line.strip()]
    return JsonLines(name, columns, limit, encoding), rows + ([Damaged(str(failed))] if failed else [])


@dataclass
class RemoteJson:
    """A file elsewhere, of which nothing is fetched before it is read; a position is its reader's."""

    name: str
    columns: Columns
    limit: int
    encoding: str | None = None

    @functools.cached_property
    def _reader(self) -> JsonLines | JsonValues:
        return open_json(self.name, self.columns, self.limit, self.encoding)[0]

    @property
    def bytes(self) -> int | None:
        return opening.size(self.name)

    def read(self, position=None) -> Iterator[tuple[list, Any]]:
        return self._reader.read(position)

    def row(self, position, index: int) -> int:
        return self._reader.row(position, index)

    def pieces(self, size: int) -> list["RemoteJson"]:
        return [self]


def _row(line: bytes) -> Any:
    try:
        row = orjson.loads(line)
    except ValueError as error:
        try:
            row = json.loads(line)
        except ValueError as also:
            return Damaged(f"{error}{_remedy(also)}")
    return row if isinstance(row, dict) else Damaged(f"it holds a {type(row).__name__}, not an object")
