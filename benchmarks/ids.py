"""Are the ids the model's own? Mixed text of this machine, every document encoded again by `tokenizers`.

    python benchmarks/ids.py [--megabytes 200] [--tokenizer DIR ...] [--roots DIR ...] [--speed] [--keep FILE]

The text is what Python, its packages and the system carry: documentation, source code in ten languages and more, the
translations of programs (each language one document a program, so scripts from Arabic to Thai), logs, and one document
in twenty once more with CRLF. Nothing is fetched. Each kind gives its share, smaller kinds all they have. Printed are
documents, how many differ (0, or the exit status is 1), the share that went to `tokenizers` because it is not shown
that tokie encodes it alike, and with --speed the ratio to `datasets.map` (see benchmarks/preparation.py).
"""

import argparse
import collections
import gettext
import gzip
import itertools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

KINDS = {
    "documentation": (".md", ".rst", ".txt", ".tex", ".pod", ".html", ".changelog", ".news"),
    "Python": (".py", ".pyi", ".pyx"),
    "C and C++": (".h", ".c", ".hpp", ".cpp", ".cc", ".cuh", ".cu"),
    "JavaScript": (".js", ".mjs", ".cjs"),
    "TypeScript": (".ts",),
    "Perl": (".pl", ".pm"),
    "shell": (".sh", ".bash"),
    "Rust": (".rs",),
    "Go": (".go",),
    "Java": (".java",),
    "Ruby and Lua": (".rb", ".lua"),
    "CSS": (".css", ".scss"),
    "data": (".json", ".yaml", ".yml", ".toml", ".xml", ".svg", ".csv"),
    "logs": (".log",),
    "translations": (".mo", ".po"),
}
ROOTS = [
    sysconfig.get_path("stdlib"),
    sysconfig.get_path("purelib"),
    "/usr/share",
    "/usr/include",
    "/usr/lib",
    "/var/log",
]
LARGEST = 2**21  # bytes of a file; a larger one is most often data


def kind_of(name: str) -> str | None:
    name = name.lower().removesuffix(".gz")
    for kind, endings in KINDS.items():
        if name.endswith(endings):
            return kind
    return "documentation" if name.startswith(("readme", "changelog", "news", "copyright", "license")) else None


def read_text(path: str) -> str | None:
    """Return a file's text, the messages of a .mo; None where it is no UTF-8 text."""
    try:
        if os.path.getsize(path) > LARGEST:
            return None
        data = Path(path).read_bytes()
        if path.endswith(".gz"):
            data = gzip.decompress(data)
        if path.endswith(".mo"):
            with open(path, "rb") as file:
                messages = gettext.GNUTranslations(file)._catalog.values()
            return "\n".join(message for message in messages if isinstance(message, str))
        return data.decode()
    except (OSError, ValueError, EOFError, LookupError):  # the last: gettext's, of a damaged .mo
        return None


def paths_of(roots: list[str]) -> dict[str, list[str]]:
    """Return the files of each kind, in an order that is the same for the same files, one of each folder in turn."""
    folders = collections.defaultdict(lambda: collections.defaultdict(list))
    for root in roots:
        for top, inner, names in os.walk(root):
            inner.sort()
            for name in sorted(names):
                if (kind := kind_of(name)) and not os.path.islink(os.path.join(top, name)):
                    folders[kind][top].append(os.path.join(top, name))
    turns = {kind: itertools.zip_longest(*found.values()) for kind, found in folders.items()}
    return {kind: [path for turn in several for path in turn if path] for kind, several in turns.items()}


def gather(path: Path, megabytes: float, roots: list[str]) -> dict[str, int]:
    """Write JSON lines; return the bytes of each kind."""
    waiting = {kind: iter(paths) for kind, paths in paths_of(roots).items()}
    sizes, seen, number = collections.Counter(), set(), 0
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        while waiting and sum(sizes.values()) < megabytes * 1e6:
            kind = min(waiting, key=lambda kind: sizes[kind])
            name = next(waiting[kind], None)
            if name is None:
                del waiting[kind]
                continue
            text = read_text(name)
            if text is None or not text.strip() or hash(text) in seen:
                continue
            seen.add(hash(text))
            number += 1
            again = [text.replace("\r\n", "\n").replace("\n", "\r\n")] if number % 20 == 0 else []
            for document in [text, *again]:
                file.write(json.dumps({"text": document}) + "\n")
                sizes[kind] += len(document.encode())
    os.replace(unfinished, path)
    return dict(sizes)


def compare(path: Path, tokenizer) -> tuple[int, int, int, int]:
    """Return documents, how many differ, how many were unsure, and tokens."""
    from smolpretrain.data.read.corpus import read_documents
    from smolpretrain.data.read.documents import Tally
    from smolpretrain.data.tokens.encoding import Encoder
    from smolpretrain.data.tokens.tokenization import document_encoder

    encode, truth = Encoder(tokenizer), document_encoder(tokenizer)
    documents = differ = unsure = tokens = 0
    for batch in read_documents(data_files=[str(path)]).batches(None, Tally()):
        ids, lengths = encode(batch.texts)
        found = np.split(ids, np.cumsum(lengths)[:-1])
        for text, mine, own in zip(batch.texts, found, truth(list(map(str, batch.texts))), strict=True):
            documents, tokens = documents + 1, tokens + len(own)
            unsure += encode.backend == "tokenizers" or encode.agreement.is_unsure(str(text))
            if not np.array_equal(mine, own):
                differ += 1
                print(f"differs: {str(text)[:100]!r}", file=sys.stderr)
    return documents, differ, unsure, tokens


def speed(path: Path, tokenizer: str) -> float:
    """Return how many times as fast as `datasets.map` a preparation is: the best of two runs of each, turn about."""
    rates = collections.defaultdict(float)
    for _, name in itertools.product(range(2), ("ours", "datasets.map, 2 processes")):
        command = [sys.executable, str(Path(__file__).with_name("preparation.py")), "--one", name, str(path), tokenizer]
        done = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        rates[name] = max(rates[name], done["tokens"] / done["seconds"])
    return rates["ours"] / rates["datasets.map, 2 processes"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--tokenizer", nargs="+", help="directories; default: one trained on the built-in text")
    parser.add_argument("--roots", nargs="+", default=ROOTS)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--keep", help="where the text is kept as JSON lines, and found again")
    args = parser.parse_args()
    from smolpretrain.data.read.corpus import builtin_documents
    from smolpretrain.data.tokens.tokenization import load_tokenizer, train_tokenizer

    with tempfile.TemporaryDirectory() as directory:
        path = Path(args.keep or f"{directory}/mixed.jsonl")
        if not path.exists():
            sizes = gather(path, args.megabytes, args.roots)
            print(", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in sorted(sizes.items())), "MB", flush=True)
        if not args.tokenizer:
            train_tokenizer(builtin_documents(), 4096).save_pretrained(f"{directory}/tokenizer")
        print("| tokenizer | MB | documents | tokens | differ | to `tokenizers` | times datasets.map |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        wrong = 0
        for name in args.tokenizer or [f"{directory}/tokenizer"]:
            documents, differ, unsure, tokens = compare(path, load_tokenizer(name))
            wrong += differ
            row = [Path(name).name, f"{os.path.getsize(path) / 1e6:.0f}", f"{documents:,}", f"{tokens:,}", str(differ)]
            row += [f"{unsure / documents:.2%}", f"{speed(path, name):.1f}" if args.speed else ""]
            print("|", " | ".join(row), "|", flush=True)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
