"""A static Space of a run: its report, and what it wrote side by side, as one page that needs no server and no network.

    python space/static.py RUN_DIR [--output_dir DIR] [--repo user/name] [--license ID]

Reads run.json, samples.jsonl, report/report.html (eval/report.py) and report/comparison_samples.jsonl with
comparison.json (eval/compare.py), as files; what is missing is said on the page. Writes index.html and README.md, the
whole of a Space with `sdk: static`, which is free for everybody.
"""

import base64
import hashlib
import json
import re
import runpy
import sys
from html import escape
from pathlib import Path

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "in_place.py"))

from huggingface_hub import SpaceCard, SpaceCardData

from smolpretrain.core import files, secrets
from smolpretrain.core.options import Parser
from smolpretrain.core.text import one_line

HERE = Path(__file__).resolve().parent
PICTURE = re.compile(r"(data:image/png;base64,[A-Za-z0-9+/=]+)")
# Paths of a machine, as in the card's hub/run_record.py, in HTML.
HOMES = re.compile(r"(?<![\w.<-])/(?:home|Users)/[^\s/'\"`<>&|,;]+")
PATHS = re.compile(r"(?<![\w./<-])~?/(?:[^\s/'\"`<>&|,;]+/)+([^\s/'\"`<>&|,;]*)")


def clean(text):
    """Text without access tokens, with the last part of an absolute path in the path's place; pictures stay."""
    text = text.encode("utf-8", "replace").decode()
    parts = PICTURE.split(text)
    parts[::2] = [PATHS.sub(r"\1", HOMES.sub("~", secrets.remove(part))) for part in parts[::2]]
    return "".join(parts)


def read_rows(path):
    """Samples of a JSON lines file, cleaned."""
    rows = files.read_rows(path).rows
    return [row | {key: clean(row[key]) for key in ("prompt", "text", "model") if key in row} for row in rows]


def read_json(path):
    return files.read_json(path) if path.is_file() else {}


def read_samples(run_dir):
    """What was written beforehand.

    Returns:
        (prompts, columns): a column is {"group", "label", "settings", "texts": one a prompt, None where there is none}.
    """
    rows, report = read_rows(run_dir / "samples.jsonl"), run_dir / "report"
    written, drawn = read_rows(report / "comparison_samples.jsonl"), read_json(report / "comparison.json")
    drawn, prompts = drawn.get("settings") or {}, list(dict.fromkeys(row["prompt"] for row in [*rows, *written]))
    found = {}
    for row in rows:
        label = f"step {row['step']:,}, {row['tokens_seen']:,} tokens"
        settings = f"{row['decoding']}, {row.get('max_new_tokens', '?')} new tokens at most"
        found.setdefault(("Checkpoints of this run", label, settings), {})[row["prompt"]] = many_breaks(row["text"])
    for row in written:
        greedy, new = row["decoding"] == "greedy", f"{drawn.get('max_new_tokens', '?')} new tokens at most"
        label = f"{row['model']}, " + ("greedy" if greedy else f"sampled {row['sample'] + 1}")
        draw = ", ".join(f"{name} {drawn.get(name, '?')}" for name in ("temperature", "top_p", "seed"))
        settings = f"greedy, {new}" if greedy else f"sampled, {draw}, {new}"
        found.setdefault(("Models compared", label, settings), {})[row["prompt"]] = many_breaks(row["text"])
    return prompts, [
        {"group": group, "label": label, "settings": settings, "texts": list(map(texts.get, prompts))}
        for (group, label, settings), texts in found.items()
    ]


def many_breaks(text):
    """Text in which many empty lines are counted, not shown: small models write dozens."""
    return re.sub(r"\n{4,}", lambda breaks: f"\n[{len(breaks[0])} line breaks]\n", text)


def _options(columns, chosen):
    parts = []
    for group in dict.fromkeys(column["group"] for column in columns):
        options = "".join(
            f'<option value="{place}"{" selected" if place == chosen else ""}>{escape(column["label"])}</option>'
            for place, column in enumerate(columns)
            if column["group"] == group
        )
        parts.append(f'<optgroup label="{escape(group)}">{options}</optgroup>')
    return "".join(parts)


def _pane(side, prompt, column):
    text = column["texts"][0]
    return (
        f'<article class="pane" id="{side}-pane" aria-labelledby="{side}-label"><h3 id="{side}-label">'
        f'{escape(column["label"])}</h3><p class="how">{escape(column["settings"])}</p><p class="words">'
        f"<b>{escape(prompt)}</b><span>{escape('' if text is None else text)}</span></p></article>"
    )


def side_by_side(prompts, columns):
    """The section in which a prompt and two columns are chosen; the first pair stands there without a script."""
    head = '<section aria-labelledby="side-by-side"><h2 id="side-by-side">Side by side</h2>'
    if not columns:
        return f"{head}<p>This run wrote no samples (sample_steps), and was compared with nothing.</p></section>"
    right = max((n for n, column in enumerate(columns) if column["group"] == columns[0]["group"]), default=0)
    options = "".join(f'<option value="{n}">{escape(prompt)}</option>' for n, prompt in enumerate(prompts))
    return f"""{head}
<p>Written beforehand, all prompts, none picked; nothing is computed here.</p>
<div class="choose" hidden>
<label class="wide">Prompt <select id="prompt">{options}</select></label>
<label>Left <select id="left">{_options(columns, 0)}</select></label>
<label>Right <select id="right">{_options(columns, right)}</select></label>
</div>
<noscript><p>Choosing others needs JavaScript.</p></noscript>
<div class="panes" aria-live="polite">
{_pane("left", prompts[0], columns[0])}
{_pane("right", prompts[0], columns[right])}
</div>
</section>"""


def read_report(run_dir):
    """(style, body) of report/report.html, its title one level down; a sentence where there is none."""
    path = run_dir / "report" / "report.html"
    if not path.is_file():
        return "", "<h2>Report</h2><p>There is none yet: <code>python eval/report.py RUN_DIR</code> writes it.</p>"
    text = path.read_text(encoding="utf-8")
    style, body = (re.search(rf"<{tag}>(.*)</{tag}>", text, re.DOTALL) for tag in ("style", "main"))
    if not style or not body:
        raise ValueError(f"{path}: not a page of eval/report.py; write it anew: python eval/report.py {run_dir}")
    body = re.sub(r"<(/?)h1>", r"<\1h2>", body[1])
    folded = r"<details><summary>\1, without choosing</summary>\2</details>\n"
    return style[1], clean(re.sub(r"<h2>(Samples[^<]*)</h2>(.*?)(?=<h2>|$)", folded, body, flags=re.DOTALL))


def page(run_dir, name):
    """index.html: one file, every picture inside it, and a policy that lets nothing be fetched and one script run."""
    record, (prompts, columns) = read_json(run_dir / "run.json"), read_samples(run_dir)
    if not record:
        raise ValueError(f"{run_dir}: no run.json of a run; give the output_dir of run_pretrain.py.")
    style, body = read_report(run_dir)
    began = (record.get("arguments") or {}).get("init_from")
    origin = f"from the weights of {clean(began)}" if began else "from random initialisation"
    size = f"{record['parameters']:,} parameters, " if record.get("parameters") else ""
    script = (HERE / "static.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    data = json.dumps({"prompts": prompts, "columns": columns}).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{style}{(HERE / "static.css").read_text(encoding="utf-8")}</style></head>
<body><main><h1>{escape(name)}</h1>
<p>A language model of {size}pre-trained {escape(origin)}. It continues a text; it is no chat.</p>
{side_by_side(prompts, columns)}
{body}
</main>
<script type="application/json" id="samples">{data}</script>
<script>{script}</script></body></html>
"""


def write_page(run_dir, output_dir, repo_id=None, license=None):
    """Write the folder of a static Space.

    Args:
        run_dir: Output directory of run_pretrain.py.
        repo_id: The model on the Hub, for the Space's list of models and its title.
        license: As the Hub names it; None leaves it out.

    Returns:
        The paths written: index.html and README.md.

    Raises:
        ValueError: run_dir holds no run, or a damaged file.
    """
    run_dir, output_dir = Path(run_dir), Path(output_dir)
    name = (repo_id or run_dir.resolve().name).split("/")[-1]
    try:
        text = page(run_dir, name)
    except (KeyError, TypeError, AttributeError) as error:
        said = f"its record is not as a run writes it ({type(error).__name__}: {error})."
        raise ValueError(f"{run_dir}: {said}") from error
    front = SpaceCardData(
        title=name,
        sdk="static",
        app_file="index.html",
        license=license,
        models=[repo_id] if repo_id else None,
        short_description=f"Report and samples of {name}"[:60],  # the Hub takes no more
        pinned=False,
    )
    said = f"# {name}\n\nThe report of a pre-training run and what the model wrote, as one page; nothing runs here."
    output_dir.mkdir(parents=True, exist_ok=True)
    written = {"index.html": text, "README.md": str(SpaceCard(f"---\n{front.to_yaml()}\n---\n\n{said}\n"))}
    for file, content in written.items():
        (output_dir / file).write_text(content, encoding="utf-8")
    return [output_dir / file for file in written]


def main(argv=None):
    """The command; what a user can get wrong is one line and exit status 2."""
    parser = Parser("static.py", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of run_pretrain.py")
    parser.add_argument("--output_dir", metavar="DIR", help="default: RUN_DIR/space")
    parser.add_argument("--repo", metavar="USER/NAME", help="the model on the Hub")
    parser.add_argument("--license", metavar="ID", help="as the Hub names it: apache-2.0, odc-by, ...")
    args = parser.parse_args(argv)
    try:
        paths = write_page(args.run_dir, args.output_dir or Path(args.run_dir, "space"), args.repo, args.license)
    except (ValueError, OSError) as error:
        parser.error(one_line(error))
    print(f"wrote {' and '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
