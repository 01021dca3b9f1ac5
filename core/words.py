"""The one dialect of all commands: a JSON file, then key=value, --key value and --key=value alike.

    model, data = parse_args(["args.json", "block_size=512"], (ModelArguments, DataArguments))

HfArgumentParser takes a JSON file or flags, not both, keeps "1e-3" a string, "false" true, and the last of two equal
keys (transformers 5.23). Words win over the file, in any order; the launcher's `--local_rank=N` is dropped (it is in
the environment as well). Commands of few options use options.py, which reads the same words.
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
from types import MappingProxyType

from pydantic import TypeAdapter, ValidationError

from . import secrets

PACKAGE = Path(__file__).resolve().parents[1]


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
    if "--version" in argv:
        print(version())
        sys.exit(0)
    hints = {cls: typing.get_type_hints(cls) for cls in dataclasses}
    names = {f.name: cls for cls in dataclasses for f in fields(cls) if f.init}
    given = collect(argv, switches_of(dataclasses))
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


def switches_of(dataclasses):
    """Names of the fields that are true or false."""
    hints = [item for cls in dataclasses for item in typing.get_type_hints(cls).items()]
    return {name for name, hint in hints if bool in {hint, *typing.get_args(hint)}}


def place(sentence, given):
    """The sentence with its file (or "command line") before it, where it begins with a key that was given."""
    key = re.match(r"\w*", sentence)[0]
    return f"{given[key].origin}: {sentence}" if key in given else sentence


def resolve(parsed):
    """{key: value} of everything that was given or left at its default, access tokens aside; it cannot be changed."""
    resolved = {}
    for part in parsed:
        values = part.to_dict() if hasattr(part, "to_dict") else asdict(part)
        names = {f.name for f in fields(part) if f.init and not f.name.endswith("_token")}
        resolved |= {name: value for name, value in values.items() if name in names}
    return MappingProxyType(resolved)


def collect(argv, switches=None):
    """Words to {key: Given}; a second JSON file or a bare word is refused.

    Args:
        switches: Keys that need no value behind --key; None where nobody knows, as in a launcher.
    """
    given, file, words = {}, None, list(argv)
    while words:
        word = words.pop(0)
        key, text = _pair(word, words, switches)
        refuse_secret("command line", key or "a word", f"{key}={text}" if key else word)
        if key == "local_rank":
            continue
        if key:
            try:
                value = json.loads(text, object_pairs_hook=lambda pairs: unique(pairs, "command line"))
            except json.JSONDecodeError:
                value = text
            given[key] = Given(value, "command line", text)
        elif file is not None:
            raise ValueError(f"command line: {word}: {file} is given already; change keys as key=value.")
        elif not word.endswith(".json"):
            raise ValueError(f"command line: {word} is neither a .json file nor key=value nor --key value.")
        else:
            file = word
    in_file = read_json(find_file(file), file) if file is not None else {}
    given = {key: Given(value, file) for key, value in in_file.items()} | given
    for key, (value, origin, _) in given.items():
        refuse_secret(origin, key, json.dumps(value, ensure_ascii=False))
    return given


def _pair(word, rest, switches):
    """(key, text) of key=value, --key=value or --key and the word behind it, which is taken from rest.

    (None, None) for a bare word. A switch, and a key whose value nobody gave where switches are not known, is true.
    """
    flag = word.startswith("--")
    key, equals, text = word.removeprefix("--").partition("=")
    if equals and (flag or not word.startswith("-")):
        return key.replace("-", "_") if flag else key, text
    if not flag:
        if word.startswith("-"):
            raise ValueError(f"command line: {word}: write key=value or --key value; --help lists all keys.")
        return None, None
    key, following = key.replace("-", "_"), rest[0] if rest else None
    no_value = following is None or following.startswith("--")
    if switches is None:  # a file right behind a key is the run's, unless the key is one of files
        no_value = no_value or (following.endswith(".json") and key != "deepspeed")
    elif key in switches:
        no_value = no_value or following.lower() not in ("true", "false")
    elif no_value:
        raise ValueError(f"command line: {word} needs a value, as in {word}=... or {key}=...; --help lists all keys.")
    return key, "true" if no_value else rest.pop(0)


def take_switch(argv, key):
    """(whether a switch is on, the words without it)."""
    rest = list(argv)
    for place, word in enumerate(rest):
        if word in (f"{key}=true", f"--{key}=true"):
            return True, rest[:place] + rest[place + 1 :]
        if word == f"--{key}" and (following := [*rest, "--"][place + 1]) in ("true", "--"):
            return True, rest[:place] + rest[place + 1 + (following == "true") :]
        if word == f"--{key}" and following.startswith("--"):
            return True, rest[:place] + rest[place + 1 :]
    return False, rest


def find_file(name):
    """A recipe's path: in the working directory, else in the package, where args.json and configs/ are."""
    for place in (Path(name).expanduser(), PACKAGE / name):
        if place.is_file():
            return place
    return Path(name).expanduser()


def version():
    """What --version says."""
    return f"smolpretrain {sys.modules['smolpretrain'].__version__}"


def refuse_secret(origin, key, text):
    """Refuse text with a token in it, by its shape or because the environment holds it as one; it is not repeated."""
    if secrets.SHAPES.search(text):
        raise ValueError(f"{origin}: {key} holds an access token: set HF_TOKEN or run `hf auth login` instead.")
    if found := secrets.find(text):
        raise ValueError(f"{origin}: {key} holds {found}: leave it in the environment, out of the run.")


def read_json(path, named=None):
    """The object in a JSON file; duplicate keys, comments and other shapes are refused by line.

    Args:
        named: What the user called it, for the sentences.
    """
    place, path = path, named or path

    try:
        loaded = json.loads(Path(place).read_text(encoding="utf-8"), object_pairs_hook=lambda held: unique(held, path))
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
    print("usage: [deepspeed | torchrun ... | python] run_pretrain.py [args.json] [key=value ...] [debug=true]")
    print("       smolpretrain train [args.json] [key=value | --key value | --key=value ...]\n")
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
