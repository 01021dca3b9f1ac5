"""Prepare a set: documents to packed blocks on disk, whole or absent, in one pass and bounded memory."""

import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

from .corpus import is_validation
from .manifest import Manifest, check_identity, describe_file, sync, verify
from .packing import Packer
from .tokenization import document_encoder, token_dtype, tokenizer_hash, vocabulary_size

SPLITS = ("train", "validation")
VALIDATION_DOCUMENTS = "validation_documents.jsonl"
UNIGRAM_COUNTS = "unigram_counts.npy"
BATCH_BYTES = 4 * 2**20  # text encoded at a time: enough for all cores, little memory
RECORD_BATCH_TOKENS = 2**20  # tokens in one Arrow record batch (2 MiB at 2 bytes)
LIBRARIES = ("datasets", "numpy", "pyarrow", "tokenizers", "transformers")


class _SplitWriter:
    """Packs one split and writes NAME.arrow, an Arrow IPC stream of {input_ids: fixed_size_list[block_size]}."""

    def __init__(self, directory: Path, name: str, block_size: int, packing: str, dtype: np.dtype):
        self.name = name
        self.documents = 0
        self.bytes = 0
        self.packer = Packer(block_size, packing)
        self._rows = [np.empty((0, block_size), dtype=dtype)]
        self._rows_per_batch = max(1, RECORD_BATCH_TOKENS // block_size)
        self._schema = pa.schema({"input_ids": pa.list_(pa.from_numpy_dtype(dtype), block_size)})
        self._file = open(directory / f"{name}.arrow", "wb")  # noqa: SIM115 (closed by close)
        self._stream = pa.ipc.new_stream(self._file, self._schema)

    def add(self, documents: list[np.ndarray], text_bytes: int) -> None:
        self.documents += len(documents)
        self.bytes += text_bytes
        self._rows.append(self.packer.add(documents))
        if sum(map(len, self._rows)) >= self._rows_per_batch:
            self._write(last=False)

    def _write(self, last: bool) -> None:
        """Write record batches of one size, so that the file's bytes depend on the text alone."""
        rows = np.concatenate(self._rows)
        while len(rows) >= self._rows_per_batch or (last and len(rows)):
            batch, rows = rows[: self._rows_per_batch], rows[self._rows_per_batch :]
            blocks = pa.FixedSizeListArray.from_arrays(pa.array(batch.reshape(-1)), self.packer.block_size)
            self._stream.write_batch(pa.record_batch([blocks], schema=self._schema))
        self._rows = [rows.copy()]

    def finish(self) -> dict:
        """Write what is left; return the split's entry in the manifest."""
        self._write(last=True)
        self.close()
        return {
            "documents": self.documents,
            "tokens": self.packer.tokens,
            "bytes": self.bytes,
            "blocks": self.packer.blocks,
            "remainder_tokens": self.packer.remainder,
            "files": [f"{self.name}.arrow"],
        }

    def close(self) -> None:
        if not self._file.closed:
            self._stream.close()
            self._file.close()


def prepare(
    documents: Iterable[str],
    tokenizer,
    block_size: int,
    prepared_dir: str | os.PathLike,
    source: dict,
    validation_fraction: float = 0.01,
    packing: str = "concat",
    progress: bool = True,
) -> Manifest:
    """Turn documents into packed blocks in prepared_dir, or find them already there.

    Args:
        documents: Texts, read once; their `.skipped`, if they have one, goes into the manifest.
        tokenizer: Fast tokenizer with an EOS token.
        block_size: Tokens per row.
        prepared_dir: Appears whole or not at all. A whole set of the same identity there is used as it is, and
            documents is not read (`manifest.reused`).
        source: What `corpus.describe_source` says the documents are.
        validation_fraction: Share of distinct documents held out, by hash; 0 for none.
        progress: Show a bar.

    Returns:
        The manifest, which is also in prepared_dir/manifest.json, beside train.arrow and validation.arrow (uint16 or
        uint32), validation_documents.jsonl (the held-out text) and unigram_counts.npy (int64 [vocab_size], training).

    Raises:
        ValueError: Empty corpus, fewer tokens than one block, nothing held out, a set of another identity or a damaged
            one in prepared_dir.
        OSError: The disk is full or cannot be written.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, got {validation_fraction}.")
    manifest = Manifest(
        source=source,
        validation_fraction=validation_fraction,
        tokenizer_hash=tokenizer_hash(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=vocabulary_size(tokenizer),
        block_size=block_size,
        packing=packing,
        versions={"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    )
    target = Path(os.path.realpath(prepared_dir))
    if (found := _prepared_already(target, manifest)) is not None:
        return found
    return _write_whole(target, documents, tokenizer, manifest, progress)


def _write_whole(target: Path, documents: Iterable[str], tokenizer, manifest: Manifest, progress: bool) -> Manifest:
    """Write the set in a directory beside target and rename it, so that target appears whole or not at all."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_set(partial, documents, tokenizer, manifest, progress)
        try:
            os.rename(partial, target)  # onto nothing, or an empty directory
        except OSError:
            if (found := _prepared_already(target, manifest)) is None:
                raise
            return found  # another process was faster
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _prepared_already(target: Path, wanted: Manifest) -> Manifest | None:
    """Return the manifest of a whole set of this identity, None if there is nothing; refuse anything else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    found = Manifest.load(target)
    check_identity(found, wanted, target)
    verify(target)
    found.reused = True
    return found


def _write_set(directory: Path, documents: Iterable[str], tokenizer, manifest: Manifest, progress: bool) -> None:
    """Write every file of the set, the manifest last, and fill the manifest in."""
    dtype = token_dtype(manifest.vocab_size)
    writers = [_SplitWriter(directory, name, manifest.block_size, manifest.packing, dtype) for name in SPLITS]
    try:
        counts = _write_blocks(directory, documents, document_encoder(tokenizer), manifest, writers, progress)
        manifest.splits = {writer.name: writer.finish() for writer in writers}
    finally:
        for writer in writers:
            writer.close()
    manifest.skipped_rows = getattr(documents, "skipped", 0)
    _check_splits(manifest)
    np.save(directory / UNIGRAM_COUNTS, counts)
    for path in sorted(directory.iterdir()):
        sync(path)
        entry = describe_file(path)
        manifest.files[entry["name"]] = {"bytes": entry["bytes"], "sha256": entry["sha256"]}
    manifest.save(directory)


def _write_blocks(directory: Path, documents, encode, manifest: Manifest, writers: list, progress: bool) -> np.ndarray:
    """Encode and pack batch by batch; return how often each id stands in the training documents, int64 [vocab_size]."""
    from tqdm import tqdm

    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    start = time.monotonic()
    with (
        open(directory / VALIDATION_DOCUMENTS, "w", encoding="utf-8", newline="\n") as held_out,
        tqdm(desc="preparing", unit=" documents", disable=not progress) as bar,
    ):
        for texts in _batches(documents):
            ids = encode(texts)
            sides = [is_validation(text, manifest.validation_fraction) for text in texts]
            for writer, side in zip(writers, (False, True), strict=True):
                mine = [number for number, held in enumerate(sides) if held == side]
                writer.add([ids[number] for number in mine], sum(len(texts[number].encode()) for number in mine))
            for text, array, held in zip(texts, ids, sides, strict=True):
                if held:
                    held_out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                else:
                    counts += np.bincount(array, minlength=manifest.vocab_size)
            seconds = max(time.monotonic() - start, 1e-9)
            megabytes, tokens = (sum(writer.bytes for writer in writers) / 1e6, sum(w.packer.tokens for w in writers))
            bar.set_postfix_str(f"{megabytes / seconds:.1f} MB/s, {tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update(len(texts))
    return counts


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents up to BATCH_BYTES characters; a longer one stands alone."""
    batch, size = [], 0
    for text in documents:
        if batch and size + len(text) > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _check_splits(manifest: Manifest) -> None:
    train, validation = (manifest.splits[name] for name in SPLITS)
    documents = train["documents"] + validation["documents"]
    if not documents:
        blank = f" ({manifest.skipped_rows} rows were null or blank)" if manifest.skipped_rows else ""
        raise ValueError(f"The corpus is empty{blank}; give a dataset or files with text in {_text_column(manifest)}.")
    if manifest.validation_fraction and not validation["documents"]:
        raise ValueError(
            f"validation_fraction {manifest.validation_fraction} held out none of {documents} documents; "
            "raise it, or set it to 0 to train without a held-out split."
        )
    if not train["blocks"]:
        raise ValueError(
            f"One block needs {manifest.block_size} tokens, the training documents hold {train['tokens']}; "
            "give more text or lower block_size."
        )


def _text_column(manifest: Manifest) -> str:
    return f"text_column {manifest.source.get('text_column', 'text')!r}"


def load_blocks(prepared_dir: str | os.PathLike, split: str):
    """Open a split's blocks, memory-mapped.

    Returns:
        datasets.Dataset of {"input_ids": numpy [block_size]}, as many rows as the manifest says blocks.

    Raises:
        ValueError: Not a prepared set, or one of its files is missing or of the wrong size.
    """
    from datasets import Dataset, concatenate_datasets

    manifest = verify(prepared_dir)
    parts = [Dataset.from_file(str(Path(prepared_dir, name))) for name in manifest.splits[split]["files"]]
    return concatenate_datasets(parts).with_format("numpy")


def load_validation_documents(prepared_dir: str | os.PathLike) -> Iterator[str]:
    """Yield the held-out documents' text, in the order of the corpus. Raises ValueError as `load_blocks`."""
    verify(prepared_dir)
    with open(Path(prepared_dir, VALIDATION_DOCUMENTS), encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)["text"]


def load_unigram_counts(prepared_dir: str | os.PathLike) -> np.ndarray:
    """Return how often each id stands in the training documents, int64 [vocab_size]. Raises as `load_blocks`."""
    verify(prepared_dir)
    return np.load(Path(prepared_dir, UNIGRAM_COUNTS))
