"""Held-out text of one's own: files or a split, under one name or several, left out of training by its hash."""

import functools
import hashlib
import re
from collections.abc import Callable

import numpy as np

from .corpus import SOURCE, describe_source, read_documents
from .documents import Documents, Tally
from .long_text import LongText
from .ready import ReadyText

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
FORM = ("text_column", "text_template")
TRIED_TOGETHER = 64  # documents that are encoded at once until a set is known to fill a row
CHARACTERS_A_TOKEN = 64  # no text has more on average; of a longer document only so much is encoded for that


def name_sets(validation_files, validation_split, source: dict) -> dict[str, dict]:
    """Say which held-out text is asked for.

    Args:
        validation_files: Paths or globs, or {name: paths, or an object with the keys of a source}.
        validation_split: A split of the training text's dataset, or {name: split}.
        source: The training text's: arguments of `corpus.read_documents`.

    Returns:
        {name: arguments of `corpus.read_documents`}, sorted by name; the name is "" where there is only one without.

    Raises:
        ValueError: Both are given, a name that is none, nothing named, a split of no dataset or that is trained on.
    """
    if validation_files is not None and validation_split is not None:
        raise ValueError(
            f"validation_files = {validation_files} and validation_split = {validation_split} are both given: keep one."
        )
    key = "validation_files" if validation_split is None else "validation_split"
    asked = validation_files if validation_split is None else validation_split
    if asked is None:
        return {}
    if not asked:
        raise ValueError(f"{key} is empty: name at least one, or leave it out.")
    if validation_split is not None and not source["dataset_name"]:
        raise ValueError(f"validation_split = {validation_split} is a split of dataset_name, which is not given.")
    found = {}
    for name, value in sorted(asked.items()) if isinstance(asked, dict) else [("", asked)]:
        if name and not NAME.fullmatch(name):
            raise ValueError(f"{key}: {name!r} is no name for a set: letters, digits and _, a letter first.")
        if not value:
            raise ValueError(f"{key}: {name} is empty: name its text, or leave it out.")
        found[name] = source | {"dataset_split": value} if validation_split is not None else _files(value, source)
        if validation_split is not None and value == source["dataset_split"]:
            raise ValueError(f"validation_split = {value} is trained on: it is dataset_split too.")
    folded = [name.lower() for name in found]
    if again := [name for name in found if folded.count(name.lower()) > 1]:
        raise ValueError(f"{key}: {' and '.join(again)} are one name twice: a name has a set of its own.")
    return found


def _files(value, source: dict) -> dict:
    """Return the source of one set: files are read as the training text is; an object says it all by itself."""
    if not isinstance(value, dict):
        elsewhere = dict.fromkeys(name for name in source if name.startswith("dataset_") or name == "mixture")
        return source | elsewhere | {"dataset_split": "train", "data_files": value}
    for key in value:
        if key not in SOURCE:
            raise ValueError(f"validation_files: {key} is not a key of a source; there are {', '.join(SOURCE)}.")
    inherited = ("document_separator", "encoding", *(FORM if not value.keys() & set(FORM) else ()))
    return {name: source[name] for name in inherited if name in source} | value


def open_sets(sets: dict[str, dict], **judging) -> dict[str, Documents]:
    """Open the sets of `name_sets`. Raises ValueError as `read_documents`, naming the user's key and the set."""
    return _each(sets, functools.partial(read_documents, **judging))


def describe_sets(sets: dict[str, dict]) -> dict[str, dict]:
    """Say what text each set of `name_sets` is; see `corpus.describe_source`. Raises as `open_sets`."""
    return _each(sets, describe_source)


def _each(sets: dict[str, dict], call: Callable) -> dict:
    found = {}
    for name, source in sets.items():
        try:
            found[name] = call(**source)
        except ValueError as error:
            said = str(error).removeprefix("data_files: ").replace("set dataset_split", "set validation_split")
            key = "validation_files" if source.get("data_files") else "validation_split"
            raise ValueError(f"{key}: {name + ': ' if name else ''}{said}") from error
    return found


class HeldOut:
    """The hashes of held-out documents: called on texts, it leaves out those of them, and counts them.

    Attributes:
        hashes: The first 8 bytes of each one's sha256, as of `corpus.is_held_out`; sorted uint64.
    """

    def __init__(self, hashes):
        self.hashes = np.unique(np.array(hashes, dtype=np.uint64))

    def __call__(self, texts: list, counts: dict[str, int]) -> list:
        """Return the texts that are not held out; counts["held_out"] grows by the others."""
        asked = np.array([_hash(text) for text in texts], dtype=np.uint64)
        at = np.minimum(np.searchsorted(self.hashes, asked), len(self.hashes) - 1)
        held = self.hashes[at] == asked
        if not held.any():
            return texts
        counts["held_out"] = counts.get("held_out", 0) + int(held.sum())
        return [text for text, one in zip(texts, held, strict=True) if not one]


def _hash(text: str | LongText) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def read_over(sets: dict[str, Documents], encode: Callable, block_size: int | None) -> HeldOut:
    """Read the held-out sets once, before anything else is encoded.

    Args:
        encode: From texts to their ids, EOS and all; tried on the first documents of each set alone.
        block_size: Tokens that each set must have; None where any document fills a row.

    Raises:
        ValueError: A set holds no text, or not a row of it; and as `Documents`.
    """
    hashes = []
    for name, documents in sets.items():
        said, before, tokens, wanted, tally = f" {name}" if name else "", len(hashes), 0, block_size or 0, Tally()
        for batch in documents.batches(None, tally):
            hashes += map(_hash, batch.texts)
            for at in range(0, len(batch.texts), TRIED_TOGETHER):
                if tokens >= wanted:
                    break
                texts = batch.texts[at : at + TRIED_TOGETHER]
                tokens += sum(len(text.ids) for text in texts if isinstance(text, ReadyText))
                plain = [text for text in texts if not isinstance(text, ReadyText)]
                tokens += sum(map(len, encode([str(text[: CHARACTERS_A_TOKEN * wanted]) for text in plain])))
        if len(hashes) == before:
            blank = f" ({tally.words})" if tally.words else ""
            raise ValueError(f"the held-out set{said} holds no text{blank}: name other files, or leave it out.")
        if tokens < wanted:
            raise ValueError(
                f"the held-out set{said} holds {tokens} tokens, a row takes block_size = {block_size}: give more text."
            )
    return HeldOut(hashes)
