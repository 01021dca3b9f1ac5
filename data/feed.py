"""Feeds: documents cleaned, encoded and bounded, batch by batch, with a state from which each can go on."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from .documents import Documents, Tally


@dataclass
class Encoded:
    """A batch: texts, and their ids end to end, EOS after each; lengths counts it."""

    texts: list[str]
    ids: np.ndarray
    lengths: np.ndarray


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


class Feed:
    """Encoded batches of documents, in their order.

    Args:
        documents: What is read.
        encode: See `encoding.Encoder`.
        clean: From texts to those kept, or None; see `cleaning.Cleaner`.
        limits: max_tokens is met to the token: the last document is cut (it still ends in EOS). It is one of the
            training documents: a held-out one that would have to be cut is passed over.
        is_held_out: From a text to whether it is held out.
        state: What `state()` said after a batch: go on behind it.
    """

    def __init__(
        self,
        documents: Documents,
        encode: Callable,
        clean: Callable | None = None,
        limits: Limits | None = None,
        is_held_out: Callable[[str], bool] = lambda text: False,
        state: dict | None = None,
    ):
        state = state or {}
        self._sources, self._encode, self._clean, self._limits = documents, encode, clean, limits or Limits()
        self._is_held_out = is_held_out
        self._position = state.get("position")
        self.tally = Tally(**state.get("tally", {}))
        self.documents, self.tokens = state.get("documents", 0), state.get("tokens", 0)

    def state(self) -> dict:
        values = {"position": self._position, "documents": self.documents, "tokens": self.tokens}
        return values | {"tally": asdict(self.tally)}

    def report(self) -> dict:
        """What a mixture realised; nothing here."""
        return {}

    @property
    def full(self) -> bool:
        limits = self._limits
        return (limits.max_documents is not None and self.documents >= limits.max_documents) or (
            limits.max_tokens is not None and self.tokens >= limits.max_tokens
        )

    def __iter__(self) -> Iterator[Encoded]:
        if self.full:
            return
        for batch in self._sources.batches(self._position, self.tally):
            encoded = self.bound(self.encode(batch.texts))
            self._position = batch.position
            yield encoded
            if self.full:
                return

    def encode(self, texts: list[str]) -> Encoded:
        texts = texts if self._clean is None else self._clean(texts)
        return Encoded(texts, *self._encode(texts))

    def bound(self, batch: Encoded) -> Encoded:
        """Cut a batch to the limits and count it."""
        limits = self._limits
        if limits.max_documents is not None:
            batch = first(batch, limits.max_documents - self.documents)
        if limits.max_tokens is not None and self.tokens + len(batch.ids) > limits.max_tokens:
            batch = self._cut(batch, limits.max_tokens - self.tokens)
        self.documents += len(batch.texts)
        self.tokens += len(batch.ids)
        return batch

    def _cut(self, batch: Encoded, room: int) -> Encoded:
        """Keep whole documents while they fit, then the first training document that does not, cut to the room."""
        texts, ids, lengths = [], [np.empty(0, dtype=batch.ids.dtype)], []
        ends = np.cumsum(batch.lengths)
        for text, end, length in zip(batch.texts, ends, batch.lengths, strict=True):
            document = batch.ids[end - length : end]
            if length > room:
                if self._is_held_out(text):
                    continue
                document = np.append(document[: room - 1], document[-1:])
            texts.append(text)
            ids.append(document)
            lengths.append(len(document))
            room -= len(document)
            if not room:
                break
        return Encoded(texts, np.concatenate(ids), np.array(lengths, dtype=np.int64))


def first(batch: Encoded, count: int) -> Encoded:
    """Return a batch's first documents."""
    if count >= len(batch.texts):
        return batch
    lengths = batch.lengths[:count]
    return Encoded(batch.texts[:count], batch.ids[: int(lengths.sum())], lengths)
