"""Where text comes from: the built-in sample, local files, or a dataset of the Hub; always documents in one order."""

import functools
import glob
import hashlib
import logging
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from smolpretrain.core.files import describe_file

from .builtin import builtin_documents
from .documents import Documents, MixedDocuments, one_line
from .long_text import LONG_BYTES, LongText
from .readers import JSON_LINES, ROWS_PER_READ, JsonLines, Parquet, Rows, Stream

SOURCE = ("dataset_name", "dataset_config_name", "dataset_split", "dataset_revision", "data_files", "text_column")
BUILDERS = dict.fromkeys((".jsonl", ".json", ".jsonl.gz", ".json.gz"), "json")
BUILDERS |= {".parquet": "parquet", ".txt": "text", ".csv": "csv"}


def read_documents(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    dataset_revision: str | None = None,
    data_files: str | list[str] | None = None,
    text_column: str = "text",
    mixture: list[dict] | None = None,
    mixture_seed: int = 0,
    streaming: bool = False,
    bad_rows: str = "error",
) -> Documents | MixedDocuments:
    """Open the text that is asked for; everything that can be checked without reading it all is checked here.

    Args:
        dataset_name: Hub id, or a local directory in a layout that `datasets` knows.
        data_files: Paths or globs of .jsonl, .json, .jsonl.gz, .json.gz, .parquet, .csv (a row is a document) and
            .txt (a file is a document), read kind after kind, each kind in sorted order, never materialised.
        text_column: The column that holds the text. A .txt file has none.
        mixture, mixture_seed: Several sources by share of tokens, each with the arguments above, weight and
            max_epochs; see `MixedDocuments`.
        streaming: Read a Hub dataset as it comes, nothing kept on the disk. Files always are.
        bad_rows: See `Documents`.

    Returns:
        Iterator of documents, none blank, all UTF-8; `.skipped` counts the blank rows. The built-in text if neither
        dataset_name nor data_files is given.

    Raises:
        ValueError: Missing file, unknown kind, missing column or split, dataset out of reach. While iterating: see
            `Documents`.
    """
    if dataset_name and data_files:
        raise ValueError(f"dataset_name {dataset_name!r} and data_files {data_files!r} are both given; keep one.")
    if mixture:
        return _mixed(mixture, mixture_seed, streaming, bad_rows)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # our sentence says what they would
    if dataset_name:
        names = (dataset_name, dataset_config_name, dataset_split, dataset_revision)
        return Documents([_dataset_reader(*names, text_column, streaming)], bad_rows)
    if data_files:
        return Documents([_file_reader(path, text_column) for path in find_files(data_files)], bad_rows)
    return Documents([Rows("built-in text", builtin_documents)], bad_rows)


def _mixed(mixture: list[dict], seed: int, streaming: bool, bad_rows: str) -> MixedDocuments:
    """Open a mixture's sources; what is wrong with one names it by its place."""
    made = MixedDocuments([], [], [], [], seed)
    for number, entry in enumerate(mixture):
        try:
            source, weight, max_epochs = _entry(entry)
            made.sources.append(read_documents(**source, streaming=streaming, bad_rows=bad_rows))
        except ValueError as error:
            raise ValueError(f"mixture[{number}]: {error}") from error
        made.names.append(_short_name(source))
        made.weights.append(weight)
        made.max_epochs.append(max_epochs)
    made.weights = [weight / sum(made.weights) for weight in made.weights]
    return made


def _short_name(source: dict) -> str:
    """Name a source for people: no path of this machine, as the name stands in the manifest."""
    if files := source.get("data_files"):
        return " ".join(map(os.path.basename, [files] if isinstance(files, str) else files))
    name = source.get("dataset_name") or "built-in"
    name = os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
    return f"{name} {config}" if (config := source.get("dataset_config_name")) else name


def _entry(entry: dict) -> tuple[dict, float, int]:
    """Return (source, weight, max_epochs) of one entry of a mixture."""
    known = (*SOURCE, "weight", "max_epochs")
    for key in entry:
        if key not in known:
            raise ValueError(f"{key} is not a key of a source; there are {', '.join(known)}.")
    source = {name: entry[name] for name in SOURCE if name in entry}
    weight, max_epochs = entry.get("weight"), entry.get("max_epochs", 1)
    if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ValueError(f"weight must be a number above 0, a share of the tokens, got {weight!r}.")
    if not isinstance(max_epochs, int) or max_epochs < 1:
        raise ValueError(f"max_epochs must be a whole number of at least 1, got {max_epochs!r}.")
    return source, float(weight), max_epochs


def find_files(data_files: str | list[str]) -> list[str]:
    """Expand paths and globs to files, each once, sorted by kind and then by path.

    Raises:
        ValueError: Nothing matches, a directory, or a kind of file that cannot be read.
    """
    found = {}
    for pattern in [data_files] if isinstance(data_files, str) else data_files:
        expanded = os.path.expanduser(pattern)
        paths = [expanded] if os.path.exists(expanded) else glob.glob(expanded, recursive=True)
        paths = [path for path in paths if not os.path.isdir(path)]
        if not paths:
            hint = f"it is a directory, give {pattern}/*.jsonl" if os.path.isdir(expanded) else "check the path"
            raise ValueError(f"data_files: no file matches {pattern}; {hint}.")
        found |= {os.path.normpath(path): _builder(path) for path in paths}
    return sorted(found, key=lambda path: (found[path], path))


def _builder(path: str) -> str:
    extension = next((end for end in BUILDERS if path.lower().endswith(end)), None)
    if extension is None:
        raise ValueError(f"data_files: {path} is not of a kind that can be read; it must end in {', '.join(BUILDERS)}.")
    return BUILDERS[extension]


def _file_reader(path: str, text_column: str):
    """Check that a file opens and has the column; return its reader: direct where speed counts, else `datasets`."""
    builder = _builder(path)
    if os.path.getsize(path) == 0:
        return Rows(path, list, 0)
    try:
        if builder == "text":
            return Rows(path, functools.partial(_whole_text, path), os.path.getsize(path))
        if builder == "parquet":
            reader = Parquet(path, text_column)
            columns = reader.columns()
        elif path.lower().endswith(JSON_LINES):
            reader = JsonLines(path, text_column)
            columns = reader.columns()
        else:
            dataset = _built(path, text_column)
            columns = dataset.column_names or list(next(iter(dataset), {}))
            reader = Rows(path, functools.partial(_built_column, path, text_column), os.path.getsize(path))
    except Exception as error:
        reason = one_line(error)
        raise ValueError(f"{path}: cannot be read as {builder} ({reason}); repair it or leave it out.") from error
    _check_column(path, text_column, columns)
    return reader


def _whole_text(path: str) -> list[str | LongText]:
    if os.path.getsize(path) > LONG_BYTES:
        return [LongText(Path(path).read_bytes())]
    with open(path, encoding="utf-8", newline="") as file:
        return [file.read()]


def _built(path: str, text_column: str):
    from datasets import load_dataset

    options = {}
    if (builder := _builder(path)) == "csv":  # "NA" and "12" are text here, not a missing value and a number
        options = {"keep_default_na": False, "converters": {text_column: str}}
    escaped = glob.escape(os.path.abspath(path))  # load_dataset would read [ and * in a file's name as a pattern
    return load_dataset(builder, data_files={"train": escaped}, split="train", streaming=True, **options)


def _built_column(path: str, column: str):
    return _column(_built(path, column), column)


def _column(dataset, column: str):
    for rows in dataset.select_columns([column]).iter(batch_size=ROWS_PER_READ):
        yield from rows[column]


def _check_column(name: str, column: str, columns: Iterable[str] | None) -> None:
    if columns and column not in columns:
        raise ValueError(f"{name}: no column {column!r}; set text_column to one of {', '.join(map(str, columns))}.")


def _dataset_reader(name: str, config: str | None, split: str, revision: str | None, column: str, streaming: bool):
    """Check a Hub dataset's (or local directory's) split and column before any text is downloaded, where it says."""
    from datasets import get_dataset_split_names, load_dataset, load_dataset_builder

    try:
        info = load_dataset_builder(name, config, revision=revision).info
        splits = list(info.splits or get_dataset_split_names(name, config, revision=revision))
    except Exception as error:
        raise ValueError(
            f"dataset_name {name!r}{f' ({config})' if config else ''} cannot be loaded ({one_line(error)}); check the "
            "name, dataset_config_name, dataset_revision and the network, and run `hf auth login` if it is gated."
        ) from error
    if split.split("[")[0].split("+")[0] not in splits:
        raise ValueError(f"{name}: there is no split {split!r}; set dataset_split to one of {', '.join(splits)}.")
    _check_column(name, column, info.features)
    streaming = streaming or os.path.isdir(name)
    if streaming and "[" in split:
        raise ValueError(f"dataset_split {split!r}: a stream has no slices; name a whole split and set max_documents.")
    try:
        dataset = load_dataset(name, config, split=split, revision=revision, streaming=streaming)
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except Exception as error:
        raise ValueError(f"{name}: split {split!r} cannot be loaded ({one_line(error)}).") from error
    _check_column(name, column, columns)
    if streaming:
        return Stream(name, dataset, column)
    dataset = dataset.select_columns([column])
    return Rows(
        name,
        functools.partial(_column, dataset, column),
        dataset.data.nbytes,
        skip=functools.partial(_column_from, dataset, column),
    )


def _column_from(dataset, column: str, first: int):
    return _column(dataset.select(range(min(first, len(dataset)), len(dataset))), column)


def describe_source(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    dataset_revision: str | None = None,
    data_files: str | list[str] | None = None,
    text_column: str = "text",
    mixture: list[dict] | None = None,
    mixture_seed: int = 0,
) -> dict:
    """Say what text this is, for the manifest: JSON values, no absolute path. Arguments as in `read_documents`.

    Returns:
        The built-in text: the Python that carries it. Files: name, bytes and sha256 of each, in the order of reading.
        A mixture: that of each source, its weight and max_epochs, and the seed.
        A Hub dataset: its names, and `dataset_commit` (None where the Hub cannot be asked), or a directory's files.
    """
    if mixture:
        described = [
            {"source": describe_source(**source), "weight": weight, "max_epochs": max_epochs}
            for source, weight, max_epochs in map(_entry, mixture)
        ]
        return {"mixture": described, "mixture_seed": mixture_seed}
    if data_files:
        return {"data_files": [describe_file(path) for path in find_files(data_files)], "text_column": text_column}
    if not dataset_name:
        return {"builtin": f"{platform.python_implementation()} {platform.python_version()} documentation"}
    names = {"dataset_name": dataset_name, "dataset_config_name": dataset_config_name, "dataset_split": dataset_split}
    names |= {"dataset_revision": dataset_revision, "text_column": text_column}
    if os.path.isdir(dataset_name):
        paths = sorted(path for path in Path(dataset_name).rglob("*") if path.is_file())
        names["dataset_name"] = os.path.basename(os.path.abspath(dataset_name))
        return names | {"files": [describe_file(path) for path in paths]}
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(dataset_name, revision=dataset_revision, timeout=10).sha
    except Exception:  # offline with a cached copy: the names still say which
        commit = None
    return names | {"dataset_commit": commit}


def is_validation(text: str, fraction: float) -> bool:
    """Tell whether a document is among the held-out fraction: by sha256 of its UTF-8, so identical ones never part."""
    return is_held_out(text.encode("utf-8"), fraction)


def is_held_out(utf8: bytes, fraction: float) -> bool:
    """`is_validation` of a text already in UTF-8."""
    return int.from_bytes(hashlib.sha256(utf8).digest()[:8], "big") < fraction * 2**64
