"""Files: which ones paths, globs, directories and addresses name, each once, and of what kind they are."""

import fnmatch
import functools
import glob
import hashlib
import json
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from smolpretrain.core.files import describe_file
from smolpretrain.core.text import reason

from .forms import opening

_CODE = (
    ".py .pyi .c .h .cc .cpp .cxx .hh .hpp .cs .java .kt .scala .clj .go .rs .swift .m .js .mjs .jsx .ts .tsx .rb .php "
    ".pl .pm .lua .r .jl .hs .ml .mli .fs .ex .exs .erl .el .lisp .scm .dart .zig .nim .pas .f .f90 .cu .cuh .asm .s "
    ".sh .bash .zsh .ps1 .sql .proto .cmake .vhd .sv .groovy .gradle"
)
KINDS = dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".json"), "json")
KINDS |= dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".tex", *_CODE.split()), "text")
KINDS |= {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
SHOWN_KINDS = ".jsonl, .ndjson, .jsonlines, .json, .txt, .md, .rst, .tex, source code, .csv, .tsv, .parquet, .arrow"
FOREIGN = {
    ".warc": "datatrove's WarcReader and Trafilatura",
    ".wet": "datatrove's WarcReader",
    ".wat": "datatrove's WarcReader",
    ".xml": "a reader of your own on datatrove's BaseDiskReader (mwxml or wikiextractor for a Wikipedia dump)",
    ".pdf": "a reader of your own on datatrove's BaseDiskReader with pypdf or docling",
    ".html": "datatrove's Trafilatura",
    ".epub": "a reader of your own on datatrove's BaseDiskReader",
}
BESIDE = ("readme*", "license*", "licence*", "copying*", "changelog*")
DESCRIBING = ("dataset_info*.json", "*.index.json", "state.json")
MANY = 1000  # files that a manifest names one by one


@dataclass
class Found:
    """Files in the order of reading, and sentences on what was taken and what was not."""

    paths: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def kind_of(name: str) -> str:
    """Return json, text, csv, parquet or arrow. Raises ValueError: another kind, with what can read it."""
    extension = opening.extension(name)
    kind = KINDS.get(extension)
    if kind in ("parquet", "arrow") and opening.compression(name):
        raise ValueError(f"data_files: {name}: {extension} is compressed inside; unpack it first.")
    if kind is None and extension in FOREIGN:
        raise ValueError(
            f"data_files: {name}: {extension} is not read here: turn it into JSON lines with {FOREIGN[extension]}, or "
            "prepare it by data/datatrove_step.py."
        )
    if kind is None:
        raise ValueError(
            f"data_files: {name} is not of a kind that can be read; it must end in {SHOWN_KINDS}, of text also with "
            ".gz, .zst, .xz or .bz2 behind it."
        )
    return kind


def find(data_files: str | list[str], split: str = "train") -> Found:
    """Expand paths, globs, directories and addresses to files, each once, sorted by kind and then by path.

    Raises:
        ValueError: Nothing matches, a kind of file that cannot be read, a directory of several kinds or of none.
    """
    found, kinds, again = Found(), {}, []
    known = {}
    for pattern in [data_files] if isinstance(data_files, str) else data_files:
        for path in _remote(pattern) if opening.is_remote(pattern) else _local(pattern, split, found.said):
            identity = path if opening.is_remote(path) else _identity(path)
            if identity in known:
                again += [(path, known[identity])] if path != known[identity] else []
                continue
            known[identity] = path
            kinds[path] = kind_of(path)
    if again:
        one, other = again[0]
        more = f", and {len(again) - 1} more" if len(again) > 1 else ""
        found.said.append(f"data_files: {one} is the same file as {other}{more}: read once.")
    found.paths = sorted(kinds, key=lambda path: (kinds[path], path))
    return found


def _identity(path: str) -> tuple:
    """Return what a file is under all its names. Raises ValueError where it is none."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"data_files: {path}: {error.strerror}.") from None
    if not stat.S_ISREG(status.st_mode):
        what = "a FIFO" if stat.S_ISFIFO(status.st_mode) else "no regular file"
        raise ValueError(f"data_files: {path} is {what}: a text is read more than once; write it to a file first.")
    return status.st_dev, status.st_ino


def _local(pattern: str, split: str, said: list[str]) -> list[str]:
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        return saved_to_disk(expanded, split) or _walked(expanded, said)
    paths = [expanded] if os.path.exists(expanded) else glob.glob(expanded, recursive=True)
    paths = [os.path.normpath(path) for path in paths if not os.path.isdir(path)]
    if not paths:
        raise ValueError(f"data_files: no file matches {pattern}; check the path.")
    return paths


def _remote(pattern: str) -> list[str]:
    """Return the addresses that an address with or without * names."""
    system, path = opening.file_system(pattern)
    try:
        if "*" not in pattern:
            system.info(path)
            return [pattern]
        found = [system.unstrip_protocol(name) for name in sorted(system.glob(path))]
    except Exception as error:  # each place has its own
        raise ValueError(
            f"data_files: {pattern} cannot be reached ({reason(error)}); check it and the network."
        ) from None
    if not found:
        raise ValueError(f"data_files: no file matches {pattern}; check the address.")
    return found


def saved_to_disk(directory: str, split: str) -> list[str]:
    """Return the Arrow files of what `datasets` saved with save_to_disk; none where directory is something else."""
    splits = os.path.join(directory, "dataset_dict.json")
    if os.path.isfile(splits):
        with open(splits, encoding="utf-8") as file:
            names = json.load(file)["splits"]
        if split not in names:
            raise ValueError(
                f"{directory}: there is no split {split!r}; set dataset_split to one of {', '.join(names)}."
            )
        directory = os.path.join(directory, split)
    state = os.path.join(directory, "state.json")
    if not os.path.isfile(state):
        return []
    with open(state, encoding="utf-8") as file:
        return [os.path.join(directory, entry["filename"]) for entry in json.load(file)["_data_files"]]


def _walked(directory: str, said: list[str]) -> list[str]:
    """Return the files below a directory that can be read; what was taken and what was left out is said."""
    rows, texts, left_out, hidden, seen = [], [], Counter(), 0, set()
    for above, below, names in os.walk(directory, followlinks=True):
        hidden += sum(name.startswith(".") for name in (*below, *names))
        seen.add(os.path.realpath(above))
        below[:] = sorted(
            name
            for name in below
            if not name.startswith((".", "__pycache__")) and os.path.realpath(os.path.join(above, name)) not in seen
        )
        for name in sorted(name for name in names if not name.startswith(".")):
            kind = KINDS.get(opening.extension(name))
            if kind is None or (kind == "json" and _matches(name, DESCRIBING)):
                left_out[opening.extension(name) or name] += 1
            else:
                (texts if kind == "text" else rows).append(os.path.normpath(os.path.join(above, name)))
    if rows:  # a page that lies beside them is no document
        beside = [path for path in texts if _matches(os.path.basename(path), BESIDE)]
        left_out.update(map(os.path.basename, beside))
        texts = [path for path in texts if path not in beside]
    if rows and texts:
        raise ValueError(
            f"data_files: {directory} holds rows ({_counted(rows)}) and whole texts ({_counted(texts)}); say which: "
            f"{directory}/**/*{opening.extension(rows[0])} or {directory}/**/*{opening.extension(texts[0])}."
        )
    taken = rows or texts
    beside = ", ".join(f"{count:,} {what}" for what, count in left_out.most_common(8))
    left = f"; left out {beside}" if beside else ""
    left += f"; {hidden:,} hidden" if hidden else ""
    if not taken:
        raise ValueError(f"data_files: {directory} holds nothing that can be read ({SHOWN_KINDS}){left}.")
    said.append(f"data_files: of {directory} taken {_counted(taken)}{left}.")
    return taken


def _matches(name: str, patterns: tuple) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern) for pattern in patterns)


def _counted(paths: list[str]) -> str:
    counts = Counter(map(opening.extension, paths))
    return ", ".join(f"{count:,} {extension}" for extension, count in counts.most_common(8))


def describe(paths: list[str], show: bool = False) -> list[dict] | dict:
    """Return name, bytes and sha256 of each file, of an address what its place says; of very many their sum.

    show: A bar over the bytes that are hashed. A file is hashed once a process.
    """
    from tqdm import tqdm

    sizes = [0 if opening.is_remote(path) else os.path.getsize(path) for path in paths]
    described = []
    with tqdm(total=sum(sizes), desc="hashing the text", unit="B", unit_scale=True, disable=not show, delay=2) as bar:
        for path, size in zip(paths, sizes, strict=True):
            described.append(_described_remote(path) if opening.is_remote(path) else _described(path))
            bar.update(size)
    if len(described) <= MANY:
        return described
    lines = "".join(f"{json.dumps(entry, sort_keys=True)}\n" for entry in described)
    return {"files": len(paths), "bytes": sum(sizes), "sha256": hashlib.sha256(lines.encode("utf-8")).hexdigest()}


def _described(path: str) -> dict:
    status = os.stat(path)
    return dict(_hashed(path, status.st_size, status.st_mtime_ns, status.st_ino))


@functools.lru_cache(maxsize=100_000)
def _hashed(path: str, size: int, changed: int, number: int) -> dict:
    return describe_file(path)


def _described_remote(name: str) -> dict:
    """Return an address without what is secret in it, its bytes, and what tells its versions apart."""
    system, path = opening.file_system(name)
    info = system.info(path)
    marks = {key: str(info[key]) for key in ("ETag", "etag", "blob_id", "md5", "generation") if info.get(key)}
    parts = urlsplit(name)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return {"name": shown, "bytes": info.get("size")} | marks
