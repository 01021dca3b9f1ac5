"""Pre-train a small language model from random weights: text, tokens, packed blocks, training, evaluation."""

__version__ = "0.1.0"
