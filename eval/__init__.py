"""Measure a language model: perplexity and bits per byte of held-out text."""
