"""Which checkpoint counts: one whose manifest.json, written last, vouches for every file in it.

Trainer writes straight into checkpoint-N and looks only at directory names when it resumes; a run killed while saving
then dies on its own newest checkpoint (transformers 5.23). Here the manifest is the commit point.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch.distributed as dist

MANIFEST = "manifest.json"
_STEP = re.compile(r"checkpoint-(\d+)")
_RANK = re.compile(r"rng_state_(\d+)\.|(?:pp|dp)_rank_(\d+)_")


def by_step(output_dir):
    """Checkpoint directories of a run, newest step first: [(step, path)]."""
    found = [(_STEP.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def describe(path):
    """A file's size and sha256, after the disk has it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": os.path.getsize(path), "sha256": digest}


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
        partial = checkpoint / f".{MANIFEST}.partial"
        with open(partial, "w", encoding="utf-8") as file:
            json.dump({"world_size": world_size, **facts, "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, checkpoint / MANIFEST)
        _sync_directory(checkpoint)
    if world_size > 1:
        dist.barrier()  # nothing of an older checkpoint goes before this one counts


def _sync_directory(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    for name, entry in manifest["files"].items():
        path = Path(checkpoint, name)
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise ValueError(f"{path} is damaged: {size} bytes, its manifest says {entry['bytes']}")
        if (found := describe(path)["sha256"]) != entry["sha256"]:
            raise ValueError(f"{path} is damaged: sha256 {found[:12]}, its manifest says {entry['sha256'][:12]}")
    return manifest


class Damaged(ValueError):
    """There are finished checkpoints, and not one is whole."""


def choose(output_dir, resume, trust, same):
    """The checkpoint to go on from.

    Args:
        resume: auto (the newest whole one), never, or a checkpoint's path.
        trust: Load a path that no manifest vouches for.
        same: See check_same_run.

    Returns:
        (path or None to start fresh, sentences on those passed over). None: nothing was ever finished here.

    Raises:
        Damaged: No whole one is left, or the path is damaged.
        ValueError: The path is none, the checkpoint is another run's, or never was said and there is one.
    """
    finished = [path for _, path in by_step(output_dir) if (path / MANIFEST).is_file()]
    if resume == "never":
        if finished:
            raise ValueError(
                f"resume = never, but output_dir = {output_dir} holds {finished[0]}: name another output_dir."
            )
        return None, []
    if resume == "auto":
        found, passed = find_resumable(output_dir)
    else:
        found, passed = Path(resume), []
        if not found.is_dir():
            raise ValueError(f"resume = {resume} is not auto, never or a directory.")
        if not trust:
            try:
                verify(found)
            except ValueError as error:
                raise Damaged(f"resume = {resume}: {error}; trust_checkpoint=true loads it all the same.") from None
    manifest = read_manifest(found) if found else None
    if manifest:
        check_same_run(found, manifest, same)
    return (str(found) if found else None), passed


def find_resumable(output_dir):
    """The newest whole checkpoint's path or None, and sentences on those passed over; Damaged as `choose`."""
    passed, damaged = [], None
    for _, path in by_step(output_dir):
        if not (path / MANIFEST).is_file():
            passed.append(f"{path} was passed over: it was never finished (no {MANIFEST}).")
            continue
        try:
            verify(path)
        except ValueError as error:
            damaged = str(error)
            passed.append(f"{path} was passed over: {error}.")
            continue
        return path, passed
    if damaged:
        raise Damaged(f"no checkpoint in {output_dir} is whole: {damaged}. Restore it, or name another output_dir.")
    return None, passed


def check_same_run(checkpoint, manifest, facts):
    """Refuse to go on with another run than the checkpoint's.

    Args:
        manifest: The checkpoint's.
        facts: {key: value} of what this command would train; each key that the manifest has must agree.

    Raises:
        ValueError: Names the first key that differs and both values.
    """
    saved = {"world_size": manifest["world_size"], **manifest.get("same", {})}
    for key, value in json.loads(json.dumps(facts)).items():
        if key in saved and saved[key] != value:
            raise ValueError(
                f"{checkpoint} was trained with {key} = {json.dumps(saved[key])}, now it is {json.dumps(value)}: set "
                "it back to go on with that run, or start a new one in another output_dir."
            )


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
