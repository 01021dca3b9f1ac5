"""Tables: parquet, Arrow and CSV, a row a document."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import long_text, readers
from ..long_text import LongText
from ..readers import Damaged
from . import opening
from .columns import Columns


def as_text(value) -> Any:
    """Return an Arrow scalar as Python has it, a long text as LongText."""
    import pyarrow.types as types

    if (types.is_string(value.type) or types.is_large_string(value.type)) and value.is_valid:
        buffer = value.as_buffer()
        return LongText(buffer) if len(buffer) > long_text.LONG_BYTES else value.as_py()
    return value.as_py()


def texts_of(batch, columns: Columns) -> list:
    """Return the texts of a record batch's rows."""
    if columns.alone is not None:
        column = batch.column(columns.alone)
        return list(map(as_text, column)) if column.nbytes > long_text.LONG_BYTES else column.to_pylist()
    return list(map(columns.value, batch.to_pylist()))


@dataclass
class Parquet:
    """Row groups [first, last) of a parquet file; a position is [group, rows of it done]."""

    name: str
    columns: Columns
    first: int = 0
    last: int | None = None

    def _open(self, whole: bool = True):
        import pyarrow.parquet

        if opening.is_remote(self.name):
            return pyarrow.parquet.ParquetFile(opening.open_stored(self.name, whole))
        return pyarrow.parquet.ParquetFile(self.name)

    def _sizes(self, file) -> list[int]:
        """Return the uncompressed bytes of the columns in each row group."""
        names = {name.split(".")[0] for name in self.columns.names} | set(self.columns.names)
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        return [
            sum(
                column.total_uncompressed_size
                for column in map(group.column, range(group.num_columns))
                if column.path_in_schema.split(".")[0] in names
            )
            for group in groups
        ]

    @property
    def bytes(self) -> int | None:
        if opening.is_remote(self.name):
            return opening.size(self.name)  # what it holds shows only where it is here
        with self._open() as file:
            return sum(self._sizes(file)[self.first : self.last])

    def read(self, position: list | None = None) -> Iterator[tuple[list, list]]:
        import pyarrow

        batches = self._batches(*(position or (self.first, 0)))
        while (found := next(batches, None)) is not None:
            batch, position = found
            if batch.nbytes > long_text.LONG_BYTES:
                batches.close()  # Arrow's reader holds twice a page's size: not while a long text is worked on
                pyarrow.default_memory_pool().release_unused()
                batches = self._batches(*position)
            yield texts_of(batch, self.columns), position
            del found, batch  # a text of hundreds of megabytes must be gone before the next one is read

    def _batches(self, group: int, done: int) -> Iterator[tuple[Any, list]]:
        with self._open() as file:
            sizes, names = self._sizes(file), self.columns.of(file.schema_arrow.names)
            last = file.num_row_groups if self.last is None else self.last
            for number in range(group, last):
                rows = max(1, file.metadata.row_group(number).num_rows)
                batch_size = min(8192, max(1, readers.READ_BYTES * rows // max(1, sizes[number])))
                at = 0
                for batch in file.iter_batches(batch_size, row_groups=[number], columns=names):
                    at += len(batch)
                    if at > done:
                        yield batch.slice(max(0, done - at + len(batch))), [number, at]
                done = 0

    def row(self, position: list | None, index: int) -> int:
        group, done = position or (self.first, 0)
        with self._open() as file:
            before = sum(file.metadata.row_group(number).num_rows for number in range(group))
        return before + done + index + 1

    def column_names(self) -> list[str]:
        with self._open(whole=False) as file:
            return file.schema_arrow.names

    def pieces(self, size: int) -> list["Parquet"]:
        """Cut at row groups, a piece at least `size` bytes of text."""
        if opening.is_remote(self.name):
            return [self]
        with self._open() as file:
            sizes = self._sizes(file)
        found, first, held = [], 0, 0
        for number, bytes_ in enumerate(sizes):
            held += bytes_
            if held >= size or number == len(sizes) - 1:
                found.append(Parquet(self.name, self.columns, first, number + 1))
                first, held = number + 1, 0
        return found


@dataclass
class Arrow:
    """An Arrow file or stream, as `datasets` keeps them; a position is [batch, rows of it done, rows before it]."""

    name: str
    columns: Columns

    def _open(self, whole: bool = True):
        import pyarrow as pa

        source = opening.open_stored(self.name, whole) if opening.is_remote(self.name) else pa.memory_map(self.name)
        begins = source.read(6)
        source.seek(0)
        if begins == b"ARROW1":
            file = pa.ipc.open_file(source)
            return file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
        stream = pa.ipc.open_stream(source)
        return stream.schema, stream

    @property
    def bytes(self) -> int | None:
        return opening.size(self.name)

    def read(self, position: list | None = None) -> Iterator[tuple[list, list]]:
        first, done, before = position or (0, 0, 0)
        schema, batches = self._open()
        names = self.columns.of(schema.names)
        for number, batch in enumerate(batches):
            if number < first:
                continue
            taken = batch.select(names)
            rows = max(1, readers.READ_BYTES * max(1, len(batch)) // max(1, taken.nbytes))
            for at in range(done, len(batch), rows):
                after = min(at + rows, len(batch))
                whole = after == len(batch)
                yield (
                    texts_of(taken.slice(at, rows), self.columns),
                    [number + 1, 0, before + len(batch)] if whole else [number, after, before],
                )
            before, done = before + len(batch), 0

    def row(self, position: list | None, index: int) -> int:
        _, done, before = position or (0, 0, 0)
        return before + done + index + 1

    def column_names(self) -> list[str]:
        return self._open(whole=False)[0].names

    def pieces(self, size: int) -> list["Arrow"]:
        return [self]


@dataclass
class Csv:
    """The rows of a CSV or TSV file with a header; every field is text. A position counts rows."""

    name: str
    columns: Columns
    limit: int
    encoding: str | None = None

    def _rows(self, whole: bool = True) -> Iterator[list[str] | Damaged]:
        tabs = opening.extension(self.name) == ".tsv"
        csv.field_size_limit(self.limit)
        file = opening.open_bytes(self.name, self.encoding, whole)
        with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
            rows = csv.reader(self._lines(text), delimiter="\t" if tabs else ",", strict=True)
            while True:
                try:
                    yield next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Damaged(str(error))

    def _lines(self, text) -> Iterator[str]:
        while line := text.readline(self.limit):
            if len(line) >= self.limit:
                raise ValueError(f"a line is longer than max_document_bytes = {self.limit:,}")
            yield line

    @property
    def bytes(self) -> int | None:
        return opening.size(self.name)

    def read(self, position: int | None = None) -> Iterator[tuple[list, int]]:
        rows = self._rows()
        header = next(rows, [])
        done, values, size = 0, [], 0
        for row in rows:
            if not row and not isinstance(row, Damaged):
                continue  # a blank line
            done += 1
            if done > (position or 0):
                values.append(self._value(header, row))
                size += len(values[-1]) if isinstance(values[-1], str) else 0
            if size >= readers.READ_BYTES or len(values) >= 8192:
                yield values, done
                values, size = [], 0
        if values:
            yield values, done

    def _value(self, header: list[str], row: list[str] | Damaged) -> Any:
        if isinstance(row, Damaged):
            return row
        if len(row) != len(header):
            return Damaged(f"it has {len(row)} fields, the header {len(header)}")
        return undecodable(self.columns.value(dict(zip(header, row, strict=True))))

    def row(self, position: int | None, index: int) -> int:
        return (position or 0) + index + 1

    def column_names(self) -> list[str]:
        header = next(self._rows(whole=False), [])
        if isinstance(header, Damaged):
            raise ValueError(header.reason)
        return header

    def pieces(self, size: int) -> list["Csv"]:
        return [self]


def undecodable(text: Any) -> Any:
    """Return Damaged in the place of a text with bytes that are not UTF-8."""
    if isinstance(text, str) and not text.isascii():
        at = next((at for at, character in enumerate(text) if "\udc80" <= character <= "\udcff"), None)
        if at is not None:
            return Damaged(f"its byte {ord(text[at]) - 0xDC00:#04x} at character {at} is not UTF-8: set its encoding=")
    return text
