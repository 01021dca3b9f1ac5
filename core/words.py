"""One JSON file and `key=value` words into dataclasses, every type checked.

    model, data = parse_args(["args.json", "block_size=512"], (ModelArguments, DataArguments))

HfArgumentParser takes a JSON file or flags, not both, keeps "1e-3" a string, "false" true, and the last of two equal
keys (transformers 5.23). Words instead of flags, because the deepspeed launcher takes flags for its own. Words win
over the file, in any order; the launcher's `--local_rank=N` is dropped (it is in the environment as well).
"""

import difflib
import enum
import json
import math
import re
import sys
import typing
from dataclasses import MISSING, asdict, fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from . import secrets


class Given(typing.NamedTuple):
    """One value as the user gave it, and where."""

    value: typing.Any
    origin: str  # the file's name, or "command line"
    word: str | None = None  # as typed


def parse_args(argv, dataclasses):
    """Fill the dataclasses from argv.

    Args:
        argv: Words after the script's name.
        dataclasses: Argument classes with disjoint field names.

    Returns:
        One instance of each class, in order.

    Raises:
        ValueError: One sentence that names the file (or "command line"), the key, the value and what to do.
        SystemExit: 0 after --help.
    """
    if "--help" in argv or "-h" in argv:
        print_help(dataclasses)
        sys.exit(0)
    given = collect(argv)
    hints = {cls: typing.get_type_hints(cls) for cls in dataclasses}
    names = {f.name: cls for cls in dataclasses for f in fields(cls) if f.init}
    for key, (_, origin, _) in given.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"Did you mean {near[0]}?" if near else "--help lists all."
            raise ValueError(f"{origin}: {key} is not an argument. {hint}")
    values = {key: coerce(key, hints[names[key]][key], source) for key, source in given.items()}
    parsed = []
    for cls in dataclasses:
        try:
            parsed.append(cls(**{key: value for key, value in values.items() if names[key] is cls}))
        except ValueError as error:
            raise ValueError(place(str(error), given)) from error
    return tuple(parsed)


def place(sentence, given):
    """The sentence with its file (or "command line") before it, where it begins with a key that was given."""
    key = re.match(r"\w*", sentence)[0]
    return f"{given[key].origin}: {sentence}" if key in given else sentence


def resolve(parsed):
    """{key: value} of everything that was given or left at its default, access tokens aside."""
    resolved = {}
    for part in parsed:
        values = part.to_dict() if hasattr(part, "to_dict") else asdict(part)
        names = {f.name for f in fields(part) if f.init and not f.name.endswith("_token")}
        resolved |= {name: value for name, value in values.items() if name in names}
    return resolved


def collect(argv):
    """Words to {key: Given}; a second JSON file, a flag or a bare word is refused."""
    given, file = {}, None
    for word in argv:
        key, equals, text = word.partition("=")
        refuse_secret("command line", key if equals else "a word", word)
        if key.replace("-", "_") == "__local_rank":
            continue
        if word.startswith("-"):
            remedy = f"write {word.lstrip('-')}" if equals else "write key=value, or --help for all keys"
            raise ValueError(f"command line: {word}: arguments are words, not flags: {remedy}.")
        if equals:
            try:
                value = json.loads(text, object_pairs_hook=lambda pairs: unique(pairs, "command line"))
            except json.JSONDecodeError:
                value = text
            given[key] = Given(value, "command line", text)
        elif file is not None:
            raise ValueError(f"command line: {word}: {file} is given already; change keys as key=value.")
        elif not word.endswith(".json"):
            raise ValueError(f"command line: {word} is neither a .json file nor key=value.")
        else:
            file = word
    in_file = read_json(file) if file is not None else {}
    given = {key: Given(value, file) for key, value in in_file.items()} | given
    for key, (value, origin, _) in given.items():
        refuse_secret(origin, key, json.dumps(value, ensure_ascii=False))
    return given


def refuse_secret(origin, key, text):
    """Refuse text with a token in it, by its shape or because the environment holds it as one; it is not repeated."""
    if secrets.SHAPES.search(text):
        raise ValueError(f"{origin}: {key} holds an access token: set HF_TOKEN or run `hf auth login` instead.")
    if found := secrets.find(text):
        raise ValueError(f"{origin}: {key} holds {found}: leave it in the environment, out of the run.")


def read_json(path):
    """The object in a JSON file; duplicate keys, comments and other shapes are refused by line."""

    try:
        loaded = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=lambda held: unique(held, path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON at line {error.lineno}: {error.msg} (JSON has no comments).") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}.") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: must hold one JSON object, holds a {type(loaded).__name__}.")
    return loaded


def unique(pairs, origin):
    """The object of these pairs; ValueError where a key stands twice."""
    seen = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"{origin}: {key} is given twice, as {seen[key]!r} and as {value!r}. Keep one.")
        seen[key] = value
    return seen


def coerce(name, hint, source):
    """The value as the field's type hint wants it."""
    value, origin, word = source
    parts = set(typing.get_args(hint)) if typing.get_origin(hint) not in (list, dict) else {hint}
    parts = parts or {hint}
    problem = f"{origin}: {name} = {json.dumps(value, default=str)}:"
    if isinstance(value, int | float) and str in parts and not parts & {int, float, bool}:
        value = str(value) if word is None else word  # dataset_revision=12e7 is the word, not a number
    choices = [str(e.value) for p in parts if isinstance(p, type) and issubclass(p, enum.Enum) for e in p]
    if choices:  # what a field takes beside transformers' own names
        choices += [each for p in parts if typing.get_origin(p) is typing.Literal for each in typing.get_args(p)]
    if choices and not isinstance(value, list) and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise ValueError(f"{problem} choose from {', '.join(choices)}.{f' Did you mean {near[0]}?' if near else ''}")
    if bool in parts and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if bool in parts and str not in parts and not isinstance(value, bool) and value is not None:
        raise ValueError(f"{problem} must be true or false.")
    if isinstance(value, bool) and bool not in parts and typing.Literal[False] not in parts:
        raise ValueError(f"{problem} must not be a boolean.")
    if isinstance(value, str) and list[str] in parts and str not in parts:
        value = [value]
    try:
        checked = TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        reasons = " or ".join(dict.fromkeys(e["msg"].removeprefix("Input ") for e in error.errors()))
        raise ValueError(f"{problem} {reasons}.") from None
    if isinstance(checked, float) and not math.isfinite(checked):
        raise ValueError(f"{problem} must be a finite number.")
    return value if isinstance(value, int) and isinstance(checked, float) else checked  # save_steps=100 stays whole


def print_help(dataclasses):
    """Every key with its default; ours with a sentence, TrainingArguments' own by name."""
    print("usage: [deepspeed | torchrun ... | python] run_pretrain.py [args.json] [key=value ...] [debug=true]\n")
    inherited = []
    for cls in dataclasses:
        own = {
            name
            for base in cls.__mro__
            if not base.__module__.startswith("transformers")
            for name in getattr(base, "__annotations__", {})
        }
        print(f"{cls.__name__}: {cls.__doc__.splitlines()[0]}")
        for f in fields(cls):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if f.name in own:
                print(f"  {f.name}={json.dumps(default, default=str)}\n      {f.metadata.get('help', '')}")
            elif f.init:
                inherited.append(f"{f.name}={json.dumps(default, default=str)}")
        print()
    print("As transformers.TrainingArguments documents them:\n  " + "\n  ".join(inherited))
