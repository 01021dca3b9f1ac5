"""Text to packed blocks: ours beside `datasets.map` and beside the tokenizer alone, in one run, as ratios.

    python benchmarks/preparation.py [--megabytes 30 300] [--kinds jsonl jsonl.zst parquet] [--tokenizer DIR]
                                     [--rounds 2] [--ways ours ...]
    python benchmarks/preparation.py --ways ours --megabytes 10 1000        # does memory grow with the corpus?
    python benchmarks/preparation.py --ways ours --megabytes 200 --one_document

The corpus is the built-in text, each document cut into paragraphs of about 2 kB that are shuffled and joined anew, so
that no two documents are alike. `datasets.map` is the recipe of run_clm.py: load_dataset, tokenize in 2 processes, then
group_texts in 2 processes. Each way runs in a process of its own, turn about. tokens/s is from the first byte read to
the last one written, imports and the loading of the tokenizer left out. The seconds of the whole process have them in,
and so has the memory: the peak of all the way's processes together, from their start (proportional set size, so that
shared pages count once).
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCK = 2048


def write_corpus(path, megabytes):
    """Documents of 0.5 to 8 kB, JSON lines (.zst: compressed) or parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    from smolpretrain.data.read.corpus import builtin_documents

    random.seed(0)
    paragraphs = [text[at : at + 500] for text in builtin_documents() for at in range(0, len(text), 500)]
    size, texts, writer = 0, [], None
    compressed = path.suffix == ".zst"
    with zstandard.open(path, "wb") if compressed else open(path, "wb") as file:
        while size < megabytes * 1e6:
            texts.append("\n\n".join(random.choices(paragraphs, k=random.randint(1, 16))))
            size += len(texts[-1].encode())
            if path.suffix != ".parquet":
                file.write(json.dumps({"text": texts.pop()}).encode() + b"\n")
            elif len(texts) == 10_000 or size >= megabytes * 1e6:
                table = pa.table({"text": texts})
                writer = writer or pq.ParquetWriter(file, table.schema)
                writer.write_table(table)
                texts = []
        if writer:
            writer.close()


def write_document(path, megabytes):
    """One document; one character of it takes 4 bytes, as then all of them would in a Python string."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from smolpretrain.data.read.corpus import builtin_documents

    text = "\n\n".join(builtin_documents())
    text = (text * (int(megabytes * 1e6) // len(text) + 1))[: int(megabytes * 1e6)] + " \U0001f600 end"
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array([text], pa.large_string())}), path)
    else:
        row = text if path.suffix == ".txt" else json.dumps({"text": text}, ensure_ascii=False) + "\n"
        path.write_text(row, encoding="utf-8")


def ours(path, tokenizer, directory):
    from smolpretrain.data.preparation import prepare
    from smolpretrain.data.read.corpus import describe_source, read_documents

    source = {"data_files": [str(path)]}
    manifest = prepare(
        read_documents(**source), tokenizer, BLOCK, directory / "set", describe_source(**source), 0, progress=False,
        say=lambda sentence: print(sentence, file=sys.stderr),
    )  # fmt: skip
    return sum(split["tokens"] for split in manifest.splits.values())


def datasets_map(path, tokenizer, directory):
    """run_clm.py's: map the tokenizer, then concatenate and cut 1,000 documents at a time."""
    import datasets

    datasets.disable_progress_bars()
    kind = "parquet" if path.suffix == ".parquet" else "json"
    loaded = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(directory))
    eos = tokenizer.eos_token_id

    def tokenize(rows):
        return {"input_ids": [[*ids, eos] for ids in tokenizer(rows["text"])["input_ids"]]}

    def group(rows):
        ids = [token for document in rows["input_ids"] for token in document]
        return {"input_ids": [ids[at : at + BLOCK] for at in range(0, len(ids) // BLOCK * BLOCK, BLOCK)]}

    tokenized = loaded.map(tokenize, batched=True, num_proc=2, remove_columns=["text"])
    return len(tokenized.map(group, batched=True, num_proc=2)) * BLOCK


def tokenizer_alone(path, tokenizer, directory):
    """`tokenizers` over texts that are already in memory, ids thrown away: nothing is read or written."""
    from smolpretrain.data.read.corpus import read_documents
    from smolpretrain.data.tokens.tokenization import plain_backend

    backend, tokens, texts, seconds = plain_backend(tokenizer), 0, [], 0.0
    for text in read_documents(data_files=[str(path)]):
        texts.append(text)
        if len(texts) == 1000:
            began = time.monotonic()
            tokens += sum(map(len, backend.encode_batch_fast(texts, add_special_tokens=False)))
            seconds += time.monotonic() - began
            texts = []
    return tokens, seconds


WAYS = {"ours": ours, "datasets.map, 2 processes": datasets_map, "tokenizers alone": tokenizer_alone}


def run_one(name, path, tokenizer_dir):
    """In a process of its own: print tokens and seconds."""
    if name == "ours":
        import smolpretrain.data.preparation  # noqa: F401 (imports are not timed)
    elif name.startswith("datasets"):
        import datasets  # noqa: F401
    from smolpretrain.data.tokens.tokenization import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_dir)
    with tempfile.TemporaryDirectory() as directory:
        began = time.monotonic()
        tokens = WAYS[name](path, tokenizer, Path(directory))
        seconds = time.monotonic() - began
    tokens, seconds = tokens if isinstance(tokens, tuple) else (tokens, seconds)
    print(json.dumps({"tokens": tokens, "seconds": seconds}))


def run_whole(command):
    """Run a way; return what it says, with the seconds and the peak memory of its whole processes."""
    began, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.02)
        said = process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return json.loads(said.splitlines()[-1]) | {"whole": time.monotonic() - began, "gib": peak / 2**20}


def memory(pid):
    """KiB that this process and those below it hold, shared pages counted once."""
    import psutil

    total = 0
    with contextlib.suppress(psutil.Error):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[30, 300])
    parser.add_argument("--kinds", nargs="+", default=["jsonl", "jsonl.zst", "parquet"])
    parser.add_argument("--tokenizer", help="directory; default: one of 4096 tokens trained on the built-in text")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--one_document", action="store_true", help="the whole text is one document")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_one(args.one[0], Path(args.one[1]), args.one[2])
    from smolpretrain.data.read.corpus import builtin_documents
    from smolpretrain.data.tokens.tokenization import train_tokenizer

    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in cpuinfo if line.startswith("model name")), "an unknown CPU")
    print(f"{os.cpu_count()} cores of {cpu}; tokenizer: {args.tokenizer or 'trained on the built-in text, 4096'}.\n")
    print("| MB | | | tokens/s | of datasets.map | whole process (s) | peak memory (GiB) |")
    print("|---:|---|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = args.tokenizer or f"{directory}/tokenizer"
        if not args.tokenizer:
            train_tokenizer(builtin_documents(), 4096).save_pretrained(tokenizer)
        for megabytes in args.megabytes:
            for kind in args.kinds:
                path = Path(directory, f"{megabytes}.{kind}")
                (write_document if args.one_document else write_corpus)(path, megabytes)
                measure(path, megabytes, kind, tokenizer, args.rounds, args.ways)
                path.unlink()


def measure(path, megabytes, kind, tokenizer, rounds, ways):
    found = {name: [] for name in ways}
    for _ in range(rounds):
        for name in ways:
            command = [sys.executable, __file__, "--one", name, str(path), str(tokenizer)]
            found[name].append(run_whole(command))
    rate = {name: max(run["tokens"] / run["seconds"] for run in runs) for name, runs in found.items()}
    for name, runs in found.items():
        peer, gib = rate.get("datasets.map, 2 processes"), max(run["gib"] for run in runs)
        ratio = f"{rate[name] / peer:.1f}" if peer else ""
        whole = f"{min(run['whole'] for run in runs):.1f}"
        print(f"| {megabytes} | {kind} | {name} | {rate[name]:,.0f} | {ratio} | {whole} | {gib:.2f} |", flush=True)


if __name__ == "__main__":
    main()
