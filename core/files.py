"""Files: JSON whole or not at all, rows of JSON lines, and what a file is."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file: whole or not at all, on the disk when this returns."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # where the disk was full
    sync(path.parent)


def write_json(path: str | os.PathLike, values: Any, *, indent: int | None = 2, sort_keys: bool = False) -> None:
    """Write a JSON file as write_text does; text as it is, unless it has half a surrogate pair."""
    text = json.dumps(values, indent=indent, sort_keys=sort_keys, ensure_ascii=False)
    if not text.isascii() and text.encode("utf-8", "replace").decode() != text:
        text = json.dumps(values, indent=indent, sort_keys=sort_keys)
    write_text(path, text + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: It is no JSON; OSError where it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: it is no JSON ({error}).") from error


class Rows(NamedTuple):
    """The objects of a JSON lines file, and how many lines were cut short, as the last one by a kill."""

    rows: list[dict]
    cut: int


def read_rows(path: str | os.PathLike, *, strict: bool = True) -> Rows:
    """Read a JSON lines file; none where there is no file. Bytes that are no UTF-8 become U+FFFD.

    Args:
        strict: Only the last line may be damaged; else any may, and is counted.

    Raises:
        ValueError: A line before the last is no JSON.
    """
    path, rows, cut = Path(path), [], 0
    lines = path.read_bytes().splitlines() if path.is_file() else []  # of text they would part at U+2028 too
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line.decode("utf-8", "replace")))
        except ValueError as error:
            if strict and number < len(lines):
                raise ValueError(f"{path}: line {number} is no JSON ({error}).") from error
            cut += 1
    return Rows([row for row in rows if isinstance(row, dict)], cut)


def sync(path: str | os.PathLike) -> None:
    """Have a file or directory reach the disk before anything that names it does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: Any, alone: bool = False) -> bool:
    """Lock an open file, shared or, not waiting, alone; the kernel lets it go with the process.

    Returns False where the storage has no locks. Raises BlockingIOError where another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def describe_file(path: str | os.PathLike) -> dict[str, Any]:
    """Return a file's base name, bytes and sha256."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": os.path.basename(path), "bytes": os.path.getsize(path), "sha256": digest}


def digest(values: Mapping | list) -> str:
    """sha256 of JSON values, whatever the order of their keys; what JSON has no name for counts as its text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
