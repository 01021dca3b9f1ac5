"""Texts: files that are text as they stand, one document each, or many with a separator between them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import long_text, readers
from ..long_text import LongText
from ..readers import Damaged
from . import opening
from .json_lines import too_long


@dataclass
class TextFile:
    """A file that is one document; the position after it is 1."""

    name: str
    limit: int
    encoding: str | None = None

    @property
    def bytes(self) -> int | None:
        return opening.size(self.name)

    def read(self, position: int | None = None) -> Iterator[tuple[list, int]]:
        if not position:
            yield [self._value()], 1

    def _value(self) -> Any:
        held = bytearray()
        with opening.open_bytes(self.name, self.encoding) as file:
            for block in opening.blocks(file):
                held += block
                if len(held) > self.limit:
                    return too_long(self.limit)
        return decoded(held)

    def row(self, position: int | None, index: int) -> int:
        return (position or 0) + index + 1

    def pieces(self, size: int) -> list["TextFile"]:
        return [self]


def decoded(utf8: bytearray) -> str | LongText | Damaged:
    if utf8.startswith(opening.BOM):
        del utf8[: len(opening.BOM)]
    try:
        return LongText(bytes(utf8)) if len(utf8) > long_text.LONG_BYTES else utf8.decode("utf-8")
    except UnicodeDecodeError as error:
        return Damaged(f"{error}, unless another encoding= is set")


@dataclass
class Separated:
    """The documents of a file between separators, those whose text starts in [start, end); line ends around a
    separator belong to it.

    A position is [byte, documents before it].
    """

    name: str
    separator: str
    limit: int
    encoding: str | None = None
    start: int = 0
    end: int | None = None

    def __post_init__(self):
        utf8 = re.escape(self.separator.encode("utf-8"))
        self._pattern = re.compile(utf8.replace(b"\\\n", b"\r?\n"))
        self._longest = 2 * len(self.separator.encode("utf-8"))

    @property
    def bytes(self) -> int | None:
        whole = self.end if self.end is not None else opening.size(self.name)
        return None if whole is None else whole - self.start

    def read(self, position: list | None = None) -> Iterator[tuple[list, list]]:
        start, documents = position or (self.start, 0)
        at, values, size = start, [], 0
        for value, length, at in self._documents(start, position is None and self.start > 0):
            documents += 1
            values.append(value)
            size += length
            if size >= readers.READ_BYTES:
                yield values, [at, documents]
                values, size = [], 0
            del value
        if values:
            yield values, [at, documents]

    def _documents(self, at: int, in_the_midst: bool) -> Iterator[tuple[Any, int, int]]:
        """Yield (document, bytes, the byte behind its separator) from a byte on, at which one begins.

        in_the_midst: The one that it stands in is another part's.
        """
        if self.end is not None and at >= self.end:
            return
        if in_the_midst:
            at = max(0, at - self._longest)
        held, searched, passing = bytearray(), 0, in_the_midst
        with opening.open_bytes(self.name, self.encoding) as file:
            if opening.is_plain(self.name, self.encoding):
                file.seek(at)
            else:
                opening.skip(file, at)
            for block in opening.blocks(file):
                held += block
                del block
                begun = 0
                for found in self._pattern.finditer(held, max(0, searched - self._longest)):
                    after = at + found.end()
                    if not passing:
                        yield self._document(held[begun : found.start()]), found.start() - begun, after
                    passing = in_the_midst and after < self.start
                    begun = found.end()
                    if self.end is not None and after >= self.end:
                        return
                del held[:begun]
                at, searched = at + begun, len(held)
                if len(held) > self.limit:
                    if not passing:
                        yield too_long(self.limit), len(held), at + len(held) - self._longest
                    passing = True
                    at += len(held) - self._longest
                    del held[: -self._longest]
                    searched = len(held)
        if not passing and held:
            yield self._document(held), len(held), at + len(held)

    def _document(self, utf8: bytearray) -> str | LongText | Damaged:
        return decoded(utf8.strip(b"\r\n")) if len(utf8) <= self.limit else too_long(self.limit)

    def row(self, position: list | None, index: int) -> int:
        before = 0
        if self.start:
            whole = Separated(self.name, self.separator, self.limit, self.encoding, 0, self.start)
            before = sum(1 for _ in whole._documents(0, False))
        return before + (position[1] if position else 0) + index + 1

    def pieces(self, size: int) -> list["Separated"]:
        text = self.separator
        overlaps = any(text.startswith(text[-length:]) for length in range(1, len(text)))  # where it begins is open
        if overlaps or not opening.is_plain(self.name, self.encoding):
            return [self]
        whole = opening.size(self.name)
        cuts = [(at, min(at + size, whole)) for at in range(0, whole, size)]
        return [Separated(self.name, text, self.limit, self.encoding, *cut) for cut in cuts]
