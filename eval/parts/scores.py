"""lm-eval's results as rows: value, standard error, documents and chance level of every metric.

A row is a dict of task, metric, value, stderr, n, chance and settings; benchmark.py says what they mean.
"""

import math
import statistics
import sys

import rich.console
import rich.table


def ratio_stderr(pairs, clusters=None):
    """Standard error of sum(a) / sum(b) over pairs (a, b), linearized (Cochran 1977, section 2.11).

    Args:
        clusters: A name for each pair; pairs of one name are taken as one draw, for they rise and fall together
            (Miller 2024, arXiv 2411.00640). None: every pair is a draw of its own.
    """
    sums = {}
    for place, (a, b) in enumerate(pairs):
        name = place if clusters is None else clusters[place]
        before = sums.get(name, (0, 0))
        sums[name] = before[0] + a, before[1] + b
    total = sum(b for _, b in sums.values())
    ratio = sum(a for a, _ in sums.values()) / total
    return math.sqrt(sum((a - ratio * b) ** 2 for a, b in sums.values()) * len(sums) / max(1, len(sums) - 1)) / total


def summarize(metric, values, clusters=None):
    """Return (value, standard error) of a metric from its documents' values; None where that is not known here.

    Args:
        values: Numbers, whose mean is meant; or (log-likelihood, bytes or words) pairs of a perplexity.
        clusters: See ratio_stderr.
    """
    if all(isinstance(value, (int, float)) for value in values):
        return statistics.fmean(values), ratio_stderr([(value, 1) for value in values], clusters)
    if not all(isinstance(value, (tuple, list)) and len(value) == 2 for value in values):
        return None, None
    nats, error = -sum(a for a, _ in values) / sum(b for _, b in values), ratio_stderr(values, clusters)
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
    """Return the rows (task, metric, value, stderr, n, chance, settings) of an lm-eval result; groups come first.

    The standard error is lm-eval's; where it has none, or the task's `metadata: cluster` names a field whose documents
    hang together, that of summarize.
    """
    samples, rows = result["samples"], []
    chance = {task: chance_level(docs, result["configs"][task]) for task, docs in samples.items()}
    counts = {task: result["n-samples"][task]["effective"] for task in samples}
    for task, scores in result["results"].items():
        leaves = _leaves(task, result["group_subtasks"])
        n = sum(counts[leaf] for leaf in leaves)
        known = None if any(chance[leaf] is None for leaf in leaves) else chance
        guess = known and sum(known[leaf] * counts[leaf] for leaf in leaves) / n
        settings, field = _settings(task, result)
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = scores.get(f"{metric}_stderr,{kind}")
            if field or not isinstance(stderr, (int, float)):
                mine = [doc for doc in samples.get(task, []) if doc["filter"] == kind and metric in doc]
                stderr = _summarize(metric, mine, field)[1] if mine else None
            row = _row(task, metric, value, stderr, n, guess, settings)
            rows.append(row | {"settings": settings | {"filter": kind}} if kind != "none" else row)
    for task, documents in samples.items():
        for field in fields:
            rows += _rows_by(task, documents, field, result)
    return rows


def _leaves(task, groups):
    children = groups.get(task)
    return [leaf for child in children for leaf in _leaves(child, groups)] if children else [task]


def _settings(task, result):
    """Return (what a task was scored with, the field its documents hang together by or None)."""
    settings = {"num_fewshot": result["n-shot"].get(task), "task_version": result["versions"].get(task)}
    field = (result["configs"].get(task, {}).get("metadata") or {}).get("cluster")
    return settings | ({"stderr_clustered_by": field} if field else {}), field


def _summarize(metric, documents, field):
    clusters = [document["doc"][field] for document in documents] if field else None
    return summarize(metric, [document[metric] for document in documents], clusters)


def _row(task, metric, value, stderr, n, chance, settings):
    chance = chance if metric.startswith("acc") else None
    row = {"task": task, "metric": metric, "value": value, "stderr": stderr, "n": n, "chance": chance}
    return row | {"settings": settings}


def _rows_by(task, documents, field, result):
    """Rows of a task's documents that share a value of a field; none where they lack it."""
    parts, (settings, cluster) = {}, _settings(task, result)
    for sample in documents:
        if field in sample["doc"]:
            parts.setdefault(sample["doc"][field], []).append(sample)
    for value, part in parts.items():
        chance = chance_level(part, result["configs"][task])
        for metric in part[0]["metrics"]:
            score, stderr = _summarize(metric, part, cluster)
            if score is not None:
                yield _row(f"{task}/{field}={value}", metric, score, stderr, len(part), chance, settings)


def show(rows):
    """Print the rows; what lies within two standard errors (SE) of chance is said not to be over it."""
    table = rich.table.Table("task", "metric", "value", "SE", "n", "chance", "over chance")
    for row in rows:
        value, stderr, chance = (
            "" if (x := row[key]) is None else f"{x:,.4f}" for key in ("value", "stderr", "chance")
        )
        over = ""
        if row["chance"] is not None and row["stderr"] is not None:
            above = row["value"] - row["chance"]
            errors = above / row["stderr"] if row["stderr"] else math.copysign(math.inf, above) if above else 0.0
            over = f"{errors:.1f} SE" if errors > 2 else f"no ({errors:.1f} SE)"
        table.add_row(row["task"], row["metric"], value, stderr, f"{row['n']:,}", chance, over)
    rich.console.Console(width=None if sys.stdout.isatty() else 120).print(table)
