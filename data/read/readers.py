"""Readers: each gives a source's values a few megabytes at a time, with a position from which reading can go on.

A reader has `name`, `bytes` (what there is to read, for the bar; None if unknown), `read(position)`, which yields
(values, position after them), and `row(position, index)`, which numbers a value for a message, from 1. A position is a
JSON value; None is the start. Values are what the source holds: text, None, or anything else that stands there.
"""

import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from .long_text import LONG_BYTES, LongText

READ_BYTES = 4 * 2**20  # read at a time: enough text for all cores, little memory
ROWS_PER_READ = 256  # where a row's size is not known
JSON_LINES = (".jsonl", ".jsonl.gz")


class Damaged:
    """A row that cannot be read, in the place of its value; `reason` says why."""

    def __init__(self, reason: str):
        self.reason = reason


def parse_line(line: bytes, column: str) -> Any:
    """Return a JSON line's value in column, None where it has none, Damaged where it is no JSON object."""
    try:
        row = orjson.loads(line)
    except ValueError as error:
        try:
            row = json.loads(line)  # NaN, and lone surrogates, which are judged as text
        except ValueError:
            return Damaged(str(error))
    return row.get(column) if isinstance(row, dict) else Damaged(f"it holds a {type(row).__name__}, not an object")


def parse_long_line(line: bytes, column: str) -> Any:
    """Return a long JSON line's value, a text as LongText: Arrow unescapes it without a str."""
    import pyarrow
    import pyarrow.json

    options = pyarrow.json.ParseOptions(
        explicit_schema=pyarrow.schema([(column, pyarrow.large_string())]), unexpected_field_behavior="ignore"
    )
    try:
        reading = pyarrow.json.ReadOptions(use_threads=False, block_size=len(line) + 1)
        (value,) = pyarrow.json.read_json(pyarrow.BufferReader(line), reading, options).column(0).chunk(0)
    except (pyarrow.ArrowInvalid, ValueError):
        return parse_line(line, column)  # says what is wrong with it
    if not value.is_valid or len(value.as_buffer()) <= LONG_BYTES:
        return value.as_py()
    del line
    return LongText(value.as_buffer().to_pybytes())  # a copy: Arrow's own buffers hold twice as much


def as_text(value) -> Any:
    """Return an Arrow scalar as Python has it, a long text as LongText."""
    import pyarrow.types as types

    if (types.is_string(value.type) or types.is_large_string(value.type)) and value.is_valid:
        buffer = value.as_buffer()
        return LongText(buffer) if len(buffer) > LONG_BYTES else value.as_py()
    return value.as_py()


def parse_lines(lines: list[bytes], column: str) -> list:
    """Return the values of a column of JSON lines; blank lines are no rows."""
    if max(map(len, lines), default=0) > LONG_BYTES:
        values = []
        while lines:  # emptied, so that no line stays beside its text
            long = len(lines[0]) > LONG_BYTES
            if not lines[0].isspace():
                values.append((parse_long_line if long else parse_line)(lines.pop(0), column))
            else:
                del lines[0]
        return values
    try:
        return [row.get(column) for row in map(orjson.loads, lines)]
    except (ValueError, AttributeError):
        return [parse_line(line, column) for line in lines if line.strip()]


@dataclass
class JsonLines:
    """The lines of a .jsonl file that start in [start, end), or all of a .jsonl.gz; a position is a byte or a line."""

    name: str
    column: str
    start: int = 0
    end: int | None = None

    @property
    def gzipped(self) -> bool:
        return self.name.lower().endswith(".gz")

    @property
    def bytes(self) -> int:
        return (os.path.getsize(self.name) if self.end is None else self.end) - self.start

    def read(self, position: int | None = None) -> Iterator[tuple[list, int]]:
        if self.gzipped:
            yield from self._read_gzip(position or 0)
            return
        end = os.path.getsize(self.name) if self.end is None else self.end
        with open(self.name, "rb") as file:
            if position is None and self.start:
                file.seek(self.start - 1)
                file.readline()  # the line that holds the byte before start is the part's before this one
            else:
                file.seek(position or 0)
            while (at := file.tell()) < end:
                hint = (
                    min(READ_BYTES, end - at) - 1
                )  # readlines stops once it has read more than the hint; 0 is no bound
                lines = file.readlines(hint) if hint else [file.readline()]
                values = parse_lines(lines, self.column)
                del lines  # one may be of hundreds of megabytes
                yield values, file.tell()

    def _read_gzip(self, line: int) -> Iterator[tuple[list, int]]:
        with gzip.open(self.name, "rb") as file:
            for _ in range(line):
                file.readline()
            while lines := file.readlines(READ_BYTES):
                line += len(lines)
                yield parse_lines(lines, self.column), line

    def row(self, position: int | None, index: int) -> int:
        rows, before = 0, (position or 0) if self.gzipped else (self.start if position is None else position)
        with (gzip.open if self.gzipped else open)(self.name, "rb") as file:
            at = 0
            for line in file:
                if at >= before:
                    break
                rows += bool(line.strip())
                at += 1 if self.gzipped else len(line)
        return rows + index + 1

    def columns(self) -> list[str]:
        """Return the columns of the first rows; what cannot be parsed among them is a ValueError."""
        found = {}
        with (gzip.open if self.gzipped else open)(self.name, "rb") as file:
            for line in file.readlines(2**20):
                if line.strip() and len(line) <= LONG_BYTES:
                    row = json.loads(line) if b"NaN" in line else orjson.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"a line holds a {type(row).__name__}, not an object")
                    found |= dict.fromkeys(row)
        return list(found)

    def pieces(self, size: int) -> list["JsonLines"]:
        if self.gzipped:
            return [self]
        whole = os.path.getsize(self.name)
        return [JsonLines(self.name, self.column, at, min(at + size, whole)) for at in range(0, whole, size)]


@dataclass
class Parquet:
    """Row groups [first, last) of a parquet file; a position is [group, rows of it done]."""

    name: str
    column: str
    first: int = 0
    last: int | None = None

    def _open(self):
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self.name)

    def _sizes(self, file) -> list[int]:
        """Return the uncompressed bytes of the column in each row group."""
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        return [
            sum(
                column.total_uncompressed_size
                for column in map(group.column, range(group.num_columns))
                if column.path_in_schema.split(".")[0] == self.column
            )
            for group in groups
        ]

    @property
    def bytes(self) -> int:
        with self._open() as file:
            return sum(self._sizes(file)[self.first : self.last])

    def read(self, position: list | None = None) -> Iterator[tuple[list, list]]:
        import pyarrow

        columns = self._columns(*(position or (self.first, 0)))
        while (found := next(columns, None)) is not None:
            column, position = found
            if column.nbytes > LONG_BYTES:
                columns.close()  # Arrow's reader holds twice a page's size: not while a long text is worked on
                pyarrow.default_memory_pool().release_unused()
                columns = self._columns(*position)
                yield list(map(as_text, column)), position
            else:
                yield column.to_pylist(), position
            del found, column  # a text of hundreds of megabytes must be gone before the next one is read

    def _columns(self, group: int, done: int) -> Iterator[tuple[Any, list]]:
        with self._open() as file:
            sizes = self._sizes(file)
            last = file.num_row_groups if self.last is None else self.last
            for number in range(group, last):
                rows = max(1, file.metadata.row_group(number).num_rows)
                batch_size = min(8192, max(1, READ_BYTES * rows // max(1, sizes[number])))
                at = 0
                for batch in file.iter_batches(batch_size, row_groups=[number], columns=[self.column]):
                    at += len(batch)
                    if at > done:
                        yield batch.column(0).slice(max(0, done - at + len(batch))), [number, at]
                done = 0

    def row(self, position: list | None, index: int) -> int:
        group, done = position or (self.first, 0)
        with self._open() as file:
            before = sum(file.metadata.row_group(number).num_rows for number in range(group))
        return before + done + index + 1

    def columns(self) -> list[str]:
        with self._open() as file:
            return file.schema_arrow.names

    def pieces(self, size: int) -> list["Parquet"]:
        """Cut at row groups, a piece at least `size` bytes of text."""
        with self._open() as file:
            sizes = self._sizes(file)
        found, first, held = [], 0, 0
        for number, bytes_ in enumerate(sizes):
            held += bytes_
            if held >= size or number == len(sizes) - 1:
                found.append(Parquet(self.name, self.column, first, number + 1))
                first, held = number + 1, 0
        return found


@dataclass
class Rows:
    """Values of anything that iterates: a list, or what `open()` returns; a position is the number of values done."""

    name: str
    open: Any
    bytes: int | None = None
    skip: Any = None  # skip(n): an iterator past the first n values, where that is faster than reading them

    def read(self, position: int | None = None) -> Iterator[tuple[list, int]]:
        done = position or 0
        if self.skip is not None and done:
            values = iter(self.skip(done))
        else:
            values = iter(self.open())
            for _ in range(done):
                next(values, None)
        batch, size = [], 0
        for value in values:
            batch.append(value)
            size += len(value) if isinstance(value, str) else 0
            if size >= READ_BYTES or len(batch) >= 8192:
                done += len(batch)
                yield batch, done
                batch, size = [], 0
        if batch:
            yield batch, done + len(batch)

    def row(self, position: int | None, index: int) -> int:
        return (position or 0) + index + 1

    def pieces(self, size: int) -> list["Rows"]:
        return [self]


@dataclass
class Stream:
    """A `datasets.IterableDataset`, read as it comes; a position is [rows done, the dataset's own state]."""

    name: str
    dataset: Any
    column: str
    bytes: int | None = field(default=None, init=False)

    def read(self, position: list | None = None) -> Iterator[tuple[list, list]]:
        done, state = position or (0, None)
        dataset = self.dataset.select_columns([self.column])
        if state is not None:
            dataset.load_state_dict(state)
        for rows in dataset.iter(batch_size=ROWS_PER_READ):
            values = rows[self.column]
            done += len(values)
            yield list(values), [done, dataset.state_dict()]

    def row(self, position: list | None, index: int) -> int:
        return (position[0] if position else 0) + index + 1

    def pieces(self, size: int) -> list["Stream"]:
        """One a file of the dataset (at most 1,024, then several files each)."""
        count = min(self.dataset.num_shards, 1024)
        if count < 2:
            return [self]
        return [Stream(self.name, self.dataset.shard(count, number), self.column) for number in range(count)]
