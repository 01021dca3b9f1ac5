"""A prepared set, read: its rows, its held-out documents, its counts."""

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .pack.assemble import UNIGRAM_COUNTS
from .pack.manifest import Manifest, verify
from .tokens.tokenization import token_dtype


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


def load_validation_documents(prepared_dir: str | os.PathLike, split: str = "validation") -> Iterator[str]:
    """Yield a held-out split's texts, in the order of the corpus. Raises ValueError as `load_blocks`."""
    manifest = verify(prepared_dir)
    for name in manifest.documents_of(split):
        with open(Path(prepared_dir, name), encoding="utf-8", newline="\n") as file:
            for line in file:
                yield json.loads(line)["text"]


def load_unigram_counts(prepared_dir: str | os.PathLike) -> np.ndarray:
    """Return how often each id stands in the training documents, int64 [vocab_size]. Raises as `load_blocks`."""
    verify(prepared_dir)
    return np.load(Path(prepared_dir, UNIGRAM_COUNTS))


@dataclass
class PreparedSet:
    """What a run takes of a prepared set; `blend.Blend` has the same of several."""

    directory: str

    @functools.cached_property
    def manifest(self) -> Manifest:
        return Manifest.load(self.directory)

    def train_rows(self):
        return load_blocks(self.directory, "train")

    def held_out_rows(self, name: str):
        return load_blocks(self.directory, self.manifest.held_out[name])

    def held_out_documents(self, name: str) -> Iterator[str]:
        return load_validation_documents(self.directory, self.manifest.held_out[name])

    def unigram_counts(self) -> np.ndarray:
        return load_unigram_counts(self.directory)
