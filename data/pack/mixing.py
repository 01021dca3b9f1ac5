"""A mixture: documents of several sources, drawn so that each has its share of the tokens at any time."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np

from ..read.cleaning import Cleaner, Cleaning, Seen
from ..read.documents import Documents, MixedDocuments, Shares, Tally
from ..read.validation import HeldOut
from .feed import Beside, Encoded, Source

DRAWS = 4096  # documents at most in one batch


@dataclass
class _Drawn:
    """One source on the way: its batch in hand, and the state before it, from which it is read again."""

    source: Source
    batches: Iterator[Encoded]
    before: dict | None
    batch: Encoded | None = None
    taken: int = 0  # documents of the batch
    epoch: int = 0
    in_epoch: int = 0  # documents
    counts: dict = field(default_factory=lambda: {"documents": 0, "tokens": 0, "drawn": 0, "duplicates": 0})


class Mixture:
    """Encoded batches of a mixture's documents. It ends where the first source does, its epochs done.

    Args:
        open_source: From (Documents, state) to a `Source`.
        seen: As in `Source`, over all sources together.
        state: What `state()` said after a batch: go on behind it.
    """

    def __init__(self, mixed: MixedDocuments, open_source: Callable, seen: Seen | None = None, state=None):
        state = state or {}
        self._mixed, self._open, self._seen = mixed, open_source, seen
        self._shares = Shares(mixed.weights, mixed.seed, state.get("picks", 0))
        self._ended_by = state.get("ended_by")
        self._drawn = []
        for number, documents in enumerate(mixed.sources):
            held = copy.deepcopy(state["sources"][number]) if state else {"before": None}
            in_hand, source = held.pop("in_hand", False), open_source(documents, held["before"])
            self._drawn.append(_Drawn(source, iter(source), **held))
            if in_hand:
                self._drawn[-1].batch = next(self._drawn[-1].batches)

    def state(self) -> dict:
        names = ("before", "taken", "epoch", "in_epoch")
        held = [{name: getattr(drawn, name) for name in names} for drawn in self._drawn]
        sources = [
            one | {"in_hand": drawn.batch is not None, "counts": dict(drawn.counts)}
            for one, drawn in zip(held, self._drawn, strict=True)
        ]
        return {"sources": sources, "picks": self._shares.picks, "ended_by": self._ended_by}

    def report(self) -> dict:
        """The tally and the counts of cleaning of what was read, and for each source what was taken."""
        tally, filtered, rows = Tally(), {}, []
        total = sum(drawn.counts["tokens"] for drawn in self._drawn)
        for drawn, name, weight in zip(self._drawn, self._mixed.names, self._mixed.weights, strict=True):
            read = drawn.source.report()
            tally.add(Tally(**read["tally"]))
            for reason, number in read["filtered"].items():
                filtered[reason] = filtered.get(reason, 0) + number
            if drawn.counts["duplicates"]:
                filtered["deduplicate"] = filtered.get("deduplicate", 0) + drawn.counts["duplicates"]
            counts = {key: drawn.counts[key] for key in ("documents", "tokens")}
            realised = round(counts["tokens"] / total, 6) if total else 0.0
            passes = drawn.epoch + bool(drawn.in_epoch)
            rows.append({"source": name, "weight": weight, "realised": realised, "epochs_begun": passes} | counts)
        if self._ended_by is not None:
            rows[self._ended_by]["ended_the_mixture"] = True
        return {"tally": asdict(tally), "filtered": filtered, "mixture": rows}

    def __iter__(self) -> Iterator[Encoded]:
        while self._ended_by is None:
            beside = Beside()
            for number in range(len(self._drawn)):
                if not self._refill(number, beside):
                    self._ended_by = number
                    break
            yield self._draw(beside)

    def _refill(self, number: int, beside: Beside) -> bool:
        """Have a batch with something left in hand; False where the source has no more to give."""
        drawn = self._drawn[number]
        while drawn.batch is None or drawn.taken == len(drawn.batch.texts):
            drawn.before = drawn.source.state()
            drawn.batch, drawn.taken = next(drawn.batches, None), 0
            if drawn.batch is not None:
                beside.add(drawn.batch.beside)
            if drawn.batch is None:
                if not drawn.in_epoch or drawn.epoch + 1 >= self._mixed.max_epochs[number]:
                    return False
                drawn.epoch, drawn.in_epoch = drawn.epoch + 1, 0
                state = {name: value for name, value in drawn.before.items() if name != "position"}
                drawn.source = self._open(self._mixed.sources[number], state)
                drawn.batches = iter(drawn.source)
        return True

    def _draw(self, beside: Beside) -> Encoded:
        """Draw documents until a batch in hand is used up; none at the end."""
        taken = np.array([drawn.counts["drawn"] for drawn in self._drawn], dtype=np.float64)
        starts = [np.append(0, np.cumsum(drawn.batch.lengths)) if drawn.batch else [0] for drawn in self._drawn]
        texts, ids, origins = [], [], []
        while self._ended_by is None and len(texts) < DRAWS:
            number = self._shares.pick(taken)
            drawn = self._drawn[number]
            text, at = drawn.batch.texts[drawn.taken], starts[number][drawn.taken : drawn.taken + 2]
            drawn.taken += 1
            drawn.in_epoch += 1
            if self._seen is None or self._seen.is_new(text):
                texts.append(text)
                ids.append(drawn.batch.ids[at[0] : at[1]])
                origins.append(number)
                taken[number] += len(ids[-1])
            else:
                drawn.counts["duplicates"] += 1
            if drawn.taken == len(drawn.batch.texts):
                break
        for drawn, tokens in zip(self._drawn, taken, strict=True):
            drawn.counts["drawn"] = int(tokens)
        lengths = np.array([len(document) for document in ids], dtype=np.int64)
        flat = np.concatenate(ids) if ids else np.empty(0, dtype=np.uint16)
        return Encoded(texts, flat, lengths, np.array(origins, dtype=np.int64), beside)

    def count(self, batch: Encoded) -> None:
        """Take note of what was kept of a batch."""
        documents = np.bincount(batch.origins, minlength=len(self._drawn))
        tokens = np.bincount(batch.origins, weights=batch.lengths, minlength=len(self._drawn))
        for drawn, more, size in zip(self._drawn, documents, tokens, strict=True):
            drawn.counts["documents"] += int(more)
            drawn.counts["tokens"] += int(size)


def open_source(
    documents: Documents | MixedDocuments,
    encode,
    cleaning: Cleaning,
    seen: Seen | None,
    state,
    held_out: HeldOut | None = None,
):
    """Return what encodes these documents from a state on: a `Source`, or of a mixture's a `Mixture`."""
    cleaner = Cleaner(cleaning) if cleaning.by_text else None
    if isinstance(documents, MixedDocuments):

        def open_one(one: Documents, held: dict | None) -> Source:
            return Source(one, encode, cleaner, None, held, held_out)

        return Mixture(documents, open_one, seen, state)
    return Source(documents, encode, cleaner, seen, state, held_out)
