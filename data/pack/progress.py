"""A bar for preparations: documents/s, MB/s, tokens, time left; and sentences that do not break it."""

import time
from collections.abc import Callable


class Progress:
    """Counts what was prepared. Use as a context; `total_bytes` (None: unknown) gives the time left.

    In a worker's process, counts is (array, place): what was prepared stands there too, for the parent's bar.
    """

    def __init__(self, show: bool, total_bytes: int | None, say: Callable[[str], None] = print, counts=None):
        self._counts = counts
        self.documents = self.bytes = self.tokens = 0
        self._show, self._total, self._say = show, total_bytes, say
        self._bar, self._start = None, time.monotonic()

    def __enter__(self) -> "Progress":
        from tqdm import tqdm

        form = "{desc}: {percentage:3.0f}%|{bar}| {postfix}, {elapsed}<{remaining}" if self._total else None
        self._bar = tqdm(total=self._total, desc="preparing", unit="B", disable=not self._show, bar_format=form)
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()
        self._bar = None

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def tick(self, batch) -> None:
        self.add(len(batch.texts), sum(map(len, batch.texts)), len(batch.ids))

    def add(self, documents: int, size: int, tokens: int) -> None:
        self.documents += documents
        self.bytes += size
        self.tokens += tokens
        if self._counts is not None:
            array, at = self._counts
            array[at : at + 3] = [self.documents, self.bytes, self.tokens]
        if self._bar is not None and self._show:
            rates = f"{self.documents / self.seconds:,.0f} documents/s, {self.bytes / 1e6 / self.seconds:,.1f} MB/s"
            self._bar.set_postfix_str(f"{rates}, {self.tokens:,} tokens", refresh=False)
            self._bar.update(size)

    def reach(self, documents: int, size: int, tokens: int) -> None:
        """Take what other processes have counted so far."""
        self.add(documents - self.documents, size - self.bytes, tokens - self.tokens)

    def say(self, sentence: str) -> None:
        if self._bar is not None and self._show:
            self._bar.write(sentence)
        else:
            self._say(sentence)
