"""Columns: which value of a row is the text: a column, a nested one, or several by a template."""

import string
from collections.abc import Iterable
from dataclasses import dataclass

from ..readers import MISSING, Damaged

WORDS = 4
SHOWN = 40  # characters of a name in a message, and names: the first row of a file without a header is a document


class NoColumn(ValueError):
    """A source has columns, and not the one that is asked for."""


@dataclass(frozen=True)
class Columns:
    """The text of a row: text_column, nested by dots (`meta.text`), or text_template ("{title}\\n\\n{body}").

    Raises ValueError where the template names no column.
    """

    text_column: str = "text"
    text_template: str | None = None

    def __post_init__(self):
        if self.text_template is not None:
            try:
                names = self.names
            except ValueError as error:
                raise ValueError(f"text_template {self.text_template!r}: {error}; {{{{ stands for a brace.") from None
            if not names or not all(names):
                raise ValueError(
                    f'text_template {self.text_template!r} names no column, as in "{{title}}\\n\\n{{body}}".'
                )

    @property
    def names(self) -> list[str]:
        if self.text_template is None:
            return [self.text_column]
        return list(
            dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.text_template) if name is not None)
        )

    @property
    def alone(self) -> str | None:
        """The one column whose value is the text as it stands, wherever rows have it by that name; else None."""
        return self.text_column if self.text_template is None and "." not in self.text_column else None

    def of(self, columns: Iterable[str]) -> list[str]:
        """Return the names by which a table with these columns gives what is needed."""
        return [name if name in columns else name.split(".")[0] for name in self.names]

    def check(self, source: str, columns: Iterable[str] | None) -> None:
        """Raise NoColumn where a source has columns and one of ours is not among them."""
        if not columns:
            return
        for name, top in zip(self.names, self.of(columns), strict=True):
            if top not in columns:
                key = "text_column" if self.text_template is None else "text_template's names"
                raise NoColumn(f"{source}: no column {name!r}; set {key} to {_shown(list(map(str, columns)))}.")

    def value(self, row) -> object:
        """Return a row's text, MISSING where it has none of the columns, Damaged where one is no text."""
        if not isinstance(row, dict):
            return Damaged(f"it holds a {type(row).__name__}, not an object")
        if self.text_template is None:
            return _look_up(row, self.text_column)
        values = {name: _look_up(row, name) for name in self.names}
        if all(value is MISSING for value in values.values()):
            return MISSING
        texts = {}
        for name, value in values.items():
            texts[name] = _as_text(value)
            if texts[name] is None:
                return Damaged(f"its column {name} holds a {type(value).__name__}, not text")
        if not any(text.strip() for text in texts.values()):
            return None
        parts = string.Formatter().parse(self.text_template)
        return "".join(literal + texts.get(name, "") for literal, name, _, _ in parts).strip("\r\n")


def _look_up(row: dict, name: str) -> object:
    if name in row or "." not in name:
        return row.get(name, MISSING)
    value = row
    for part in name.split("."):
        if not isinstance(value, dict):
            return MISSING
        value = value.get(part, MISSING)
    return value


def _as_text(value) -> str | None:
    if value is None or value is MISSING:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    joined = join(value)
    return joined if isinstance(joined, str) else None


def join(value) -> object:
    """Return a list of texts as one text, blank lines between them; anything else as it is."""
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return "\n\n".join(value)
    return value


def _shown(names: list[str]) -> str:
    """List columns for a message; what is no name is not listed."""
    if any(len(name) > SHOWN or len(name.split()) > WORDS or "\n" in name for name in names):
        opening = " ".join(names[0].split())[:SHOWN]
        return f"one of its columns, or give it a header: its first row ({opening!r} ...) names none"
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return f"one of {', '.join(names[:SHOWN])}{more}"
