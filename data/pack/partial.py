"""Partial: the directory of a set in the making, beside its place, and what may be done with it."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from smolpretrain.core.files import lock, write_json

from .manifest import Manifest, check_identity, verify

TOKENIZERS_ONLY = "tokenizers-only-*"  # see tokenizers_only


def tokenizers_only(part: int) -> str:
    """Name the file that stands once tokie disagreed in a part: `tokenizers` does it again."""
    return TOKENIZERS_ONLY.replace("*", f"{part:05d}")


def partial_of(target: Path) -> Path:
    """Return where a set is made before it is renamed to its place."""
    return target.with_name(f".{target.name}.partial")


def open_partial(target: Path, manifest: Manifest) -> Path:
    """Make the directory of a set in the making, or find one of the same identity; refuse another's."""
    work = partial_of(target)
    (work / "set").mkdir(parents=True, exist_ok=True)
    path = work / "identity.json"
    if path.exists():
        held = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        check_identity(held, manifest, work)
        manifest.held_out_fraction = held.held_out_fraction
    else:
        write_json(path, {key: value for key, value in asdict(manifest).items() if key != "reused"})
    return work


def has_begun(target: Path) -> bool:
    """Tell whether a preparation of a set began and did not end."""
    return (partial_of(target) / "identity.json").exists()


def prepared_already(target: Path, wanted: Manifest) -> Manifest | None:
    """Return the manifest of a whole set of this identity, None if there is nothing; refuse anything else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    found = Manifest.load(target)
    if wanted.source is None:
        wanted = replace(wanted, source=found.source, options=wanted.options or found.options)
    check_identity(found, wanted, target)
    verify(target, sha256=True)
    found.reused = True
    shutil.rmtree(partial_of(target), ignore_errors=True)  # killed just after its rename
    return found


@contextlib.contextmanager
def in_use(work: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Remove a partial set that holds nothing to go on from, unless another process is at it."""
    with open(work / "in-use.lock", "w") as file:
        locked = lock(file)
        if not locked:
            say(f"{work}: its storage has no locks: nothing keeps a second process away from it; start only one.")
        try:
            yield
        finally:
            if locked and work.exists() and not any(work.glob("shard-*.json")) and not any(work.glob(TOKENIZERS_ONLY)):
                with contextlib.suppress(BlockingIOError):
                    lock(file, alone=True)
                    shutil.rmtree(work)
