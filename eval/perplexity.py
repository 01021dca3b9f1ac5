"""Perplexity and bits per byte of any causal language model on held-out text.

    python eval/perplexity.py --model DIR_OR_ID --data_files held_out.jsonl --output perplexity.json

Also an `evaluate` measurement: evaluate.load("eval/perplexity.py", module_type="measurement"). Each document is scored
alone, after a prefix token, nothing behind it; special-token strings in it are plain text. The first window scores all
its targets, each later one moves on by stride and scores what is new: every token counts once. Corpus sums, one exp,
one row each corpus. Two other tools' figures can be had instead: compatible_with="evaluate" and "lm_eval".
Source: huggingface.co/docs/transformers/perplexity; bits per byte as in the Pile (Gao et al. 2020, section 3.1).
"""

import re
import runpy
import sys
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tqdm import tqdm

SUMS = ("nll", "tokens", "bytes", "words", "documents", "skipped")
COMPATIBLE = ("evaluate", "lm_eval")
UNITS = ("token", "byte", "word")  # of which there is a perplexity


def resolve_window(config, window=None, stride=None, compatible_with=None):
    """Fill in the defaults of window and stride (input tokens); ValueError where model or sense forbids them."""
    if compatible_with not in (None, *COMPATIBLE):
        raise ValueError(f"compatible_with must be one of {', '.join(COMPATIBLE)}, got {compatible_with}.")
    if compatible_with and stride is not None:
        raise ValueError(f"compatible_with {compatible_with} fixes the windows: leave stride out.")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if window is None:
        window = positions or 2048 if compatible_with else min(positions or 2048, 2048)
    stride = window if compatible_with else window // 2 if stride is None else stride
    if not 2 <= window <= (positions or window):
        raise ValueError(f"window must be from 2 to the model's max_position_embeddings ({positions}), got {window}.")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be from 1 to the window ({window}, then windows are disjoint), got {stride}.")
    return window, stride


def choose_prefix(tokenizer, prefix, vocabulary, compatible_with=None):
    """Name the token before each document (bos, eos or none) and its ids; ValueError where there is none such."""
    if len(tokenizer) > vocabulary or not tokenizer.is_fast:
        raise ValueError(f"need a fast tokenizer of at most the model's {vocabulary} tokens, got {len(tokenizer)}.")
    known = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "none": None}
    if compatible_with == "evaluate":
        known.pop("eos")
        prefix = "bos" if prefix == "auto" else prefix
    if compatible_with == "lm_eval":
        known.pop("none")
    found = (kind for kind in known if known[kind] is not None or kind == "none")
    prefix = next(found, None) if prefix == "auto" else prefix
    if prefix not in known or (prefix != "none" and known[prefix] is None):
        names = ", ".join(known)
        raise ValueError(f"prefix must be auto or one of {names} that the tokenizer has; got {prefix}.")
    return prefix, [] if prefix == "none" else [known[prefix]]


def encode(tokenizer, documents, prefix, vocabulary, compatible_with=None):
    """Turn texts into what is scored; ValueError where the tokenizer lacks the prefix or exceeds the vocabulary.

    Returns:
        prefix: bos, eos or none.
        ids: An int32 array a document; the first id is context, the others are scored.
        each: float64 [documents, 4]: nll (0 as yet), tokens, bytes, words of the scored text; with no prefix that is
            what follows the first token. All 0 for a blank document and for one with nothing left to score.
    """
    prefix, before = choose_prefix(tokenizer, prefix, vocabulary, compatible_with)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: the caller's keeps its settings
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = compatible_with is None  # as plain text; the two others read them as tokens
    as_lm_eval, opening = compatible_with == "lm_eval", tokenizer.decode(before)
    if not as_lm_eval:  # which adds the tokenizer's own BOS behind the prefix, unless the text begins with it
        backend.post_processor = None  # it would trim the offsets
    all_ids, each, documents = [], [], iter(documents)
    while texts := [text or "" for text in islice(documents, 512)]:
        for text, row in zip(texts, backend.encode_batch(texts), strict=True):
            if as_lm_eval and text.startswith(opening):
                row = backend.encode(text, add_special_tokens=False)
            ids = np.array(before + row.ids, np.int32)
            scored = text if before or not row.ids else text[row.offsets[0][1] :]
            words = len(re.split(r"\s+", scored) if as_lm_eval else scored.split())
            blank = not compatible_with and (len(ids) < 2 or not text.strip())
            all_ids.append(ids[:0] if blank else ids)
            each.append((0,) * 4 if blank else (0, max(len(ids) - 1, 0), len(scored.encode()), words))
    return prefix, all_ids, np.array(each, np.float64).reshape(-1, 4)


def cut_windows(length, window, stride, full=False):
    """Yield (start, first, end) for `length` targets: inputs [start, end) score targets [first, end); t predicts t.

    full: The last window reaches back until it is full, as in lm_eval.utils.get_rolling_token_windows.
    """
    start = first = 0
    while first < length:
        end = min(start + window, length)
        yield max(0, end - window) if full else start, first, end
        start, first = start + stride, end


def cut_documents(ids, window, stride, compatible_with, truncate):
    """List (document, start, first, end) of all windows; truncates ids in place where `evaluate`'s metric would."""
    if compatible_with == "evaluate":
        for row, all_ids in enumerate(ids):
            if len(all_ids) < 2:
                raise ValueError(f"text {row} has no token to score: evaluate's metric refuses it.")
            if len(all_ids) > window and not truncate:
                raise ValueError(f"text {row} has {len(all_ids)} tokens, the model {window}: set window, to truncate.")
            ids[row] = all_ids[:window]
    full, lengths = compatible_with == "lm_eval", [len(all_ids) - 1 for all_ids in ids]
    return [(row, *cut) for row, length in enumerate(lengths) for cut in cut_windows(length, window, stride, full)]


def _batches(windows, batch_size, max_tokens):
    """Yield batches of (document, start, first, end), with context or all without, longest first: little is padded."""
    windows, done = sorted(windows, key=lambda w: (w[2] - w[1], w[3] - w[1]), reverse=True), 0
    while done < len(windows):
        _, start, first, end = windows[done]
        count = batch_size or max(1, max_tokens // (end - start))
        batch = [w for w in windows[done : done + count] if (w[2] > w[1]) == (first > start)]
        yield batch
        done += len(batch)


def _batch_nll(model, ids, batch):
    """NLL in nats of each window of a batch, float64 [len(batch)]."""
    # Right padding is invisible to a causal model; a mask, position_ids or a cache would change the attention's path.
    context = min(first - start for _, start, first, _ in batch)
    keep = max(end - start for _, start, _, end in batch) - context  # no logits for the context that all have
    inputs, targets = np.zeros((len(batch), context + keep), np.int64), np.full((len(batch), keep), -100)
    for row, (document, start, first, end) in enumerate(batch):
        inputs[row, : end - start] = ids[document][start:end]
        targets[row, first - start - context : end - start - context] = ids[document][first + 1 : end + 1]
    inputs = torch.from_numpy(inputs).to(model.device)
    # Sliced again, for a model may swallow logits_to_keep in **kwargs.
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=keep).logits[:, -keep:].flatten(0, 1)
    targets = torch.from_numpy(targets).flatten().to(logits.device)
    rows = max(1, (2**22 if logits.device.type == "cpu" else 2**26) // logits.shape[1])  # 16 or 256 MiB in float32
    chunks = zip(logits.split(rows), targets.split(rows), strict=True)
    losses = [torch.nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in chunks]  # 0 for target -100
    return torch.cat(losses).view(len(batch), keep).double().sum(1).cpu().numpy()


def _nll_within_memory(model, ids, batch):
    """_batch_nll, in halves where the device runs out of memory."""
    try:
        return _batch_nll(model, ids, batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    half = len(batch) // 2  # outside the except: the traceback holds the tensors
    return np.concatenate([_nll_within_memory(model, ids, part) for part in (batch[:half], batch[half:])])


def score_documents(
    model,
    tokenizer,
    documents,
    window=None,
    stride=None,
    prefix="auto",
    batch_size=None,
    progress=True,
    each=False,
    compatible_with=None,
):
    """Score texts with a causal LM as it stands; ranks may each score documents[rank::world] and `merge` the sums.

    Args:
        window: Input tokens a pass; default the model's max_position_embeddings, at most 2048.
        stride: Tokens a window moves on. Default half a window, which leaves every target at least that much context
            where its document has it. Equal to window: disjoint, about twice as fast, a higher figure.
        prefix: Token before each document: auto (BOS, else EOS, else none), bos, eos or none. With none a document's
            first token is context only and its bytes are not counted.
        batch_size: Windows a pass; default at most 1024 tokens on CPU, as more leave its caches (1.4 times slower at
            8192); on CUDA 16384, or what keeps the logits under 1/8 of free memory.
        each: Return (float64 [documents, 4]: nll, tokens, bytes, words; settings) instead, for intervals.
        compatible_with: lm_eval: its rolling windows (disjoint, the last one full), its words, special tokens read as
            such. evaluate: each text in one pass, truncated to `window` tokens, prefix included, if that is given.

    Returns:
        dict: nll (nats), tokens, bytes (UTF-8), words (split at whitespace), documents (scored), skipped (blank);
        window, stride and prefix as used. ValueError where these cannot be or the tokenizer exceeds the vocabulary.
    """
    vocabulary, truncate = model.config.get_text_config().vocab_size, window is not None
    window, stride = resolve_window(model.config, window, stride, compatible_with)
    prefix, ids, sums = encode(tokenizer, documents, prefix, vocabulary, compatible_with)
    windows = cut_documents(ids, window, stride, compatible_with, truncate)
    if truncate and compatible_with == "evaluate":
        sums[:, 1] = [len(all_ids) - 1 for all_ids in ids]
    cuda = model.device.type == "cuda"
    memory, most = (torch.cuda.mem_get_info(model.device)[0] // 8, 16384) if cuda else (2**27, 1024)  # tokens a pass
    total, training = int(sums[:, 1].sum()), model.training
    model.eval()
    try:
        with torch.inference_mode(), tqdm(total=total, unit="tok", unit_scale=True, disable=not progress) as bar:
            for batch in _batches(windows, batch_size, min(most, memory // (4 * vocabulary))):
                np.add.at(sums[:, 0], [document for document, *_ in batch], _nll_within_memory(model, ids, batch))
                bar.update(sum(end - first for _, _, first, end in batch))
    finally:
        model.train(training)
    used = {"window": window, "stride": stride, "prefix": prefix}
    used |= {"compatible_with": compatible_with} if compatible_with else {}
    return (sums, used) if each else add_up(sums, used)


def add_up(each, settings):
    """Sum score_documents(..., each=True) up, as it does itself without `each`."""
    if settings.get("compatible_with") == "evaluate":
        settings = settings | {"mean_perplexity": float(np.exp(each[:, 0] / each[:, 1]).mean())}
    scored, (nll, *counts) = int((each[:, 1] > 0).sum()), each.sum(0)
    return dict(zip(SUMS, (float(nll), *map(int, counts), scored, len(each) - scored), strict=True)) | settings


def unigram_nll(counts, tokenizer, documents, prefix="auto", each=False):
    """Sums as of score_documents (window, stride None) under add-one smoothed token counts, int64 [vocabulary]."""
    prefix, ids, sums = encode(tokenizer, documents, prefix, len(counts))
    nats = np.log(np.sum(counts) + len(counts)) - np.log(np.asarray(counts) + 1.0)
    sums[:, 0] = [nats[row[1:]].sum() for row in ids]
    used = {"window": None, "stride": None, "prefix": prefix}
    return (sums, used) if each else add_up(sums, used)


def merge(parts):
    """Add up sums of disjoint documents; ValueError where they were scored with different settings."""
    sums = {key: sum(part[key] for part in parts) for key in SUMS}
    if any(part | sums != parts[0] | sums for part in parts):
        raise ValueError("sums of different settings (window, stride, prefix) cannot be added.")
    return parts[0] | sums


def summarize(sums):
    """Add token_, word_ and byte_perplexity (inf where exp overflows) and bits_per_byte; ValueError if no token.

    With compatible_with="evaluate" the figure is mean_perplexity alone, the mean over texts of each text's own.
    """
    if not sums["tokens"]:
        raise ValueError(f"no text to score: {sums['skipped']} documents, all blank or too short.")
    if "mean_perplexity" in sums:
        return sums
    with np.errstate(over="ignore", divide="ignore"):
        figures = {f"{unit}_perplexity": np.exp(sums["nll"] / np.float64(sums[f"{unit}s"])) for unit in UNITS}
    bits = sums["nll"] / sums["bytes"] / np.log(2)
    return sums | {key: float(value) for key, value in figures.items()} | {"bits_per_byte": float(bits)}


if "evaluate" in sys.modules:  # which is loading this file; a command and each rank start 0.6 s sooner without it
    import datasets
    import evaluate

    class Perplexity(evaluate.Measurement):
        """compute(data=[texts], model=id, path or loaded model, tokenizer=None, window=None, ...): summarize's dict."""

        def _info(self):
            features, inputs = datasets.Features({"data": datasets.Value("string")}), score_documents.__doc__
            return evaluate.MeasurementInfo(
                description=__doc__, citation="", inputs_description=inputs, features=features
            )

        def _compute(self, data, model, tokenizer=None, revision=None, dtype="auto", device="auto", **options):
            loaded = isinstance(model, torch.nn.Module)
            if tokenizer is None or isinstance(tokenizer, (str, Path)):
                _, tokenizer = load_config(model.config.name_or_path if loaded else model, tokenizer, revision)
            model = model if loaded else load_model(model, revision, dtype, device)
            return summarize(score_documents(model, tokenizer, data, **{"progress": False} | options))


def locate(model, revision=None):
    """Turn a model's name into from_pretrained's (name, options).

    Args:
        model: A directory, a checkpoint-N of a run among them; a Hub id, or id@revision; a GGUF file, or
            owner/name/file.gguf of the Hub.
    """
    name, options = str(model), {"revision": revision} if revision else {}
    if not Path(name).exists() and "@" in name:
        name, _, options["revision"] = name.rpartition("@")
        if revision not in (None, options["revision"]):
            raise ValueError(f"{model} and revision {revision} name two revisions: keep one.")
    if name.endswith(".gguf"):
        if find_spec("gguf") is None:
            raise ValueError(f"{model}: reading GGUF files needs the package gguf: pip install gguf.")
        parts = name.split("/", 2)
        if Path(name).is_file():
            name, options["gguf_file"] = str(Path(name).parent), Path(name).name
        elif len(parts) == 3 and not Path(parts[0]).exists():
            name, options["gguf_file"] = "/".join(parts[:2]), parts[2]
        else:
            raise ValueError(f"{model}: no such file.")
    return name, options


def load_config(model, tokenizer=None, revision=None):
    """Load (config, tokenizer) of what `locate` finds; ValueError or OSError where there is none."""
    name, options = locate(model, revision)
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise OSError(f"{model}: no directory or Hub model with a config.json. {error}") from error
    name, options = locate(tokenizer) if tokenizer else (name, options)
    try:  # tokenizer.json as it stands: AutoTokenizer rebuilds it and drops SmolLM2's Digits step (transformers 5.23)
        if "gguf_file" not in options:
            return config, transformers.PreTrainedTokenizerFast.from_pretrained(name, **options)
    except (OSError, ValueError):
        pass
    return config, transformers.AutoTokenizer.from_pretrained(name, **options)


def load_model(model, revision=None, dtype="auto", device="auto"):
    """Load a causal LM; dtype auto: float32 on CPU (accurate), else the checkpoint's. ValueError: weights missing."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    name, options = locate(model, revision)
    options["dtype"] = "float32" if dtype == "auto" and device == "cpu" else dtype
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    if info["missing_keys"]:  # transformers would score them at random
        raise ValueError(f"{model} lacks weights, such as {min(info['missing_keys'])}.")
    return loaded.to(device)


def main(argv=None):
    """The command; command.py has its options."""
    if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
        runpy.run_path(str(Path(__file__).resolve().parents[1] / "in_place.py"))
    from smolpretrain.eval.parts import command

    command.main(argv)


if __name__ == "__main__":
    main()
