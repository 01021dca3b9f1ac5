"""Training straight from text: documents read, encoded and packed as the run goes, each rank its own share."""

import json
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .pack.mixing import open_source
from .pack.packing import BestFitPacker, make_packer
from .read.cleaning import Cleaning
from .read.corpus import is_validation
from .read.documents import Documents, MixedDocuments
from .read.validation import open_sets, read_over
from .tokens.encoding import Encoder
from .tokens.tokenization import document_encoder

READ_AHEAD = 2  # chunks that a thread has ready
STATE_FILE = "stream_dp_rank_{}_state.json"


@dataclass
class Chunk:
    """Rows of one batch of documents, and the state before them, from which they come again."""

    rows: np.ndarray
    state: dict


class PackedStream:
    """The packed rows of a rank, in the order of training; a map-style dataset that is read from front to back.

    Row i of the whole run belongs to rank (i // micro_batch) % world_size, as Trainer's sequential sampler shares
    rows out, and a rank draws its rows from its own share of the text: every world_size-th piece of the sources'
    files, or, where a source has fewer pieces than ranks, every world_size-th row of all. The pieces' order is drawn by
    seed anew in each epoch, and rows are shuffled within what is read at once (about 4 MB of text). It never ends: the
    next epoch begins where a rank's share does.

    Args:
        documents: See `corpus.read_documents`.
        open_source: From documents and a state (None: the start) to encoded batches; see `mixing.open_source`.
        length: Rows of all ranks over the whole run.
        validation_fraction: Documents of it are left out; see `corpus.is_validation`.
        block_size, packing, eos_token_id: See `packing.make_packer`; best_fit looks at one read's documents at a time.
    """

    def __init__(
        self,
        documents: Documents | MixedDocuments,
        open_source: Callable,
        *,
        length: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        block_size: int,
        packing: str,
        eos_token_id: int,
        validation_fraction: float,
        seed: int,
    ):
        self._documents, self._open_source, self._length = documents, open_source, length
        self._micro_batch, self._rank, self._world_size = micro_batch, rank, world_size
        self._packing = (block_size, packing, eos_token_id)
        self._validation_fraction, self._seed = validation_fraction, seed
        sources = documents.sources if isinstance(documents, MixedDocuments) else [documents]
        self._parts = [source.parts() for source in sources]
        self._alone = min(map(len, self._parts)) >= world_size
        self._start = {"row": 0, "epoch": 0, "chunk": 0, "source": None, "tail": []}
        self._chunks = self._chunk = None
        self._states = deque()  # of chunks that are not trained on to their end

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        """Return {"input_ids": [block_size]}; index must not go back."""
        batch, at = divmod(index, self._micro_batch)
        row = batch // self._world_size * self._micro_batch + at
        if self._chunks is None:
            self._chunks = read_ahead(self._read(self._start))
        while self._chunk is None or row >= self._chunk.state["row"] + len(self._chunk.rows):
            self._chunk = next(self._chunks)
            self._states.append(self._chunk.state)
            while len(self._states) > 2 and self._states[1]["row"] <= row - 2 * self._micro_batch:
                self._states.popleft()  # Trainer asks for one micro-batch more than it has trained on
        if row < self._chunk.state["row"]:
            raise ValueError(f"a stream is read from front to back: row {row} was passed.")
        return {"input_ids": self._chunk.rows[row - self._chunk.state["row"]]}

    def save_state(self, directory: str | Path, steps_rows: int) -> None:
        """Write this rank's state into a checkpoint, for steps_rows rows of this rank trained on."""
        state = max((s for s in self._states if s["row"] <= steps_rows), key=lambda s: s["row"], default=self._start)
        Path(directory, STATE_FILE.format(self._rank)).write_text(json.dumps(state), encoding="utf-8")

    def load_state(self, directory: str | Path) -> None:
        """Go on from a checkpoint of as many ranks; call it before the first row is read.

        Raises:
            ValueError: The checkpoint holds no state of this rank's stream.
        """
        path = Path(directory, STATE_FILE.format(self._rank))
        if not path.is_file():
            raise ValueError(f"{path} is missing: the checkpoint was not trained from a stream of {self._world_size}.")
        self._start = json.loads(path.read_text(encoding="utf-8"))

    def _read(self, state: dict) -> Iterator[Chunk]:
        """Yield chunk after chunk, epoch after epoch."""
        packer = make_packer(*self._packing)
        packer.tail = np.array(state["tail"], dtype=np.int64)
        row, chunk = state["row"], state["chunk"]
        for epoch in range(state["epoch"], 2**31):
            at = state["source"] if epoch == state["epoch"] else None
            source, tokens = self._open_source(self._share(epoch), at), packer.tokens
            before = {"epoch": epoch, "source": at, "tail": packer.tail.tolist()}
            for batch in source:
                rows = self._rows(packer, batch, chunk)
                if len(rows):
                    yield Chunk(rows, {"row": row, "chunk": chunk, **before})
                row, chunk = row + len(rows), chunk + 1
                before = {"epoch": epoch, "source": source.state(), "tail": packer.tail.tolist()}
            if packer.tokens == tokens and at is None:
                raise ValueError(f"an epoch of the stream gave rank {self._rank} no document: give more text.")

    def _rows(self, packer, batch, chunk: int) -> np.ndarray:
        if self._validation_fraction:
            held = [is_validation(text, self._validation_fraction) for text in batch.texts]
            batch = batch.keep(~np.array(held, dtype=bool))
        rows = packer.add(batch.ids, batch.lengths)
        if isinstance(packer, BestFitPacker):
            rows = np.concatenate([rows, packer.finish()])
        order = np.random.default_rng([self._seed, self._rank if self._alone else 0, chunk]).permutation(len(rows))
        rows = rows[order]
        return rows if self._alone else rows[(self._rank - chunk) % self._world_size :: self._world_size]

    def _share(self, epoch: int) -> Documents | MixedDocuments:
        """Return this rank's pieces of every source, in the epoch's order."""
        shares = [self._pieces(parts, epoch) for parts in self._parts]
        return self._documents.over(shares) if isinstance(self._documents, MixedDocuments) else shares[0]

    def _pieces(self, parts: list[Documents], epoch: int) -> Documents:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(parts)).tolist()
        mine = order[self._rank :: self._world_size] if self._alone else order
        return parts[0].over([reader for number in mine for reader in parts[number].readers])


def open_stream(
    documents: Documents | MixedDocuments,
    tokenizer,
    block_size: int,
    cleaning: dict | None = None,
    validation: dict[str, dict] | None = None,
    reading_validation: dict | None = None,
    **more,
) -> PackedStream:
    """Open the rows of a rank; arguments as in `PackedStream` and `prepare.prepare`.

    A stream is encoded by `tokenizers` itself: what tokie encoded before it disagreed could not be taken back.

    Raises:
        ValueError: deduplicate is asked for, which would need all ranks to know of all documents.
    """
    cleaning, encode = Cleaning(**(cleaning or {})), Encoder(tokenizer, "tokenizers")
    if cleaning.deduplicate:
        raise ValueError(
            "deduplicate = true needs a prepared set: set streaming=false, or prepare it with data/prepare.py."
        )

    held_out = (
        read_over(open_sets(validation, **reading_validation or {}), document_encoder(tokenizer), None)
        if validation
        else None
    )

    def open_one(share: Documents | MixedDocuments, state: dict | None):
        return open_source(share, encode, cleaning, None, state, held_out)

    return PackedStream(documents, open_one, block_size=block_size, eos_token_id=tokenizer.eos_token_id, **more)


def read_ahead(chunks: Iterator) -> Iterator:
    """Yield what chunks does, READ_AHEAD of them made by a thread while the last one is used; errors come through."""
    ready = queue.Queue(READ_AHEAD)

    def fill():
        try:
            for chunk in chunks:
                ready.put((chunk, None))
        except BaseException as error:
            ready.put((None, error))

    threading.Thread(target=fill, name="stream", daemon=True).start()
    while True:
        chunk, error = ready.get()
        if error is not None:
            raise error
        yield chunk
