"""Prepared sets blended by weight while a run trains: rows of several sets in one order, nothing copied."""

import functools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np

from .arguments import Entry
from .pack.manifest import Manifest
from .prepared import PreparedSet

WINDOW = 4096  # rows whose order is worked out at once


class Order:
    """In which order the rows of several sets come: each has its share, give or take a row or two, of any prefix.

    Row k of a set of share w is due at (k + 1/2) / w; rows come as they are due. With up to five sets no prefix is more
    than two rows from the shares; with m it is at most half a row and w (m - 2) / 2. It ends before the first row that
    no set has: where its rows, max_epochs times over, are used up.

    Source: Inman and Bulfin 1991, Sequencing JIT mixed-model assembly lines.

    Args:
        weights: Any positive numbers; shares are weights over their sum. Counting is in whole numbers: exact.
        rows: How many each set has, all epochs together.
    """

    def __init__(self, weights: list[float], rows: list[int]):
        fractions = [Fraction(str(weight)) for weight in weights]
        self._weights = [int(one * math.lcm(*(one.denominator for one in fractions))) for one in fractions]
        self._sum = sum(self._weights)
        self.ends = [Fraction((2 * n + 1) * self._sum, 2 * w) for n, w in zip(rows, self._weights, strict=True)]
        self._length = sum(self._before(min(self.ends)))
        self._window = None

    def __len__(self) -> int:
        return self._length

    def _before(self, time: Fraction | int) -> list[int]:
        """Count each set's rows that are due before a time."""
        return [max(0, math.ceil(Fraction(weight) * time / self._sum - Fraction(1, 2))) for weight in self._weights]

    def _find(self, index: int) -> tuple:
        """Return the window that holds a row: (first row, rows of each set before it, its order)."""
        number = index // WINDOW
        if self._window is not None and self._window[0] <= index < self._window[0] + len(self._window[2]):
            return self._window
        while sum(self._before(number * WINDOW)) > index:
            number -= 1
        while sum(self._before((number + 1) * WINDOW)) <= index:
            number += 1
        first, after = self._before(number * WINDOW), self._before((number + 1) * WINDOW)
        sets = np.repeat(np.arange(len(first)), [b - a for a, b in zip(first, after, strict=True)])
        due = [
            (np.arange(a, b) + 0.5) * (self._sum / weight)
            for a, b, weight in zip(first, after, self._weights, strict=True)
        ]
        self._window = sum(first), first, sets[np.argsort(np.concatenate(due), kind="stable")]
        return self._window

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return which set row `index` is of, and which of its rows, counted through all its epochs."""
        start, first, sets = self._find(index)
        number = int(sets[index - start])
        return number, first[number] + int((sets[: index - start] == number).sum())

    def taken(self, count: int) -> list[int]:
        """Count each set's rows among the first `count`."""
        if not count:
            return [0] * len(self._weights)
        start, first, sets = self._find(count - 1)
        more = np.bincount(sets[: count - start], minlength=len(first))
        return [a + int(b) for a, b in zip(first, more, strict=True)]


class BlendedRows:
    """Rows of several sets in the order of training, a map-style dataset: what came before is skipped for nothing.

    Each set's rows are shuffled anew in each of its epochs, by the seed.
    """

    def __init__(self, sets: list, order: Order, seed: int):
        self._sets, self.order, self._seed = sets, order, seed
        self._shuffled = {}

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict:
        number, row = self.order[index]
        rows = self._sets[number]
        epoch, at = divmod(row, len(rows))
        if self._shuffled.get(number, (None,))[0] != epoch:
            chance = np.random.default_rng([self._seed, number, epoch])
            dtype = np.uint32 if len(rows) < 2**32 else np.uint64
            self._shuffled[number] = epoch, chance.permutation(len(rows)).astype(dtype)
        return rows[int(self._shuffled[number][1][at])]


class Blend:
    """Several prepared sets as one; has what `PreparedSet` has."""

    def __init__(self, entries: list[Entry], seed: int):
        self.entries, self._seed = entries, seed
        self._sets = [PreparedSet(entry.prepared_dir) for entry in entries]
        total = sum(entry.weight for entry in entries)
        self.shares = [entry.weight / total for entry in entries]

    @functools.cached_property
    def manifest(self) -> Manifest:
        """What the sets have in common; each one's own fingerprint and source; no file, for nothing is copied."""
        splits, described, held = {}, [], self._held_out
        for entry, one in zip(self.entries, self._sets, strict=True):
            splits[f"train_{entry.name}"] = one.manifest.splits["train"]
            own = {"name": entry.name, "weight": entry.weight, "max_epochs": entry.max_epochs}
            described.append(own | {"fingerprint": one.manifest.fingerprint, "source": one.manifest.source})
        for name, (one, own) in held.items():
            splits[f"validation_{name}"] = one.manifest.splits[one.manifest.held_out[own]]
        return replace(
            self._sets[0].manifest, source={"blend": described}, splits=splits, files={}, options={}, mixture=[],
            validation_documents=[], decontaminated=[], filtered={}, skipped_rows=0, bad_rows={},
        )  # fmt: skip

    @property
    def _held_out(self) -> dict[str, tuple[PreparedSet, str]]:
        """{name: (set, its own name of it)}: named by the set, and by its held-out set where that has a name."""
        found = {}
        for entry, one in zip(self.entries, self._sets, strict=True):
            for own in one.manifest.held_out:
                name = f"{entry.name}_{own}" if own else entry.name
                if name in found:
                    raise ValueError(
                        f"prepared_dir: two held-out sets would be called {name}: name the sets otherwise."
                    )
                found[name] = one, own
        return found

    @functools.cached_property
    def order(self) -> Order:
        rows = [
            one.manifest.splits["train"]["blocks"] * entry.max_epochs
            for entry, one in zip(self.entries, self._sets, strict=True)
        ]
        return Order([entry.weight for entry in self.entries], rows)

    def train_rows(self) -> BlendedRows:
        return BlendedRows([one.train_rows() for one in self._sets], self.order, self._seed)

    def held_out_rows(self, name: str):
        one, own = self._held_out[name]
        return one.held_out_rows(own)

    def held_out_documents(self, name: str):
        one, own = self._held_out[name]
        return one.held_out_documents(own)

    def unigram_counts(self) -> np.ndarray:
        """Return the sets' counts in the shares of the blend, int64 [vocab_size], as many as the sets have together."""
        counts = [one.unigram_counts().astype(np.float64) for one in self._sets]
        total = sum(one.sum() for one in counts)
        return np.rint(sum(w * one / one.sum() for w, one in zip(self.shares, counts, strict=True)) * total).astype(int)

    def check_length(self, steps: int, rows_a_step: int) -> None:
        """Raise ValueError where so many steps would take a set more often than its max_epochs."""
        wanted, there = steps * rows_a_step, len(self.order)
        if wanted <= there:
            return
        number = min(range(len(self.entries)), key=lambda at: self.order.ends[at])
        entry, blocks = self.entries[number], self._sets[number].manifest.splits["train"]["blocks"]
        needed = -(-math.ceil(wanted * self.shares[number]) // blocks)
        raise ValueError(
            f"max_steps = {steps} takes {wanted:,} rows, prepared_dir gives {there:,} in its shares: {entry.name} ends "
            f"first, {blocks:,} rows at max_epochs = {entry.max_epochs}. Raise that to {needed}, lower its weight, or "
            f"set max_steps to {there // rows_a_step}."
        )

    def taken(self, rows: int) -> list[dict]:
        """Say what so many rows of the blend were, set by set."""
        counts = self.order.taken(rows)
        return [
            {
                "name": entry.name,
                "weight": round(share, 6),
                "realised": round(count / rows, 6) if rows else 0.0,
                "rows": count,
                "epochs": round(count / one.manifest.splits["train"]["blocks"], 4),
            }
            for entry, one, share, count in zip(self.entries, self._sets, self.shares, counts, strict=True)
        ]
