"""Documents: the texts of readers, judged row by row, in batches with a position from which reading can go on."""

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from smolpretrain.core.text import reason

from . import readers
from .forms import opening
from .forms.columns import join
from .long_text import LongText
from .readers import MISSING, Damaged

BAD_ROWS = ("error", "skip")
PART_BYTES = 64 * 2**20  # of text in one part, so that a few hundred MB already occupy several processes
PICKS = 4096  # of a mixture's sources for which chance is drawn at once
END = object()  # the position after the rest of a file that is damaged
NO_COLUMN, BLANK = "has not the column", "is null or blank"
PASSED = (NO_COLUMN, BLANK)  # rows that are passed over whatever bad_rows says
NOISE_TOKENS = 2048  # how far chance may carry a source's share from its weight
MOST_PASSED = 10_000  # rows of one batch that are named in the set
MOST_PARTS = 1024  # a set's parts grow beyond this, so that a manifest stays short


@dataclass
class Batch:
    """Texts, none blank, all UTF-8; `position` is where the part's reading goes on after them."""

    texts: list[str | LongText]
    position: list


@dataclass
class Tally:
    """What was read and passed over.

    Attributes:
        skipped: Rows without text: null, blank, or without the column at all; `missing` of them are of the last kind.
        bad: Rows that are no text, and the rest of each damaged file as one.
        first_bad: The first of them in a sentence.
        rows: All rows.
        eos_appended: Documents of ready ids that did not end in EOS.
        passed: Not part of its state: what was passed over since it was last emptied, at most MOST_PASSED of them.
    """

    skipped: int = 0
    bad: int = 0
    first_bad: str | None = None
    missing: int = 0
    rows: int = 0
    eos_appended: int = 0

    def __post_init__(self):
        self.passed = []

    def add(self, other: "Tally") -> None:
        """Take the counts of another one."""
        self.skipped, self.bad = self.skipped + other.skipped, self.bad + other.bad
        self.missing, self.rows = self.missing + other.missing, self.rows + other.rows
        self.eos_appended += other.eos_appended
        self.first_bad = self.first_bad or other.first_bad

    def take_passed(self) -> list[dict]:
        passed, self.passed = self.passed, []
        return passed

    @property
    def words(self) -> str:
        """Say what was passed over, "" where nothing was."""
        blank = self.skipped - self.missing
        parts = [f"{self.missing:,} without the column"] if self.missing else []
        parts += [f"{blank:,} null or blank"] if blank else []
        parts += [f"{self.bad:,} bad ({self.first_bad})"] if self.bad else []
        return f"{self.skipped + self.bad:,} of {self.rows:,} rows have no text: {', '.join(parts)}" if parts else ""


@dataclass
class Documents:
    """The documents of readers, one after another.

    Attributes:
        readers: See `readers`.
        bad_rows: "error" stops at a row that is no text (a number, bytes, a lone surrogate, no JSON), naming it;
            "skip" counts it, and where a file is damaged goes on with the next.
        said: Sentences on what was taken and what was not.
        tally: What was passed over so far, by this object's own iteration.
        documents: Texts given out so far, by this object's own iteration, which gives a long one in pieces.

    Raises ValueError while iterating: a bad row, a damaged file; names the source and the row, counted from 1.
    """

    readers: list
    bad_rows: str = "error"
    said: list[str] = field(default_factory=list)
    documents: int = field(default=0, init=False)
    tally: Tally = field(default_factory=Tally, init=False)

    def __post_init__(self):
        if self.bad_rows not in BAD_ROWS:
            raise ValueError(f"bad_rows must be one of {', '.join(BAD_ROWS)}, got {self.bad_rows!r}.")
        self._iterator = None

    @property
    def skipped(self) -> int:
        return self.tally.skipped

    @property
    def bytes(self) -> int | None:
        """What there is to read; None where a source does not say."""
        sizes = [reader.bytes for reader in self.readers]
        return None if None in sizes else sum(sizes)

    def __iter__(self) -> "Documents":
        return self

    def __next__(self) -> str:
        if self._iterator is None:
            self._iterator = (
                piece
                for batch in self.batches(None, self.tally)
                for text in batch.texts
                for piece in ([text] if isinstance(text, str) else text.pieces())
            )
        text = next(self._iterator)
        self.documents += 1
        return text

    def parts(self) -> list["Documents"]:
        """Cut into parts that can be read alone: the same ones on every machine, and this whole in their order."""
        size = max(PART_BYTES, (self.bytes or 0) // MOST_PARTS)
        parts, held = [[]], 0
        for piece in (piece for reader in self.readers for piece in reader.pieces(size)):
            if parts[-1] and (piece.bytes is None or held + piece.bytes > size):
                parts.append([])
                held = 0
            parts[-1].append(piece)
            held += piece.bytes or 0
        return [self.over(part) for part in parts]

    def over(self, readers: list) -> "Documents":
        """Return the documents of these readers, judged alike."""
        made = copy.copy(self)
        made.readers, made.documents, made.tally, made._iterator = readers, 0, Tally(), None
        return made

    def batches(self, position: list | None, tally: Tally) -> Iterator[Batch]:
        """Yield batches of about readers.READ_BYTES characters, from a batch's position on (None: the start)."""
        first, within = position or (0, None)
        texts, size, here = [], 0, position
        for number in range(first, len(self.readers)):
            reader = self.readers[number]
            for values, before, after in self._readable(reader, within):
                found = self._judge(reader, values, before, tally)
                texts += found
                size += sum(map(len, found))
                here = [number, after] if after is not END else [number + 1, None]
                if size >= readers.READ_BYTES:
                    yield Batch(texts, here)
                    texts, size = [], 0
                del values, found  # long texts must be gone before the next one is read
            within = None
            if texts and opening.is_remote(reader.name):  # the next file is fetched only where it is asked for
                yield Batch(texts, [number + 1, None])
                texts, size = [], 0
        if texts or tally.passed:
            yield Batch(texts, here)

    def _readable(self, reader, position) -> Iterator[tuple[list, object, object]]:
        """Yield (values, position before, position after); what a reader raises becomes a sentence on how far it came.

        Where bad rows are passed over, the rest of a damaged file is one of them, and END the position after it.
        """
        at = position
        try:
            for values, after in reader.read(position):
                yield values, at, after
                at = after
                del values
        except Exception as error:  # pyarrow, csv, zlib, fsspec and datasets each raise their own
            broken = isinstance(error, OSError) and error.errno is not None  # the disk's or the network's fault
            if self.bad_rows == "skip" and not broken and not opening.is_remote(reader.name):
                yield [Damaged(f"{reason(error)}; what comes behind it is left out")], at, END
                return
            try:
                row = reader.row(at, -1)
            except Exception:
                row = "the last one read"
            said = f"cannot be read past row {row} ({reason(error)})"
            raise ValueError(f"{reader.name}: {said}; repair it or leave it out.") from error

    def _judge(self, reader, values: list, position, tally: Tally) -> list[str]:
        texts, first = [], None  # first: the number of the first value's row
        tally.rows += len(values)
        for index, value in enumerate(values):
            if isinstance(value, str) and value.isascii() and not value.isspace() and value:
                texts.append(value)
                continue
            if (problem := problem_of(value := join(value))) is None:
                texts.append(value)
                continue
            if problem in PASSED:
                tally.skipped += 1
                tally.missing += value is MISSING
                if len(tally.passed) >= MOST_PASSED:
                    continue
            first = reader.row(position, 0) if first is None else first
            sentence = f"row {first + index} {problem}"
            if problem in PASSED:
                pass
            elif self.bad_rows == "error":
                raise ValueError(f"{reader.name}: {sentence} (bad_rows=skip passes such rows over and counts them).")
            else:
                tally.bad += 1
                tally.first_bad = tally.first_bad or f"{os.path.basename(reader.name)}: {sentence}"
            if len(tally.passed) < MOST_PASSED:
                tally.passed.append({"file": os.path.basename(reader.name), "row": first + index, "why": problem})
        return texts


@dataclass
class MixedDocuments:
    """What a mixture is made of.

    Attributes:
        names: What each source is called in messages and in the manifest.
        weights: Shares of the tokens, adding up to 1.
        max_epochs: How often each source may be read from its start.
        seed: Another seed, another order.
    """

    sources: list[Documents]
    names: list[str]
    weights: list[float]
    max_epochs: list[int]
    seed: int = 0

    @property
    def said(self) -> list[str]:
        return [sentence for source in self.sources for sentence in source.said]

    bytes = None  # how much of each source is read shows only on the way

    def over(self, sources: list[Documents]) -> "MixedDocuments":
        """Return the same mixture of other documents, source by source."""
        return replace(self, sources=sources)

    def __iter__(self) -> Iterator[str]:
        """Yield texts by the same shares, of characters; what trains a tokenizer."""
        iterators, shares = list(map(iter, self.sources)), Shares(self.weights, self.seed)
        taken = np.zeros(len(iterators))
        while (text := next(iterators[number := shares.pick(taken)], None)) is not None:
            taken[number] += len(text)
            yield text


class Shares:
    """Picks the source that is furthest behind its share, give or take NOISE_TOKENS by chance."""

    def __init__(self, weights: list[float], seed: int, picks: int = 0):
        self._weights, self._seed, self.picks = np.array(weights), seed, picks
        self._noise = self._draw()

    def _draw(self) -> np.ndarray:
        chance = np.random.default_rng([self._seed, self.picks // PICKS])
        return chance.random((PICKS, len(self._weights))) * NOISE_TOKENS

    def pick(self, taken: np.ndarray) -> int:
        """Return a source's number; taken, float [sources], is what was taken of each so far."""
        at = self.picks % PICKS
        self._noise = self._draw() if at == 0 else self._noise
        self.picks += 1
        return int(np.argmax(self._weights * taken.sum() - taken + self._noise[at]))


def problem_of(value) -> str | None:
    """Say what keeps a value from being a document, None if nothing does."""
    if value is MISSING:
        return NO_COLUMN
    if value is None or (isinstance(value, str) and (not value or value.isspace())):
        return BLANK
    if isinstance(value, Damaged):
        return f"cannot be read ({value.reason.rstrip('.')}); repair it"
    if isinstance(value, LongText):
        return BLANK if value.is_blank else None
    if not isinstance(value, str):
        kind = type(value).__name__
        return f"is {kind} {str(value)[:40]!r}, not text; name another text_column or convert the column to strings"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return (
            f"holds the lone surrogate {value[error.start]!r} at character {error.start}, which UTF-8 cannot hold; "
            "replace it, for example with U+FFFD"
        )
    return None
