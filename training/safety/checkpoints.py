"""Which checkpoint counts: one whose manifest.json, written last, vouches for every file in it.

Trainer writes straight into checkpoint-N and looks only at directory names when it resumes; a run killed while saving
then dies on its own newest checkpoint (transformers 5.23). Here the manifest is the commit point.
"""

import json
import re
import shutil
from pathlib import Path

import torch.distributed as dist

from smolpretrain.core.files import describe_file, sync, write_json

MANIFEST = "manifest.json"
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
_STEP = re.compile(r"checkpoint-(0|[1-9]\d*)")
_RANK = re.compile(r"rng_state_(\d+)\.|(?:pp|dp)_rank_(\d+)_")


def by_step(output_dir):
    """Checkpoint directories of a run, newest step first: [(step, path)]."""
    found = [(_STEP.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def finished(output_dir):
    """Those that a manifest vouches for, newest step first."""
    return [path for _, path in by_step(output_dir) if (path / MANIFEST).is_file()]


def step_of(path):
    """The step in a checkpoint's name; -1 where there is none."""
    match = _STEP.fullmatch(Path(path).name)
    return int(match[1]) if match else -1


def describe(path):
    """A file's size and sha256, after the disk has it."""
    sync(path)
    return {key: value for key, value in describe_file(path).items() if key != "name"}


def commit(checkpoint, rank, world_size, **facts):
    """Make a saved checkpoint count. All ranks call; each hashes the files it wrote, the first writes the manifest.

    Args:
        checkpoint: Directory that Trainer and DeepSpeed have written, on storage that all ranks see.
        facts: What else a resumed run must know (step, tokens, data fingerprint, arguments, versions).
    """
    checkpoint = Path(checkpoint)
    if world_size > 1:
        dist.barrier()  # every rank has written
    mine = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST):
        match = _RANK.search(path.name)
        owner = int(match[1] or match[2]) if match else 0
        if owner % world_size == rank:
            mine[path.relative_to(checkpoint).as_posix()] = describe(path)
    parts = [mine]
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, mine)
    if rank == 0:
        files = {name: entry for part in parts for name, entry in sorted(part.items())}
        for directory in (checkpoint.parent, *(path for path in checkpoint.rglob("*") if path.is_dir())):
            sync(directory)  # a name that a power cut takes away takes the file along
        write_json(checkpoint / MANIFEST, {"world_size": world_size, **facts, "files": files})
    if world_size > 1:
        dist.barrier()  # nothing of an older checkpoint goes before this one counts


def read_manifest(checkpoint):
    """The manifest, or None where the checkpoint was never committed.

    Raises:
        ValueError: The manifest itself is damaged.
    """
    path = Path(checkpoint, MANIFEST)
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["files"], manifest["world_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    return manifest


def verify(checkpoint):
    """Check every byte against the manifest.

    Raises:
        ValueError: Names the first file that is missing or differs, without a remedy: the caller knows what is left.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise ValueError(f"{checkpoint} has no {MANIFEST}: it was never finished, or is not one of ours")
    for path in sorted(Path(checkpoint).rglob("*")):
        if path.suffix in PICKLES and path.relative_to(checkpoint).as_posix() not in manifest["files"]:
            raise ValueError(f"{path} is not in its {MANIFEST}: it would be unpickled, and anyone may have written it")
    for name, entry in manifest["files"].items():
        path = Path(checkpoint, name)
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise ValueError(f"{path} is damaged: {size} bytes, its manifest says {entry['bytes']}")
        if (found := describe(path)["sha256"]) != entry["sha256"]:
            raise ValueError(f"{path} is damaged: sha256 {found[:12]}, its manifest says {entry['sha256'][:12]}")
    return manifest


def rotate(output_dir, limit, keep_every=0):
    """Remove whole checkpoints beyond the newest `limit` by step; call it after the newest is committed.

    Unfinished directories are neither counted nor removed: the next save of their step replaces them. Steps that
    are multiples of keep_every stay for good.

    Returns:
        A sentence for each directory that could not be removed.
    """
    if limit is None:
        return []
    failed = []
    whole = [(step, path) for step, path in by_step(output_dir) if (path / MANIFEST).is_file()]
    for step, path in whole[limit:]:
        if keep_every and step % keep_every == 0:
            continue
        try:
            (path / MANIFEST).unlink()  # first: what is half removed must not count
            shutil.rmtree(path)
        except OSError as error:
            failed.append(f"{path} could not be removed ({error.strerror}): it still takes disk space.")
    return failed
