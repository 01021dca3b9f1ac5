"""Pre-train a small language model from random weights: text, tokens, packed blocks, training, evaluation."""
