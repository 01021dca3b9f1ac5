"""Tokens a second of eval/perplexity.py beside lm-eval's rolling evaluation: same model, windows and text, in one run.

    python benchmarks/evaluation_throughput.py [--model DIR_OR_GGUF | --model_name smollm2-1m --config_overrides JSON]
        [--documents 48] [--characters 300] [--rounds 3]

Both score the same documents of the built-in text in lm-eval's rolling windows (--compatible_with lm_eval), with the
same loaded model in float32 and the same tokenizer; the figures they give must agree to 1e-4 or this ends with an
error. lm-eval runs at each of --batch_sizes and its best counts; ours chooses its own. Turn about, the median of
--rounds after a warm-up. --characters cuts the documents into short ones. Beside the wall's tokens a second those of a
CPU second, which a busy machine hardly moves. Without --model: SmolLM2-135M's architecture at random weights, whose
speed is that of any weights, with a tokenizer trained on the same text.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import time

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from smolpretrain.core.architectures import load_config
from smolpretrain.data.read.builtin import builtin_documents
from smolpretrain.data.tokens.tokenization import train_tokenizer
from smolpretrain.eval import perplexity
from smolpretrain.eval.parts import provenance
from smolpretrain.training.model import random_model


def ours(model, tokenizer, texts, window):
    sums = perplexity.score_documents(model, tokenizer, texts, window, compatible_with="lm_eval", progress=False)
    return sums["nll"], sums["tokens"]


def theirs(model, tokenizer, texts, window, batch_size):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=window, batch_size=batch_size)
    asked = [Instance("loglikelihood_rolling", {}, (text,), n) for n, text in enumerate(texts)]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its bars cannot be turned off
        return -sum(lm.loglikelihood_rolling(asked, disable_tqdm=True))


def timed(function, *args):
    began = time.perf_counter(), time.process_time()
    result = function(*args)
    return result, time.perf_counter() - began[0], time.process_time() - began[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--model_name", default="smollm2-135m")
    parser.add_argument("--config_overrides", type=json.loads)
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--characters", type=int)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    documents = builtin_documents()
    if args.model:
        model, (_, tokenizer) = perplexity.load_model(args.model), perplexity.load_config(args.model)
    else:
        config = load_config(args.model_name, args.config_overrides)
        tokenizer = train_tokenizer(documents, config.vocab_size)
        model = random_model(config, 0, "sdpa").eval()
    model.config.use_cache = False  # as perplexity.py has it; a cache would only slow lm-eval down
    texts = documents[:: len(documents) // args.documents][: args.documents]
    ways = {"eval/perplexity.py": (ours,)}
    ways |= {f"lm-eval, batch size {size}": (theirs, size) for size in args.batch_sizes}
    if args.characters:
        texts = [
            text[start : start + args.characters] for text in texts for start in range(0, len(text), args.characters)
        ]
        texts = [text for text in texts if text.strip()]
    seconds, figures = {name: [] for name in ways}, {}
    for round_number in range(args.rounds + 1):
        for name, (function, *more) in ways.items():
            some = texts if round_number else texts[:2]  # warm-up
            figures[name], *took = timed(function, model, tokenizer, some, args.window, *more)
            seconds[name] += [took] if round_number else []
    nll, tokens = figures.pop("eval/perplexity.py")
    for name, figure in figures.items():
        if not math.isclose(figure, nll, rel_tol=1e-4):
            raise SystemExit(f"{name} gives {figure} nats, eval/perplexity.py {nll}: they do not score the same.")
    rates = {name: [tokens / statistics.median(some) for some in zip(*s, strict=True)] for name, s in seconds.items()}
    best = [max(rates[name][kind] for name in figures) for kind in (0, 1)]
    print(
        f"{provenance.hardware('cpu')}; torch {torch.__version__}, {model.num_parameters():,} parameters, float32; "
        f"{tokens:,} tokens of {len(texts)} documents, window {args.window}; all {nll / tokens:.4f} nats a token.\n"
    )
    print("| | tokens/s | of lm-eval's best | tokens a CPU second | of lm-eval's best |\n|---|---:|---:|---:|---:|")
    for name, (wall, cpu) in rates.items():
        print(f"| {name} | {wall:,.0f} | {wall / best[0]:.2f} | {cpu:,.0f} | {cpu / best[1]:.2f} |")


if __name__ == "__main__":
    main()
