"""Ready ids: documents that stand in a column of token ids, held as text that knows its own ids."""

from collections.abc import Callable

import numpy as np

from .documents import Documents, Tally
from .readers import MISSING, Damaged


class ReadyText(str):
    """A document's text, decoded from its ids; whatever looks at documents sees text, and no one encodes it.

    Attributes:
        ids: int64, the last one EOS.
    """

    ids: np.ndarray


class ReadyDocuments(Documents):
    """Documents whose rows are lists of token ids of one tokenizer.

    Raises ValueError while iterating: a row that is no list of ids below the vocabulary, named as any bad row is.
    """

    @classmethod
    def of(cls, documents: Documents, decode: Callable, vocab_size: int, eos_token_id: int) -> "ReadyDocuments":
        """Return the same rows, read as ids.

        Args:
            decode: From lists of ids, EOS left out, to texts.
        """
        made = documents.over(documents.readers)
        made.__class__ = cls
        made._decode, made._size, made._eos = decode, vocab_size, eos_token_id
        return made

    def _judge(self, reader, values: list, position, tally: Tally) -> list:
        rows = list(map(self._checked, values))
        whole = {number: row for number, row in enumerate(rows) if isinstance(row, np.ndarray)}
        ended = [bool(ids[-1] == self._eos) for ids in whole.values()]
        texts = self._decode([ids[: len(ids) - e].tolist() for ids, e in zip(whole.values(), ended, strict=True)])
        for (number, ids), text, end in zip(whole.items(), texts, ended, strict=True):
            made = ReadyText(text)
            made.ids = ids if end else np.append(ids, self._eos)
            rows[number] = made
            tally.eos_appended += not end
        return super()._judge(reader, rows, position, tally)

    def _checked(self, value):
        """Return a row's ids, int64; None or MISSING where it has none, Damaged where they are none."""
        if value is None or value is MISSING or isinstance(value, Damaged):
            return value
        if not isinstance(value, list | np.ndarray):
            return Damaged(f"it is {type(value).__name__} {str(value)[:40]!r}, not a list of token ids")
        if not len(value):
            return None
        ids = np.asarray(value)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            return Damaged(f"{str(value)[:40]} is not a list of token ids")
        if len(bad := np.flatnonzero((ids < 0) | (ids >= self._size))):
            return Damaged(f"id {ids[bad[0]]} at place {bad[0]} is not in the vocabulary of {self._size:,}")
        return ids.astype(np.int64)


class ReadyEncoder:
    """Takes the ids of documents that have them; others, as held-out text may be, are encoded."""

    def __init__(self, encode: Callable):
        self._encode, self._dtype = encode, encode.dtype

    @property
    def backend(self) -> str:
        return "ids"

    def __call__(self, texts: list) -> tuple[np.ndarray, np.ndarray]:
        if not all(isinstance(text, ReadyText) for text in texts):
            parts = [self([text]) if isinstance(text, ReadyText) else self._encode([text]) for text in texts]
            return np.concatenate([ids for ids, _ in parts]), np.concatenate([lengths for _, lengths in parts])
        found = [text.ids.astype(self._dtype) for text in texts]
        ids = np.concatenate([np.empty(0, dtype=self._dtype), *found])
        return ids, np.array([len(one) for one in found], dtype=np.int64)
