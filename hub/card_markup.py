"""Recorded values as Markdown in which nothing recorded is markup."""

import json
import re

CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
FILE_LIMIT = 20  # entries of a list that the card names; the prepared set's manifest has all


def code(text):
    """Recorded text as a code span: nothing in it is markup; a line break is written as backslash n, and so on."""
    text = "not recorded" if text is None else text
    text = re.sub(r"\r\n|[\r\n\x85\u2028\u2029]", r"\\n", str(text)).replace("\t", r"\t")
    text = CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    if not text.strip():
        return f"`{json.dumps(text)}`"
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    edge = " " if "`" in (text[0], text[-1]) or text[0] == text[-1] == " " else ""
    return f"{fence}{edge}{text}{edge}{fence}"


def plain(text):
    """Recorded text as one line of prose, its markup taken literally."""
    one_line = CONTROLS.sub("", " ".join(("not recorded" if text is None else str(text)).split()))
    return re.sub(r"[\\`*{}\[\]<>#~&$!]|(?<!\w)_|_(?!\w)", lambda mark: "\\" + mark[0], one_line)


def number(value):
    """A number for a reader: integers whole, others with four digits that matter; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:.4g}"


def table(header, rows):
    """Rows as a table; a pipe inside a cell is text. Nothing where there are no rows."""
    lines = [header, ["---"] * len(header), *rows] if rows else []
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def section(title, *parts):
    return "\n\n".join([f"## {title}", *(part for part in parts if part)])


def listed(values, indent=""):
    """Values of a record as a list, nested as they are; a file is its name, size and sha256."""
    lines = []
    items = list(values.items() if isinstance(values, dict) else enumerate(values, start=1))
    for key, value in items[: None if isinstance(values, dict) else FILE_LIMIT]:
        if isinstance(value, dict) and set(value) == {"name", "bytes", "sha256"}:
            lines.append(
                f"{indent}- {code(value['name'])}, {number(value['bytes'])} bytes, sha256 {code(value['sha256'])}"
            )
        elif isinstance(value, (dict, list)):
            lines += [f"{indent}- {plain(key)}:", *listed(value, indent + "  ")] if value else []
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            lines.append(f"{indent}- {plain(key)}: {number(value)}")
        elif value is not None:
            lines.append(f"{indent}- {plain(key)}: {code(value)}")
    if len(items) > FILE_LIMIT and not isinstance(values, dict):
        lines.append(f"{indent}- and {number(len(items) - FILE_LIMIT)} more")
    return lines
