"""The one door: `smolpretrain VERB ...`, and `python -m smolpretrain VERB ...`.

    smolpretrain train args.json max_steps=100
    smolpretrain launch deepspeed --num_gpus 2 --module smolpretrain.run_pretrain args.json

All verbs take key=value, --key value and --key=value alike, a JSON file of keys first; --help lists a verb's keys.
"""

import difflib
import importlib
import re
import runpy
import sys
from pathlib import Path

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parent / "in_place.py"))

from smolpretrain.core import status, words

VERBS = {  # verb: (module, what it does)
    "train": ("run_pretrain", "text to a model: prepare, plan, train, evaluate, record, publish"),
    "plan": ("plan", "what a run will cost and whether it can work, before it starts"),
    "prepare": ("data.prepare", "text to a set of packed rows, once for many runs"),
    "launch": ("launch", "deepspeed, torchrun or accelerate, so that a signal leaves a whole checkpoint"),
    "report": ("eval.report", "curves, samples and figures of a run"),
    "perplexity": ("eval.perplexity", "perplexity and bits per byte on held-out text"),
    "compare": ("eval.compare", "several models side by side"),
    "benchmark": ("eval.benchmark", "lm-eval's tasks beside chance"),
    "contamination": ("eval.contamination", "whether the text holds the benchmark's items"),
    "publish": ("hub.publish", "a run on the Hub, checked first"),
    "card": ("hub.card", "a model card from a run's record"),
    "demo": ("space.app", "a model continues text in a browser"),
    "static": ("space.static", "a run's report as one static page"),
    "deploy": ("space.deploy", "the demo or the static page as a Space"),
}


def usage() -> str:
    """The docstring and the verbs."""
    return f"{__doc__}\n" + "\n".join(f"  {verb:<14}{said}" for verb, (_, said) in VERBS.items())


def main(argv: list[str] | None = None) -> int | None:
    """Hand the words behind the verb to its command; words without a verb are train's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(words.version())
        return 0
    verb, rest = argv[0], argv[1:]
    if verb.endswith(".json") or "=" in verb or verb.startswith("--"):
        verb, rest = "train", argv
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Verbs: {', '.join(VERBS)}."
        print(f"smolpretrain: error: {verb} is not a verb. {hint}", file=sys.stderr)
        return status.BAD_INPUT
    if verb == "demo":  # space/app.py lies alone on the Hub: plain argparse
        rest = [f"--{word}" if re.match(r"[a-z_]+=", word) else word for word in rest]
    return importlib.import_module(f"smolpretrain.{VERBS[verb][0]}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
