"""Text to ids."""

BACKENDS = ("auto", "tokenizers", "tokie")
