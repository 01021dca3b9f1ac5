"""data_preparation_log.md: for people, what was prepared beside it, when, from what, and what came of it."""

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from .manifest import Manifest
from .progress import Progress

FILE_NAME = "data_preparation_log.md"


class PreparationLog:
    """Adds to the log in the directory that holds the set: not in the set, whose bytes depend on the text alone."""

    def __init__(self, target: Path):
        self._path, self._name = target.with_name(FILE_NAME), target.name

    def began(self, manifest: Manifest, finished_shards: int, share: str) -> None:
        source = json.dumps(manifest.source, ensure_ascii=False)
        asked = {"validation_fraction": manifest.validation_fraction, **manifest.options}
        went = f"Went on from {finished_shards} finished shards" if finished_shards else "Began"
        self._add(
            f"## {self._name}, {_now()}\n\n{went}{share}: rows of {manifest.block_size}, {manifest.packing}, tokenizer "
            f"{manifest.tokenizer_hash[:16]} with {manifest.vocab_size:,} tokens, {json.dumps(asked)}.\n\n"
            f"Source: `{source[:2000]}{' ...' if len(source) > 2000 else ''}`\n"
        )

    def wrote(self, progress: Progress) -> None:
        """Say what this process and its workers prepared."""
        size, seconds = progress.bytes / 1e6, progress.seconds
        self._add(
            f"{_now()}: {progress.documents:,} documents, {size:,.1f} MB, {progress.tokens:,} tokens in "
            f"{seconds:,.1f} s ({progress.tokens / seconds:,.0f} tokens/s, {size / seconds:,.1f} MB/s).\n"
        )

    @contextlib.contextmanager
    def failure(self) -> Iterator[None]:
        """Say why it ended, where it ends with an error."""
        try:
            yield
        except Exception as error:
            self._add(f"{_now()}: not finished: {' '.join(str(error).split())}\n")
            raise

    def ended(self, manifest: Manifest) -> None:
        """Say what the whole set is."""
        keys = ("documents", "tokens", "bytes", "blocks", "fill", "padding_tokens", "remainder_tokens", "documents_cut")
        rows = [["split", *(key.replace("_", " ") for key in keys), "documents per block"]]
        for name, split in manifest.splits.items():
            rows.append([name, *(f"{split[key]:,}" for key in keys), f"{split['documents_per_block']:,}"])
        parts = [_table(rows)]
        if manifest.mixture:
            keys = ("source", "weight", "realised", "documents", "tokens", "epochs_begun")
            mixed = [["source", "weight", "realised", "documents", "tokens", "epochs begun"]]
            parts.append(_table(mixed + [[str(entry[key]) for key in keys] for entry in manifest.mixture]))
        left_out = manifest.filtered | {"null or blank": manifest.skipped_rows}
        left_out |= {"bad rows": manifest.bad_rows["rows"]} if manifest.bad_rows else {}
        parts.append("Left out: " + ", ".join(f"{name} {count:,}" for name, count in left_out.items()) + ".\n")
        if manifest.bad_rows:
            parts.append(f"The first bad row: {manifest.bad_rows['first']}.\n")
        if manifest.decontaminated:
            parts.append(f"Contaminated documents are named in {', '.join(manifest.decontaminated)}.\n")
        parts.append(f"{_now()}: whole, fingerprint {manifest.fingerprint}, {len(manifest.files)} files.\n")
        self._add("\n".join(parts))

    def _add(self, text: str) -> None:
        """Append in one write, so that machines that share a directory do not mix their lines."""
        fresh = not self._path.exists()
        with open(self._path, "a", encoding="utf-8") as log:
            log.write(("# Data preparation\n\n" if fresh else "\n") + text)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _table(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"
