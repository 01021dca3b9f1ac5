"""Held-out text for a command: its options, and the texts they name, one corpus or several."""

import glob
from itertools import chain, islice
from pathlib import Path

import datasets

READERS = {".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv"}
OPTIONS = {
    "data_files": {
        "nargs": "+",
        "help": f"paths or globs ({' '.join(READERS)}); a .txt is one document. NAME=PATH puts it in the corpus NAME, "
        "and each corpus gets a row",
    },
    "dataset_name": {"help": "data set on the Hub, or its directory"},
    "dataset_config_name": {"help": "its configuration"},
    "dataset_revision": {"help": "its branch, tag or commit"},
    "dataset_split": {"help": "default train"},
    "prepared_dir": {"help": "prepared set, whose validation_documents (.jsonl or .parquet) are read"},
    "text_column": {"default": "text"},
    "max_documents": {"type": int, "help": "score the first N of each corpus only"},
}


def describe(args):
    """What the options name, as JSON values: {option: value} of those that were given."""
    return {name: getattr(args, name) for name in OPTIONS if getattr(args, name)}


def read_corpora(args):
    """Read the texts that the data options name.

    Returns:
        {corpus: [text, ...]}. A corpus has the name before its files' `=`, else that of its file, set or directory.

    Raises:
        ValueError: Nothing, too much, or nothing readable is named.
    """
    if sum(map(bool, (args.data_files, args.dataset_name, args.prepared_dir))) != 1:
        raise ValueError("give one of data_files, dataset_name, prepared_dir.")
    if args.max_documents is not None and args.max_documents < 1:
        raise ValueError(f"max_documents must be at least 1, got {args.max_documents}.")
    if args.dataset_name:
        hub = {"path": args.dataset_name, "name": args.dataset_config_name, "revision": args.dataset_revision}
        corpora = {args.dataset_name: [hub | {"split": args.dataset_split or "train"}]}
    else:
        corpora = _file_sources(args.data_files or _prepared(args.prepared_dir))
    return {name: _read(sources, args.text_column, args.max_documents) for name, sources in corpora.items()}


def _prepared(directory):
    """Words that name a prepared set's held-out texts: held_out, or each set by its own name."""
    stems = {path.name.split("-")[0] for path in Path(directory).glob("validation_documents_*-*.*")}
    named = [f"{stem.removeprefix('validation_documents_')}={directory}/{stem}-*.*" for stem in sorted(stems)]
    return named or [f"held_out={directory}/validation_documents*.*"]


def _file_sources(words):
    """{corpus: load_dataset's arguments for each file}; files without a name of their corpus share one."""
    named = {}
    for word in words:
        name, equals, pattern = word.partition("=")
        if not equals or glob.glob(word):
            name, pattern = "", word
        named.setdefault(name, []).append(pattern)
    if "" in named:
        named = {name or " ".join(Path(pattern).name for pattern in named[""]): named[name] for name in named}
    return {name: list(map(file_source, expand(patterns))) for name, patterns in named.items()}


def expand(patterns):
    """The files that paths and globs name; a pattern that names none stays as it is."""
    return chain.from_iterable(sorted(glob.glob(pattern)) or [pattern] for pattern in patterns)


def file_source(path):
    """load_dataset's arguments for a file; ValueError where there is none, or none that can be read."""
    reader = next((READERS[extension] for extension in READERS if path.endswith(extension)), None)
    if (missing := not Path(path).is_file()) or reader is None:
        raise ValueError(f"{path}: " + ("no such file." if missing else f"not one of {', '.join(READERS)}."))
    source = {"path": reader, "data_files": path, "split": "train"}
    return source | ({"sample_by": "document"} if reader == "text" else {})


def _read(sources, column, limit):
    texts = []
    for source in sources:
        try:
            rows = datasets.load_dataset(**source, streaming=True)  # no cached copy, nothing fetched in vain
            columns = rows.column_names or list(next(iter(rows)))
            if column not in columns:
                raise ValueError(f"no column {column}; the columns are {', '.join(columns)}.")
            texts += [row[column] for row in islice(rows, limit and limit - len(texts))]
        except (StopIteration, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(f"{source.get('data_files', source['path'])}: {str(error) or 'it is empty'}") from error
    if any(not isinstance(text, str | None) for text in texts) or not any(text and text.strip() for text in texts):
        raise ValueError(f"column {column} holds no text, only blanks or other things.")
    return texts
