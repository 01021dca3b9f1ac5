"""The model card of a run, made from the run's own record: README.md with the metadata that the Hub reads.

    python hub/card.py RUN_DIR --license ID [--repo user/name] [--language en ...] [--base_model user/name]

Reads run.json, metrics.jsonl, samples.jsonl, config.json, prepared/manifest.json, and in RUN_DIR/report what
eval/report.py, eval/compare.py and eval/benchmark.py wrote; what is missing is said. Writes RUN_DIR/README.md.
"""

import re
import runpy
import sys
from pathlib import Path

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "in_place.py"))

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from smolpretrain.core.options import Parser
from smolpretrain.core.text import one_line
from smolpretrain.hub import card_evaluation, card_sections
from smolpretrain.hub.run_record import read_run


def make_card(run_dir, repo_id, license, **more):
    """Describe a run.

    Args:
        run_dir: Output directory of run_pretrain.py.
        repo_id: user/name on the Hub; None: the card speaks of its own directory.
        license: As the Hub names it. The Hub itself knows all names: publishing asks it.
        more: Further fields of ModelCardData: language, license_name, license_link, base_model, ...

    Returns:
        Text of README.md, metadata first.

    Raises:
        ValueError: No licence, a name that cannot be one, a base_model of random weights, or no record of a run.
    """
    check(repo_id, license)
    try:
        return _make(run_dir, repo_id, license, more)
    except (KeyError, TypeError, AttributeError) as error:
        said = f"its record is not as a run writes it ({type(error).__name__}: {error})."
        raise ValueError(f"{run_dir}: {said}") from error


def _make(run_dir, repo_id, license, more):
    run = read_run(run_dir, repo_id)
    began = run.arguments.get("init_from")
    if more.get("base_model") and not began and not more.get("base_model_relation"):
        raise ValueError(f"base_model {more['base_model']}: this run began from random weights (init_from is not set).")
    source = (run.record.get("data") or {}).get("source")
    results = card_evaluation.eval_results(run)
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": license,
        "datasets": sorted(set(hub_datasets(source))) or None,
        "tags": ["pre-training", *([] if began else ["from-scratch"]), "smolpretrain"],
        "model_name": run.name if results else None,
        "eval_results": results or None,
    }
    front = ModelCardData(**metadata | more).to_yaml()
    parts = [
        card_sections.summary(run),
        card_sections.quick_start(run, repo_id),
        card_sections.model(run),
        card_sections.data(run),
        card_sections.hyper_parameters(run),
        card_sections.curves(run),
        card_evaluation.evaluation(run),
        card_sections.samples(run),
        card_sections.intended_use(run),
        card_sections.provenance(run),
        card_sections.energy(run),
        card_sections.citation(run, repo_id),
    ]
    return str(ModelCard(f"---\n{front}\n---\n\n" + "\n\n".join(parts) + "\n"))


def check(repo_id, license):
    """ValueError where the licence is missing or no name, or the repository's name is none."""
    if not license:
        raise ValueError("license: asked for, never guessed; name yours as the Hub does: apache-2.0, mit, odc-by ...")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(f"license {license!r} is no name of the Hub's: they look like apache-2.0, cc-by-4.0, other.")
    if repo_id is None:
        return
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo {repo_id}: {error}") from None


def hub_datasets(source):
    """Yield the Hub datasets that a source, or any of a mixture's, names: never files or directories."""
    if isinstance(source, dict) and "dataset_commit" in source:
        yield source["dataset_name"]
    for value in source.values() if isinstance(source, dict) else source if isinstance(source, list) else ():
        yield from hub_datasets(value)


def main(argv=None):
    """The command; what a user can get wrong is one line and exit status 2."""
    parser = Parser("card.py", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of run_pretrain.py")
    parser.add_argument("--license", required=True, metavar="ID", help="as the Hub names it: apache-2.0, odc-by, ...")
    parser.add_argument("--repo", metavar="USER/NAME", help="where the model will be on the Hub")
    parser.add_argument("--language", nargs="+", metavar="CODE", help="of the training text: en, de, code, ...")
    parser.add_argument("--base_model", metavar="USER/NAME", help="on the Hub, if init_from named its weights")
    args = parser.parse_args(argv)
    more = {name: value for name in ("language", "base_model") if (value := getattr(args, name))}
    try:
        text = make_card(args.run_dir, args.repo, args.license, **more)
        Path(args.run_dir, "README.md").write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.error(one_line(error))
    print(f"wrote {Path(args.run_dir, 'README.md')}")


if __name__ == "__main__":
    main()
