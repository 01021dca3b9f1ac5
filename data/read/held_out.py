"""Held out: which documents train nothing, by a hash of their text; at least one of two or more."""

import hashlib
import math
from collections.abc import Callable, Iterable


def is_validation(text: str, fraction: float) -> bool:
    """Tell whether a document is among the held-out fraction: by sha256 of its UTF-8, so identical ones never part."""
    return is_held_out(text.encode("utf-8"), fraction)


def is_held_out(utf8: bytes, fraction: float) -> bool:
    """`is_validation` of a text already in UTF-8."""
    return _number(utf8) < fraction * 2**64


def _number(utf8: bytes) -> int:
    return int.from_bytes(hashlib.sha256(utf8).digest()[:8], "big")


def enough(texts: Iterable, fraction: float, keep: Callable[[list], list], documents: int, tokens: int) -> float:
    """Return the fraction by which at least one document is held out, before any is encoded.

    Texts are read until one of them is held out: 1 / fraction of them on the average. Where none is, the fraction is
    raised to the one whose hash comes first.

    Args:
        keep: What cleaning leaves of a list of texts.
        documents, tokens: How many documents and tokens are taken at most. A text has at most as many tokens as bytes,
            and EOS: so much of it is certain to be taken.

    Raises:
        ValueError: There is one document.
    """
    lowest, seen, held = None, set(), 0
    for text in texts:
        if not (kept := keep([text])):
            continue
        utf8 = kept[0].encode("utf-8")
        held += len(utf8) + 1
        if held > tokens and len(seen) > 1:
            break
        number = _number(utf8)
        if number < fraction * 2**64:
            return fraction
        lowest = number if lowest is None else min(lowest, number)
        if len(seen) < 2:
            seen.add(number)
        documents -= 1
        if not documents or held > tokens:
            break
    if len(seen) == 1:
        raise ValueError(
            f"validation_fraction {fraction} cannot hold out a document of a corpus that has one: set it to 0, "
            "or cut the text into documents with document_separator."
        )
    return fraction if lowest is None else math.nextafter(lowest / 2**64, 1)
