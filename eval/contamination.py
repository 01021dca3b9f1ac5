"""Which items of the educational benchmark stand in a training text.

    python eval/contamination.py runs/first/prepared
    python eval/contamination.py corpus/*.jsonl.gz notes.txt --output contamination.json

An item counts as seen where its question with its right option shares 13 running words with the text, or, if it has
fewer, stands there whole; case and punctuation do not count. The canary that every line of items.jsonl bears is looked
for too. Source: the 13-grams of GPT-3 (Brown et al. 2020, appendix C). A paraphrase or a translation is not found.
"""

import re
import runpy
import sys
from pathlib import Path

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "in_place.py"))

import datasets
import pyarrow as pa
import transformers
from tqdm import tqdm

from smolpretrain.core.files import write_json
from smolpretrain.core.text import one_line
from smolpretrain.eval.educational.items import read_items
from smolpretrain.eval.parts import command, corpora

GRAM = 13
HEAD = 5  # words of the shortest item: what a gram is looked up by
DECODED = 2**18  # tokens decoded at a time
OVERLAP = 2**10  # tokens decoded again with the next ones: what any item takes, in bytes too
OPTIONS = {
    "text_column": {"default": "text"},
    "tokenizer": {"help": "directory or Hub id, for a prepared set that has none"},
    "output": {"help": "JSON file to write: {id, or canary: the words found}"},
}


def split_words(text):
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def index_items(items):
    """Return {first HEAD words: [(words, id)]} of every gram of every item, and of their canary, of id canary."""
    index = {}
    canaries = [{"id": "canary", "text": canary} for canary in {item["canary"] for item in items}]
    for item in [*canaries, *items]:
        words = split_words(item.get("text") or f"{item['question']} {item['options'][item['answer']]}")
        for start in range(max(1, len(words) - GRAM + 1)):
            gram = words[start : start + GRAM]
            index.setdefault(tuple(gram[:HEAD]), []).append((gram, item["id"]))
    return index


def find_seen(items, texts):
    """Return {id: the words found} of the items that stand in any of the texts."""
    index, seen = index_items(items), {}
    for text in texts:
        words = split_words(text)
        for at, head in enumerate(zip(*(words[start:] for start in range(HEAD)), strict=False)):
            for gram, name in index.get(head, ()):
                if words[at : at + len(gram)] == gram:
                    seen.setdefault(name, " ".join(gram))
    return seen


def read_texts(paths, column="text", tokenizer=None):
    """Yield the texts of files (globs too) and of prepared sets; ValueError where one cannot be read."""
    for path in corpora.expand(paths):
        if Path(path).is_dir():
            yield from _read_prepared(Path(path), tokenizer)
            continue
        try:
            for row in datasets.load_dataset(**corpora.file_source(path), streaming=True):
                if column not in row:
                    raise ValueError(f"{path}: no column {column}; the columns are {', '.join(row)}.")
                yield row[column] or ""
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"{path}: {error}") from error


def _read_prepared(directory, tokenizer):
    """Yield the decoded rows of a prepared set's training split, laid end to end."""
    files = sorted(directory.glob("train*.arrow"))
    homes = [tokenizer, directory / "tokenizer", directory.parent]  # a run's own tokenizer is beside its prepared set
    home = next((home for home in homes if home and (home == tokenizer or (home / "tokenizer.json").is_file())), None)
    if not files or home is None:
        lacks = "no tokenizer in it or beside it: name one with --tokenizer" if files else "no train*.arrow in it"
        raise ValueError(f"{directory} is no prepared set that can be read: {lacks}.")
    decoder = transformers.PreTrainedTokenizerFast.from_pretrained(home)
    for file in files:
        kept = []
        for batch in pa.ipc.open_stream(pa.memory_map(str(file))):
            ids = batch.column("input_ids").values.to_pylist()
            for start in range(0, len(ids), DECODED):
                kept = kept[-OVERLAP:] + ids[start : start + DECODED]
                yield decoder.decode(kept)


def main(argv=None):
    """The command; what a user can get wrong is one line and exit status 2."""
    datasets.logging.set_verbosity(50)
    parser = command.build_parser("contamination.py", __doc__.split("\n")[0], OPTIONS, file=False)
    parser.add_argument("data", nargs="+", help=f"prepared sets, files or globs ({' '.join(corpora.READERS)})")
    args = parser.parse_args(argv)
    items = read_items()
    try:
        seen = find_seen(items, tqdm(read_texts(args.data, args.text_column, args.tokenizer), unit=" texts"))
    except (ValueError, OSError) as error:
        parser.error(one_line(error))
    for name, words in seen.items():
        print(f"{name}: {words}")
    found = len(seen.keys() - {"canary"})
    print(f"{found} of {len(items)} items stand there ({GRAM} running words, or a shorter item whole).")
    if args.output:
        write_json(args.output, seen)


if __name__ == "__main__":
    main()
