"""Shards: the parts of a set as they are written, each whole or absent, so that a killed preparation goes on.

Beside the set's directory stands `.NAME.partial`: in `set/` what the set will hold, and a record (JSON) and the
unigram counts of each finished shard. A file without a record is of a shard that was cut off and is written anew.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from smolpretrain.core.files import describe_file, lock, sync, write_json

from ..read.held_out import is_held_out
from ..read.long_text import LongText
from ..tokens.encoding import Encoder
from ..tokens.tokenization import token_dtype
from .audit import Audit
from .feed import Encoded, Feed
from .manifest import Manifest, documents_name
from .packing import document_starts, make_packer

TRAIN = "train"
SHARD_BYTES = 256 * 2**20  # of text in one shard: what a kill costs at most
RECORD_BATCH_TOKENS = 2**20  # tokens in one Arrow record batch (2 MiB at 2 bytes)
COUNTED = ("documents", "tokens", "bytes", "blocks", "padding_tokens", "documents_cut", "document_pieces")


class SplitWriter:
    """Packs one split of a shard and writes its Arrow IPC stream of {input_ids: fixed_size_list[block_size]}."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.counts = dict.fromkeys(COUNTED, 0)
        self.packer = make_packer(manifest.block_size, manifest.packing, manifest.eos_token_id)
        self._eos, self._dtype = manifest.eos_token_id, token_dtype(manifest.vocab_size)
        self._rows = [np.empty((0, manifest.block_size), dtype=self._dtype)]
        self._rows_per_batch = max(1, RECORD_BATCH_TOKENS // manifest.block_size)
        self._schema = pa.schema({"input_ids": pa.list_(pa.from_numpy_dtype(self._dtype), manifest.block_size)})
        self._file = self._stream = None

    def add(self, ids: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        self.counts["documents"] += len(lengths)
        self.counts["bytes"] += text_bytes
        self._take(self.packer.add(ids.astype(self._dtype, copy=False), lengths))

    def _take(self, rows: np.ndarray) -> None:
        self.counts["document_pieces"] += int(document_starts(rows, self._eos).sum()) if len(rows) else 0
        self._rows.append(rows)
        if sum(map(len, self._rows)) >= self._rows_per_batch:
            self._write(last=False)

    def _write(self, last: bool) -> None:
        """Write record batches of one size, so that the file's bytes depend on the text alone."""
        full = [rows for rows in self._rows if len(rows)]
        rows = full[0] if len(full) == 1 else np.concatenate([*full, self._rows[0][:0]])  # one may be of 100 MB
        while len(rows) >= self._rows_per_batch or (last and len(rows)):
            if self._stream is None:
                self._file = open(self.path, "wb")  # noqa: SIM115 (closed by close)
                self._stream = pa.ipc.new_stream(self._file, self._schema)
            batch, rows = rows[: self._rows_per_batch], rows[self._rows_per_batch :]
            blocks = pa.FixedSizeListArray.from_arrays(pa.array(batch.reshape(-1)), batch.shape[1])
            self._stream.write_batch(pa.record_batch([blocks], schema=self._schema))
        self._rows = [rows.copy()]

    def finish(self) -> dict:
        """Write what is left; return the counts, the tail that fills no row, and the file (None if no row is full)."""
        self._take(self.packer.finish())
        self._write(last=True)
        self.close()
        packer = self.packer
        self.counts |= {"tokens": packer.tokens, "blocks": packer.blocks, "padding_tokens": packer.padding_tokens}
        self.counts["document_pieces"] -= packer.padding_tokens  # padding is EOS after EOS, a start each
        self.counts["documents_cut"] = packer.documents_cut
        made = self.path.name if packer.blocks else None
        return self.counts | {"tail": packer.tail.tolist(), "file": made}

    def close(self) -> None:
        if self._file is not None and not self._file.closed:
            self._stream.close()
            self._file.close()


class JsonLinesWriter:
    """Writes JSON lines into a file that is made with the first of them."""

    def __init__(self, path: Path):
        self.path, self._file = path, None

    @property
    def opened(self) -> bool:
        return self._file is not None

    def _open(self):
        if self._file is None:
            self._file = open(self.path, "w", encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by close)
        return self._file

    def write(self, row: dict) -> None:
        self._open().write(json.dumps(row, ensure_ascii=False) + "\n")

    def write_text(self, text: str | LongText) -> None:
        """Write {"text": text}; a long one piece by piece."""
        if isinstance(text, str):
            self.write({"text": text})
            return
        self._open().write('{"text": "')
        for piece in text.pieces():
            self._file.write(json.dumps(piece, ensure_ascii=False)[1:-1])
        self._file.write('"}\n')

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class ShardWriter:
    """Writes one shard: its splits' rows, the held-out texts, the unigram counts, and last its record.

    Args:
        split: All of a held-out set's documents go there. Of "train" a fraction goes to "validation", if one is asked.
    """

    def __init__(self, work: Path, part: int, number: int, manifest: Manifest, encode: Encoder, split: str = TRAIN):
        self.work, self.name, self.manifest, self.split = work, f"{part:05d}-{number:05d}", manifest, split
        self._encode = encode
        own = "validation" in manifest.options
        self.names = (split,) if own else manifest.split_names
        self.splits = [SplitWriter(work / "set" / f"{name}-{self.name}.arrow", manifest) for name in self.names]
        self.bytes = 0
        self._audit = Audit(encode)
        self._counts = np.zeros(manifest.vocab_size, dtype=np.int64)
        texts = documents_name("validation" if split == TRAIN else split)
        self._texts = JsonLinesWriter(work / "set" / f"{texts}-{self.name}.jsonl")
        self._dropped = JsonLinesWriter(work / "set" / f"decontaminated-{self.name}.jsonl")
        self._passed = JsonLinesWriter(work / f"skipped_rows-{self.name}.jsonl")

    def add(self, batch: Encoded) -> None:
        for dropped in batch.beside.dropped:
            self._dropped.write(dropped.entry())
        for row in batch.beside.passed:
            self._passed.write(row)
        if not batch.texts:
            return
        self._audit.add(batch.texts, batch.ids, batch.lengths, last_cut="max_tokens" in self.manifest.options)
        sizes, held = np.empty(len(batch.texts), dtype=np.int64), np.zeros(len(batch.texts), dtype=bool)
        fraction = self.manifest.held_out_below
        for number, text in enumerate(batch.texts):
            utf8 = text.encode("utf-8")
            sizes[number], in_validation = len(utf8), self.split != TRAIN or (fraction and is_held_out(utf8, fraction))
            del utf8
            if in_validation:
                held[number] = True
                self._texts.write_text(text)
        self.bytes += int(sizes.sum())
        if not held.any():
            self._add_train(batch.ids, batch.lengths, sizes)
            return
        of_held = np.repeat(held, batch.lengths)
        if not held.all():
            self._add_train(batch.ids[~of_held], batch.lengths[~held], sizes[~held])
        self.splits[-1].add(batch.ids[of_held], batch.lengths[held], int(sizes[held].sum()))

    def _add_train(self, ids: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> None:
        for at in range(0, len(ids), RECORD_BATCH_TOKENS):  # bincount takes 8 bytes a token
            self._counts += np.bincount(ids[at : at + RECORD_BATCH_TOKENS], minlength=len(self._counts))
        self.splits[0].add(ids, lengths, int(sizes.sum()))

    def finish(self, state: dict, last: bool) -> None:
        splits = {name: writer.finish() for name, writer in zip(self.names, self.splits, strict=True)}
        self.close()
        paths = [self.work / "set" / split["file"] for split in splits.values() if split["file"]]
        paths += [writer.path for writer in (self._texts, self._dropped) if writer.opened]
        np.save(self.work / f"counts-{self.name}.npy", self._counts)
        beside = [self.work / f"counts-{self.name}.npy", *([self._passed.path] if self._passed.opened else [])]
        for path in [*paths, *beside]:
            sync(path)
        record = {"splits": splits, "files": [describe_file(path) for path in paths], "bytes": self.bytes}
        record |= {"texts": self._texts.path.name if self._texts.opened else None, "backend": self._encode.backend}
        record |= {"dropped": self._dropped.path.name if self._dropped.opened else None}
        record |= {"passed": self._passed.path.name if self._passed.opened else None}
        record |= {"audit": self._audit.documents, "state": state, "last": last}
        write_json(self.work / f"shard-{self.name}.json", record)

    def close(self) -> None:
        for writer in (*self.splits, self._texts, self._dropped, self._passed):
            writer.close()


def records(work: Path, part: int) -> list[dict]:
    """Return the records of a part's finished shards, in order; a record whose files are not whole ends the list."""
    found = []
    while (path := work / f"shard-{part:05d}-{len(found):05d}.json").is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        files = [(work / "set" / entry["name"], entry["bytes"]) for entry in record["files"]]
        if not all(file.is_file() and file.stat().st_size == size for file, size in files):
            break
        found.append(record)
    return found


def is_done(work: Path, part: int) -> bool:
    return bool((found := records(work, part)) and found[-1]["last"])


def write_part(
    work: Path,
    part: int,
    open_feed: Callable[[dict | None, int], Feed],
    manifest: Manifest,
    encode: Encoder,
    tick=None,
    split: str = TRAIN,
) -> None:
    """Write the shards of a part that are not there yet.

    Args:
        open_feed: From a feed's state (None: the start) and the number of finished shards to the feed.
        encode: The one that the feed encodes with: its name is for the record, and it is audited.
        tick: Called with each batch.
        split: See `ShardWriter`.

    Raises ValueError where another process is at this part, Disagreement where the ids are not the model's.
    """
    with _alone(work, part):
        done = records(work, part)
        if done and done[-1]["last"]:
            return
        feed = open_feed(done[-1]["state"] if done else None, len(done))
        shard = ShardWriter(work, part, len(done), manifest, encode, split)
        number = len(done)
        try:
            for batch in feed:
                shard.add(batch)
                if tick is not None:
                    tick(batch)
                if shard.bytes >= SHARD_BYTES:
                    feed.end_shard()
                    shard.finish(feed.state(), False)
                    number += 1
                    shard = ShardWriter(work, part, number, manifest, encode, split)
                del batch
            shard.finish(feed.state() | {"report": feed.report()}, True)
        finally:
            shard.close()
            feed.close()


@contextlib.contextmanager
def _alone(work: Path, part: int) -> Iterator[None]:
    """Hold a part's lock; the kernel lets it go with the process, however that ends."""
    with open(work / f"part-{part:05d}.lock", "w") as file:
        try:
            lock(file, alone=True)
        except BlockingIOError:
            raise ValueError(
                f"part {part} of {work} is being prepared by another process; wait for it, or end it."
            ) from None
        yield
