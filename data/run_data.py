"""A run's data: its tokenizer, its packed set, and the rows and documents that it trains on and is judged by."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from . import preparation, stream
from .blend import Blend
from .pack.manifest import Manifest
from .prepared import PreparedSet
from .read import corpus
from .tokens import tokenization

TRAIN = "train"  # as training/model.py and data/prepare.py say it
TOKENIZER_DOCUMENTS = 100_000  # a BPE's merges settle long before; the built-in text has 600


def get_tokenizer(data_args: Any, source: str, *, vocab_size: int = 0):
    """The tokenizer of a name or directory; "train" trains one of vocab_size tokens on the text."""
    if source != TRAIN:
        return tokenization.load_tokenizer(source)
    data_args.check_text_for_tokenizer()
    documents = islice(corpus.read_documents(**data_args.reading), TOKENIZER_DOCUMENTS)
    return tokenization.train_tokenizer(documents, vocab_size)


def open_data(data_args: Any, args: Any) -> Blend | PreparedSet:
    """What a run takes its rows of: a prepared set, there or to be made, or a blend of several."""
    directory = data_args.prepared_dir or str(Path(args.output_dir, "prepared"))
    return Blend(data_args.blend, args.order_seed) if data_args.blend else PreparedSet(directory)


def make_sets(data_args: Any, args: Any, tokenizer: Any, say: Callable[[str], None]) -> None:
    """Prepare the set of a run, or find it whole; of a blend, each."""
    alone = data_args.prepared_dir or str(Path(args.output_dir, "prepared"))
    for directory in [entry.prepared_dir for entry in data_args.blend] or [alone]:
        as_it_is = data_args.prepared_dir and not data_args.named and Manifest.stands_in(directory)
        more = data_args.first_of_stream | (data_args.as_prepared if as_it_is else {})
        manifest = preparation.prepare(
            corpus.read_documents(**data_args.reading),
            tokenizer,
            data_args.block_size,
            directory,
            source=None if as_it_is or data_args.blend else corpus.describe_source(**data_args.source),
            progress=not args.disable_tqdm,
            **data_args.preparing | more,
        )
        found = "found in" if manifest.reused else "written to"
        say(f"data: {manifest.summary}, {found} {directory}.{manifest.notes}")


class Sets(NamedTuple):
    """Training rows, and {held-out set: rows scored during training}."""

    train: Any
    held_out: dict[str, Any]


def load_sets(data_args: Any, args: Any, tokenizer: Any, data: Any, share: dict | None, say: Callable) -> Sets:
    """What a run trains on and is held against.

    Args:
        args: PretrainArguments: micro-batch, accumulation, ranks, max_eval_samples.
        data: Of open_data.
        share: This rank's share of a stream; None where a set is read.

    Raises:
        ValueError: Fewer rows than one step takes; of several sets, fewer than all steps do.
    """
    if share is not None:
        documents = corpus.read_documents(**data_args.reading)
        train = stream.open_stream(documents, tokenizer, **data_args.streamed, **share)
    else:
        train = data.train_rows()
    if len(train) < args.rows_a_step:
        raise ValueError(
            f"one step takes {args.rows_a_step} rows (per_device_train_batch_size {args.per_device_train_batch_size} x "
            f"gradient_accumulation_steps {args.gradient_accumulation_steps} x {args.world_size} ranks), the set has "
            f"{len(train)} of {data_args.block_size} tokens: lower one of them or block_size, or give more text."
        )
    if data_args.blend:  # in the order that keeps the shares
        args.blend_in_order(data)
    together = args.per_device_train_batch_size * args.world_size  # what ranks take at once
    if left_out := len(train) % together if args.dataloader_drop_last and not data_args.blend else 0:
        say(f"data: each epoch leaves out {left_out} of its {len(train):,} rows, others each time: they fill no batch.")
    held_out = {}
    for name in data.manifest.held_out:
        if rows := len(blocks := data.held_out_rows(name)):
            held_out[name] = blocks.select(range(0, rows, -(-rows // args.max_eval_samples)))
    if not held_out:
        say("no held-out row: held-out loss is not measured during training (see validation_fraction, block_size).")
    return Sets(train, held_out)


def first_documents(data: Any, count: int) -> list[str]:
    """The first documents of each held-out set."""
    return [text for name in data.manifest.held_out for text in islice(data.held_out_documents(name), count)]


def spaced_documents(data: Any, most: int) -> dict[str, list[str]]:
    """{held-out set: at most so many of its documents, evenly spaced}."""
    found = {}
    for name, split in data.manifest.held_out.items():
        every = -(-data.manifest.splits[split]["documents"] // most)
        found[name] = list(islice(data.held_out_documents(name), 0, None, every))
    return found


def taken(data: Any, rows: int) -> dict[str, Any]:
    """{blend: what its sets gave of so many rows}; nothing of a single set."""
    return {"blend": data.taken(rows)} if isinstance(data, Blend) else {}
