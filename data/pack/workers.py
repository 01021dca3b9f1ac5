"""Workers: the parts of a set, written by this process or shared out over several of this machine."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from smolpretrain.core import upstream
from smolpretrain.core.files import write_json

from ..read.cleaning import Cleaning, Seen
from ..read.held_out import is_validation
from ..read.ready import ReadyEncoder
from ..read.validation import HeldOut
from ..tokens.encoding import Disagreement, Encoder
from . import shards
from .feed import Feed, Limits, Source
from .manifest import Manifest
from .mixing import open_source
from .partial import tokenizers_only
from .progress import Progress

SECONDS_BETWEEN_LOOKS = 0.2  # at what the processes have done, for the bar
_counts = None  # in a worker's process: documents, bytes and tokens of each worker, for the bar


@dataclass
class Work:
    """What every worker needs; pickled for those in processes of their own.

    Attributes:
        splits: Of each part, where its documents go: "train", or a held-out set's split, which is taken as it is.
        held_out: Leaves held-out documents of the user's own out of training; None where there are none.
    """

    directory: Path
    parts: list
    tokenizer: object
    manifest: Manifest
    tokenizer_backend: str
    limits: Limits = field(default_factory=Limits)
    cleaning: Cleaning = field(default_factory=Cleaning)
    splits: list[str] = field(default_factory=list)
    held_out: HeldOut | None = None

    def write(self, numbers: Iterable[int], progress: Progress) -> None:
        """Write these parts; one in which tokie is seen to disagree is done again by `tokenizers`."""
        encode = Encoder(self.tokenizer, self.tokenizer_backend, progress.say)
        if "ids_column" in self.manifest.options:  # what is text beside them is encoded by the tokenizer itself
            encode = ReadyEncoder(Encoder(self.tokenizer, "tokenizers", progress.say))
        for number in numbers:
            try:
                self.write_part(number, encode, progress)
            except Disagreement as error:
                progress.say(f"part {number}: again with `tokenizers` itself, not the faster tokie: {error}.")
                self.write_part(number, encode, progress)

    def write_part(self, number: int, encode: Encoder, progress: Progress) -> None:
        """Write a part. Raises Disagreement where tokie disagrees; the next time does without it."""
        fallen_back = self.directory / tokenizers_only(number)
        if fallen_back.exists():
            encode = Encoder(self.tokenizer, "tokenizers", progress.say)
            self._forget(number)

        split = self.splits[number] if self.splits else shards.TRAIN

        def open_feed(state: dict | None, shard: int) -> Feed:
            if split != shards.TRAIN:
                return Feed(Source(self.parts[number], encode, state=(state or {}).get("source")), state=state)
            seen = Seen(self.directory / f"seen-{number:05d}.sqlite", shard) if self.cleaning.deduplicate else None
            held = (state or {}).get("source")
            source = open_source(self.parts[number], encode, self.cleaning, seen, held, self.held_out)
            return Feed(source, self.limits, self._is_held_out, seen, state)

        try:
            shards.write_part(self.directory, number, open_feed, self.manifest, encode, progress.tick, split)
        except Disagreement as error:
            if self.tokenizer_backend == "tokie":
                raise ValueError(f"tokenizer_backend tokie cannot serve: {error}; set it to auto.") from None
            write_json(fallen_back, str(error))
            raise

    def _forget(self, number: int) -> None:
        for at, record in enumerate(shards.records(self.directory, number)):
            if record["backend"] != "tokenizers":
                (self.directory / f"shard-{number:05d}-{at:05d}.json").unlink()
                (self.directory / f"counts-{number:05d}-{at:05d}.npy").unlink()

    def _is_held_out(self, text: str) -> bool:
        return is_validation(text, self.manifest.held_out_below)


def write_parts(work: Work, shard_index: int, num_shards: int, num_proc: int, progress: Progress) -> None:
    """Write this machine's parts of the set, in num_proc processes.

    Raises:
        ValueError: A process was killed, and what the parts' own reading and encoding raises.
    """
    numbers = range(shard_index, len(work.parts), num_shards)
    if num_proc > max(1, len(numbers)):
        parts = f"{len(numbers)} part{'s' if len(numbers) != 1 else ''}"
        progress.say(f"num_proc = {num_proc}: this text has {parts} to share out, so no more processes work at it.")
    num_proc = min(num_proc, len(numbers))
    with progress:
        if num_proc < 2:
            work.write(numbers, progress)
            return
        context = multiprocessing.get_context("spawn")
        counts, killed = context.Array("q", 3 * num_proc, lock=False), _killed_for_memory()
        with ProcessPoolExecutor(num_proc, context, _see_counts, (counts,)) as pool:
            shares = [pool.submit(_write_share, work, numbers, at, num_proc) for at in range(num_proc)]
            processes = upstream.pool_processes(pool)
            while wait(shares, SECONDS_BETWEEN_LOOKS, FIRST_EXCEPTION).not_done and not _failed(shares):
                progress.reach(*(sum(counts[at::3]) for at in range(3)))
            try:
                for share in shares:
                    share.result()
            except BrokenProcessPool:
                more = _killed_for_memory() > killed
                raise ValueError(_what_ended(processes, more, progress.documents, num_proc)) from None
        progress.reach(*(sum(counts[at::3]) for at in range(3)))


def _what_ended(processes: list, more_killed: bool, documents: int, num_proc: int) -> str:
    """Say why a process ended that should not have; the pool ends the others by SIGTERM."""
    for process in processes:
        process.join(5)
    codes = [process.exitcode for process in processes if process.exitcode not in (None, 0, -signal.SIGTERM)]
    code = codes[0] if codes else -signal.SIGTERM
    again = "start again to go on from the last finished shard"
    if code == -signal.SIGKILL and more_killed:
        return (
            f"a process that prepared was killed by the kernel for want of memory after {documents:,} documents: "
            f"{again}, num_proc below {num_proc}."
        )
    if code < 0:
        name = signal.Signals(-code).name
        return f"a process that prepared was ended from outside by {name} after {documents:,} documents: {again}."
    return (
        f"a process that prepared ended by itself with exit status {code} after {documents:,} documents; what it said "
        f"stands above. num_proc=1 does without processes."
    )


def _killed_for_memory() -> int:
    """Return how many processes the kernel has killed for want of memory, of this container where it says."""
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with contextlib.suppress(OSError):
            for line in Path(path).read_text(encoding="utf-8").splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def _failed(shares: list) -> bool:
    return any(share.done() and share.exception() is not None for share in shares)


def _see_counts(counts) -> None:
    global _counts
    _counts = counts


def _write_share(work: Work, numbers: range, at: int, num_proc: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_proc))
    work.write(numbers[at::num_proc], Progress(False, None, print, counts=(_counts, 3 * at)))
