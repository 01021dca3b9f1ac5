"""Perplexity and bits per byte of any causal language model on held-out text.

    python eval/perplexity.py --model DIR_OR_ID --data_files held_out.jsonl --output perplexity.json

Also an `evaluate` measurement: evaluate.load("eval/perplexity.py", module_type="measurement"). Each document is scored
alone, after a prefix token, nothing behind it; special-token strings in it are plain text. The first window scores all
its targets, each later one moves on by stride and scores what is new: every token counts once. Corpus sums, one exp.
Source: huggingface.co/docs/transformers/perplexity; bits per byte as in the Pile (Gao et al. 2020, section 3.1).
"""

import argparse
import glob
import json
from itertools import chain, islice
from pathlib import Path

import datasets
import evaluate
import numpy as np
import rich.table
import torch
import transformers
from tokenizers import Tokenizer
from tqdm import tqdm

SUMS = ("nll", "tokens", "bytes", "words", "documents", "skipped")
READERS = {".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv"}


def resolve_window(config, window=None, stride=None):
    """Fill in the defaults of window and stride (input tokens); ValueError where model or sense forbids them."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    window = min(positions or 2048, 2048) if window is None else window
    stride = window // 2 if stride is None else stride
    if not 2 <= window <= (positions or window):
        raise ValueError(f"window must be from 2 to the model's max_position_embeddings ({positions}), got {window}.")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be from 1 to the window ({window}, then windows are disjoint), got {stride}.")
    return window, stride


def encode(tokenizer, documents, prefix, vocabulary):
    """Turn texts into what is scored; ValueError where the tokenizer lacks the prefix or exceeds the vocabulary.

    Returns:
        prefix: bos, eos or none.
        ids: An int32 array a document; the first id is context, the others are scored.
        each: float64 [documents, 4]: nll (0 as yet), tokens, bytes, words of the scored text; with no prefix that is
            what follows the first token. All 0 for a blank document and for one with nothing left to score.
    """
    if len(tokenizer) > vocabulary or not tokenizer.is_fast:
        raise ValueError(f"need a fast tokenizer of at most the model's {vocabulary} tokens, got {len(tokenizer)}.")
    known = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "none": None}
    prefix = next(kind for kind in known if known[kind] is not None or kind == "none") if prefix == "auto" else prefix
    if prefix not in known or (prefix != "none" and known[prefix] is None):
        raise ValueError(f"prefix must be auto, none, or one of bos and eos that the tokenizer has; got {prefix}.")
    before = [] if prefix == "none" else [known[prefix]]
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: the caller's keeps its settings
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None  # it would trim the offsets
    backend.encode_special_tokens = True  # as plain text
    all_ids, each, documents = [], [], iter(documents)
    while texts := [text or "" for text in islice(documents, 512)]:
        for text, row in zip(texts, backend.encode_batch(texts), strict=True):
            ids = np.array(before + row.ids, np.int32)
            scored = text if before or not row.ids else text[row.offsets[0][1] :]
            blank = len(ids) < 2 or not text.strip()
            all_ids.append(ids[:0] if blank else ids)
            each.append((0,) * 4 if blank else (0, len(ids) - 1, len(scored.encode()), len(scored.split())))
    return prefix, all_ids, np.array(each, np.float64).reshape(-1, 4)


def cut_windows(length, window, stride):
    """Yield (start, first, end) for `length` targets: inputs [start, end) score targets [first, end); t predicts t."""
    start = first = 0
    while first < length:
        end = min(start + window, length)
        yield start, first, end
        start, first = start + stride, end


def _batches(windows, batch_size, max_tokens):
    """Yield batches of (document, start, first, end) of one context width, longest first: little is padded."""
    windows, done = sorted(windows, key=lambda w: (w[2] - w[1], w[3] - w[1]), reverse=True), 0
    while done < len(windows):
        _, start, first, end = windows[done]
        count = batch_size or max(1, max_tokens // (end - start))
        batch = [w for w in windows[done : done + count] if w[2] - w[1] == first - start]
        yield batch
        done += len(batch)


def _batch_nll(model, ids, batch):
    """NLL in nats of each window of a batch, float64 [len(batch)]."""
    # Right padding is invisible to a causal model; a mask, position_ids or a cache would change the attention's path.
    context = batch[0][2] - batch[0][1]
    keep = max(end - first for _, _, first, end in batch)  # no logits for the context
    inputs, targets = np.zeros((len(batch), context + keep), np.int64), np.full((len(batch), keep), -100)
    for row, (document, start, first, end) in enumerate(batch):
        inputs[row, : end - start] = ids[document][start:end]
        targets[row, : end - first] = ids[document][first + 1 : end + 1]
    inputs = torch.from_numpy(inputs).to(model.device)
    # Sliced again, for a model may swallow logits_to_keep in **kwargs.
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=keep).logits[:, -keep:].flatten(0, 1)
    targets = torch.from_numpy(targets).flatten().to(logits.device)
    rows = max(1, (2**22 if logits.device.type == "cpu" else 2**26) // logits.shape[1])  # 16 or 256 MiB in float32
    chunks = zip(logits.split(rows), targets.split(rows), strict=True)
    losses = [torch.nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in chunks]  # 0 for target -100
    return torch.cat(losses).view(len(batch), keep).double().sum(1).cpu().numpy()


def score_documents(
    model, tokenizer, documents, window=None, stride=None, prefix="auto", batch_size=None, progress=True, each=False
):
    """Score texts with a causal LM as it stands; ranks may each score documents[rank::world] and `merge` the sums.

    Args:
        window: Input tokens a pass; default the model's max_position_embeddings, at most 2048.
        stride: Tokens a window moves on. Default half a window, which leaves every target at least that much context
            where its document has it. Equal to window: disjoint, about twice as fast, a higher figure.
        prefix: Token before each document: auto (BOS, else EOS, else none), bos, eos or none. With none a document's
            first token is context only and its bytes are not counted.
        batch_size: Windows a pass; default what keeps the logits under 128 MiB, best on CPU (CUDA: 1/8 of free memory).
        each: Return (float64 [documents, 4]: nll, tokens, bytes, words; settings) instead, for intervals.

    Returns:
        dict: nll (nats), tokens, bytes (UTF-8), words (split at whitespace), documents (scored), skipped (blank);
        window, stride and prefix as used. ValueError where these cannot be or the tokenizer exceeds the vocabulary.
    """
    vocabulary = model.config.get_text_config().vocab_size
    window, stride = resolve_window(model.config, window, stride)
    prefix, ids, sums = encode(tokenizer, documents, prefix, vocabulary)
    windows = [(row, *cut) for row, all_ids in enumerate(ids) for cut in cut_windows(len(all_ids) - 1, window, stride)]
    memory = torch.cuda.mem_get_info(model.device)[0] // 8 if model.device.type == "cuda" else 2**27
    total, training = int(sums[:, 1].sum()), model.training
    model.eval()
    try:
        with torch.inference_mode(), tqdm(total=total, unit="tok", unit_scale=True, disable=not progress) as bar:
            for batch in _batches(windows, batch_size, min(16384, memory // (4 * vocabulary))):
                np.add.at(sums[:, 0], [document for document, *_ in batch], _batch_nll(model, ids, batch))
                bar.update(sum(end - first for _, _, first, end in batch))
    finally:
        model.train(training)
    used = {"window": window, "stride": stride, "prefix": prefix}
    return (sums, used) if each else _sum(sums, used)


def _sum(each, settings):
    scored, (nll, *counts) = int((each[:, 1] > 0).sum()), each.sum(0)
    return dict(zip(SUMS, (float(nll), *map(int, counts), scored, len(each) - scored), strict=True)) | settings


def unigram_nll(counts, tokenizer, documents, prefix="auto"):
    """Sums as of score_documents (window, stride None) under add-one smoothed token counts, int64 [vocabulary]."""
    prefix, ids, each = encode(tokenizer, documents, prefix, len(counts))
    nats = np.log(np.sum(counts) + len(counts)) - np.log(np.asarray(counts) + 1.0)
    each[:, 0] = [nats[row[1:]].sum() for row in ids]
    return _sum(each, {"window": None, "stride": None, "prefix": prefix})


def merge(parts):
    """Add up sums of disjoint documents; ValueError where they were scored with different settings."""
    sums = {key: sum(part[key] for part in parts) for key in SUMS}
    if any(part | sums != parts[0] | sums for part in parts):
        raise ValueError("sums of different settings (window, stride, prefix) cannot be added.")
    return parts[0] | sums


def summarize(sums):
    """Add token_perplexity, word_perplexity (inf where exp overflows) and bits_per_byte; ValueError if no token."""
    if not sums["tokens"]:
        raise ValueError(f"no text to score: {sums['skipped']} documents, all blank or too short.")
    with np.errstate(over="ignore", divide="ignore"):
        token, byte, word = sums["nll"] / np.array([sums[key] for key in ("tokens", "bytes", "words")], np.float64)
        figures = {"token_perplexity": np.exp(token), "word_perplexity": np.exp(word)}
    return sums | {key: float(value) for key, value in figures.items()} | {"bits_per_byte": float(byte / np.log(2))}


class Perplexity(evaluate.Measurement):
    """compute(data=[texts], model=id, path or loaded model, tokenizer=None, window=None, ...): summarize's dict."""

    def _info(self):
        features, inputs = datasets.Features({"data": datasets.Value("string")}), score_documents.__doc__
        return evaluate.MeasurementInfo(description=__doc__, citation="", inputs_description=inputs, features=features)

    def _compute(self, data, model, tokenizer=None, revision=None, dtype="auto", device="auto", **options):
        loaded = isinstance(model, torch.nn.Module)
        if tokenizer is None or isinstance(tokenizer, (str, Path)):
            _, tokenizer = load_config(model.config.name_or_path if loaded else model, tokenizer, revision)
        model = model if loaded else load_model(model, revision, dtype, device)
        return summarize(score_documents(model, tokenizer, data, **{"progress": False} | options))


def load_config(model, tokenizer=None, revision=None):
    """Load (config, tokenizer) of a directory or Hub id; ValueError or OSError where there is none."""
    try:
        config = transformers.AutoConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise OSError(f"{model}: no directory or Hub model with a config.json. {error}") from error
    name, source = tokenizer or model, {} if tokenizer else {"revision": revision}
    try:  # tokenizer.json as it stands: AutoTokenizer rebuilds it and drops SmolLM2's Digits step (transformers 5.23)
        return config, transformers.PreTrainedTokenizerFast.from_pretrained(name, **source)
    except (OSError, ValueError):
        return config, transformers.AutoTokenizer.from_pretrained(name, **source)


def load_model(model, revision=None, dtype="auto", device="auto"):
    """Load a causal LM; dtype auto: float32 on CPU (accurate), else the checkpoint's. ValueError: weights missing."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    options = {"revision": revision, "dtype": "float32" if dtype == "auto" and device == "cpu" else dtype}
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **options)
    if info["missing_keys"]:  # transformers would score them at random
        raise ValueError(f"{model} lacks weights, such as {min(info['missing_keys'])}.")
    return loaded.to(device)


def read_documents(args):
    """Read the texts that the command's data options name; ValueError where there are none to be had."""
    hub = {"path": args.dataset_name, "name": args.dataset_config_name, "revision": args.dataset_revision}
    sources, texts = [hub | {"split": args.dataset_split or "train"}] if args.dataset_name else [], []
    prepared = [f"{args.prepared_dir}/validation_documents*.*"] if args.prepared_dir else []
    for path in chain.from_iterable(sorted(glob.glob(p)) or [p] for p in args.data_files or prepared):
        reader = next((READERS[extension] for extension in READERS if path.endswith(extension)), None)
        if (missing := not Path(path).is_file()) or reader is None:
            raise ValueError(f"{path}: " + ("no such file." if missing else f"not one of {', '.join(READERS)}."))
        source = {"path": reader, "data_files": path, "split": "train"}
        sources.append(source | ({"sample_by": "document"} if reader == "text" else {}))
    for source in sources:
        try:
            rows = datasets.load_dataset(**source, streaming=True)  # no cached copy, nothing fetched in vain
            columns = rows.column_names or list(next(iter(rows)))
            if args.text_column not in columns:
                raise ValueError(f"no column {args.text_column}; the columns are {', '.join(columns)}.")
            left = args.max_documents and args.max_documents - len(texts)
            texts += [row[args.text_column] for row in islice(rows, left)]
        except (StopIteration, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(f"{source.get('data_files', source['path'])}: {str(error) or 'it is empty'}") from error
    if any(not isinstance(text, str | None) for text in texts) or not any(text and text.strip() for text in texts):
        raise ValueError(f"column {args.text_column} holds no text, only blanks or other things.")
    return texts


OPTIONS = {
    "model": {"required": True, "help": "directory or Hub id"},
    "tokenizer": {"help": "directory or Hub id, if it is not the model's own"},
    "revision": {"help": "commit, branch or tag of a model on the Hub"},
    "data_files": {"nargs": "+", "help": f"paths or globs ({' '.join(READERS)}); a .txt is one document"},
    "dataset_name": {"help": "data set on the Hub, or its directory"},
    "dataset_config_name": {"help": "its configuration"},
    "dataset_revision": {"help": "its branch, tag or commit"},
    "dataset_split": {"help": "default train"},
    "prepared_dir": {"help": "prepared set, whose validation_documents (.jsonl or .parquet) are read"},
    "text_column": {"default": "text"},
    "max_documents": {"type": int, "help": "score the first N only"},
    "window": {"type": int, "help": "input tokens a pass; default the model's positions, at most 2048"},
    "stride": {"type": int, "help": "tokens a window moves on; default half of it (half is context); all: disjoint"},
    "prefix": {"default": "auto", "choices": ("auto", "none", "bos", "eos"), "help": "token before each document"},
    "batch_size": {"type": int, "default": 0, "help": "windows a pass; 0: as many as memory and cache like"},
    "dtype": {"default": "auto", "choices": ("auto", "float32", "bfloat16"), "help": "auto: float32 on CPU"},
    "device": {"default": "auto", "choices": ("auto", "cpu", "cuda")},
    "output": {"help": "JSON file to write"},
}


def run(args):
    """Check, load, score, print, write; what can be wrong is found before the weights are read."""
    if sum(map(bool, (args.data_files, args.dataset_name, args.prepared_dir))) != 1:
        raise ValueError("give one of data_files, dataset_name, prepared_dir.")
    if min(args.max_documents or 0, args.batch_size) < 0 or (args.device == "cuda" and not torch.cuda.is_available()):
        raise ValueError("max_documents and batch_size are 0 or more, and device cuda needs a GPU that torch sees.")
    config, tokenizer = load_config(args.model, args.tokenizer, args.revision)
    resolve_window(config, args.window, args.stride)
    encode(tokenizer, [], args.prefix, config.get_text_config().vocab_size)
    texts = read_documents(args)
    model = load_model(args.model, args.revision, args.dtype, args.device)
    sums = score_documents(model, tokenizer, texts, args.window, args.stride, args.prefix, args.batch_size)
    result = summarize(sums) | {"model": args.model, "revision": args.revision}
    result["data"] = {key: vars(args)[key] for key in list(OPTIONS)[3:11] if vars(args)[key]}
    result |= {"dtype": str(model.dtype), "device": str(model.device)}
    result["versions"] = {module.__name__: module.__version__ for module in (torch, transformers)}
    table = rich.table.Table(show_header=False)
    for key, value in result.items():
        table.add_row(key, f"{value:,.4f}" if isinstance(value, float) else str(value))
    rich.print(table)
    if args.output:
        finite = {key: None if value != value or value in (np.inf, -np.inf) else value for key, value in result.items()}
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(finite, indent=2) + "\n")


def main(argv=None):
    """The command; what a user can get wrong is one line and exit status 2."""
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity(50)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS, allow_abbrev=False)
    for name, option in OPTIONS.items():
        parser.add_argument(f"--{name}", **option)
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
