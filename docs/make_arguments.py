"""The page of every argument, from the dataclasses that the commands parse.

python docs/make_arguments.py             # prints docs/arguments.md
python docs/make_arguments.py --write     # and puts it there
"""

import argparse
import json
import runpy
import sys
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "in_place.py"))

from transformers import TrainingArguments

from smolpretrain import arguments, limits

PAGE = Path(__file__).resolve().with_name("arguments.md")
HEAD = """# Every argument

<!-- Made by `python docs/make_arguments.py --write` from the dataclasses; change the help there. -->

Arguments are `key=value` words after a JSON file, or instead of it: `python run_pretrain.py args.json KEY=VALUE ...`.
Values are JSON; a word that is none is a string. `null` is no value. Words win over the file.
"""
THEIRS = """## TrainingArguments

Every other argument is passed on as transformers documents it. These are their defaults, and what is refused here.
"""


def own(cls):
    """Names of the fields that this project declares, whatever it inherits from transformers."""
    bases = [base for base in cls.__mro__ if not base.__module__.startswith("transformers")]
    return {name for base in bases for name in getattr(base, "__annotations__", {})}


def default_of(field):
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return json.dumps(getattr(value, "value", value), default=str)


def ranges():
    """{name: what its value must be}."""
    return {name: rule for rule, (_, names) in limits.RANGES.items() for name in names.split()}


def entry(field, must_be):
    """One of our own arguments: its default, help and range."""
    said = field.metadata.get("help", "").replace("|", "\\|").replace("<", "&lt;")
    said += f" It must be {must_be[field.name]}." if field.name in must_be else ""
    said = textwrap.fill(said, 119, break_long_words=False, break_on_hyphens=False)
    return f"### {field.name}\n\n`{field.name}={default_of(field)}`\n\n{said}\n"


def section(cls, must_be):
    names = own(cls)
    entries = [entry(field, must_be) for field in fields(cls) if field.name in names and field.init]
    return "\n".join([f"## {cls.__name__}\n\n{cls.__doc__.splitlines()[0]}\n", *entries])


def inherited(must_be):
    """The table of TrainingArguments' own fields."""
    names, rows = own(arguments.PretrainArguments), ["| key | default | |", "|---|---|---|"]
    for field in fields(TrainingArguments):
        if field.name in names or not field.init:
            continue
        said = f"must be {must_be[field.name]}" if field.name in must_be else ""
        if field.name in limits.LEFT_ALONE:
            said = f"must keep its default: {limits.LEFT_ALONE[field.name]}"
        rows.append(f"| `{field.name}` | `{default_of(field)}` | {said} |")
    return "\n".join(rows)


def page() -> str:
    """The text of docs/arguments.md."""
    classes = (arguments.ModelArguments, arguments.DataArguments, arguments.PretrainArguments)
    must_be = ranges()
    return "\n".join([HEAD, *(section(cls, must_be) for cls in classes), THEIRS, inherited(must_be), ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/arguments.md")
    made = page()
    if parser.parse_args().write:
        PAGE.write_text(made, encoding="utf-8")
    else:
        print(made)


if __name__ == "__main__":
    main()
