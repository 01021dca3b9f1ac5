"""Prepare a set: documents to packed blocks on disk, whole or absent, resumable, in bounded memory."""

import contextlib
import errno
import functools
import os
import platform
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice, tee
from pathlib import Path

from smolpretrain.core import status

from .pack import shards
from .pack.assemble import assemble
from .pack.feed import Limits
from .pack.manifest import Manifest
from .pack.packing import check_packing, make_packer
from .pack.partial import has_begun, in_use, open_partial, prepared_already, tokenizers_only
from .pack.preparation_log import PreparationLog
from .pack.progress import Progress
from .pack.shards import TRAIN
from .pack.workers import Work, write_parts
from .read.cleaning import Cleaner, Cleaning
from .read.documents import Documents, MixedDocuments, Tally
from .read.held_out import enough
from .read.readers import Rows
from .read.ready import ReadyDocuments
from .read.validation import describe_sets, open_sets, read_over
from .tokens.encoding import check_backend
from .tokens.tokenization import document_encoder, tokenizer_hash, vocabulary_size

MIXED_LOOKED_AT = 10_000  # documents of a mixture among which one must be held out
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LIBRARIES = ("datasets", "numpy", "pyarrow", "tokenizers", "transformers")


def prepare(
    documents: Iterable[str],
    tokenizer,
    block_size: int,
    prepared_dir: str | os.PathLike,
    source: dict | None,
    validation_fraction: float | None = 0.005,
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
    ids_column: str | None = None,
    validation: dict[str, dict] | None = None,
    reading_validation: dict | None = None,
    say: Callable[[str], None] = print,
) -> Manifest | None:
    """Write the set, or find it already there. A preparation that was killed goes on from its last finished shard.

    Args:
        documents: `corpus.read_documents`'s, or any iterable of texts, none blank, the same at every start.
        tokenizer: See `tokenization.load_tokenizer`.
        prepared_dir: Absent, empty, or a set of the same identity, which is used as it is.
        source: What `corpus.describe_source` says; part of the identity, so that another text is noticed. None: a set
            is there, of whatever text, and used as it is.
        validation_fraction: None takes what the set that is there has.
        progress: Show a bar.
        tokenizer_backend: See `encoding.Encoder`.
        max_documents, max_tokens: See `feed.Limits`.
        cleaning: Keyword arguments of `cleaning.Cleaning`.
        num_proc: Processes of this machine that share the parts. A bounded, mixed or deduplicated corpus is one part.
        shard_index, num_shards: This machine's number, from 0, of those that share the parts and prepared_dir. With
            more than one, the set is joined by `prepare.py --merge` afterwards.
        save_tokenizer: Keep the tokenizer in the set, in tokenizer/.
        only_merge: Write no part: join those that are there, once all are.
        ids_column: The column holds token ids of this tokenizer: they are taken as they are, nothing is encoded.
        validation: Held-out text of the user's own; see `validation.name_sets`. It is taken whole and as it is: limits
            and cleaning are the training text's, from which the documents that stand here too are left out.
        reading_validation: How it is read: streaming, bad_rows; see `validation.open_sets`.

    Returns:
        The manifest; None where other machines' parts are not to be waited for.

    Raises:
        ValueError: A bad argument, no text, fewer tokens than one block, nothing held out, a set of another identity or
            a damaged one in prepared_dir.
        OSError: The disk is full or cannot be written.
    """
    if validation_fraction is None:
        validation_fraction = Manifest.load(prepared_dir).validation_fraction
    if not 0 <= shard_index < num_shards:
        raise ValueError(f"shard_index must be at least 0 and below num_shards = {num_shards}, got {shard_index}.")
    limits, cleaning = Limits(max_documents, max_tokens), Cleaning(**(cleaning or {}))
    one_part = limits or cleaning.deduplicate or isinstance(documents, MixedDocuments)
    if one_part and num_shards > 1:
        raise ValueError(
            "max_documents, max_tokens, deduplicate and mixture look at one stream of documents: set num_shards to 1."
        )
    options = {name: value for name, value in asdict(limits).items() if value is not None} | cleaning.describe()
    if ids_column:
        options["ids_column"] = ids_column
    if validation:
        options["validation"] = describe_sets(validation)
    manifest = plan(tokenizer, block_size, source, validation_fraction, packing, options)
    check_backend(tokenizer_backend)
    target = Path(os.path.realpath(prepared_dir))
    if (found := prepared_already(target, manifest)) is not None:
        return found
    if source is None:
        raise ValueError(f"{prepared_dir} is not a prepared set; name the text to prepare it from.")
    ready = functools.partial(
        ReadyDocuments.of,
        decode=functools.partial(tokenizer.backend_tokenizer.decode_batch, skip_special_tokens=False),
        vocab_size=manifest.vocab_size,
        eos_token_id=manifest.eos_token_id,
    )
    if ids_column:
        documents = ready(documents)
    if not isinstance(documents, Documents | MixedDocuments):
        looked_at, documents = tee(documents)
        documents = Documents([Rows("documents", functools.partial(iter, documents))])
    else:
        looked_at = _texts(documents)
    if cleaning.by_text:
        Cleaner(cleaning)  # its checks, before a directory is made
    parts = [documents] if one_part else documents.parts()
    for sentence in documents.said:
        say(sentence)
    if validation_fraction and not only_merge and not has_begun(target):
        manifest.held_out_fraction = _raised(looked_at, validation_fraction, limits, cleaning)
        if manifest.held_out_fraction is not None:
            say(f"validation_fraction {validation_fraction} would hold out no document: it is raised to hold out one.")
    del looked_at  # of an iterator it would keep every document
    splits, held_out = [TRAIN] * len(parts), None
    if validation:
        sets = open_sets(validation, **reading_validation or {})
        of_ids = {name for name, source in validation.items() if ids_column and source.get("text_column") == ids_column}
        sets = {name: ready(one) if name in of_ids else one for name, one in sets.items()}
        held_out = read_over(sets, document_encoder(tokenizer), block_size if packing == "concat" else None)
        for split, one in zip(manifest.split_names[1:], sets.values(), strict=True):
            more = one.parts()
            parts, splits = [*parts, *more], [*splits, *[split] * len(more)]
    with _disk(target):
        directory = open_partial(target, manifest)
    work = Work(directory, parts, tokenizer, manifest, tokenizer_backend, limits, cleaning, splits, held_out)
    log = PreparationLog(target)
    with _disk(target), in_use(work.directory, say), log.failure():
        if not only_merge:
            share = f" share {shard_index} of {num_shards}" if num_shards > 1 else ""
            log.began(manifest, len(list(work.directory.glob("shard-*.json"))), share)
            done = Progress(progress, documents.bytes, say)
            write_parts(work, shard_index, num_shards, num_proc, done)
            log.wrote(done)
        if num_shards > 1 and not only_merge:
            return None
        if save_tokenizer:
            tokenizer.save_pretrained(work.directory / "set" / "tokenizer")
        made = merge(work.directory, target, len(parts), manifest)
        log.ended(made)
        return made


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


def merge(work: Path, target: Path, parts: int, manifest: Manifest) -> Manifest:
    """Join the finished parts into the set.

    Raises ValueError naming the parts that are missing, and where the corpus cannot be a set.
    """
    missing = [number for number in range(parts) if not shards.is_done(work, number)]
    if missing:
        named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{len(missing)} of {parts} parts of {target} are not finished ({named}): prepare them first.")
    again = [number for number in range(parts) if (work / tokenizers_only(number)).exists()]
    for number in again:
        if any(record["backend"] != "tokenizers" for record in shards.records(work, number)):
            raise ValueError(f"part {number} of {target} was encoded by tokie, which disagreed: prepare it again.")
    try:
        return assemble(work, target, parts, manifest)
    except ValueError:
        if not manifest.splits or not manifest.splits["train"]["blocks"]:  # less than a row: nothing to go on from
            shutil.rmtree(work)
        raise


def _texts(documents: Documents | MixedDocuments) -> Iterator:
    """Yield the documents from their start, without a trace in what counts them; of a mixture the first ones."""
    if isinstance(documents, MixedDocuments):
        yield from islice(documents.over([one.over(one.readers) for one in documents.sources]), MIXED_LOOKED_AT)
        return
    for batch in documents.over(documents.readers).batches(None, Tally()):
        yield from batch.texts


def _raised(texts: Iterable, fraction: float, limits: Limits, cleaning: Cleaning) -> float | None:
    """Return what fraction must be raised to so that a document is held out; None: it does as it is.

    Raises ValueError: there is only one document.
    """
    counts, cleaner = {}, Cleaner(cleaning) if cleaning.by_text else None
    keep = (lambda some: cleaner(some, counts)[0]) if cleaner else list
    most = [sys.maxsize if limit is None else limit for limit in (limits.max_documents, limits.max_tokens)]
    raised = enough(texts, fraction, keep, *most)
    return None if raised == fraction else raised


class DiskFull(OSError):
    """No room for the set; the whole sentence."""

    status = status.NO_SPACE


@contextlib.contextmanager
def _disk(target: Path):
    """Name the directory where its disk is full."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:  # sqlite3: what is seen of duplicates
        full = error.errno in FULL if isinstance(error, OSError) else "full" in str(error)
        if not full:
            raise
        words = os.strerror(error.errno) if isinstance(error, OSError) else str(error)
        raise DiskFull(f"{target}: {words}: make room, and start again to go on from there.") from error
