"""Benchmarks of a causal language model through lm-eval: scores with their chance level and standard error.

    python eval/benchmark.py runs/first --tasks educational --by subject level
    python eval/benchmark.py random:runs/first --tasks educational       # the control: the same at random weights
    python eval/benchmark.py HuggingFaceTB/SmolLM2-135M --tasks small --output_dir scores

MODEL is what eval/compare.py takes: a directory, a checkpoint of a run, a Hub id or id@revision, a GGUF file; random:
(or random_init:) before it asks for its architecture with the random weights that compare.py gives it too.

A task is any that lm-eval knows, one of ours (educational, educational_choices_only), one of --include_path, or a set:
`small` is what tells base models under 2B apart. All score the text of each answer (cloze form): such models cannot
yet choose among letters (OLMES, Gu et al. 2024, arXiv 2406.08446).

OUTPUT_DIR/benchmark.json (RUN_DIR/report/benchmark.json for a run and its checkpoints) is a list of rows:
    task      its name, or NAME/FIELD=VALUE for the part of it that --by asked for
    metric    lm-eval's name; acc, acc_norm, word_perplexity, ...
    value, stderr   floats; stderr null where none is known, clustered by the field that the task's metadata names
    n         documents scored
    chance    what guessing gives, null for metrics that are no accuracies
    model     as it was named
    settings  num_fewshot, limit, window, batch_size, dtype, device, seed, kind of the model, its commit on the Hub,
              version of the task, of lm-eval ...
    file      lm-eval's whole result with every document's likelihoods, JSON, relative to OUTPUT_DIR
    commit    of this project
A row takes the place of an earlier one of the same task, metric, model and settings; the others stay.
"""

import difflib
import json
import logging
import re
import runpy
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "in_place.py"))

import datasets
import transformers

from smolpretrain.core import files
from smolpretrain.core.text import one_line
from smolpretrain.eval import perplexity
from smolpretrain.eval.compare import Candidate
from smolpretrain.eval.parts import command, provenance, scores

HERE = Path(__file__).resolve().parent
OURS = HERE / "educational"
# Of OLMES's ten tasks those that lm-eval 0.4.13 has in cloze form (its CommonsenseQA asks for letters) and whose chance
# level is that of a guess (always yes is right on 62 % of BoolQ); SciQ and WikiText stand beside them. OLMES gives five
# solved examples: --num_fewshot 5 (lm-eval draws its own).
SETS = {
    "small": (
        *("arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa", "social_iqa", "winogrande"),
        *("mmlu_continuation", "sciq", "wikitext"),
    )
}
BOOTSTRAPS = 1000  # for lm-eval's bootstrapped metrics: the error of a standard error is then about 2 %
OPTIONS = {
    "tasks": {"nargs": "+", "required": True, "help": f"tasks or groups of lm-eval, or {', '.join(SETS)}"},
    "include_path": {"nargs": "+", "default": [], "help": "directories of further tasks (YAML, as lm-eval has them)"},
    "by": {"nargs": "+", "default": [], "help": "fields of the documents, a row for each value: subject level"},
    "tokenizer": {"help": "directory or Hub id, if it is not the model's own"},
    "revision": {"help": "commit, branch or tag of a model on the Hub; MODEL@REVISION does it too"},
    "num_fewshot": {"type": int, "help": "solved examples before each question; default the task's own, mostly 0"},
    "limit": {"type": int, "help": "score the first N documents of each task only"},
    "window": {"type": int, "help": "input tokens a pass; default the model's positions, at most 2048"},
    "batch_size": {"type": int, "default": 16, "help": "sequences a pass"},
    "dtype": {"default": "auto", "choices": ("auto", "float32", "bfloat16", "float16"), "help": "auto: float32 on CPU"},
    "device": {"default": "auto", "help": "auto, cpu, cuda, cuda:1, ..."},
    "seed": {"type": int, "default": 0, "help": "of random weights; lm-eval's own seeds are fixed"},
    "output_dir": {"help": "where the results go; default report/ of the run that MODEL is of"},
}


class Cuts(logging.Handler):
    """Counts lm-eval's warnings that a context was longer than the window and lost its beginning."""

    count = 0

    def emit(self, record):
        self.count += "Truncating" in record.getMessage()


def load_tasks(names, include_path=(), fields=(), tasks=SETS):
    """Return (lm-eval's TaskManager, the names with sets expanded); every task has then been loaded once.

    Raises:
        ValueError: A task does not exist, its documents cannot be had, or none of them has a field of fields.
    """
    from lm_eval.tasks import TaskManager

    names = list(dict.fromkeys(task for name in names for task in tasks.get(name, (name,))))
    for path in include_path:
        if not Path(path).is_dir():
            raise ValueError(f"include_path {path}: no such directory.")
    paths = [str(OURS), *map(str, include_path)]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # lm-eval's own take seconds to index
        manager = TaskManager(include_path=paths)
    known = set()
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"task {name}: lm-eval has none of that name.{hint}")
        try:
            for task in manager.load([name])["tasks"].values():
                known |= set(getattr(task, "features", ()))
        except Exception as error:  # a task is somebody's YAML and Python: what it may raise is not ours to list
            raise ValueError(f"task {name} cannot be loaded: {type(error).__name__}: {error}") from error
    if missing := set(fields) - known:
        raise ValueError(f"by {min(missing)}: no task's documents have it; they have {', '.join(sorted(known))}.")
    return manager, names


def check(candidate, args):
    """Return (tokenizer, window) of a model whose weights are not read yet; ValueError or OSError where it is none."""
    config, tokenizer = perplexity.load_config(candidate.name, args.tokenizer)
    return tokenizer, perplexity.resolve_window(config, args.window)[0]


def evaluate(model, tokenizer, manager, names, window, args):
    """Return (lm-eval's whole result, how often it cut a context); ValueError where the window is below an answer."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size, max_length=window)
    logger, cuts = logging.getLogger("lm_eval.models.huggingface"), Cuts()
    logger.addHandler(cuts)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    options = {"num_fewshot": args.num_fewshot, "limit": args.limit, "bootstrap_iters": BOOTSTRAPS}
    try:
        return simple_evaluate(scorer, tasks=names, task_manager=manager, **options), cuts.count
    except AssertionError as error:
        raise ValueError(f"lm-eval cannot score an answer that is longer than the window ({window} tokens).") from error
    finally:
        logger.removeHandler(cuts)


def run_directory(name):
    """The directory of the run that a model is, or is a checkpoint of; None for any other."""
    path = Path(name)
    return next((directory for directory in (path, path.parent) if (directory / "run.json").is_file()), None)


def write(rows, result, directory):
    """Write lm-eval's result and put the rows into directory/benchmark.json; returns its path."""
    same = ("task", "metric", "model", "settings")
    name = re.sub(r"[^\w.-]+", "_", rows[0]["model"]).strip("_")
    mark = files.digest([[row[key] for key in same] for row in rows])[:8]
    whole, path = directory / "lm_eval" / f"{name}-{mark}.json", directory / "benchmark.json"
    whole.parent.mkdir(parents=True, exist_ok=True)
    whole.write_text(json.dumps(result, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = [row | {"file": str(whole.relative_to(directory)), "commit": provenance.code_commit()} for row in rows]
    before = files.read_json(path) if path.is_file() else []
    new = [[row[key] for key in same] for row in rows]
    kept = [row for row in before if [row.get(key) for key in same] not in new]
    files.write_json(path, kept + rows)
    return path


def run(args):
    """Check, load tasks, load the model, score, print, write."""
    if find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install -c constraints.txt -e '.[bench]'")
    for name in ("limit", "batch_size", "num_fewshot"):
        if (value := getattr(args, name)) is not None and value < (name != "num_fewshot"):
            raise ValueError(f"{name} must be at least {int(name != 'num_fewshot')}, got {value}.")
    command.check_device(args.device)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, names = load_tasks(args.tasks, args.include_path, args.by)
    candidate = Candidate(args.model)
    candidate.name += f"@{args.revision}" if args.revision else ""
    tokenizer, window = check(candidate, args)
    model = candidate.load(args.dtype, args.device, args.seed)
    result, cuts = evaluate(model, tokenizer, manager, names, window, args)
    used = {"limit": args.limit, "window": window, "contexts_cut": cuts, "batch_size": args.batch_size}
    used |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
    used |= {"kind": candidate.kind, "seed": args.seed}
    used |= {"revision": args.revision, "model_commit": command.commit_of(candidate.name)}
    used |= {"hardware": provenance.hardware(model.device)}
    used |= {name: version(name) for name in ("lm_eval", "transformers", "torch")}
    rows = scores.tabulate(result, args.by)
    rows = [command.finite(row) | {"model": args.model, "settings": row["settings"] | used} for row in rows]
    scores.show(rows)
    if cuts:
        print(f"{cuts} contexts were longer than the window ({window} tokens) and lost their beginning.")
    home = run_directory(candidate.name)
    directory = Path(args.output_dir) if args.output_dir else home and home / "report"
    print(f"written to {write(rows, result, directory)}" if directory else "not written: --output_dir names a place.")


def main(argv=None):
    """The command; what a user can get wrong is one line and exit status 2."""
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity(50)
    parser = command.build_parser("benchmark.py", __doc__.split("\n")[0], OPTIONS)
    parser.add_argument("model", metavar="MODEL", help="directory, checkpoint or Hub id; random:MODEL: random weights")
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        parser.error(one_line(error))


if __name__ == "__main__":
    main()
