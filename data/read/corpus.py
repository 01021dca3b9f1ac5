"""Where text comes from: the built-in sample, local files, or a dataset of the Hub; always documents in one order."""

import functools
import logging
import os
import platform
from dataclasses import dataclass, fields

from smolpretrain.core.text import reason

from . import files, hub
from .builtin import builtin_documents
from .documents import Documents, MixedDocuments, problem_of
from .forms import opening
from .forms.columns import Columns, NoColumn
from .forms.json_lines import RemoteJson, open_json
from .forms.tables import Arrow, Csv, Parquet
from .forms.texts import Separated, TextFile
from .held_out import is_held_out, is_validation
from .readers import Damaged, Rows

__all__ = ["builtin_documents", "describe_source", "find_files", "is_held_out", "is_validation", "read_documents"]
MAX_DOCUMENT_BYTES = 2**29


@dataclass
class Source:
    """Which text: one dataset, files, or nothing (the built-in text), and how a document stands in it.

    Attributes:
        dataset_name: Hub id, or a local directory in a layout that `datasets` knows, or that its save_to_disk left.
        dataset_data_dir, dataset_data_files: A part of it: a folder, or paths and globs in it.
        data_files: Paths, globs, directories and addresses (hf://, s3://, https://) of files; see `files.KINDS`. A row
            is a document, or a text file is; kind after kind, each kind in sorted order, never materialised.
        text_column, text_template: See `Columns`. A text file has none.
        document_separator: What stands between the documents of a text file; None takes a file as one.
        encoding: Of the files; None is UTF-8, with or without its mark.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    dataset_revision: str | None = None
    dataset_data_dir: str | None = None
    dataset_data_files: str | list[str] | None = None
    data_files: str | list[str] | None = None
    text_column: str = "text"
    text_template: str | None = None
    document_separator: str | None = None
    encoding: str | None = None

    def __post_init__(self):
        if self.dataset_name and self.data_files:
            raise ValueError(
                f"dataset_name {self.dataset_name!r} and data_files {self.data_files!r} are both given; keep one "
                "(dataset_data_files names files of the dataset)."
            )
        if self.document_separator is not None:  # a command line has no other way to say a line end
            plain = self.document_separator.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r")
            self.document_separator = plain

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.text_template)

    @property
    def dataset(self) -> hub.Dataset:
        part = self.dataset_data_files
        part = [part] if isinstance(part, str) else part
        names = (self.dataset_name, self.dataset_config_name, self.dataset_split, self.dataset_revision)
        return hub.Dataset(*names, self.dataset_data_dir, part)

    @property
    def short_name(self) -> str:
        """Name a source for people: no path of this machine, as the name stands in the manifest."""
        if found := self.data_files:
            return " ".join(map(os.path.basename, [found] if isinstance(found, str) else found))
        name = self.dataset_name or "built-in"
        name = os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
        return f"{name} {self.dataset_config_name}" if self.dataset_config_name else name

    def describe(self, show: bool = False) -> dict:
        """Say what text this is, for the manifest; see `describe_source`."""
        how = {"text_column": self.text_column}
        more = {name: getattr(self, name) for name in ("text_template", "document_separator", "encoding")}
        how |= {name: value for name, value in more.items() if value is not None}
        if self.data_files:
            return {"data_files": files.describe(find_files(self.data_files, self.dataset_split), show)} | how
        if self.dataset_name:
            return self.dataset.describe(show) | how
        return {"builtin": f"{platform.python_implementation()} {platform.python_version()} documentation"}


SOURCE = tuple(item.name for item in fields(Source))


@dataclass
class Reading:
    """How rows are judged, beside what a source says of itself."""

    bad_rows: str = "error"
    streaming: bool = False
    max_document_bytes: int = MAX_DOCUMENT_BYTES


def read_documents(
    mixture: list[dict] | None = None,
    mixture_seed: int = 0,
    streaming: bool = False,
    bad_rows: str = "error",
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    **source,
) -> Documents | MixedDocuments:
    """Open the text that is asked for; everything that can be checked without reading it all is checked here.

    Args:
        mixture, mixture_seed: Several sources by share of tokens, each with the arguments of `Source`, weight and
            max_epochs; see `MixedDocuments`.
        streaming: Read a Hub dataset as it comes, nothing kept on the disk. Files always are.
        bad_rows: See `Documents`.
        max_document_bytes: A longer line or document is a bad row: memory stays bounded, whatever a file unpacks to.
        source: See `Source`.

    Returns:
        Iterator of documents, none blank, all UTF-8; `.tally` counts the rows that are none, `.said` says what was
        taken. The built-in text if neither dataset_name nor data_files is given.

    Raises:
        ValueError: Missing file, unknown kind, missing column or split, dataset out of reach. While iterating: see
            `Documents`.
    """
    reading = Reading(bad_rows, streaming, max_document_bytes)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # our sentence says what they would
    return _mixed(mixture, mixture_seed, reading) if mixture else _opened(Source(**source), reading)


def _opened(source: Source, reading: Reading) -> Documents:
    said = []

    def open_one(path: str, look: bool = True):
        return open_file(path, source, reading, look)

    if source.dataset_name:
        readers = source.dataset.readers(source.columns, reading.streaming, open_one, said)
    elif source.data_files:
        found = files.find(source.data_files, source.dataset_split)
        said += found.said
        readers = list(map(open_one, found.paths))
    else:
        readers = [Rows("built-in text", builtin_documents)]
    return Documents(readers, reading.bad_rows, said)


def _mixed(mixture: list[dict], seed: int, reading: Reading) -> MixedDocuments:
    """Open a mixture's sources; what is wrong with one names it by its place."""
    made = MixedDocuments([], [], [], [], seed)
    for number, entry in enumerate(mixture):
        try:
            source, weight, max_epochs = _entry(entry)
            made.sources.append(_opened(source, reading))
        except ValueError as error:
            raise ValueError(f"mixture[{number}]: {error}") from error
        made.names.append(source.short_name)
        made.weights.append(weight)
        made.max_epochs.append(max_epochs)
    made.weights = [weight / sum(made.weights) for weight in made.weights]
    return made


def _entry(entry: dict) -> tuple[Source, float, int]:
    """Return (source, weight, max_epochs) of one entry of a mixture."""
    known = (*SOURCE, "weight", "max_epochs")
    for key in entry:
        if key not in known:
            raise ValueError(f"{key} is not a key of a source; there are {', '.join(known)}.")
    source = Source(**{name: entry[name] for name in SOURCE if name in entry})
    weight, max_epochs = entry.get("weight"), entry.get("max_epochs", 1)
    if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ValueError(f"weight must be a number above 0, a share of the tokens, got {weight!r}.")
    if not isinstance(max_epochs, int) or max_epochs < 1:
        raise ValueError(f"max_epochs must be a whole number of at least 1, got {max_epochs!r}.")
    return source, float(weight), max_epochs


def find_files(data_files: str | list[str], split: str = "train") -> list[str]:
    """Return the files that are named, each once, in the order of reading; see `files.find`."""
    return files.find(data_files, split).paths


class _BadRow(ValueError):
    """A row among a file's first ones is no text; the whole sentence."""


def open_file(path: str, source: Source, reading: Reading, look: bool = True):
    """Return a file's reader. look: See that it opens and has the columns, and of JSON that the first rows can be read.

    Raises ValueError where it does not; where bad rows are passed over, such a file is one of them.
    """
    kind = files.kind_of(path)
    if not opening.is_remote(path) and os.path.getsize(path) == 0:
        return Rows(path, list, 0)
    try:
        return _reader(path, kind, source, reading, look)
    except (NoColumn, _BadRow):
        raise
    except Exception as error:  # pyarrow, zlib, csv, fsspec and others raise their own
        if reading.bad_rows == "skip" and not opening.is_remote(path):
            return Rows(path, functools.partial(_damaged, reason(error)), 0)
        raise ValueError(f"{path}: cannot be read as {kind} ({reason(error)}); repair it or leave it out.") from error


def _damaged(words: str) -> list:
    return [Damaged(words)]


def _reader(path: str, kind: str, source: Source, reading: Reading, look: bool):
    columns, how = source.columns, (reading.max_document_bytes, source.encoding)
    if kind == "text":
        if look:
            opening.beginning(path, source.encoding, 1)
        return (
            TextFile(path, *how)
            if source.document_separator is None
            else Separated(path, source.document_separator, *how)
        )
    if kind == "json":
        if not look:
            return RemoteJson(path, columns, *how)
        reader, rows = open_json(path, columns, *how)
        _check_rows(path, rows, columns, reading.bad_rows)
        return RemoteJson(path, columns, *how) if opening.is_remote(path) else reader
    reader = {"csv": Csv(path, columns, *how), "parquet": Parquet(path, columns), "arrow": Arrow(path, columns)}[kind]
    if look:
        columns.check(path, reader.column_names())
    return reader


def _check_rows(path: str, rows: list, columns: Columns, bad_rows: str) -> None:
    """Raise ValueError where a file's first rows do not have the columns, or one of them cannot be read."""
    bad = next(((number, row) for number, row in enumerate(rows, 1) if isinstance(row, Damaged)), None)
    if bad is not None and bad_rows == "error":
        sentence = f"{path}: row {bad[0]} {problem_of(bad[1])}"
        raise _BadRow(f"{sentence} (bad_rows=skip passes such rows over and counts them).")
    columns.check(path, list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)))


def describe_source(mixture: list[dict] | None = None, mixture_seed: int = 0, show: bool = False, **source) -> dict:
    """Say what text this is, for the manifest: JSON values, no absolute path. Arguments as in `read_documents`.

    show: A bar while files are hashed.

    Returns:
        The built-in text: the Python that carries it. Files: name, bytes and sha256 of each, in the order of reading.
        A mixture: that of each source, its weight and max_epochs, and the seed.
        A Hub dataset: its names, and `dataset_commit` (None where the Hub cannot be asked), or a directory's files.
    """
    if not mixture:
        return Source(**source).describe(show)
    entries = map(_entry, mixture)
    described = [{"source": one.describe(show), "weight": weight, "max_epochs": most} for one, weight, most in entries]
    return {"mixture": described, "mixture_seed": mixture_seed}
