"""Secrets: how they look, which ones the environment holds, and text without them. The one list there is.

What a user types is refused with them, what a run publishes (card, record, static page) goes without them.
"""

import os
import re

SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|github_pat_\w{20,}|gh[a-z]_\w{20,}"  # GitHub: of one's own, of an app, of a workflow
    r"|A[KS]IA[0-9A-Z]{16}"  # AWS: of a user, of a session
    r"|sk-[\w-]{20,}"  # OpenAI and the like
    r")|(?<=://)[!-.0-9;-?A-~]{1,100}:[!-.0-?A-~]{1,200}(?=@)"  # user and password in an address
)
NAMES = re.compile(  # of environment variables
    r"(?:TOKENS?|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_KEY|SECRET_KEY|PRIVATE_KEY)(?:_ID|_?\d+)?$", re.I
)
SHORTEST = 16  # characters of a value that is taken for a secret: "true" is none
REMOVED = "[removed]"


def in_environment() -> dict[str, str]:
    """The variables that hold a secret, by their names."""
    return {name: value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= SHORTEST}


def find(text: str) -> str | None:
    """What secret stands in the text, in words that do not repeat it; None where none does."""
    if SHAPES.search(text):
        return "an access token"
    return next((f"the value of {name}" for name, value in in_environment().items() if value in text), None)


def remove(text: str) -> str:
    """The text with `[removed]` where a secret stood."""
    for value in in_environment().values():
        text = text.replace(value, REMOVED)
    return SHAPES.sub(REMOVED, text)
