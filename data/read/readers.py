"""Readers: each gives a source's values a few megabytes at a time, with a position from which reading can go on.

A reader has `name`, `bytes` (what there is to read, for the bar; None if unknown), `read(position)`, which yields
(values, position after them), `row(position, index)`, which numbers a value for a message, from 1, and `pieces(size)`,
readers of its parts that can be read alone. A position is a JSON value; None is the start. Values are what the source
holds: text, None, MISSING, Damaged, or anything else that stands there. `forms/` has one for each kind of file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

READ_BYTES = 4 * 2**20  # read at a time: enough text for all cores, little memory
ROWS_PER_READ = 256  # where a row's size is not known
MISSING = type("Missing", (), {"__repr__": lambda self: "MISSING"})()  # of a row that has not the column at all


class Damaged:
    """A row that cannot be read, in the place of its value; `reason` says why."""

    def __init__(self, reason: str):
        self.reason = reason


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
    """A `datasets.IterableDataset`, read as it comes; a position is [rows done, the dataset's own state].

    columns: see `forms.columns.Columns`.
    """

    name: str
    dataset: Any
    columns: Any
    bytes: int | None = field(default=None, init=False)

    def read(self, position: list | None = None) -> Iterator[tuple[list, list]]:
        done, state = position or (0, None)
        names = self.columns.of(self.dataset.column_names or self.columns.names)
        dataset = self.dataset.select_columns(names)
        if state is not None:
            dataset.load_state_dict(state)
        for rows in dataset.iter(batch_size=ROWS_PER_READ):
            values = [self.columns.value(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
            done += len(values)
            yield values, [done, dataset.state_dict()]

    def row(self, position: list | None, index: int) -> int:
        return (position[0] if position else 0) + index + 1

    def pieces(self, size: int) -> list["Stream"]:
        """One a file of the dataset (at most 1,024, then several files each)."""
        count = min(self.dataset.num_shards, 1024)
        if count < 2:
            return [self]
        return [Stream(self.name, self.dataset.shard(count, number), self.columns) for number in range(count)]
