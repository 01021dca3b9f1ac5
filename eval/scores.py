"""lm-eval's results as rows: value, standard error, documents and chance level of every metric.

A row is a dict of task, metric, value, stderr, n, chance and settings; benchmark.py says what they mean.
"""

import math
import statistics
import sys

import rich.console
import rich.table


def ratio_stderr(pairs):
    """Standard error of sum(a) / sum(b) over independent pairs (a, b), linearized (Cochran 1977, section 2.11)."""
    pairs = list(pairs)
    total = sum(b for _, b in pairs)
    ratio = sum(a for a, _ in pairs) / total
    return math.sqrt(sum((a - ratio * b) ** 2 for a, b in pairs) * len(pairs) / max(1, len(pairs) - 1)) / total


def summarize(metric, values):
    """Return (value, standard error) of a metric from its documents' values; None where that is not known here.

    Args:
        values: Numbers, whose mean is meant; or (log-likelihood, bytes or words) pairs of a perplexity.
    """
    if all(isinstance(value, (int, float)) for value in values):
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return statistics.fmean(values), deviation / math.sqrt(len(values))
    if not all(isinstance(value, (tuple, list)) and len(value) == 2 for value in values):
        return None, None
    nats, error = -sum(a for a, _ in values) / sum(b for _, b in values), ratio_stderr(values)
    if metric.endswith("bits_per_byte"):
        return nats / math.log(2), error / math.log(2)
    return (math.exp(nats), math.exp(nats) * error) if metric.endswith("_perplexity") else (None, None)


def chance_level(samples, config):
    """What guessing scores in a task's accuracies, from the number of choices of each document; None if it has none."""
    if config.get("output_type") != "multiple_choice" or not all(isinstance(s["target"], (int, str)) for s in samples):
        return None
    asked = [len(sample["arguments"]) for sample in samples]
    twice = any(entry["metric"] == "acc_mutual_info" for entry in config.get("metric_list", []))
    return statistics.fmean((1 + twice) / count for count in asked)


def tabulate(result, fields=()):
    """Return the rows (task, metric, value, stderr, n, chance, settings) of an lm-eval result; groups come first."""
    samples, rows = result["samples"], []
    chance = {task: chance_level(docs, result["configs"][task]) for task, docs in samples.items()}
    counts = {task: len(docs) for task, docs in samples.items()}
    for task, scores in result["results"].items():
        leaves = _leaves(task, result["group_subtasks"])
        n = sum(counts[leaf] for leaf in leaves)
        known = None if any(chance[leaf] is None for leaf in leaves) else chance
        guess = known and sum(known[leaf] * counts[leaf] for leaf in leaves) / n
        shots = {"num_fewshot": result["n-shot"].get(task), "task_version": result["versions"].get(task)}
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = scores.get(f"{metric}_stderr,{kind}")
            if not isinstance(stderr, (int, float)):
                mine = [doc[metric] for doc in samples.get(task, []) if doc["filter"] == kind and metric in doc]
                stderr = summarize(metric, mine)[1] if mine else None
            settings = shots | {"filter": kind} if kind != "none" else shots
            rows.append(_row(task, metric, value, stderr, n, guess, settings))
    for task, documents in samples.items():
        for field in fields:
            rows += _rows_by(task, documents, field, result)
    return rows


def _leaves(task, groups):
    children = groups.get(task)
    return [leaf for child in children for leaf in _leaves(child, groups)] if children else [task]


def _row(task, metric, value, stderr, n, chance, settings):
    chance = chance if metric.startswith("acc") else None
    row = {"task": task, "metric": metric, "value": value, "stderr": stderr, "n": n, "chance": chance}
    return row | {"settings": settings}


def _rows_by(task, documents, field, result):
    """Rows of a task's documents that share a value of a field; none where they lack it."""
    parts = {}
    for sample in documents:
        if field in sample["doc"]:
            parts.setdefault(sample["doc"][field], []).append(sample)
    shots = {"num_fewshot": result["n-shot"].get(task), "task_version": result["versions"].get(task)}
    for value, part in parts.items():
        chance = chance_level(part, result["configs"][task])
        for metric in part[0]["metrics"]:
            score, stderr = summarize(metric, [sample[metric] for sample in part])
            if score is not None:
                yield _row(f"{task}/{field}={value}", metric, score, stderr, len(part), chance, shots)


def show(rows):
    """Print the rows; what lies within two standard errors (SE) of chance is said not to be over it."""
    table = rich.table.Table("task", "metric", "value", "SE", "n", "chance", "over chance")
    for row in rows:
        value, stderr, chance = (
            "" if (x := row[key]) is None else f"{x:,.4f}" for key in ("value", "stderr", "chance")
        )
        over = ""
        if row["chance"] is not None and row["stderr"]:
            errors = (row["value"] - row["chance"]) / row["stderr"]
            over = f"{errors:.1f} SE" if errors > 2 else f"no ({errors:.1f} SE)"
        table.add_row(row["task"], row["metric"], value, stderr, f"{row['n']:,}", chance, over)
    rich.console.Console(width=None if sys.stdout.isatty() else 120).print(table)
