"""A comparison for people: the files that compare.py leaves, read back, as pictures, Markdown and HTML."""

import csv
from pathlib import Path

from smolpretrain.core import files

from . import page, plots

# What each metric can and cannot say.
MEANING = {
    "bits_per_byte": "How well the model predicts held-out text; lower is better. The one figure here that compares "
    "models with different tokenizers. It says nothing of whether what the model writes is true or useful.",
    "bits_per_byte_difference": "The same less the first model's, document by document: an interval that leaves out 0 "
    "is a difference that other documents of this kind would show too.",
    "token_perplexity": "exp of the mean loss a token. Only for models with the same tokenizer, at one window.",
    "word_perplexity": "The same a word, so that tokenizers compare; words are what whitespace parts.",
    "seq_rep_4_greedy": "Share of 4-grams (of the model's own tokens) that a greedy continuation repeats (Welleck et "
    "al. 2019). Near 1 it loops. Random weights may repeat little: low alone is no merit.",
    "seq_rep_4_sampled": "The same for sampled continuations.",
    "distinct_1": "Different words over all words of the samples. Noise scores high (random weights near 1): read it "
    "only beside bits per byte.",
    "distinct_2": "The same for pairs of words.",
    "self_bleu": "How alike the samples of one prompt are, from 0 to 1. Low is varied, which noise is too.",
    "sample_perplexity_greedy": "How usual the continuation is to the judge. Loops are usual: low beside a high "
    "seq-rep-4 is no merit. It is not held-out perplexity.",
    "sample_perplexity_sampled": "The same for sampled continuations.",
    "prefill_tokens_per_second": "Tokens of a prompt read a second, one sequence: the wait for the first token.",
    "decode_tokens_per_second": "Tokens written a second after it, one sequence, cache on. Of this machine, library "
    "and dtype, not of the model alone.",
}


def read(directory):
    """(rows, made, samples) of a directory that compare.py wrote; figures are floats or None."""
    with open(directory / "comparison.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {key: float(row[key]) if row[key] else None for key in ("value", "low", "high")}
    made = files.read_json(directory / "comparison.json")
    return rows, made, files.read_rows(directory / "comparison_samples.jsonl").rows


def figure(value):
    """A number for a table: four digits that matter, thousands apart."""
    if value is None:
        return ""
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def blocks(directory):
    """The comparison as blocks of page.py, pictures drawn beside it."""
    rows, made, samples = read(directory)
    labels = [entry["model"] for entry in made["models"]]
    found = [
        ("text", f"Measured on {made['hardware']}; commit {made['commit'] or 'unknown'}. Every figure is a row of "
         "`comparison.csv`, with its settings."),
        ("table", "What is compared", ["model", "kind", "parameters", "dtype", "loaded from", "revision"],
         [[m["model"], m["kind"], f"{m['parameters']:,}", m["dtype"].removeprefix("torch."), m["name"],
           (m["commit"] or "")[:12]] for m in made["models"]]),
    ]  # fmt: skip
    for data in dict.fromkeys(row["data"] for row in rows):
        found.append(_table(data, [row for row in rows if row["data"] == data], labels))
    found += _pictures(directory, rows, labels)
    found.append(("heading", "What each metric can and cannot say"))
    metrics = dict.fromkeys(row["metric"] for row in rows)
    found.append(("table", "Metrics", ["metric", "meaning"], [[m.replace("_", " "), MEANING[m]] for m in metrics]))
    drawn = made["settings"]
    settings = f"temperature {drawn['temperature']}, top_p {drawn['top_p']}, seed {drawn['seed']}"
    found.append(("heading", "Samples, side by side"))
    found.append(
        ("text", f"Greedy, and the first of {drawn['samples']} sampled ({settings}), as the models wrote them.")
    )
    for prompt in dict.fromkeys(s["prompt"] for s in samples):
        texts = [
            (f"{label}, {decoding}", s["text"].strip())
            for decoding in ("greedy", "sampled")
            for label in labels
            for s in samples
            if (s["model"], s["prompt"], s["decoding"], s["sample"]) == (label, prompt, decoding, 0)
        ]
        found.append(("samples", prompt, texts))
    return found


def _table(data, rows, labels):
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    cells = {(r["metric"], r["model"]): r for r in rows}
    body = []
    for metric in metrics:
        line = [metric.replace("_", " ")]
        for label in labels:
            row = cells.get((metric, label))
            text = "" if row is None else figure(row["value"])
            if row and row["low"] is not None:
                text += f" ({figure(row['low'])} to {figure(row['high'])})"
            line.append(text)
        body.append(line)
    counts = sorted({row["n"] for row in rows}, key=int)
    return ("table", f"{data}; n = {', '.join(counts)}; in brackets the interval that the settings name",
            ["metric", *labels], body)  # fmt: skip


def _pictures(directory, rows, labels):
    """Draw what there is to draw; figure blocks."""
    found = []
    for number, data in enumerate(dict.fromkeys(r["data"] for r in rows if r["metric"] == "bits_per_byte")):
        points = [r for r in rows if r["metric"] == "bits_per_byte" and r["data"] == data]
        path = directory / f"comparison_bits_per_byte{number or ''}.png"
        plots.plot_intervals(path, f"Held-out text: {data.split(' (')[0]}", "bits per byte (lower is better)",
                             [(r["model"], r["value"], r["low"], r["high"]) for r in points])  # fmt: skip
        said = "; ".join(f"{r['model']} {figure(r['value'])}" for r in points)
        found.append(("figure", str(path), f"Bits per byte of held-out text with intervals: {said}."))
    speed = {
        name: [(r["model"], r["value"]) for r in rows if r["metric"] == f"{name}_tokens_per_second"]
        for name in ("prefill", "decode")
    }
    if speed["prefill"]:
        path = directory / "comparison_speed.png"
        plots.plot_bars(path, "Generation speed, one sequence", "tokens a second (log scale)", speed)
        said = "; ".join(f"{name} {label} {figure(v)}" for name, pairs in speed.items() for label, v in pairs)
        found.append(("figure", str(path), f"Tokens a second of prefill and decode: {said}."))
    varied = {
        "seq-rep-4, greedy": [r for r in rows if r["metric"] == "seq_rep_4_greedy"],
        "distinct-2, sampled": [r for r in rows if r["metric"] == "distinct_2"],
    }
    path = directory / "comparison_repetition.png"
    shares = {name: [(r["model"], r["value"]) for r in some] for name, some in varied.items()}
    plots.plot_bars(path, "Repetition and diversity", "share of n-grams", shares, log=False)
    said = "; ".join(f"{name} {label} {figure(v)}" for name, pairs in shares.items() for label, v in pairs)
    found.append(("figure", str(path), f"Repetition of greedy and diversity of sampled text: {said}."))
    return found


def write(directory):
    """comparison.md, comparison.html and pictures, from the files that compare.py left in directory."""
    page.write(directory, "comparison", "Language models compared", blocks(Path(directory)))
