"""What text is taken and how it becomes rows: the arguments that a run and `prepare.py` share, with their checks."""

import difflib
import os
import re
import typing
from dataclasses import dataclass, field

from .pack.packing import PACKINGS
from .read.corpus import MAX_DOCUMENT_BYTES, SOURCE
from .read.documents import BAD_ROWS
from .read.forms.columns import Columns
from .read.validation import NAME, name_sets
from .tokens import BACKENDS

VALIDATION_FRACTION = 0.005
KEYS_OF_A_SET = ("prepared_dir", "weight", "max_epochs", "name")  # in a blend


@dataclass
class CorpusArguments:
    """Where text comes from and how it becomes rows. Nothing named: the built-in text."""

    dataset_name: str | None = field(default=None, metadata={"help": "A Hub dataset: HuggingFaceTB/smollm-corpus."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, e.g. cosmopedia-v2."})
    dataset_split: str = field(default="train", metadata={"help": "The split to read."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the Hub dataset."})
    dataset_data_dir: str | None = field(default=None, metadata={"help": "Only this folder of the dataset."})
    dataset_data_files: list[str] | None = field(
        default=None, metadata={"help": "Only these files of the dataset: paths or globs in it."}
    )
    data_files: list[str] | None = field(
        default=None,
        metadata={
            "help": "Paths, globs, directories with all below them, or addresses (hf://, s3://, https://). A document "
            "is a row of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, or a file of .txt, .md, .rst, .tex, "
            "source code. All but .parquet and .arrow may also end in .gz, .zst, .xz, .bz2."
        },
    )
    text_column: str = field(
        default="text",
        metadata={"help": "The column that holds the text; meta.text: text in meta. A list of texts is one document."},
    )
    text_template: str | None = field(
        default=None, metadata={"help": 'Several columns as one text, instead of text_column: "{title}\\n\\n{body}".'}
    )
    document_separator: str | None = field(
        default=None,
        metadata={
            "help": "What stands between the documents of a text file: a mark, or three line ends (\\n\\n\\n). null: a "
            "file is one document."
        },
    )
    encoding: str | None = field(
        default=None,
        metadata={"help": "The files' encoding: latin-1, utf-16. null: UTF-8, with or without BOM."},
    )
    ids_column: str | None = field(
        default=None,
        metadata={
            "help": "The column that holds ready token ids of tokenizer_name, in place of text: nothing is encoded. "
            "EOS is appended to rows that do not end in it."
        },
    )
    mixture: list[dict[str, typing.Any]] | None = field(
        default=None,
        metadata={
            "help": "Sources by share of tokens, instead of one: a list of objects with the keys above, weight, "
            "and max_epochs (1: the mixture ends where a source does). Interleaved document by document."
        },
    )
    mixture_seed: int = field(default=0, metadata={"help": "Another seed, another order of a mixture's documents."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read text as it comes, nothing of it kept on the disk. A run trains straight from it (max_steps "
            "says how long), unless max_documents or max_tokens bound it: then a set is prepared."
        },
    )
    bad_rows: str = field(
        default="error",
        metadata={
            "help": "error stops at a row that is no text; skip passes it over, counts it, and names it in the set's "
            "skipped_rows.jsonl. The rest of a damaged file counts as one such row."
        },
    )
    max_document_bytes: int = field(
        default=MAX_DOCUMENT_BYTES,
        metadata={"help": "A longer line or document is a bad row: memory is bounded, whatever a file unpacks to."},
    )
    max_documents: int | None = field(default=None, metadata={"help": "Take only the first so many documents."})
    max_tokens: int | None = field(default=None, metadata={"help": "Take exactly the first so many tokens."})
    min_characters: int | None = field(default=None, metadata={"help": "Leave out documents shorter than this."})
    max_characters: int | None = field(default=None, metadata={"help": "Leave out documents longer than this."})
    deduplicate: bool = field(
        default=False,
        metadata={"help": "Keep the first of documents that are alike but for case, white space and Unicode form."},
    )
    decontaminate: list[str] | None = field(
        default=None,
        metadata={"help": "Files of evaluation texts, as data_files: documents that share 13 words in a row are left "
        "out, and named in the set's decontaminated-*.jsonl."},
    )  # fmt: skip
    filters: list[str | dict[str, typing.Any]] | None = field(
        default=None,
        metadata={
            "help": 'Filters of datatrove by name, e.g. ["GopherQualityFilter"], or with their options: '
            '[{"LanguageFilter": {"languages": ["en"]}}]. Needs the extra `datatrove`.'
        },
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={
            "help": f"Share of the documents held out, chosen by a hash of their text. 0 holds out none. Default: "
            f"{VALIDATION_FRACTION}, or 0 with held-out text of one's own."
        },
    )
    validation_files: list[str] | dict[str, str | list[str] | dict[str, typing.Any]] | None = field(
        default=None,
        metadata={
            "help": "Held-out text of one's own, instead of a fraction: files as data_files. Or several sets by name, "
            'each measured alone: {"wiki": "wiki/*.jsonl", "code": ["a.parquet"]}. An object with the keys of a source '
            "says how a set is read. Documents that stand there too are left out of training."
        },
    )
    validation_split: str | dict[str, str] | None = field(
        default=None,
        metadata={"help": "A split of dataset_name that is held out, or several by name; as validation_files."},
    )
    block_size: int = field(default=2048, metadata={"help": "Tokens per packed row. SmolLM2 was pre-trained at 2048."})
    packing: str = field(
        default="concat",
        metadata={
            "help": "concat: documents end to end, cut into rows (GPT-3, section 2.2). best_fit: documents up to a row "
            "are never cut; rows are filled best-fit decreasing, the rest padded (arXiv 2404.10830)."
        },
    )
    tokenizer_backend: str = field(
        default="auto",
        metadata={
            "help": "auto: the faster tokie where it is installed and gives the same ids, else tokenizers; or one of "
            "the two by name."
        },
    )
    num_proc: int = field(default=1, metadata={"help": "Processes of this machine that share the preparation."})

    def __post_init__(self):
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2 (one input, one target), got {self.block_size}.")
        if self.ids_column is not None:
            self._check_ids()
        sets = name_sets(self.validation_files, self.validation_split, self.source)
        if sets and self.validation_fraction:
            key = "validation_split" if self.validation_files is None else "validation_files"
            raise ValueError(
                f"validation_fraction = {self.validation_fraction} and {key} = {getattr(self, key)} are both given: "
                "keep one (validation_fraction=null takes it back)."
            )
        self.fraction_given = self.validation_fraction is not None
        if self.validation_fraction is None:
            self.validation_fraction = 0.0 if sets else VALIDATION_FRACTION
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and below 1, got {self.validation_fraction}.")
        one_of("packing", self.packing, PACKINGS)
        one_of("bad_rows", self.bad_rows, BAD_ROWS)
        one_of("tokenizer_backend", self.tokenizer_backend, BACKENDS)
        at_least_one = ("num_proc", "max_documents", "max_tokens", "min_characters", "max_characters")
        for name in (*at_least_one, "max_document_bytes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if (self.min_characters or 0) > (self.max_characters or float("inf")):
            raise ValueError(f"min_characters = {self.min_characters} is above max_characters = {self.max_characters}.")
        given = {name: getattr(self, name) for name in ("dataset_name", "data_files", "mixture")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            both = " and ".join(f"{name} = {value}" for name, value in given.items())
            raise ValueError(f"{both} are both given: keep one.")
        self._check_form()
        again = [entry for entry in self.mixture or [] if entry.get("max_epochs", 1) != 1]
        if self.deduplicate and again:
            raise ValueError(
                f"deduplicate = true would leave out all of a second pass, but mixture has max_epochs = "
                f"{again[0]['max_epochs']}: set one of them back."
            )
        for name in ("data_files", "dataset_data_files", "mixture", "decontaminate", "filters"):
            if getattr(self, name) == []:
                raise ValueError(f"{name} is an empty list: name at least one, or leave it out.")

    def _check_form(self):
        """Raise ValueError where a document's form cannot be as asked."""
        for name in ("dataset_data_dir", "dataset_data_files"):
            if getattr(self, name) is not None and self.dataset_name is None:
                raise ValueError(f"{name} = {getattr(self, name)!r} is of a dataset: give dataset_name too.")
        if self.text_template is not None:
            if self.text_column != "text":
                raise ValueError(f"text_template and text_column = {self.text_column!r} are both given: keep one.")
            Columns(self.text_column, self.text_template)
        if self.document_separator == "":
            raise ValueError('document_separator = "" separates nothing: name what stands between documents, or null.')
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
            except LookupError:
                raise ValueError(f"encoding = {self.encoding!r} is none that Python knows, as latin-1.") from None

    def _check_ids(self):
        """Raise ValueError where ready ids have no place."""
        if not self.named:
            raise ValueError(f"ids_column = {self.ids_column}: name the data_files or the dataset_name that has it.")
        others = {"mixture": self.mixture, "filters": self.filters, "text_template": self.text_template}
        others |= {"text_column": self.text_column} if self.text_column != "text" else {}
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"ids_column = {self.ids_column} and {name} = {value} do not go together: keep one.")

    @property
    def named(self) -> bool:
        """Whether a text is named at all."""
        return any((self.dataset_name, self.data_files, self.mixture))

    @property
    def source(self) -> dict:
        """Which text: the arguments of `corpus.describe_source`."""
        source = {name: getattr(self, name) for name in (*SOURCE, "mixture", "mixture_seed")}
        return source | ({"text_column": self.ids_column} if self.ids_column is not None else {})

    @property
    def validation(self) -> dict[str, dict]:
        """Held-out text of one's own; see `validation.name_sets`."""
        return name_sets(self.validation_files, self.validation_split, self.source)

    @property
    def judging(self) -> dict:
        """How rows are read, of whatever text."""
        return {name: getattr(self, name) for name in ("streaming", "bad_rows", "max_document_bytes")}

    @property
    def reading(self) -> dict:
        """Which text and how it is read: the arguments of `corpus.read_documents`."""
        return self.source | self.judging

    @property
    def preparing(self) -> dict:
        """What becomes of it: arguments of `prepare.prepare`."""
        cleaning = ("min_characters", "max_characters", "deduplicate", "decontaminate", "filters")
        names = ("validation_fraction", "packing", "tokenizer_backend", "max_documents", "max_tokens", "num_proc")
        cleaned = {name: getattr(self, name) for name in (*cleaning, "text_column", "text_template")}
        return {name: getattr(self, name) for name in names} | {
            "cleaning": cleaned,
            "ids_column": self.ids_column,
            "validation": self.validation,
            "reading_validation": self.judging,
        }


@dataclass(frozen=True)
class Entry:
    """One set of a blend.

    Attributes:
        weight: Its share of the rows, as it was given; the shares of all are weights over their sum.
        max_epochs: How often each of its rows may be trained on.
    """

    prepared_dir: str
    weight: float
    max_epochs: int
    name: str


def read_entries(given: list[dict]) -> list[Entry]:
    """Read the argument `prepared_dir` of several sets.

    Raises:
        ValueError: An unknown or missing key, a bad weight, max_epochs or name, a set or a name that stands twice.
    """
    if not given:
        raise ValueError("prepared_dir is an empty list: name at least one set, or leave it out.")
    entries = []
    for number, one in enumerate(given):
        try:
            entries.append(_entry(one))
        except ValueError as error:
            raise ValueError(f"prepared_dir[{number}]: {error}") from None
    for what, of in (("prepared_dir", lambda entry: os.path.realpath(entry.prepared_dir)), ("name", lambda e: e.name)):
        values = list(map(of, entries))
        if again := [entry for entry, value in zip(entries, values, strict=True) if values.count(value) > 1]:
            remedy = "give each a name of its own" if what == "name" else "name it once, with the sum of the weights"
            raise ValueError(f"prepared_dir: {what} {getattr(again[0], what)} stands twice: {remedy}.")
    return entries


def _entry(given: dict) -> Entry:
    for key in given:
        if key not in KEYS_OF_A_SET:
            raise ValueError(f"{key} is not a key of a set; there are {', '.join(KEYS_OF_A_SET)}.")
    directory, weight, max_epochs = given.get("prepared_dir"), given.get("weight"), given.get("max_epochs", 1)
    if not isinstance(directory, str) or not directory:
        raise ValueError(f"prepared_dir must be the directory of a prepared set, got {directory!r}.")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ValueError(f"weight must be a number above 0, a share of the rows, got {weight!r}.")
    if isinstance(max_epochs, bool) or not isinstance(max_epochs, int) or max_epochs < 1:
        raise ValueError(f"max_epochs must be a whole number of at least 1, got {max_epochs!r}.")
    name = given.get("name")
    if name is None:
        name = re.sub(r"\W+", "_", os.path.basename(os.path.realpath(directory)), flags=re.ASCII)
        name = name if NAME.fullmatch(name) else f"set_{name}"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"name {name!r} must be letters, digits and _, a letter first.")
    return Entry(directory, weight, max_epochs, name)


def one_of(name, value, choices):
    """Raise ValueError unless value is one of choices, with the nearest."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name} = {value!r} is not one of {', '.join(choices)}.{hint}")
