"""The dialect of words.py for a command of few options, which argparse knows: its help, its types, its refusals."""

import argparse
import contextlib
import difflib
import json
import sys

from .words import find_file, read_json, refuse_secret, version


class Parser(argparse.ArgumentParser):
    """argparse for a command of few options, which reads key=value and a JSON file's keys as well.

    Args:
        file: Whether a first word that ends in .json is such a file; false where files are what the command reads.
    """

    def __init__(self, *args, file=True, **kwargs):
        self.file, self.options, self.places = file, {}, {}
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.add_argument("--version", action="version", version=version())

    def _add_action(self, action):  # every way to add an argument ends here, a group's too
        for flag in action.option_strings:
            self.options[flag.removeprefix("--")] = action
        if not action.option_strings:
            self.places[action.dest] = action
        return super()._add_action(action)

    def parse_args(self, args=None, namespace=None):
        return super().parse_args(self.flags(sys.argv[1:] if args is None else args), namespace)

    def parse_intermixed_args(self, args=None, namespace=None):
        return super().parse_intermixed_args(self.flags(sys.argv[1:] if args is None else args), namespace)

    def flags(self, argv):
        """The words as argparse reads them: options of key=value and of the file behind all others."""
        words, given, kept = list(map(str, argv)), {}, []
        try:
            if self.file and words and words[0].endswith(".json") and "=" not in words[0]:
                file = words.pop(0)
                for key, value in read_json(find_file(file), file).items():
                    if key not in self.options and key not in self.places:
                        raise ValueError(f"{file}: {key} is not an option.{self._near(key)}")
                    given[key] = value
            while words:
                word = words.pop(0)
                key, equals, text = word.partition("=")
                flag = key.startswith("--")
                name = key.removeprefix("--").replace("-", "_") if flag else key
                refuse_secret("command line", name if equals else "a word", word)
                if flag and name in self.options:
                    given.pop(name, None)
                    switch = self.options[name].nargs == 0
                    if switch and not equals and words and words[0].lower() in ("true", "false"):
                        equals, text = "=", words.pop(0)
                    if not (switch and equals):
                        kept.append(f"--{name}{equals}{text}")
                        continue
                if equals and (name in self.options or (not flag and name in self.places)):
                    given[name] = _value(text)
                elif equals and not flag and name.isidentifier() and (near := self._near(name)):
                    raise ValueError(f"command line: {word}: {name} is not an option.{near}")
                else:
                    kept.append(word)
        except ValueError as error:
            self.error(str(error))
        places = [str(each) for key in self.places if key in given for each in _listed(given[key])]
        return [
            *places,
            *kept,
            *(word for key in self.options if key in given for word in self._words(key, given[key])),
        ]

    def _words(self, key, value):
        if self.options[key].nargs == 0:
            if not isinstance(value, bool):
                self.error(f"{key} = {value}: must be true or false.")
            return [f"--{key}"] if value else []
        if value is None:
            return []
        listed = [each if isinstance(each, str) else json.dumps(each) for each in _listed(value)]
        return [f"--{key}={listed[0]}"] if len(listed) == 1 else [f"--{key}", *listed]

    def _near(self, key):
        near = difflib.get_close_matches(key, [*self.options, *self.places], n=1)
        return f" Did you mean {near[0]}?" if near else ""


def _value(text):
    """What a word stands for: true, false and lists as JSON has them, all else as it is written."""
    if text in ("true", "false", "null") or text.startswith("["):
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return text


def _listed(value):
    return value if isinstance(value, list) else [value]
