"""Cleaning, each kind asked for by itself: length, datatrove's filters, decontamination, exact deduplication."""

import importlib
import re
import sqlite3
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from smolpretrain.core.files import describe_file

from .corpus import find_files, read_documents
from .forms.columns import NoColumn

NGRAM_WORDS = 13  # GPT-3's (Brown et al. 2020, appendix C)
WORD = re.compile(r"\w+")


@dataclass
class Cleaning:
    """What is left out of a corpus; see `CorpusArguments` for each.

    Evaluation texts stand in their files as the corpus' do, in text_column or by text_template, or in a column `text`.
    """

    min_characters: int | None = None
    max_characters: int | None = None
    deduplicate: bool = False
    decontaminate: list[str] | None = None
    filters: list | None = None
    text_column: str = "text"
    text_template: str | None = None

    @property
    def column(self) -> tuple[str, str | None]:
        """Where the text stands in a row: text_column and text_template."""
        return self.text_column, self.text_template

    @property
    def by_text(self) -> bool:
        """Whether a document's own text may leave it out."""
        return any((self.min_characters, self.max_characters, self.decontaminate, self.filters))

    def describe(self) -> dict:
        """Return what decides the tokens, as JSON values: what was asked, and the evaluation files by hash."""
        asked = {name: value for name, value in asdict(self).items() if value and not name.startswith("text_")}
        if self.decontaminate:
            asked["decontaminate"] = [describe_file(path) for path in find_files(self.decontaminate)]
        return asked


@dataclass
class Dropped:
    """A document that was left out, for the side file that names it."""

    text: str
    file: str
    words: str

    def entry(self) -> dict:
        digest = blake2b(self.text.encode("utf-8"), digest_size=16).hexdigest()
        return {"blake2b": digest, "opening": self.text[:200], "shared_words": self.words, "evaluation_file": self.file}


class Cleaner:
    """Leaves documents out by their own text alone; `dropped` counts them by reason.

    Raises:
        ValueError: A filter that does not exist or cannot be made, or evaluation files that cannot be read.
    """

    def __init__(self, cleaning: Cleaning):
        self._shortest, self._longest = cleaning.min_characters or 0, cleaning.max_characters or float("inf")
        self._filters = [make_filter(spec) for spec in cleaning.filters or []]
        self._evaluation = Decontaminator(cleaning.decontaminate, *cleaning.column) if cleaning.decontaminate else None

    def __call__(self, texts: list[str], counts: dict[str, int]) -> tuple[list[str], list[Dropped]]:
        """Return the texts that stay and the contaminated ones; counts gains how many were left out for what."""
        kept, contaminated = [], []
        for text in map(str, texts):
            reason = self._length(text)
            if reason is None and self._filters:
                text, reason = self._filter(text)
            if reason is None and self._evaluation is not None and (found := self._evaluation.find(text)):
                reason = "decontaminate"
                contaminated.append(Dropped(text, *found))
            if reason is None:
                kept.append(text)
            else:
                counts[reason] = counts.get(reason, 0) + 1
        return kept, contaminated

    def _length(self, text: str) -> str | None:
        if len(text) < self._shortest:
            return "min_characters"
        return "max_characters" if len(text) > self._longest else None

    def _filter(self, text: str) -> tuple[str, str | None]:
        """Return the text as the filters leave it (C4QualityFilter takes lines out), and the one that drops it."""
        from datatrove.data import Document

        document = Document(text=text, id="")
        for name, keep in self._filters:
            verdict = keep(document)
            if not (verdict[0] if isinstance(verdict, tuple) else verdict) or not document.text.strip():
                return text, name
        return document.text, None


def make_filter(spec: str | dict) -> tuple:
    """Return (name, function of a datatrove Document) of one entry of `filters`."""
    name, options = (spec, {}) if isinstance(spec, str) else next(iter(spec.items()), ("", {}))
    if isinstance(spec, dict) and (len(spec) != 1 or not isinstance(options, dict)):
        raise ValueError(f'filters: {spec} must be a name, or one name with its options: {{"NAME": {{...}}}}.')
    try:
        offered = importlib.import_module("datatrove.pipeline.filters")
    except ImportError as error:
        raise ValueError(f"filters: {name} needs datatrove ({error}): pip install 'smolpretrain[datatrove]'.") from None
    if not name.endswith("Filter") or not hasattr(offered, name):
        names = ", ".join(found for found in vars(offered) if found.endswith("Filter"))
        raise ValueError(f"filters: {name} is not one of datatrove's: {names}.")
    try:
        made = getattr(offered, name)(**options)
    except (TypeError, ValueError, ImportError) as error:  # ImportError: what this one filter needs beside datatrove
        raise ValueError(f"filters: {name} with {options} cannot be made: {' '.join(str(error).split())}") from None
    return name, made.filter


class Decontaminator:
    """Finds documents that share NGRAM_WORDS words in a row with evaluation texts, case and punctuation aside.

    Attributes: too_short, evaluation texts of fewer words, which cannot be found.
    """

    def __init__(self, files: list[str], text_column: str = "text", text_template: str | None = None):
        self._ids, self._grams, self.too_short = {}, {}, 0
        for path in find_files(files):
            for text in _evaluation_texts(path, text_column, text_template):
                words = WORD.findall(text.lower())
                ids = np.array([self._ids.setdefault(word, len(self._ids) + 1) for word in words], dtype=np.uint64)
                self.too_short += len(words) < NGRAM_WORDS
                for at in range(len(words) - NGRAM_WORDS + 1):
                    self._grams.setdefault(ids[at : at + NGRAM_WORDS].tobytes(), Path(path).name)
        if not self._grams:
            raise ValueError(f"decontaminate: none of the texts in {', '.join(files)} has {NGRAM_WORDS} words.")
        self._known = np.unique(np.concatenate([_mixed(np.frombuffer(gram, np.uint64)) for gram in self._grams]))

    def find(self, text: str) -> tuple[str, str] | None:
        """Return (file of the evaluation text, the words shared), None where nothing is."""
        words = WORD.findall(text.lower())
        if len(words) < NGRAM_WORDS:
            return None
        ids = np.fromiter((self._ids.get(word, 0) for word in words), np.uint64, len(words))
        for at in np.flatnonzero(np.isin(_mixed(ids), self._known)):
            if file := self._grams.get(ids[at : at + NGRAM_WORDS].tobytes()):
                return file, " ".join(words[at : at + NGRAM_WORDS])
        return None


def _evaluation_texts(path: str, text_column: str, text_template: str | None) -> Iterable[str]:
    try:
        return read_documents(data_files=[path], text_column=text_column, text_template=text_template)
    except NoColumn as error:
        if text_column == "text" and text_template is None:
            raise ValueError(f"decontaminate: {error}") from None
        return read_documents(data_files=[path])


def _mixed(ids: np.ndarray) -> np.ndarray:
    """Return a number for each run of NGRAM_WORDS ids; equal runs have equal numbers, others hardly ever."""
    mixed = np.zeros(len(ids) - NGRAM_WORDS + 1, dtype=np.uint64)
    for offset in range(NGRAM_WORDS):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + ids[offset : offset + len(mixed)]
    return mixed


class Seen:
    """Which texts were already kept, on the disk: memory stays bounded, and a killed preparation goes on.

    A text is known by 64 bits of a hash of it in NFKC, case folded, white space as single spaces: among a million
    documents, two different ones are taken for the same with a chance of 3 in 100 million.
    """

    def __init__(self, path: Path, shard: int):
        """Open or make the file at path; what shards from `shard` on had added is forgotten."""
        self._shard = shard
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA cache_size=-65536")  # KiB
        self._database.execute("CREATE TABLE IF NOT EXISTS seen (hash INTEGER PRIMARY KEY, shard INTEGER)")
        self._database.execute("DELETE FROM seen WHERE shard >= ?", (shard,))
        self._database.execute("BEGIN")

    def is_new(self, text: str) -> bool:
        """Tell whether a text is the first of its kind, and remember it."""
        text = str(text)
        plain = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
        digest = blake2b(" ".join(plain.split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = int.from_bytes(digest, "big", signed=True)
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (number, self._shard)).rowcount > 0

    def end_shard(self) -> None:
        """Have the disk keep what this shard added; call it before the shard's record is written."""
        self._database.execute("COMMIT")
        self._database.execute("BEGIN")
        self._shard += 1

    def close(self) -> None:
        self._database.close()
