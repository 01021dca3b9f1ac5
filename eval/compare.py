"""Compare language models: the same held-out text, the same prompts, the same machine, and how sure each figure is.

    python eval/compare.py random_init:runs/first runs/first HuggingFaceTB/SmolLM2-135M@main \
        --prepared_dir runs/first/prepared --output_dir runs/first/report

A MODEL is whatever eval/perplexity.py takes, with its kind before a colon where that is not plain from its name:
random_init (the architecture of that model, weights at random from --seed), checkpoint, released, other.

Writes into output_dir: comparison.csv, one row a figure (model, kind, metric, value, low, high, n, data, settings,
commit); comparison.json, what was compared, with what, on what; comparison.md and .html with the samples side by side;
comparison_samples.jsonl, every continuation; and pictures.
"""

import csv
import gc
import json
import runpy
import statistics
import sys
from itertools import chain
from pathlib import Path

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "in_place.py"))

import datasets
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, set_seed

from smolpretrain.core import files
from smolpretrain.core.text import one_line
from smolpretrain.eval import perplexity
from smolpretrain.eval.parts import command, comparison, corpora, generation, intervals, provenance

KINDS = ("random_init", "checkpoint", "released", "other")
COLUMNS = ("model", "kind", "metric", "value", "low", "high", "n", "data", "settings", "commit")
PROMPTS_METHOD = intervals.METHOD.replace("documents", "prompts")
OPTIONS = {
    **corpora.OPTIONS,
    **{name: command.OPTIONS[name] for name in ("window", "stride", "prefix", "batch_size", "dtype", "device")},
    "prompts": {"help": "text file, one prompt a line; default: ten of our own"},
    "judge": {"help": "another model, under which the perplexity of the samples is taken"},
    "max_new_tokens": {"type": int, "default": 64, "help": "tokens a continuation"},
    "samples": {"type": int, "default": 4, "help": "sampled continuations a prompt; at least 2, for self-BLEU"},
    "temperature": {"type": float, "default": 0.8},
    "top_p": {"type": float, "default": 0.95},
    "seed": {"type": int, "default": 0, "help": "of samples and of random weights"},
    "rounds": {"type": int, "default": 5, "help": "timed rounds of generation, after one of warm-up; 0 times none"},
    "output_dir": {"default": "comparison"},
}


class Candidate:
    """A model to be compared: its name as asked for, what kind of baseline it is, and the label tables show."""

    def __init__(self, word):
        kind, colon, rest = word.partition(":")
        kind = "random_init" if kind == "random" else kind
        self.name = rest if colon and kind in KINDS else word
        self.kind = kind if colon and kind in KINDS else self._kind()
        path = Path(self.name)
        parts = path.parts[-2:] if path.name.startswith("checkpoint-") else path.parts[-1:]
        self.label = "/".join(parts) if path.exists() else self.name
        if self.kind == "random_init":
            self.label = f"random {self.label}"

    def _kind(self):
        path = Path(self.name)
        if path.is_dir():
            of_a_run = any((place / "run.json").is_file() for place in (path, path.resolve().parent))
            return "checkpoint" if of_a_run or path.name.startswith("checkpoint-") else "other"
        return "other" if path.exists() else "released"

    def load(self, dtype, device, seed):
        """The model; ValueError or OSError where it cannot be had."""
        if self.kind != "random_init":
            return perplexity.load_model(self.name, None, dtype, device)
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        dtype = "bfloat16" if dtype == "auto" and device != "cpu" else "float32" if dtype == "auto" else dtype
        set_seed(seed)
        config, _ = perplexity.load_config(self.name)
        return AutoModelForCausalLM.from_config(config).to(device, getattr(torch, dtype)).eval()


def check(args):
    """ValueError for what needs no model to be seen wrong."""
    for name, least in (("max_new_tokens", 1), ("samples", 2), ("rounds", 0), ("batch_size", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(args, name)}.")
    if args.temperature <= 0 or not 0 < args.top_p <= 1:
        raise ValueError(f"temperature must be above 0 and top_p in (0, 1], got {args.temperature} and {args.top_p}.")
    command.check_device(args.device)


def common_window(candidates, configs, window, stride):
    """Window and stride for all: perplexity moves with them. By default the smallest of the models' own."""
    if window is None:
        window = min(perplexity.resolve_window(config)[0] for config in configs)
    for candidate, config in zip(candidates, configs, strict=True):
        try:
            used = perplexity.resolve_window(config, window, stride)
        except ValueError as error:
            raise ValueError(f"{candidate.name}: {error}") from error
    return used


def text_rows(model, tokenizer, texts, options):
    """Rows of held-out figures, and each corpus's (float64 [documents, 4], data) for paired intervals."""
    rows, kept = [], {}
    for name, documents in texts.items():
        each, used = perplexity.score_documents(model, tokenizer, documents, each=True, **options)
        result = intervals.measure(each, used)
        data = f"{name} (sha256 {provenance.fingerprint(documents)})"
        settings = {**used, "interval": intervals.METHOD}
        kept[name] = each, data, settings
        for metric in ("bits_per_byte", "token_perplexity", "word_perplexity"):
            ends = {end: result[f"{metric}_{end}"] for end in ("low", "high")}
            n = result["documents"]
            rows.append({"metric": metric, "value": result[metric], **ends, "n": n, "data": data, "settings": settings})
    return rows, kept


def difference_rows(first, kept, first_label):
    """Rows of bits per byte less those of the first model, paired by document; none where other bytes were scored."""
    rows = []
    for name, (each, data, settings) in kept.items():
        theirs = first[name][0]
        if not np.array_equal(each[:, 2], theirs[:, 2]):
            continue  # with prefix none the unscored first tokens differ
        nats, bits = each[:, 0] - theirs[:, 0], each[:, 2] * np.log(2)
        low, high = intervals.bootstrap(nats, bits)
        row = {"metric": "bits_per_byte_difference", "value": nats.sum() / bits.sum(), "low": low, "high": high}
        n = int((bits > 0).sum())
        rows.append(row | {"n": n, "data": data, "settings": {**settings, "minus": first_label, "paired": True}})
    return rows


def by_prompt(samples, decoding):
    """Continuations of one decoding, grouped by prompt: those of one are alike, so intervals are over prompts."""
    mine = [s for s in samples if s["decoding"] == decoding]
    return [[s for s in mine if s["prompt"] == prompt] for prompt in dict.fromkeys(s["prompt"] for s in mine)]


def sample_rows(samples, settings):
    """Rows of repetition and diversity."""
    rows = []
    for decoding in ("greedy", "sampled"):
        groups = by_prompt(samples, decoding)
        shares = [[generation.repetition(s["ids"]) for s in group] for group in groups]
        low, high = intervals.bootstrap(list(map(sum, shares)), list(map(len, shares)))
        if low is not None:
            low, high = max(low, 0.0), min(high, 1.0)
        row = {"metric": f"seq_rep_4_{decoding}", "value": statistics.mean(chain(*shares)), "low": low, "high": high}
        rows.append(row | {"n": len(groups), "settings": settings[decoding] | {"interval": PROMPTS_METHOD}})
    texts = [s["text"] for group in groups for s in group]
    for order in (1, 2):
        rows.append({"metric": f"distinct_{order}", "value": generation.distinct(texts, order), "n": len(texts)})
    alike = statistics.mean(generation.self_bleu([s["text"] for s in group]) for group in groups)
    rows.append({"metric": "self_bleu", "value": alike, "n": len(groups)})
    return [{"settings": settings["sampled"], "data": "prompts"} | row for row in rows]


def speed_rows(model, tokenizer, prompts, rounds):
    """Rows of generation speed: the median of the rounds, low and high the slowest and the fastest."""
    if not rounds:
        return []
    settings = {"prompt_ids": 256, "new_ids": 32, "batch": 1, "rounds": rounds, "warm_up": 1, "low_high": "extremes"}
    rates = generation.time_generation(model, tokenizer, prompts, 256, 32, rounds)
    settings |= {"dtype": str(model.dtype), "hardware": provenance.hardware(model.device)}
    return [
        {"metric": name, "value": statistics.median(v), "low": min(v), "high": max(v), "n": rounds, "data": "prompts",
         "settings": settings}
        for name, v in rates.items()
    ]  # fmt: skip


def judge_rows(judge, tokenizer, name, samples, options, settings):
    """Rows of the samples' perplexity under another model: of the continuation, given its prompt."""
    rows = []
    for decoding in ("greedy", "sampled"):
        groups = by_prompt(samples, decoding)
        prompts = [group[0]["prompt"] for group in groups]
        texts = [s["prompt"] + s["text"] for group in groups for s in group]
        scored, alone = (
            perplexity.score_documents(judge, tokenizer, t, each=True, **options)[0] for t in (texts, prompts)
        )
        size = len(texts) // len(prompts)
        nll, tokens = (scored.reshape(-1, size, 4).sum(1) - size * alone)[:, :2].T
        low, high = (end if end is None else float(np.exp(end)) for end in intervals.bootstrap(nll, tokens))
        value = float(np.exp(nll.sum() / tokens.sum())) if tokens.sum() > 0 else None
        row = {"metric": f"sample_perplexity_{decoding}", "value": value, "low": low, "high": high, "n": len(groups)}
        made = settings[decoding] | {"judge": name, "interval": PROMPTS_METHOD}
        rows.append(row | {"data": "prompts", "settings": made})
    return rows


def run(args):
    """Check, then take one model after another, then write."""
    check(args)
    candidates = [Candidate(word) for word in args.models]
    labels = [c.label for c in candidates]
    for candidate in candidates:
        if labels.count(candidate.label) > 1:
            candidate.label = f"{candidate.kind}:{candidate.name}"
    prompts = generation.read_prompts(args.prompts)
    named = args.data_files or args.dataset_name or args.prepared_dir
    texts = corpora.read_corpora(args) if named else {}
    loaded = [perplexity.load_config(candidate.name) for candidate in candidates]
    judge = args.judge and perplexity.load_config(args.judge)
    window, stride = common_window(candidates, [config for config, _ in loaded], args.window, args.stride)
    options = {"window": window, "stride": stride, "prefix": args.prefix, "batch_size": args.batch_size}
    drawing = {name: getattr(args, name) for name in ("samples", "temperature", "top_p", "seed")}
    common = {"max_new_tokens": args.max_new_tokens, "prompts": provenance.fingerprint(prompts)}
    settings = {"greedy": common, "sampled": common | drawing}
    rows, samples, models, first = [], {}, [], None
    for candidate, (_, tokenizer) in zip(candidates, loaded, strict=True):
        print(f"{candidate.label} ({candidate.kind})", flush=True)
        model = candidate.load(args.dtype, args.device, args.seed)
        mine, kept = text_rows(model, tokenizer, texts, options)
        first = kept if first is None else first
        if kept is not first:
            mine += difference_rows(first, kept, candidates[0].label)
        written = generation.continue_prompts(model, tokenizer, prompts, "greedy", args.max_new_tokens)
        written += generation.continue_prompts(model, tokenizer, prompts, "sampled", args.max_new_tokens, **drawing)
        samples[candidate.label] = written
        mine += sample_rows(written, settings) + speed_rows(model, tokenizer, prompts, args.rounds)
        rows += [{"model": candidate.label, "kind": candidate.kind} | row for row in mine]
        commit = command.commit_of(candidate.name)
        models.append({"model": candidate.label, "kind": candidate.kind, "name": candidate.name, "commit": commit,
                       "parameters": model.num_parameters(), "dtype": str(model.dtype)})  # fmt: skip
        device = model.device
        del model
        gc.collect()
    if args.judge:
        network = perplexity.load_model(args.judge, None, args.dtype, args.device)
        judged = {"prefix": args.prefix, "progress": False}
        for entry in models:
            found = judge_rows(network, judge[1], args.judge, samples[entry["model"]], judged, settings)
            rows += [{"model": entry["model"], "kind": entry["kind"]} | row for row in found]
    made = {"commit": provenance.code_commit(), "hardware": provenance.hardware(device), "models": models}
    made |= {"data": corpora.describe(args) if named else None, "settings": options | settings["sampled"]}
    made |= {"judge": args.judge, "versions": {m.__name__: m.__version__ for m in (torch, transformers)}}
    write(Path(args.output_dir), rows, samples, made)


def write(directory, rows, samples, made):
    """Leave comparison.* and its pictures in directory; every figure of them is a row of comparison.csv."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "comparison.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for row in rows:
            settings = json.dumps(row["settings"])
            table.writerow({"low": None, "high": None} | row | {"settings": settings, "commit": made["commit"]})
    with open(directory / "comparison_samples.jsonl", "w", encoding="utf-8") as file:
        for label, written in samples.items():
            for sample in written:
                file.write(json.dumps({"model": label} | sample, ensure_ascii=False) + "\n")
    files.write_json(directory / "comparison.json", made)
    comparison.write(directory)
    print(f"wrote comparison.csv, .md and .html to {directory}")


def main(argv=None):
    """The command; what a user can get wrong is one line and exit status 2."""
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity(50)
    parser = command.build_parser("compare.py", __doc__.split("\n")[0], OPTIONS)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="see eval/compare.py's docstring")
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        parser.error(one_line(error))


if __name__ == "__main__":
    main()
