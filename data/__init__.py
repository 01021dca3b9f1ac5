"""Text to tokens to packed blocks: corpus, tokenization, packing, manifest, prepare."""
