"""The command of perplexity.py: options, one row a corpus, a table and a JSON file."""

import argparse
import math
import re
from pathlib import Path

import datasets
import rich.table
import torch
import transformers
from huggingface_hub import try_to_load_from_cache

from smolpretrain.core.files import write_json
from smolpretrain.core.options import Parser
from smolpretrain.core.text import one_line

from .. import perplexity
from . import corpora, intervals

OPTIONS = {
    "model": {
        "required": True,
        "help": "directory, checkpoint-N of a run among them; Hub id, id@revision; GGUF file, or owner/name/file.gguf",
    },
    "tokenizer": {"help": "directory or Hub id, if it is not the model's own"},
    "revision": {"help": "commit, branch or tag of a model on the Hub"},
    **corpora.OPTIONS,
    "compatible_with": {
        "choices": perplexity.COMPATIBLE,
        "help": "evaluate: its mean of per-text perplexities, window its max_length; lm_eval: its rolling windows",
    },
    "window": {"type": int, "help": "input tokens a pass; default the model's positions, at most 2048"},
    "stride": {"type": int, "help": "tokens a window moves on; default half of it (half is context); all: disjoint"},
    "prefix": {"default": "auto", "choices": ("auto", "none", "bos", "eos"), "help": "token before each document"},
    "batch_size": {"type": int, "default": 0, "help": "windows a pass; 0: as many as memory and cache like"},
    "dtype": {
        "default": "auto",
        "choices": ("auto", "float32", "bfloat16", "float16"),
        "help": "auto: float32 on CPU, else the checkpoint's",
    },
    "device": {"default": "auto", "help": "auto, cpu, cuda, cuda:1, mps, ..."},
    "output": {"help": "JSON file to write: an object, or a list of them, one a corpus"},
}


def check_device(name):
    """ValueError where torch cannot place a model on a device of this name."""
    if name == "auto":
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name} needs a device that torch sees: {reason}") from error


def commit_of(model, revision=None):
    """The Hub commit that a loaded model's files are of; None for one that is not of the Hub."""
    name, options = perplexity.locate(model, revision)
    file = options.get("gguf_file", "config.json")
    found = try_to_load_from_cache(name, file, revision=options.get("revision")) if not Path(name).exists() else None
    return re.search(r"snapshots/(\w+)/", found).group(1) if isinstance(found, str) else None


def finite(result):
    """The same dict with None for what JSON has no number for."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}


def run(args):
    """Check, load, score, print, write; what can be wrong is found before the weights are read."""
    if args.batch_size < 0:
        raise ValueError(f"batch_size must be 0 or more, got {args.batch_size}.")
    check_device(args.device)
    texts = corpora.read_corpora(args)
    config, tokenizer = perplexity.load_config(args.model, args.tokenizer, args.revision)
    perplexity.resolve_window(config, args.window, args.stride, args.compatible_with)
    perplexity.choose_prefix(tokenizer, args.prefix, config.get_text_config().vocab_size, args.compatible_with)
    model = perplexity.load_model(args.model, args.revision, args.dtype, args.device)
    options = {name: vars(args)[name] for name in ("window", "stride", "prefix", "batch_size", "compatible_with")}
    made = {"model": args.model, "revision": args.revision, "commit": commit_of(args.model, args.revision)}
    made |= {"data": corpora.describe(args), "interval": intervals.METHOD}
    made |= {"dtype": str(model.dtype), "device": str(model.device)}
    made["versions"] = {module.__name__: module.__version__ for module in (torch, transformers)}
    results = []
    for name, documents in texts.items():
        each, used = perplexity.score_documents(model, tokenizer, documents, each=True, **options)
        results.append({"corpus": name} | intervals.measure(each, used) | made)
    show(results)
    if args.output:
        results = list(map(finite, results))
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, results[0] if len(results) == 1 else results)


def show(results):
    """Print a row of figures for each corpus, and below them what they have in common."""
    common = {key: value for key, value in results[0].items() if all(row[key] == value for row in results)}
    rows = [{key: value for key, value in row.items() if key not in common} for row in results]
    if len(results) == 1:
        common, rows = results[0], []
    console = rich.get_console()
    if rows:
        table = rich.table.Table(*rows[0])
        for row in rows:
            table.add_row(*map(_cell, row.values()))
        console.print(table)
    table = rich.table.Table(show_header=False)
    for key, value in common.items():
        table.add_row(key, _cell(value))
    console.print(table)


def _cell(value):
    return f"{value:,.4f}" if isinstance(value, float) else str(value)


def build_parser(prog, description, options, *, file=True):
    """argparse over {name: add_argument's keywords}, no abbreviations."""
    parser = Parser(prog, argparse.SUPPRESS, description, file=file)
    for name, option in options.items():
        parser.add_argument(f"--{name}", **option)
    return parser


def main(argv=None):
    """Run it; what a user can get wrong is one line and exit status 2."""
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity(50)
    parser = build_parser("perplexity.py", perplexity.__doc__.split("\n")[0], OPTIONS)
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        parser.error(one_line(error))
