"""Text: an error as one line."""


def one_line(error: object, limit: int | None = None) -> str:
    """What an error says, or its kind where it says nothing: white space folded, cut to `limit` characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]


def reason(error: object, limit: int = 300) -> str:
    """The same for the middle of a sentence: without the full stop."""
    return one_line(error).rstrip(".")[:limit]
