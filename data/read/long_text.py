"""A text of tens of megabytes: kept as UTF-8, given out in pieces, so that memory stays bounded."""

import codecs
from collections.abc import Iterator

LONG_BYTES = 2**25  # longer texts are kept so: Python takes 4 bytes a character of a text that holds one emoji
PIECE_BYTES = 2**22


class LongText:
    """A text as UTF-8. Its length is in bytes; what reads it takes `pieces()`, or `encode()` without a copy.

    Raises UnicodeDecodeError where it is not UTF-8.
    """

    def __init__(self, utf8):
        """utf8: Anything with a buffer, which is kept alive and not copied."""
        self.utf8 = memoryview(utf8)
        blank = [not piece or piece.isspace() for piece in self.pieces()]  # all of them: each must decode
        self.is_blank = all(blank)

    def __len__(self) -> int:
        return len(self.utf8)

    def __getitem__(self, part: slice) -> str:
        """Return the first characters, as in text[:n]."""
        return str(self.utf8[: 4 * part.stop], "utf-8", "ignore")[: part.stop]

    def __str__(self) -> str:
        return str(self.utf8, "utf-8")

    def encode(self, encoding: str = "utf-8") -> memoryview:
        return self.utf8

    def pieces(self) -> Iterator[str]:
        """Yield its characters, about PIECE_BYTES of them at a time."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        for at in range(0, len(self.utf8), PIECE_BYTES):
            yield decoder.decode(self.utf8[at : at + PIECE_BYTES], at + PIECE_BYTES >= len(self.utf8))
