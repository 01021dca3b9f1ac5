"""Audit: a sample of what tokie encoded, encoded again by `tokenizers`; what stands in the manifest about it."""

import zlib

import numpy as np

from ..read.long_text import LongText
from ..tokens.encoding import WORD_ENDS, Encoder

AUDITED_FIRST = 2**17  # bytes at a shard's start of which every document is compared
AUDITED_EACH = 128  # of the other documents every so many, by their text: the same ones wherever they are encoded
AUDITED_LENGTH = 2**20  # characters compared of a longer document
CONFIDENCE = 0.95


class Audit:
    """Compares a sample of one shard's documents. Which ones depends on the shard's text alone.

    Attributes: documents, how many were compared; all of them agreed.
    """

    def __init__(self, encode: Encoder):
        self._encode, self._bytes, self.documents = encode, 0, 0

    def add(self, texts: list[str | LongText], ids: np.ndarray, lengths: np.ndarray, last_cut: bool = False) -> None:
        """Take a batch as it was encoded, EOS after each document; last_cut: the last one's ids may stop early.

        Raises Disagreement.
        """
        if self._encode.backend != "tokie":
            return
        ends, taken, mine, partial = np.cumsum(lengths), [], [], []
        for number, text in enumerate(texts):
            utf8 = text.encode("utf-8")
            first = self._bytes < AUDITED_FIRST
            self._bytes += len(utf8)
            if (first or zlib.crc32(utf8) % AUDITED_EACH == 0) and (beginning := _beginning(text)):
                taken.append(beginning)
                mine.append(ids[ends[number] - lengths[number] : ends[number] - 1])
                partial.append(len(beginning) < len(text) or (last_cut and number == len(texts) - 1))
            del utf8
        self._encode.compare(taken, mine, partial)
        self.documents += len(taken)


def _beginning(text: str | LongText) -> str:
    """Return a text, a long one up to where its ids may be cut; nothing where there is no such place."""
    if isinstance(text, str) and len(text) <= AUDITED_LENGTH:
        return text
    head = text[:AUDITED_LENGTH]
    cuts = [found.end() for found in WORD_ENDS.finditer(head, max(0, len(head) - 2**12))]
    return head[: cuts[-1]] if cuts else ""


def summarize(shards: list[dict], done_again: int) -> dict:
    """Return what the manifest says of a set's ids; nothing where `tokenizers` made all of them.

    Args:
        shards: The shards' records.
        done_again: Parts in which a document differed, and which `tokenizers` has encoded since.
    """
    compared = [record.get("audit", 0) for record in shards if record["backend"] == "tokie"]
    if not compared and not done_again:
        return {}
    documents = sum(compared)
    bound = 1 - (1 - CONFIDENCE) ** (1 / documents) if documents else 1.0  # Clopper-Pearson's for 0 of n, about 3 / n
    return {
        "documents": documents,
        "documents_of_shards": compared,
        "disagreements": done_again,
        "upper_bound": float(f"{bound:.3g}") if compared else 0.0,
        "confidence": CONFIDENCE,
    }
