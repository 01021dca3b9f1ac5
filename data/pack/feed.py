"""Feeds: documents cleaned, encoded, mixed and bounded, batch by batch, with a state from which each can go on."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np

from ..read.cleaning import Cleaner, Dropped, Seen
from ..read.documents import Documents, Tally
from ..read.validation import HeldOut


@dataclass
class Beside:
    """What was left out on the way, to be named in the set: contaminated documents, and rows without text."""

    dropped: list[Dropped] = field(default_factory=list)
    passed: list[dict] = field(default_factory=list)

    def add(self, other: "Beside") -> None:
        self.dropped += other.dropped
        self.passed += other.passed


@dataclass
class Encoded:
    """A batch: texts, and their ids end to end, EOS after each; lengths counts it.

    Attributes:
        origins: For each document the number of its source in a mixture; None elsewhere.
        beside: What was left out on the way here.
    """

    texts: list[str]
    ids: np.ndarray
    lengths: np.ndarray
    origins: np.ndarray | None = None
    beside: Beside = field(default_factory=Beside)

    def keep(self, kept: np.ndarray) -> "Encoded":
        """Return the documents marked in kept, bool [documents]."""
        if kept.all():
            return self
        texts = [text for text, stays in zip(self.texts, kept, strict=True) if stays]
        origins = None if self.origins is None else self.origins[kept]
        return Encoded(texts, self.ids[np.repeat(kept, self.lengths)], self.lengths[kept], origins, self.beside)


@dataclass
class Limits:
    """How much of a corpus is taken: the first documents, or the first tokens exactly; None takes all."""

    max_documents: int | None = None
    max_tokens: int | None = None

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or null to take everything, got {value}.")

    def __bool__(self) -> bool:
        return self.max_documents is not None or self.max_tokens is not None


class Source:
    """Encoded batches of one source's documents, cleaned, in their order.

    Args:
        encode: See `encoding.Encoder`.
        cleaner: What leaves documents out by their own text; None leaves out none.
        seen: What leaves out a document that was there already; None leaves out none.
        state: What `state()` said after a batch: go on behind it.
        held_out: What leaves out documents that stand in held-out text of the user's own; None leaves out none.
    """

    def __init__(
        self,
        documents: Documents,
        encode: Callable,
        cleaner: Cleaner | None = None,
        seen: Seen | None = None,
        state: dict | None = None,
        held_out: HeldOut | None = None,
    ):
        state = state or {}
        self._documents, self._encode, self._cleaner, self._seen = documents, encode, cleaner, seen
        self._held_out = held_out
        self._position = state.get("position")
        self._tally = Tally(**state.get("tally", {}))
        self._filtered = dict(state.get("filtered", {}))

    def state(self) -> dict:
        values = {"position": self._position, "tally": asdict(self._tally)}
        return values | ({"filtered": dict(self._filtered)} if self._filtered else {})

    def report(self) -> dict:
        return {"tally": asdict(self._tally), "filtered": dict(self._filtered)}

    def __iter__(self) -> Iterator[Encoded]:
        for batch in self._documents.batches(self._position, self._tally):
            texts, dropped = batch.texts, []
            if self._held_out is not None:
                texts = self._held_out(texts, self._filtered)
            if self._cleaner is not None:
                texts, dropped = self._cleaner(texts, self._filtered)
            if self._seen is not None:
                kept = list(filter(self._seen.is_new, texts))
                self.count_duplicates(len(texts) - len(kept))
                texts = kept
            encoded = Encoded(texts, *self._encode(texts), beside=Beside(dropped, self._tally.take_passed()))
            self._position = batch.position
            yield encoded
            del batch, texts, encoded  # long texts must be gone before the next one is read

    def count_duplicates(self, number: int) -> None:
        if number:
            self._filtered["deduplicate"] = self._filtered.get("deduplicate", 0) + number

    def count(self, batch: Encoded) -> None:
        """Take note of what was kept of a batch: nothing here."""


class Feed:
    """A source or a mixture, within limits.

    Args:
        source: See `Source`, `mixing.Mixture`.
        limits: max_tokens is met to the token: the last document is cut (it still ends in EOS). It is one of the
            training documents: a held-out one that would have to be cut is passed over.
        is_held_out: From a text to whether it is held out.
        seen: The one that source was made with.
        state: What `state()` said after a batch; source was made with its "source".
    """

    def __init__(
        self,
        source,
        limits: Limits | None = None,
        is_held_out: Callable[[str], bool] = lambda text: False,
        seen: Seen | None = None,
        state: dict | None = None,
    ):
        state = state or {}
        self._seen = seen
        self._source, self._limits, self._is_held_out = source, limits or Limits(), is_held_out
        self._documents, self._tokens = state.get("documents", 0), state.get("tokens", 0)

    def state(self) -> dict:
        return {"source": self._source.state(), "documents": self._documents, "tokens": self._tokens}

    def report(self) -> dict:
        """What was passed over and, of a mixture, what it realised."""
        return self._source.report()

    def end_shard(self) -> None:
        """Have the disk keep what must be there before a shard's record is."""
        if self._seen is not None:
            self._seen.end_shard()

    def close(self) -> None:
        if self._seen is not None:
            self._seen.close()

    @property
    def full(self) -> bool:
        limits = self._limits
        return (limits.max_documents is not None and self._documents >= limits.max_documents) or (
            limits.max_tokens is not None and self._tokens >= limits.max_tokens
        )

    def __iter__(self) -> Iterator[Encoded]:
        if self.full:
            return
        for batch in self._source:
            yield self._bound(batch)
            del batch
            if self.full:
                return

    def _bound(self, batch: Encoded) -> Encoded:
        """Cut a batch to the limits and count it."""
        limits = self._limits
        if limits.max_documents is not None:
            batch = batch.keep(np.arange(len(batch.texts)) < limits.max_documents - self._documents)
        if limits.max_tokens is not None and self._tokens + len(batch.ids) > limits.max_tokens:
            batch = self._cut(batch, limits.max_tokens - self._tokens)
        self._documents += len(batch.texts)
        self._tokens += len(batch.ids)
        self._source.count(batch)
        return batch

    def _cut(self, batch: Encoded, room: int) -> Encoded:
        """Keep whole documents while they fit, then the first training document that does not, cut to the room."""
        kept, surplus = np.zeros(len(batch.texts), dtype=bool), 0
        for number, (text, length) in enumerate(zip(batch.texts, batch.lengths, strict=True)):
            if not room:
                break
            if length > room:
                if self._is_held_out(text):
                    continue
                surplus = length - room
            kept[number] = True
            room -= min(length, room)
        batch = batch.keep(kept)
        if surplus:  # of the last one
            ids, lengths = batch.ids[:-surplus].copy(), batch.lengths.copy()
            ids[-1], lengths[-1] = batch.ids[-1], lengths[-1] - surplus
            batch = Encoded(batch.texts, ids, lengths, batch.origins, batch.beside)
        return batch
