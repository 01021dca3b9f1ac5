"""One story, two forms: blocks of a report as Markdown beside its pictures, and as one HTML page that needs no network.

A block is a tuple: ("heading", text), ("text", text), ("table", caption, header, rows), ("figure", path, alt) or
("samples", prompt, [(label, text), ...]). Text is plain; a `code` span is the only markup.
"""

import base64
import re
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #5b6470; --line: #d9dee4; --wash: #f6f7f9; --mark: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; overflow-wrap: anywhere; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .5rem 0; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; background: var(--wash);
  padding: .1em .3em; border-radius: 3px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; } img { display: block; width: 100%; max-width: 40rem; height: auto; }
.scroll { overflow-x: auto; margin: .75rem 0; border: 1px solid var(--line); border-radius: 6px; }
.scroll:focus-visible { outline: 3px solid var(--mark); }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
.caption { margin: 1.5rem 0 0; font-size: .875rem; color: var(--soft); }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
  overflow-wrap: normal; }
tr:first-child > * { border-top: 0; }
th { background: var(--wash); overflow-wrap: anywhere; min-width: 4.5rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; } td.number small { display: block; color: var(--soft); }
td.long { min-width: 11rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .75rem; }
.sample { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .75rem; font-size: .9rem; }
.sample b { display: block; font-size: .8rem; color: var(--soft); margin-bottom: .25rem; }
.sample span { white-space: pre-wrap; }
"""
# Nothing may be fetched: not by a mistake of ours, nor by what a model wrote.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def number_columns(header, rows):
    """For each column whether all its cells are numbers, with or without an interval, or empty."""
    number = r"[-+]?[\d,.]+(e[-+]?\d+)?"
    pattern = re.compile(rf"({number}( \({number} to {number}\))?)?")
    return [bool(rows) and all(pattern.fullmatch(row[place]) for row in rows) for place in range(len(header))]


def _one_line(text):
    return re.sub(r"\s+", " ", text).strip()


def markdown(title, blocks):
    """Blocks as GitHub's Markdown; figures by their file's name."""
    parts = [f"# {title}"]
    for kind, *content in blocks:
        if kind == "heading":
            parts.append(f"## {content[0]}")
        elif kind == "text":
            parts.append(content[0])
        elif kind == "figure":
            parts.append(f"![{content[1]}]({Path(content[0]).name})")
        elif kind == "table":
            caption, header, rows = content
            numbers = number_columns(header, rows)
            lines = ["| " + " | ".join(header) + " |", "|" + "|".join("---:" if n else "---" for n in numbers) + "|"]
            lines += ["| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
            parts += [caption, "\n".join(lines)]
        else:
            prompt, texts = content
            lines = [f"- {label}: `{_one_line(text).replace('`', chr(39))}`" for label, text in texts]
            parts += [f"**{prompt}**", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _inline(text):
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _html_table(caption, header, rows):
    numbers, body = number_columns(header, rows), ""
    for row in rows:
        body += "<tr>"
        for cell, number in zip(row, numbers, strict=True):
            kind = "number" if number else "long" if len(cell) > 60 else ""
            text = re.sub(r" (\(.* to .*\))", r"<small>\1</small>", cell) if number else _inline(cell)
            body += f'<td class="{kind}">{text}</td>'
        body += "</tr>\n"
    heads = zip(header, numbers, strict=True)
    head = "".join(f'<th scope="col" class="{"number" if n else ""}">{_inline(name)}</th>' for name, n in heads)
    return (
        f'<p class="caption">{_inline(caption)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def html(title, blocks):
    """Blocks as one page: pictures inside it, no script, no address, and a policy that lets nothing be fetched."""
    parts, open_figures = [f"<h1>{escape(title)}</h1>"], False
    for kind, *content in [*blocks, ("end",)]:
        if open_figures != (kind == "figure"):
            parts.append("</div>" if open_figures else '<div class="figures">')
            open_figures = not open_figures
        if kind == "heading":
            parts.append(f"<h2>{_inline(content[0])}</h2>")
        elif kind == "text":
            parts.append(f"<p>{_inline(content[0])}</p>")
        elif kind == "figure":
            data = base64.b64encode(Path(content[0]).read_bytes()).decode()
            parts.append(f'<figure><img src="data:image/png;base64,{data}" alt="{escape(content[1])}"></figure>')
        elif kind == "table":
            parts.append(_html_table(*content))
        elif kind == "samples":
            boxes = [f'<div class="sample"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in content[1]]
            parts += [f"<h3>{escape(content[0])} ...</h3>", '<div class="samples">', *boxes, "</div>"]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def write(directory, name, title, blocks):
    """Write directory/name.md and directory/name.html."""
    Path(directory, f"{name}.md").write_text(markdown(title, blocks), encoding="utf-8")
    Path(directory, f"{name}.html").write_text(html(title, blocks), encoding="utf-8")
