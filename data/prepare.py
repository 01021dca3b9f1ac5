"""Prepare a set of packed rows from text, once for many runs; one sentence where that fails.

python data/prepare.py [prepare.json] [key=value ...]       --help lists the keys
"""

import functools
import json
import os
import runpy
import sys
from argparse import ArgumentParser
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "in_place.py"))

from smolpretrain.core import status
from smolpretrain.core.text import one_line
from smolpretrain.core.words import collect, parse_args, switches_of
from smolpretrain.data import preparation, publish
from smolpretrain.data.arguments import CorpusArguments
from smolpretrain.data.pack.assemble import SKIPPED_ROWS
from smolpretrain.data.pack.manifest import verify
from smolpretrain.data.read import corpus
from smolpretrain.data.tokens import tokenization

TRAIN = "train"
TOKENIZER_DOCUMENTS = 100_000
PUBLISHING = {"push_to_hub", "public", "license"}
USAGE = """usage: python data/prepare.py [prepare.json] [key=value | --key value | --key=value ...]
       python data/prepare.py --merge [prepare.json] [key=value ...]   join what several machines prepared
       python data/prepare.py --verify DIR                             re-check every byte of a set
       ... --push_to_hub user/name [--public] [--license ID]           then publish it; with no key but prepared_dir,
                                                                       publish the finished set that is there

Under a Slurm array, shard_index and num_shards come from SLURM_ARRAY_TASK_ID and its companions.
"""


@dataclass
class PrepareArguments(CorpusArguments):
    """What is prepared, how, and where to. Nothing named: the built-in text."""

    prepared_dir: str = field(default="prepared", metadata={"help": "Where the packed set is written."})
    tokenizer_name: str = field(
        default=TRAIN,
        metadata={"help": "A Hub id, a directory, or 'train': a byte-level BPE trained on the data, kept in the set."},
    )
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of the tokenizer that 'train' trains."})
    shard_index: int | None = field(default=None, metadata={"help": "This machine's number, from 0, of num_shards."})
    num_shards: int | None = field(default=None, metadata={"help": "Machines that share the work and prepared_dir."})
    merge: bool = field(default=False, metadata={"help": "Join what several machines have prepared."})
    verify: str | None = field(default=None, metadata={"help": "A set: re-check every byte of it, and do no more."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Then publish it as this dataset of the Hub."})
    public: bool = field(default=False, metadata={"help": "Anybody may see it there; default: you alone."})
    license: str | None = field(default=None, metadata={"help": "Its licence as the Hub names it, such as odc-by."})

    def __post_init__(self):
        super().__post_init__()
        if self.ids_column is not None and self.tokenizer_name == TRAIN:
            raise ValueError(f"ids_column = {self.ids_column} holds ids of a tokenizer: set tokenizer_name to it.")
        if (self.shard_index is None) != (self.num_shards is None):
            raise ValueError("shard_index and num_shards go together: give both or neither.")
        if self.shard_index is None:
            self.shard_index, self.num_shards = slurm_share(os.environ)
        if (self.public or self.license) and not self.push_to_hub:
            key = "license" if self.license else "public"
            raise ValueError(f"{key} says how a set is published: give push_to_hub=user/name too.")
        if self.push_to_hub and self.num_shards > 1 and not self.merge:
            raise ValueError("push_to_hub belongs to the last step: prepare.py --merge ... push_to_hub=NAME")


def slurm_share(environment) -> tuple[int, int]:
    """Return (shard_index, num_shards) of a Slurm array's task; (0, 1) outside one."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return 0, 1
    number, lowest, step, count = (
        int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", 0), ("MIN", 0), ("STEP", 1), ("COUNT", 1))
    )
    return (number - lowest) // step, count


def run(args: PrepareArguments) -> None:
    """Prepare, or join, and say what there is now."""
    if args.tokenizer_name == TRAIN:
        documents = islice(corpus.read_documents(**args.reading), TOKENIZER_DOCUMENTS)
        tokenizer = tokenization.train_tokenizer(documents, args.vocab_size)
    else:
        tokenizer = tokenization.load_tokenizer(args.tokenizer_name)
    manifest = preparation.prepare(
        corpus.read_documents(**args.reading),
        tokenizer,
        args.block_size,
        args.prepared_dir,
        source=corpus.describe_source(**args.source, show=sys.stderr.isatty()),
        progress=sys.stderr.isatty(),
        **args.preparing,
        shard_index=args.shard_index,
        num_shards=args.num_shards,
        save_tokenizer=True,
        only_merge=args.merge,
    )
    if manifest is None:
        print(f"share {args.shard_index} of {args.num_shards} is done; after the last one: prepare.py --merge.")
        return
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['blocks']:,} rows of "
            f"{manifest.block_size}, fill {split['fill']:.4f}, {split['documents_cut']:,} documents cut, "
            f"{split['documents_per_block']:.2f} documents a row."
        )
    for entry in manifest.mixture:
        ended = ", which ended the mixture" if entry.get("ended_the_mixture") else ""
        print(
            f"{entry['source']}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
            f"{entry['realised']:.4f} of all for a weight of {entry['weight']:.4f}{ended}."
        )
    if manifest.notes:
        print(manifest.notes.strip())
    if manifest.filtered:
        print(f"left out: {', '.join(f'{name} {count:,}' for name, count in manifest.filtered.items())}.")
    if words := manifest.tally.words:
        print(f"{words}; they are named in {Path(args.prepared_dir, SKIPPED_ROWS)}.")
    print(f"{'found whole in' if manifest.reused else 'written to'} {args.prepared_dir}, {manifest.fingerprint}.")
    same = " ".join(f"{name}={getattr(manifest, name)}" for name in ("block_size", "packing", "validation_fraction"))
    print(f"train on it: prepared_dir={args.prepared_dir} tokenizer_name={Path(args.prepared_dir, 'tokenizer')} {same}")


def main(argv=None) -> None:
    """Exit status 2 and one line for what the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if "--help" in argv or "-h" in argv:
            print_help()
            return
        (args,) = parse_args(argv, (PrepareArguments,))
        given = collect(argv, switches_of((PrepareArguments,))).keys()
        if args.verify:
            if given != {"verify"}:
                raise ValueError("--verify takes one directory, as in: prepare.py --verify prepared")
            manifest = verify(args.verify, sha256=True)
            print(f"{args.verify} is whole: {len(manifest.files)} files, every byte as its manifest says.")
        elif args.push_to_hub:
            publication = publish.Publication(args.push_to_hub, args.public, args.license)
            make = None if given <= {"prepared_dir", *PUBLISHING} else functools.partial(run, args)
            print(f"published: {publish.publish(publication, args.prepared_dir, make)}")
        else:
            run(args)
    except publish.NotUploaded as error:
        ArgumentParser(prog="prepare.py").exit(status.NOT_UPLOADED, f"prepare.py: error: {error}\n")
    except (ValueError, OSError) as error:
        code = getattr(error, "status", status.BAD_INPUT)
        ArgumentParser(prog="prepare.py").exit(code, f"prepare.py: error: {one_line(error)}\n")


def print_help() -> None:
    print(USAGE)
    for item in fields(PrepareArguments):
        print(f"  {item.name}={json.dumps(item.default)}\n      {item.metadata['help']}")


if __name__ == "__main__":
    main()
