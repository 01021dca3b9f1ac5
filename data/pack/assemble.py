"""Assemble: the finished shards of a partial set to the set itself, the same for every number of workers."""

import os
import shutil
from pathlib import Path

import numpy as np

from smolpretrain.core.files import describe_file, sync

from ..read.documents import Tally
from .audit import summarize
from .manifest import Manifest
from .packing import Packer
from .partial import TOKENIZERS_ONLY
from .shards import COUNTED, TRAIN, SplitWriter, records

UNIGRAM_COUNTS = "unigram_counts.npy"
SKIPPED_ROWS = "skipped_rows.jsonl"


def assemble(work: Path, target: Path, parts: int, manifest: Manifest) -> Manifest:
    """Join the shards' tails into rows, sum the counts, write the manifest last, and rename the set into its place.

    Raises:
        ValueError: No text, fewer tokens than one block, nothing held out; the partial set is then removed.
    """
    shards = [record for part in range(parts) for record in records(work, part)]
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    for path in sorted(work.glob("counts-*.npy")):
        counts += np.load(path)
    np.save(work / "set" / UNIGRAM_COUNTS, counts)
    files = {entry["name"]: entry for record in shards for entry in record["files"]}
    for split in manifest.split_names:
        found = [record["splits"][split] for record in shards if split in record["splits"]]
        manifest.splits[split] = _join(work / "set", split, found, manifest)
    manifest.validation_documents = [record["texts"] for record in shards if record["texts"]]
    manifest.decontaminated = [record["dropped"] for record in shards if record["dropped"]]
    _join_passed(work, [record["passed"] for record in shards if record.get("passed")])
    _sum_reports(manifest, [found[-1]["state"]["report"] for part in range(parts) if (found := records(work, part))])
    manifest.audit = summarize(shards, len(list(work.glob(TOKENIZERS_ONLY))))
    check_splits(manifest)
    own = {SKIPPED_ROWS} if (work / "set" / SKIPPED_ROWS).exists() else set()
    own |= {name for split in manifest.splits.values() for name in split["files"]} | {UNIGRAM_COUNTS}
    own |= {str(path.relative_to(work / "set")) for path in (work / "set").glob("tokenizer/*")}
    for name in sorted(own - set(files)):
        sync(work / "set" / name)
        files[name] = describe_file(work / "set" / name)
    for path in (work / "set").iterdir():  # of shards that were cut off
        if path.is_file() and path.name not in files:
            path.unlink()
    manifest.files = {name: {key: files[name][key] for key in ("bytes", "sha256")} for name in sorted(files)}
    manifest.save(work / "set")
    os.rename(work / "set", target)  # onto nothing, or an empty directory
    sync(target.parent)
    shutil.rmtree(work)
    return manifest


def _join(directory: Path, split: str, shards: list[dict], manifest: Manifest) -> dict:
    """Return a split's entry; what its shards left over is laid end to end and cut into rows of one more file."""
    entry = {name: sum(shard[name] for shard in shards) for name in COUNTED}
    entry["files"] = [shard["file"] for shard in shards if shard["file"]]
    tails = [np.array(shard["tail"], dtype=np.int64) for shard in shards if shard["tail"]]
    last = SplitWriter(directory / f"{split}-tail.arrow", manifest)
    last.packer = Packer(manifest.block_size)  # tails are concat's; best_fit has none
    for tail in tails:
        last.add(tail, np.array([len(tail)]), 0)
    joined = last.finish()
    for name in ("blocks", "documents_cut", "document_pieces"):
        entry[name] += joined[name]
    entry["files"] += [joined["file"]] if joined["file"] else []
    entry["remainder_tokens"] = len(joined["tail"])
    room = entry["blocks"] * manifest.block_size
    entry["fill"] = round(1 - entry["padding_tokens"] / room, 6) if room else 0.0
    pieces = entry.pop("document_pieces")
    entry["documents_per_block"] = round(pieces / entry["blocks"], 3) if entry["blocks"] else 0.0
    return entry


def _join_passed(work: Path, names: list[str]) -> None:
    """Lay the shards' lists of rows without text end to end, where there is one."""
    if not names:
        return
    with open(work / "set" / SKIPPED_ROWS, "wb") as joined:
        for name in names:
            with open(work / name, "rb") as one:
                shutil.copyfileobj(one, joined)


def _sum_reports(manifest: Manifest, reports: list[dict]) -> None:
    tally = Tally()
    for report in reports:
        tally.add(Tally(**report["tally"]))
    manifest.rows, manifest.skipped_rows, manifest.missing_rows = tally.rows, tally.skipped, tally.missing
    manifest.eos_appended = tally.eos_appended
    manifest.bad_rows = {"rows": tally.bad, "first": tally.first_bad} if tally.bad else {}
    for report in reports:
        manifest.mixture = report.get("mixture", manifest.mixture)
        for name, count in report["filtered"].items():
            manifest.filtered[name] = manifest.filtered.get(name, 0) + count


def check_splits(manifest: Manifest) -> None:
    train, own = manifest.splits[TRAIN], "validation" in manifest.options
    held_out = sum(entry["documents"] for split, entry in manifest.splits.items() if split != TRAIN)
    documents = train["documents"] + (0 if own else held_out)
    if not documents:
        blank = f" ({words})" if (words := manifest.tally.words) else ""
        column = f"text_column {manifest.source.get('text_column', 'text')!r}"
        if left_out := sum(manifest.filtered.values()):
            kinds = ", ".join(f"{name} {count:,}" for name, count in manifest.filtered.items())
            raise ValueError(f"Cleaning left none of {left_out:,} documents ({kinds}); ask for less of it.")
        for entry in manifest.mixture:
            if not entry["documents"]:
                blank = f": {entry['source']} gave no document{blank}"
                break
        raise ValueError(f"The corpus is empty{blank}; give a dataset or files with text in {column}.")
    for name, split in manifest.held_out.items() if own else ():
        if not manifest.splits[split]["blocks"]:
            raise ValueError(
                f"the held-out set {name} holds {manifest.splits[split]['tokens']} tokens, a row takes block_size = "
                f"{manifest.block_size}: give more text."
            )
    if manifest.validation_fraction and not held_out:
        raise ValueError(
            f"validation_fraction {manifest.validation_fraction} held out none of {documents} documents: raise it, "
            "or set it to 0 to train without a held-out split, and give another prepared_dir. What was encoded is kept."
        )
    if not train["blocks"]:
        raise ValueError(
            f"One block needs {manifest.block_size} tokens, the training documents hold {train['tokens']}; "
            "give more text or lower block_size."
        )
