"""The items of the educational benchmark as lm-eval reads them, and what it makes of their likelihoods.

README.md beside this file is the data card; items.jsonl holds the items, one JSON object a line.
"""

import json
import math
from pathlib import Path

import datasets
import numpy as np

ITEMS = Path(__file__).with_name("items.jsonl")
SCORED = ("id", "set", "subject", "level", "question", "options", "answer")


def read_items():
    """Return the items, a list of dicts with id, set, subject, level, question, options, answer, source, check."""
    return [json.loads(line) for line in ITEMS.read_text(encoding="utf-8").splitlines()]


def load(**_):
    """Return the items as lm-eval's custom_dataset; sources, checks and the canary stay out of it."""
    return {"test": datasets.Dataset.from_list([{key: item[key] for key in SCORED} for item in read_items()])}


def process_results(doc, results):
    """Turn (log-likelihood in nats, greedy or not) of each option into the metrics of one item.

    Returns:
        acc: 1.0 where the right option is the likeliest.
        acc_norm: The same by log-likelihood a UTF-8 byte of the option (lm-eval calls it acc_bytes).
        gold_bits_per_byte: (log-likelihood, bytes) of the right option, the blank before it counted, for it is scored.
    """
    likelihoods = np.array([likelihood for likelihood, _ in results])
    sizes = np.array([len(option.encode()) for option in doc["options"]])
    gold = doc["answer"]
    return {
        "acc": float(np.argmax(likelihoods) == gold),
        "acc_norm": float(np.argmax(likelihoods / sizes) == gold),
        "gold_bits_per_byte": (float(likelihoods[gold]), 1 + int(sizes[gold])),
    }


def bits_per_byte(pairs):
    """Sum of the bits over the sum of the bytes of (log-likelihood in nats, bytes) pairs."""
    likelihoods, sizes = zip(*pairs, strict=True)
    return -sum(likelihoods) / sum(sizes) / math.log(2)
