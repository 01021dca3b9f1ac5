"""What a prepared set is, and whether it is whole: manifest.json, written last, names every file with size and hash."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from smolpretrain.core.files import describe_file, write_json

from ..read.documents import Tally

FILE_NAME = "manifest.json"
FORMAT_VERSION = 2
VALIDATION = "validation"
# What decides the tokens. Another value of one of these is another set.
IDENTITY = (
    "format_version",
    "source",
    "validation_fraction",
    "tokenizer_hash",
    "eos_token_id",
    "vocab_size",
    "block_size",
    "packing",
    "options",
)


@dataclass
class Manifest:
    """A prepared set's record.

    Attributes:
        source: What `corpus.describe_source` said, text_column included.
        tokenizer_hash: sha256, see `tokenization.tokenizer_hash`.
        vocab_size: Every id is below it.
        splits: For "train" and "validation" (or of each held-out set by name "validation_NAME"): documents,
            tokens (EOS included), bytes (UTF-8), blocks, padding_tokens (in rows of best_fit), remainder_tokens
            (dropped: tokens + padding_tokens ==
            blocks * block_size + remainder_tokens), documents_cut, fill, documents_per_block, files.
        options: What else decides the tokens: limits, cleaning, mixture, "validation" (each held-out set's source by
            its name); empty where nothing was asked.
        filtered: Documents left out by each kind of cleaning, and those that stand in held-out text of one's own.
        mixture: Documents, tokens and realised weight of each source of a mixture.
        held_out_fraction: What validation_fraction was raised to so that a document is held out; None: it was not.
        rows: Rows that were read.
        eos_appended: Documents of ready ids that did not end in EOS, which was then appended.
        skipped_rows: Rows of the source that were null, blank or without the column; missing_rows: of the last kind.
        bad_rows: Rows passed over because they were no text, and the first of them. Both kinds are named in
            skipped_rows.jsonl, at most 10,000 of a few megabytes of text.
        validation_documents: Files that hold the held-out texts.
        decontaminated: Files that name the documents left out because evaluation texts share words with them.
        files: For each file: bytes and sha256.
        audit: Of the ids that the faster tokenizer made: documents compared with `tokenizers` (all of them, and of each
            shard), disagreements (parts in which one was found, which `tokenizers` has encoded since), upper_bound (the
            share of documents that may differ unseen, at this confidence). Empty where `tokenizers` made all of them.
        versions: Libraries that made it; not part of its identity.
        reused: True where `prepare` found the set already there; not stored.
    """

    source: dict
    validation_fraction: float
    tokenizer_hash: str
    eos_token_id: int
    vocab_size: int
    block_size: int
    packing: str
    options: dict = field(default_factory=dict)
    splits: dict[str, dict] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    mixture: list[dict] = field(default_factory=list)
    held_out_fraction: float | None = None
    rows: int = 0
    skipped_rows: int = 0
    missing_rows: int = 0
    eos_appended: int = 0
    bad_rows: dict = field(default_factory=dict)
    validation_documents: list[str] = field(default_factory=list)
    decontaminated: list[str] = field(default_factory=list)
    files: dict[str, dict] = field(default_factory=dict)
    audit: dict = field(default_factory=dict, compare=False)
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    reused: bool = field(default=False, compare=False)

    @property
    def identity(self) -> dict:
        """What decides the tokens, as JSON values; a Hub commit is recorded but does not tell two sets apart."""
        identity = {name: getattr(self, name) for name in IDENTITY}
        identity |= {name: _without_commit(identity[name]) for name in ("source", "options")}
        return json.loads(json.dumps(identity))

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits that such a set has, "train" first."""
        names = sorted(self.options.get("validation", [""]))
        return ("train", *(f"{VALIDATION}_{name}" if name else VALIDATION for name in names))

    @property
    def held_out(self) -> dict[str, str]:
        """{name: split} of what is held out; the name is "" where there is only one set without."""
        splits = sorted(s for s, entry in self.splits.items() if s.startswith(VALIDATION) and entry["documents"])
        return {split.removeprefix(VALIDATION).removeprefix("_"): split for split in splits}

    def documents_of(self, split: str) -> list[str]:
        """Return the files that hold the texts of a held-out split."""
        return [name for name in self.validation_documents if name.startswith(f"{documents_name(split)}-")]

    @property
    def summary(self) -> str:
        """What the splits hold, for people."""
        return "; ".join(
            f"{name} {split['documents']:,} documents, {split['tokens']:,} tokens, {split['blocks']:,} rows of "
            f"{self.block_size}"
            for name, split in self.splits.items()
        )

    @property
    def held_out_below(self) -> float:
        """The fraction by which documents are held out."""
        return self.held_out_fraction or self.validation_fraction

    @property
    def tally(self) -> Tally:
        """What was passed over."""
        bad = self.bad_rows or {"rows": 0, "first": None}
        return Tally(self.skipped_rows, bad["rows"], bad["first"], self.missing_rows, self.rows)

    @property
    def notes(self) -> str:
        """What was done to documents, for people: sentences, each after a blank; "" where there is nothing to say."""
        found = []
        if self.eos_appended:
            found.append(f"EOS was appended to {self.eos_appended:,} documents of ready ids, which did not end in it.")
        if there_too := self.filtered.get("held_out"):
            found.append(f"{there_too:,} documents stand in the held-out text too: they were left out of training.")
        return "".join(f" {sentence}" for sentence in found)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the identity, the counts and every file's sha256: equal for equal sets, anywhere."""
        hashes = {name: entry["sha256"] for name, entry in self.files.items()}
        text = json.dumps([self.identity, self.splits, hashes], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]

    def save(self, prepared_dir: str | os.PathLike) -> None:
        """Write manifest.json: whole or not at all, on the disk when this returns."""
        path = Path(prepared_dir, FILE_NAME)
        values = {name: value for name, value in asdict(self).items() if name != "reused"}
        write_json(path, values | {"fingerprint": self.fingerprint}, sort_keys=True)

    @staticmethod
    def stands_in(prepared_dir: str | os.PathLike) -> bool:
        """Tell whether a finished set, whole or damaged, is there."""
        return Path(prepared_dir, FILE_NAME).is_file()

    @classmethod
    def load(cls, prepared_dir: str | os.PathLike) -> "Manifest":
        """Read manifest.json.

        Raises:
            ValueError: prepared_dir is no prepared set, or its manifest is damaged or of another format.
        """
        path = Path(prepared_dir, FILE_NAME)
        if not path.is_file():
            raise ValueError(f"{prepared_dir} is not a prepared set (it has no {FILE_NAME}); prepare it first.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version, fingerprint = values["format_version"], values.pop("fingerprint")
            manifest = cls(**values) if version == FORMAT_VERSION else None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete {prepared_dir} and prepare it again.") from error
        if manifest is None:
            raise ValueError(
                f"{path} has format_version {version}, this version reads {FORMAT_VERSION}; prepare it anew."
            )
        if manifest.fingerprint != fingerprint:
            raise ValueError(
                f"{path} is damaged (fingerprint {fingerprint} is written, its values give {manifest.fingerprint}); "
                f"delete {prepared_dir} and prepare it again."
            )
        return manifest


def documents_name(split: str) -> str:
    """Return how the files of a held-out split's texts begin: validation_documents, validation_documents_NAME."""
    return f"{VALIDATION}_documents{split.removeprefix(VALIDATION)}"


def verify(prepared_dir: str | os.PathLike, sha256: bool = False) -> Manifest:
    """Check that a prepared set is whole: every file there and of its size; with sha256, every byte.

    Raises:
        ValueError: Names the first file that is missing or differs, and how.
    """
    manifest = Manifest.load(prepared_dir)
    remedy = f"delete {prepared_dir} and prepare it again."
    hashed = {}
    if sha256:
        paths = {name: Path(prepared_dir, name) for name in manifest.files if Path(prepared_dir, name).is_file()}
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run
            described = pool.map(describe_file, paths.values())
            hashed = {name: found["sha256"] for name, found in zip(paths, described, strict=True)}
    for name, entry in manifest.files.items():
        path = Path(prepared_dir, name)
        if not path.is_file():
            raise ValueError(f"{path} is missing from the prepared set; {remedy}")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise ValueError(f"{path} is damaged: it holds {size} bytes, its manifest says {entry['bytes']}; {remedy}")
        if sha256 and (found := hashed[name]) != entry["sha256"]:
            raise ValueError(
                f"{path} is damaged: its sha256 is {found[:16]}, its manifest says {entry['sha256'][:16]}; {remedy}"
            )
    return manifest


def check_identity(found: Manifest, wanted: Manifest, prepared_dir: str | os.PathLike) -> None:
    """Refuse a prepared set that is not the one asked for.

    Raises:
        ValueError: Names the first key that differs and both values.
    """
    held, asked = _flat(found.identity), _flat(wanted.identity)
    for key in [*asked, *held]:
        old, new = held.get(key), asked.get(key)
        if old != new:
            raise ValueError(
                f"{prepared_dir} was prepared with {key} {_shown(old, new)}, but {_shown(new, old)} is asked for; "
                "give another prepared_dir, or delete that one to prepare it anew."
            )


def _without_commit(source):
    """Return a description of a source, or of a mixture's, without the commit of the Hub."""
    if isinstance(source, dict):
        return {key: _without_commit(value) for key, value in source.items() if key != "dataset_commit"}
    return list(map(_without_commit, source)) if isinstance(source, list) else source


def _flat(identity: dict) -> dict:
    """Return the identity with source's and options' keys beside the others: a difference is named by its own key."""
    source = {f"source.{key}": value for key, value in identity["source"].items()}
    plain = {key: value for key, value in identity.items() if key not in ("source", "options")}
    options = {key: value for key, value in identity["options"].items() if key != VALIDATION}
    held_out = identity["options"].get(VALIDATION, {}).items()
    own = {f"validation {name}".rstrip() + f".{key}": value for name, one in held_out for key, value in one.items()}
    return plain | source | own | options


def _shown(value, other) -> str:
    """Return a value for a message; of a list, its first item that the other one lacks."""
    if isinstance(value, list) and isinstance(other, list):
        value = next((item for item in value if item not in other), f"{len(value)} in another order or number")
    return json.dumps(value)
