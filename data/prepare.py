"""Prepare a set: documents to packed blocks on disk, whole or absent, resumable, in bounded memory.

python data/prepare.py [prepare.json] [key=value ...]       --help lists the keys
"""

import functools
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__" and not __package__:  # python data/prepare.py: sys.path[0] is data/
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "data"

import numpy as np

from . import shards
from .assemble import UNIGRAM_COUNTS, assemble
from .cleaning import Cleaner, Cleaning, Seen
from .corpus import is_validation
from .documents import Documents, MixedDocuments
from .encoding import Disagreement, Encoder, check_backend
from .feed import Feed, Limits, Source
from .manifest import Manifest, verify
from .mixing import Mixture
from .packing import check_packing, make_packer
from .partial import TOKENIZERS_ONLY, in_use, open_partial, prepared_already
from .progress import Progress
from .readers import Rows
from .tokenization import token_dtype, tokenizer_hash, vocabulary_size

LIBRARIES = ("datasets", "numpy", "pyarrow", "tokenizers", "transformers")


@dataclass
class Work:
    """What every worker needs; pickled for those in processes of their own."""

    directory: Path
    parts: list
    tokenizer: object
    manifest: Manifest
    tokenizer_backend: str
    limits: Limits = field(default_factory=Limits)
    cleaning: Cleaning = field(default_factory=Cleaning)

    @property
    def fallen_back(self) -> Path:
        """Stands there once tokie disagreed in the middle: what it had encoded is done again by `tokenizers`."""
        return self.directory / TOKENIZERS_ONLY

    def write(self, numbers: Iterable[int], progress: Progress) -> None:
        """Write these parts; the whole of what this worker did is done again where tokie disagrees on the way."""
        numbers = list(numbers)
        try:
            self.write_once(numbers, progress)
        except Disagreement as error:
            progress.say(f"tokenizer: from the start again with `tokenizers` itself, not the faster tokie: {error}.")
            self.write_once(numbers, progress)

    def write_once(self, numbers: list[int], progress: Progress) -> None:
        """Write these parts. Raises Disagreement where tokie disagrees on the way; the next time does without it."""
        backend = "tokenizers" if self.fallen_back.exists() else self.tokenizer_backend
        encode = Encoder(self.tokenizer, backend, progress.say)
        if backend != self.tokenizer_backend:
            self._forget(numbers)
        try:
            for number in numbers:
                self._write_part(number, encode, progress)
        except Disagreement as error:
            if self.tokenizer_backend == "tokie":
                raise ValueError(f"tokenizer_backend tokie cannot serve: {error}; set it to auto.") from None
            shards.write_json(self.fallen_back, str(error))
            raise

    def _forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            for at, record in enumerate(shards.records(self.directory, number)):
                if record["backend"] != "tokenizers":
                    (self.directory / f"shard-{number:05d}-{at:05d}.json").unlink()
                    (self.directory / f"counts-{number:05d}-{at:05d}.npy").unlink()

    def _write_part(self, number: int, encode: Encoder, progress: Progress) -> None:
        def open_feed(state: dict | None, shard: int) -> Feed:
            seen = Seen(self.directory / f"seen-{number:05d}.sqlite", shard) if self.cleaning.deduplicate else None
            source = open_source(self.parts[number], encode, self.cleaning, seen, (state or {}).get("source"))
            return Feed(source, self.limits, self._is_held_out, seen, state)

        shards.write_part(self.directory, number, open_feed, self.manifest, lambda: encode.backend, progress.tick)

    def _is_held_out(self, text: str) -> bool:
        return is_validation(text, self.manifest.validation_fraction)


def open_source(documents: Documents | MixedDocuments, encode, cleaning: Cleaning, seen: Seen | None, state):
    """Return what encodes these documents from a state on: a `Source`, or of a mixture's a `Mixture`."""
    cleaner = Cleaner(cleaning) if cleaning.by_text else None
    if isinstance(documents, MixedDocuments):

        def open_one(one: Documents, held: dict | None) -> Source:
            return Source(one, encode, cleaner, None, held)

        return Mixture(documents, open_one, seen, state)
    return Source(documents, encode, cleaner, seen, state)


def prepare(
    documents: Iterable[str],
    tokenizer,
    block_size: int,
    prepared_dir: str | os.PathLike,
    source: dict | None,
    validation_fraction: float = 0.005,
    packing: str = "concat",
    progress: bool = True,
    tokenizer_backend: str = "auto",
    max_documents: int | None = None,
    max_tokens: int | None = None,
    cleaning: dict | None = None,
    num_proc: int = 1,
    shard_index: int = 0,
    num_shards: int = 1,
    save_tokenizer: bool = False,
    only_merge: bool = False,
    say: Callable[[str], None] = print,
) -> Manifest | None:
    """Write the set, or find it already there. A preparation that was killed goes on from its last finished shard.

    Args:
        documents: `corpus.read_documents`'s, or any iterable of texts, none blank, the same at every start.
        tokenizer: See `tokenization.load_tokenizer`.
        prepared_dir: Absent, empty, or a set of the same identity, which is used as it is.
        source: What `corpus.describe_source` says; part of the identity, so that another text is noticed. None: a set
            is there, of whatever text, and used as it is.
        progress: Show a bar.
        tokenizer_backend: See `encoding.Encoder`.
        max_documents, max_tokens: See `feed.Limits`.
        cleaning: Keyword arguments of `cleaning.Cleaning`.
        num_proc: Processes of this machine that share the parts. A bounded, mixed or deduplicated corpus is one part.
        shard_index, num_shards: This machine's number, from 0, of those that share the parts and prepared_dir. With
            more than one, the set is joined by `prepare.py --merge` afterwards.
        save_tokenizer: Keep the tokenizer in the set, in tokenizer/.
        only_merge: Write no part: join those that are there, once all are.

    Returns:
        The manifest; None where other machines' parts are not to be waited for.

    Raises:
        ValueError: A bad argument, no text, fewer tokens than one block, nothing held out, a set of another identity or
            a damaged one in prepared_dir.
        OSError: The disk is full or cannot be written.
    """
    if not 0 <= shard_index < num_shards:
        raise ValueError(f"shard_index must be at least 0 and below num_shards = {num_shards}, got {shard_index}.")
    limits, cleaning = Limits(max_documents, max_tokens), Cleaning(**(cleaning or {}))
    one_part = limits or cleaning.deduplicate or isinstance(documents, MixedDocuments)
    if one_part and num_shards > 1:
        raise ValueError(
            "max_documents, max_tokens, deduplicate and mixture look at one stream of documents: set num_shards to 1."
        )
    options = {name: value for name, value in asdict(limits).items() if value is not None} | cleaning.describe()
    manifest = plan(tokenizer, block_size, source, validation_fraction, packing, options)
    check_backend(tokenizer_backend)
    target = Path(os.path.realpath(prepared_dir))
    if (found := prepared_already(target, manifest)) is not None:
        return found
    if source is None:
        raise ValueError(f"{prepared_dir} is not a prepared set; name the text to prepare it from.")
    if not isinstance(documents, Documents | MixedDocuments):
        documents = Documents([Rows("documents", functools.partial(iter, documents))])
    if cleaning.by_text:
        Cleaner(cleaning)  # its checks, before a directory is made
    parts = [documents] if one_part else documents.parts()
    work = Work(open_partial(target, manifest), parts, tokenizer, manifest, tokenizer_backend, limits, cleaning)
    with in_use(work.directory):
        if not only_merge:
            _write_parts(work, shard_index, num_shards, num_proc, Progress(progress, documents.bytes, say))
        if num_shards > 1 and not only_merge:
            return None
        if save_tokenizer:
            tokenizer.save_pretrained(work.directory / "set" / "tokenizer")
        return merge(work.directory, target, len(parts), manifest)


def plan(
    tokenizer, block_size: int, source: dict | None, validation_fraction: float, packing: str, options: dict
) -> Manifest:
    """Return the manifest of a set to be made: what decides its tokens. Raises ValueError: a bad argument."""
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, got {validation_fraction}.")
    check_packing(packing)
    make_packer(block_size, packing, tokenizer.eos_token_id)  # its checks, before a directory is made
    return Manifest(
        source=source,
        validation_fraction=validation_fraction,
        tokenizer_hash=tokenizer_hash(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=vocabulary_size(tokenizer),
        block_size=block_size,
        packing=packing,
        options=options,
        versions={"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    )


def _write_parts(work: Work, shard_index: int, num_shards: int, num_proc: int, progress: Progress) -> None:
    numbers = range(shard_index, len(work.parts), num_shards)
    num_proc = min(num_proc, len(numbers))
    with progress:
        if num_proc < 2:
            work.write(numbers, progress)
            return
        import multiprocessing

        with ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn")) as pool:
            shares = [pool.submit(_write_share, work, numbers[at::num_proc], num_proc) for at in range(num_proc)]
            for share in shares:
                progress.add(*share.result())


def _write_share(work: Work, numbers: range, num_proc: int) -> tuple:
    os.environ["RAYON_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_proc))
    progress = Progress(False, None, print)
    work.write(numbers, progress)
    return progress.documents, progress.bytes, progress.tokens


def merge(work: Path, target: Path, parts: int, manifest: Manifest) -> Manifest:
    """Join the finished parts into the set.

    Raises ValueError naming the parts that are missing, and where the corpus cannot be a set.
    """
    missing = [number for number in range(parts) if not shards.is_done(work, number)]
    if missing:
        named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{len(missing)} of {parts} parts of {target} are not finished ({named}): prepare them first.")
    if (work / TOKENIZERS_ONLY).exists():
        for number in range(parts):
            if any(record["backend"] != "tokenizers" for record in shards.records(work, number)):
                raise ValueError(f"part {number} of {target} was encoded by tokie, which disagreed: prepare it again.")
    try:
        return assemble(work, target, parts, manifest)
    except ValueError:
        shutil.rmtree(work)
        raise


def load_blocks(prepared_dir: str | os.PathLike, split: str):
    """Open a split's blocks, memory-mapped.

    Returns:
        datasets.Dataset of {"input_ids": numpy [block_size]}, as many rows as the manifest says blocks.

    Raises:
        ValueError: Not a prepared set, or one of its files is missing or of the wrong size.
    """
    from datasets import Dataset, Features, List, Value, concatenate_datasets

    manifest = verify(prepared_dir)
    parts = [Dataset.from_file(str(Path(prepared_dir, name))) for name in manifest.splits[split]["files"]]
    if not parts:
        column = List(Value(token_dtype(manifest.vocab_size).name), length=manifest.block_size)
        parts = [Dataset.from_dict({"input_ids": []}, features=Features({"input_ids": column}))]
    return concatenate_datasets(parts).with_format("numpy")


def load_validation_documents(prepared_dir: str | os.PathLike) -> Iterator[str]:
    """Yield the held-out documents' text, in the order of the corpus. Raises ValueError as `load_blocks`."""
    manifest = verify(prepared_dir)
    for name in manifest.validation_documents:
        with open(Path(prepared_dir, name), encoding="utf-8", newline="\n") as file:
            for line in file:
                yield json.loads(line)["text"]


def load_unigram_counts(prepared_dir: str | os.PathLike) -> np.ndarray:
    """Return how often each id stands in the training documents, int64 [vocab_size]. Raises as `load_blocks`."""
    verify(prepared_dir)
    return np.load(Path(prepared_dir, UNIGRAM_COUNTS))


if __name__ == "__main__":
    from .command import main

    main()
