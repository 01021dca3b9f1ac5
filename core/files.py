"""Files: JSON whole or not at all, and what a file is."""

import hashlib
import json
import os
from pathlib import Path


def write_json(path: Path, values) -> None:
    """Write a JSON file: whole or not at all, on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(values, sort_keys=True) + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: str | os.PathLike) -> None:
    """Have a file or directory reach the disk before anything that names it does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_file(path: str | os.PathLike) -> dict:
    """Return a file's base name, bytes and sha256."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": os.path.basename(path), "bytes": os.path.getsize(path), "sha256": digest}
