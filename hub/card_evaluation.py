"""The evaluation of a model card: one list of scores, as a table for people and as the Hub's model-index."""

from huggingface_hub import EvalResult

from .card_markup import code, number, plain, section, table
from .card_sections import own_label, picture, settings_text, source_name

COMPARED = ("bits_per_byte", "token_perplexity", "word_perplexity")  # what of a comparison goes into the model-index


def held_out(run):
    """The scores of the run's end: rows of metric, trained, random weights, unigram model."""
    scored = run.result.get("held_out") or {}
    name = settings_text(scored)
    rows = [
        [f"bits per byte ({name})", _interval(scored, "bits_per_byte"), number(run.result.get("random_bits_per_byte")),
         number(run.result.get("unigram_bits_per_byte"))],
        *([f"{label} ({name})", _interval(scored, key), "", ""]
          for label, key in (("token perplexity", "token_perplexity"), ("word perplexity", "word_perplexity"))),
    ]  # fmt: skip
    for of, one in (run.result.get("held_out_sets") or {}).items():
        own = one.get("held_out") or {}
        rows.append([f"bits per byte, {code(of)}, {number(own.get('documents'))} documents",
                     _interval(own, "bits_per_byte"), number(one.get("random_bits_per_byte")),
                     number(one.get("unigram_bits_per_byte"))])  # fmt: skip
    return [row for row in rows if row[1]]


def _interval(scored, key):
    low, high = scored.get(f"{key}_low"), scored.get(f"{key}_high")
    ends = f" ({number(low)} to {number(high)})" if None not in (low, high) else ""
    return f"{number(scored.get(key))}{ends}" if scored.get(key) is not None else ""


def evaluation(run):
    """Held-out figures beside their baselines, a comparison, benchmarks beside chance; each with its settings."""
    rows, result = held_out(run), run.result
    documents = number((result.get("held_out") or {}).get("documents"))
    parts = [table(["held-out text", "this model", "random weights", "unigram model"], rows)]
    if rows:
        parts.append(f"Over {documents} held-out documents, no token scored twice; in brackets the 95 % interval over "
                     "documents. Lower is better. Random weights: the same architecture untrained. Unigram model: each "
                     "token by its frequency in the training text. Bits per byte compares models of different "
                     "tokenizers, perplexities do not.")  # fmt: skip
    elif result.get("held_out"):
        parts.append("The held-out score in `run.json` is not a finite number.")
    else:
        parts.append("Nothing was held out and scored at the end of this run.")
    if run.held_out:
        last = run.held_out[-1]
        parts.append(f"During training, last at step {number(last['step'])}: held-out loss "
                     f"{number(last['eval_loss'])} nats a token over {number(last.get('eval_tokens'))} tokens, packed "
                     "as in training.")  # fmt: skip
    return section("Evaluation", *parts, *_comparison(run), *_benchmark(run))


def _comparison(run):
    """A table a text: metrics by model."""
    parts, labels = [], list(dict.fromkeys(row["model"] for row in run.compared))
    for data in dict.fromkeys(row["data"] for row in run.compared):
        rows = [row for row in run.compared if row["data"] == data]
        body = []
        for metric in dict.fromkeys(row["metric"] for row in rows):
            found = {row["model"]: row for row in rows if row["metric"] == metric}
            settings = settings_text(next(iter(found.values()))["settings"])
            name = plain(metric.replace("_", " ")) + (f" ({settings})" if settings else "")
            body.append([name, *(_compared(found.get(label)) for label in labels)])
        said = "in brackets the 95 % interval, of speeds the slowest and the fastest round"
        parts += [f"Compared on {code(data)}; {said}:", table(["metric", *map(code, labels)], body)]
    return [*parts, *(picture(*one) for one in run.pictures if one[0].startswith("report/comparison"))]


def _compared(row):
    ends = {f"value_{end}": row[end] for end in ("low", "high")} | {"value": row["value"]} if row else {}
    return _interval(ends, "value")


def _benchmark(run):
    rows = [
        [code(row["task"]), f"{plain(row['metric'])}{_asked(row)}", code(row.get("model")), *map(number, (
            row["value"], row.get("stderr"), row.get("chance"), row.get("n")))]
        for row in run.scores if row.get("value") is not None
    ]  # fmt: skip
    head = ["task", "metric", "model", "value", "standard error", "chance", "n"]
    said = "Benchmarks, by lm-eval; what lies within two standard errors of chance is no better than chance:"
    return [said, table(head, rows)] if rows else ["No benchmark was run."]


def _asked(row):
    """What moves a benchmark's score, for the metric's name."""
    settings = row.get("settings") or {}
    shots = f"{settings['num_fewshot']}-shot" if settings.get("num_fewshot") is not None else ""
    first = f"first {settings['limit']} documents" if settings.get("limit") else ""
    return f" ({', '.join(filter(None, (shots, first)))})" if shots or first else ""


def eval_results(run):
    """The scores of this model, finite ones only, as the Hub's model-index takes them."""
    source = (run.record.get("data") or {}).get("source") or {}
    hub = source.get("dataset_name") if "dataset_commit" in source else None
    scored = run.result.get("held_out") or {}
    settings = {name: scored.get(name) for name in ("window", "stride", "prefix", "documents")}
    mine = {
        "task_type": "text-generation",
        "dataset_type": hub or "held-out-text",
        "dataset_name": f"held out of {source_name(source)}",
        "dataset_revision": source.get("dataset_commit"),
        "dataset_args": {"fingerprint": (run.record.get("data") or {}).get("fingerprint")},
    }
    found = [(mine, key, scored.get(key), settings) for key in COMPARED]
    label = own_label(run)
    for row in run.compared:
        again = bool(scored) and row["data"].startswith("held_out (")  # the set's own held-out text, as above
        if row["model"] == label and row["metric"] in COMPARED and not again:
            where = {"task_type": "text-generation", "dataset_type": "text", "dataset_name": row["data"]}
            found.append((where, row["metric"], row["value"], row["settings"]))
    results = [
        EvalResult(**where, metric_type=key.removeprefix("token_"), metric_value=value, metric_args=more,
                   metric_name=f"{key.replace('_', ' ')} ({settings_text(more)})")
        for where, key, value, more in found if value is not None
    ]  # fmt: skip
    for row in run.scores:
        kind, name = (row.get("settings") or {}).get("kind"), str(row.get("model")).rstrip("/").split("/")[-1]
        if row.get("value") is not None and kind == "checkpoint" and name in run.names:
            results.append(EvalResult(
                task_type="text-generation", dataset_type=row["task"].split("/")[0], dataset_name=row["task"],
                metric_type=row["metric"], metric_name=f"{row['metric']}{_asked(row)}", metric_value=row["value"],
                metric_args={name: row.get(name) for name in ("stderr", "chance", "n")},
            ))  # fmt: skip
    return results
