"""Datasets: of the Hub, or a directory in a layout that `datasets` knows; read file by file where their kind allows."""

import functools
import glob
import os
from collections.abc import Callable
from dataclasses import dataclass

from smolpretrain.core.text import reason

from . import files
from .forms.columns import Columns
from .readers import ROWS_PER_READ, Rows, Stream


@dataclass
class Dataset:
    """Which dataset, in the words of `datasets.load_dataset`."""

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_dir: str | None = None
    data_files: list[str] | None = None

    @property
    def is_local(self) -> bool:
        return os.path.isdir(self.name)

    @property
    def _where(self) -> dict:
        named = {"revision": self.revision, "data_dir": self.data_dir, "data_files": self.data_files}
        return {key: value for key, value in named.items() if value is not None}

    def readers(self, columns: Columns, streaming: bool, open_file: Callable, said: list[str]) -> list:
        """Check split and columns before any text is downloaded, where they are said; return the readers.

        Args:
            open_file: From a file's path or address to its reader; `corpus.open_file`.
            said: Gains sentences on what was taken.

        Raises:
            ValueError: Out of reach, no such split or column.
        """
        from datasets import get_dataset_split_names

        if saved := files.saved_to_disk(self.name, self.split) if self.is_local else []:
            return self._opened(saved, open_file)
        try:
            builder = self._builder(said)
            named = builder.config.data_files
            splits = list(
                map(str, builder.info.splits or named or get_dataset_split_names(self.name, self.config, **self._where))
            )
        except Exception as error:
            raise ValueError(
                f"dataset_name {self.name!r}{f' ({self.config})' if self.config else ''} cannot be loaded "
                f"({reason(error)}); check the name, dataset_config_name, dataset_revision and the network, and run "
                "`hf auth login` if it is gated."
            ) from error
        if self.split.split("[")[0].split("+")[0] not in splits:
            raise ValueError(
                f"{self.name}: there is no split {self.split!r}; set dataset_split to one of {', '.join(splits)}."
            )
        columns.check(self.name, builder.info.features)
        if (streaming or self.is_local) and "[" in self.split:
            raise ValueError(
                f"dataset_split {self.split!r}: a stream has no slices; name a whole split and set max_documents."
            )
        paths = None if streaming and not self.is_local else _readable(builder, (named or {}).get(self.split))
        return self._loaded(columns, streaming) if paths is None else self._opened(paths, open_file)

    def _builder(self, said: list[str]):
        from datasets import load_dataset_builder
        from huggingface_hub import constants

        try:
            return load_dataset_builder(self.name, self.config, **self._where)
        except Exception:
            if self.is_local or not constants.HF_HUB_OFFLINE or (cached := self._cached()) is None:
                raise
        said.append(f"{self.name}: offline: what the cache of the Hub holds of it is taken, which may not be all.")
        return load_dataset_builder(
            cached, self.config, **{key: value for key, value in self._where.items() if key != "revision"}
        )

    def _cached(self) -> str | None:
        """Return the newest snapshot of the dataset in the cache of the Hub; its files may not be all."""
        from huggingface_hub import CacheNotFound, scan_cache_dir

        try:
            repos = [
                repo for repo in scan_cache_dir().repos if (repo.repo_type, repo.repo_id) == ("dataset", self.name)
            ]
        except CacheNotFound:
            return None
        found = [one for repo in repos for one in repo.revisions if self.revision in (None, one.commit_hash, *one.refs)]
        return str(max(found, key=lambda one: one.last_modified).snapshot_path) if found else None

    def _opened(self, paths: list[str], open_file: Callable) -> list:
        """Return the files' readers; the first one shows whether the columns are there."""
        return [open_file(path, look=number == 0) for number, path in enumerate(paths)]

    def _loaded(self, columns: Columns, streaming: bool) -> list:
        """Have `datasets` read what only it can."""
        from datasets import load_dataset

        try:
            dataset = load_dataset(self.name, self.config, split=self.split, streaming=streaming, **self._where)
            names = dataset.column_names or list(next(iter(dataset), {}))
        except Exception as error:
            raise ValueError(f"{self.name}: split {self.split!r} cannot be loaded ({reason(error)}).") from error
        columns.check(self.name, names)
        if streaming:
            return [Stream(self.name, dataset, columns)]
        dataset = dataset.select_columns(columns.of(names))
        open_rows = functools.partial(_texts, dataset, columns)
        return [Rows(self.name, open_rows, dataset.data.nbytes, skip=functools.partial(_texts_from, dataset, columns))]

    def describe(self, show: bool) -> dict:
        """Return what text this is, as JSON values, no absolute path."""
        named = {"dataset_name": self.name, "dataset_config_name": self.config, "dataset_split": self.split}
        named |= {"dataset_revision": self.revision}
        more = {"dataset_data_dir": self.data_dir, "dataset_data_files": self.data_files}
        named |= {key: value for key, value in more.items() if value is not None}
        if self.is_local:
            top = os.path.abspath(self.name)
            found = glob.glob(os.path.join(glob.escape(top), "**", "*"), recursive=True)
            paths = sorted(path for path in found if os.path.isfile(path))
            return named | {"dataset_name": os.path.basename(top), "files": files.describe(paths, show)}
        from huggingface_hub import HfApi

        try:
            commit = HfApi().dataset_info(self.name, revision=self.revision, timeout=10).sha
        except Exception:  # offline with a cached copy: the names still say which
            commit = None
        return named | {"dataset_commit": commit}


def _readable(builder, paths: list[str] | None) -> list[str] | None:
    """Return a split's files where our readers give what `datasets` would; None where only it can read them."""
    if not paths or getattr(builder.config, "field", None) or builder.name == "csv":
        return None
    try:
        kinds = [files.kind_of(path) for path in paths]
    except ValueError:
        return None
    return list(paths) if set(kinds) <= {"json", "text", "parquet", "arrow"} else None


def _texts(dataset, columns: Columns):
    for rows in dataset.iter(batch_size=ROWS_PER_READ):
        yield from (columns.value(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True))


def _texts_from(dataset, columns: Columns, first: int):
    return _texts(dataset.select(range(min(first, len(dataset)), len(dataset))), columns)
