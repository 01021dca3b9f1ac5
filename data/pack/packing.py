"""Ids to blocks: documents end to end, cut into full rows."""

import bisect
from collections.abc import Iterable

import numpy as np

PACKINGS = ("concat", "best_fit")
WINDOW_TOKENS = 2**22  # best_fit looks at so many at a time: memory stays bounded, few rows of a window stay unfilled
IGNORED_LABEL = -100  # torch.nn.CrossEntropyLoss's ignore_index


def check_packing(packing: str) -> None:
    """Raise ValueError unless packing is a way that exists."""
    if packing not in PACKINGS:
        raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {packing!r}.")


def make_packer(block_size: int, packing: str, eos_token_id: int):
    """Return the packer of that name: `Packer` or `BestFitPacker`, both with `add` and `finish`."""
    check_packing(packing)
    return Packer(block_size) if packing == "concat" else BestFitPacker(block_size, eos_token_id)


class Packer:
    """Lay documents end to end and cut full rows off as they fill, holding less than one row back.

    Attributes:
        tokens: Tokens put in so far.
        blocks: Rows cut off so far, so tokens == blocks * block_size + remainder at any time.
        padding_tokens: 0, as nothing is padded.
        documents_cut: Documents that do not lie in one row.

    Raises:
        ValueError: block_size is below 2.

    Source: concatenate and chunk, as in GPT-3 (Brown et al. 2020, section 2.2).
    """

    def __init__(self, block_size: int):
        _check_block_size(block_size)
        self.block_size = block_size
        self.tokens = self.blocks = self.padding_tokens = self.documents_cut = 0
        self.tail = np.empty(0, dtype=np.uint16)  # a narrow type yields to the documents' own

    @property
    def remainder(self) -> int:
        """Tokens that do not fill a row yet: at most block_size - 1."""
        return len(self.tail)

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Take documents' ids end to end, each already ending in EOS, and how long each is.

        Returns:
            The rows they complete, [n, block_size], n >= 0.
        """
        ends = self.tokens + np.cumsum(lengths)
        self.documents_cut += int(((ends - lengths) // self.block_size != (ends - 1) // self.block_size).sum())
        stream = np.concatenate([self.tail, ids]) if len(self.tail) else np.asarray(ids)
        self.tokens += len(ids)
        filled = len(stream) // self.block_size
        self.blocks += filled
        self.tail = stream[filled * self.block_size :].copy()  # a view would keep the whole stream alive
        return stream[: filled * self.block_size].reshape(filled, self.block_size)

    def finish(self) -> np.ndarray:
        """Return the rows held back: none, what is left is in `tail`."""
        return np.empty((0, self.block_size), dtype=self.tail.dtype)


class BestFitPacker:
    """Put each document where it leaves the least room, longest first, in windows of WINDOW_TOKENS.

    Documents up to block_size are never cut; a longer one is cut into full rows and a rest that is packed like a
    document. Nothing is dropped: what room is left in a row is filled with EOS, which no label counts (a row's padding
    is EOS after EOS, see PackedCollator). Attributes as in `Packer`; tokens + padding_tokens == blocks * block_size
    after finish().

    Source: best-fit packing, Ding et al. 2024 (arXiv 2404.10830), section 3.
    """

    remainder = 0

    def __init__(self, block_size: int, eos_token_id: int):
        _check_block_size(block_size)
        self.block_size = block_size
        self.tokens = self.blocks = self.padding_tokens = self.documents_cut = 0
        self.tail = np.empty(0, dtype=np.uint16)
        self._eos = eos_token_id
        self._held = []
        self._held_tokens = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """As `Packer.add`; gives rows whenever a window is full, wherever the batches end."""
        rows = [np.empty((0, self.block_size), dtype=ids.dtype)]
        for document in np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []:
            self._held.append(document)
            self._held_tokens += len(document)
            if self._held_tokens >= WINDOW_TOKENS:
                rows.append(self.finish())
        self._held = [document.copy() for document in self._held] if len(rows) > 1 else self._held
        return np.concatenate(rows)

    def finish(self) -> np.ndarray:
        """Return the rows of the documents that are held, the last ones not full."""
        pieces = []
        for document in self._held:
            self.documents_cut += len(document) > self.block_size
            pieces += [document[at : at + self.block_size] for at in range(0, len(document), self.block_size)]
        bins = best_fit([len(piece) for piece in pieces], self.block_size)
        dtype = pieces[0].dtype if pieces else self.tail.dtype
        rows = np.full((len(bins), self.block_size), self._eos, dtype=dtype)
        for row, members in zip(rows, bins, strict=True):
            filled = np.concatenate([pieces[number] for number in members])
            row[: len(filled)] = filled
        self.tokens += self._held_tokens
        self.blocks += len(rows)
        self.padding_tokens += rows.size - self._held_tokens
        self._held, self._held_tokens = [], 0
        return rows


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item, longest first, goes into the bin that it leaves least room in.

    Args:
        lengths: None above capacity.

    Returns:
        The items' numbers bin by bin, the bins in the order of their first item.
    """
    bins, with_room, rooms = [], {}, []  # rooms: the distinct room left in bins, ascending
    for number in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        at = bisect.bisect_left(rooms, lengths[number])
        if at < len(rooms):
            room = rooms[at]
            mine = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(at)
        else:
            room, mine = capacity, len(bins)
            bins.append([])
        bins[mine].append(number)
        left = room - lengths[number]
        if left and not with_room.get(left):
            bisect.insort(rooms, left)
        if left:
            with_room.setdefault(left, []).append(mine)
    return sorted(map(sorted, bins))


def _check_block_size(block_size: int) -> None:
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2 (one input, one target), got {block_size}.")


def pack_blocks(documents: Iterable, block_size: int) -> np.ndarray:
    """Lay documents end to end and cut them into full rows.

    Args:
        documents: Token ids of each document, each already ending in EOS.
        block_size: Tokens per row.

    Returns:
        Array [num_blocks, block_size]. The last, unfilled row is dropped: fewer than block_size tokens a corpus.

    Raises:
        ValueError: The corpus is shorter than one block.
    """
    packer = Packer(block_size)
    documents = [np.asarray(document) for document in documents]
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    blocks = packer.add(np.concatenate(documents) if documents else packer.tail, lengths)
    if not packer.blocks:
        raise ValueError(
            f"One block needs {block_size} tokens, the documents hold {packer.tokens}; give more or lower block_size."
        )
    return blocks


def document_starts(input_ids: np.ndarray, eos_token_id: int) -> np.ndarray:
    """Mark the first token of each document in rows [B, S]: after every EOS, and where a row starts."""
    starts = np.empty(input_ids.shape, dtype=bool)
    starts[:, 0] = True
    starts[:, 1:] = input_ids[:, :-1] == eos_token_id
    return starts
