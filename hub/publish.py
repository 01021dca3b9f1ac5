"""Publish a run: its model, card, record and pictures as one commit of a model repository; private unless --public.

    python hub/publish.py RUN_DIR --repo user/name --license ID [--public] [--checkpoints] [--tag v1] [--dry_run]

Before anything is sent the folder is built in RUN_DIR/publish, loaded as a reader loads it, and must give the run's own
held-out bits per byte again. Status 2: something to mend, nothing was sent; 6: saved, not (all) uploaded.
"""

import argparse
import contextlib
import fcntl
import fileinput
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "in_place.py"))

import huggingface_hub
import torch
import transformers
from huggingface_hub.utils import disable_progress_bars

from smolpretrain.core import status
from smolpretrain.core.options import Parser
from smolpretrain.core.text import one_line, reason
from smolpretrain.hub import branches, card, folder
from smolpretrain.hub.connection import Repository, check_license

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = 0.005  # of the bits per byte: bf16 on a GPU and fp32 on a CPU differ by a tenth of it
REMEDIES = {
    402: "the Hub asks for payment ({said}); free some private storage, choose a paid plan, or add --public",
    413: "the Hub takes no commit of this size ({said}); send fewer bytes (--bf16)",
}


def build(run_dir: Path, target: Path, repo_id: str, license: str, dtype: torch.dtype | None, own_card=None) -> None:
    """Build the folder of the finished model in `target`, which must not exist.

    Args:
        own_card: A file that is the card, instead of the one made from the run's record.

    Raises:
        ValueError: The run has no finished model, or no record.
    """
    if not folder.has_weights(run_dir):
        raise ValueError(f"{run_dir} has no model*.safetensors: the run is not finished, or it is no run's output_dir.")
    text = Path(own_card).read_text(encoding="utf-8") if own_card else card.make_card(run_dir, repo_id, license)
    folder.write_model(run_dir, target, dtype)
    folder.write_card(target, text, run_dir)


def reproduce(run_dir: Path, target: Path, run: dict) -> str:
    """Score the folder on the run's held-out documents as the run did; returns the sentence that compares them.

    Raises:
        ValueError: The documents are not there, or the figure is another one.
    """
    result = run.get("result") or {}
    if "bits_per_byte" not in result:
        return "no score to reproduce: run.json holds no held-out bits per byte."
    arguments = (run.get("arguments") or {}) | (run.get("decided") or {})
    used = result["held_out"]
    asked, scored = arguments.get("prepared_dir"), []
    sets = (
        {asked or str(run_dir / "prepared"): run["data"]["fingerprint"]}
        if not isinstance(asked, list)
        else {
            one["prepared_dir"]: held["fingerprint"]
            for one, held in zip(asked, run["data"]["source"]["blend"], strict=True)
        }
    )
    for prepared, fingerprint in sets.items():
        path = Path(prepared, "manifest.json")
        manifest = json.loads(path.read_text()) if path.is_file() else {}
        if manifest.get("fingerprint") != fingerprint:
            raise ValueError(
                f"{prepared} does not hold the set that {run_dir} was trained on, so its held-out score cannot be "
                "reproduced: put it back, or give --unscored."
            )
        scored += scored_documents(Path(prepared), manifest, arguments["max_eval_documents"])
    with tempfile.TemporaryDirectory() as scratch:
        documents, scores = Path(scratch, "held_out.jsonl"), Path(scratch, "scores.json")
        documents.write_bytes(b"".join(scored))
        settings = [f"--{name}={used[name]}" for name in ("window", "stride", "prefix")]
        judge = Path(__file__).resolve().parents[1] / "eval" / "perplexity.py"
        command = [sys.executable, judge, f"--model={target}", f"--data_files={documents}", *settings]
        done = subprocess.run([*command, f"--output={scores}"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{target} cannot be scored: {reason(done.stderr[-300:])}.")
        found = json.loads(scores.read_text(encoding="utf-8"))
    figure, expected = found["bits_per_byte"], result["bits_per_byte"]
    said = f"held-out bits per byte {figure:.4f}, the run's {expected:.4f}, over {found['documents']} documents"
    if abs(figure - expected) > TOLERANCE * expected or found["documents"] != used["documents"]:
        raise ValueError(f"{target} is not the model that the run scored: {said}.")
    return f"{said}, window {used['window']}."


def scored_documents(prepared: Path, manifest: dict, most: int) -> Iterator[bytes]:
    """Yield the lines of the held-out documents that the run scored: of each set at most so many, evenly spaced."""
    sets = {}
    for name in manifest["validation_documents"]:
        sets.setdefault(name.rsplit("-", 2)[0].replace("_documents", "", 1), []).append(prepared / name)
    for split, files in sets.items():
        with fileinput.input(files, mode="rb") as lines:
            yield from islice(lines, 0, None, -(-manifest["splits"][split]["documents"] // most))


def show(target: Path) -> None:
    """List a folder's files and sizes."""
    sizes = folder.files(target)
    for name, size in sizes.items():
        print(f"  {size:>14,}  {name}")
    print(f"  {sum(sizes.values()):>14,}  bytes in {len(sizes)} files, one commit")


def claim(repository: Repository, tag: str | None) -> None:
    """Make sure that the repository can be written and holds nothing of others; ValueError where not."""
    there = repository.claim()
    names = {file.rfilename for file in there.siblings or []}
    if "run.json" not in names and (other := sorted(filter(folder.MODEL.fullmatch, names))):
        raise ValueError(f"{repository.asked}: it holds another model ({other[0]}) already; give another name.")
    check_tag(repository, tag, there.sha)


def check_tag(repository: Repository, tag: str | None, commit: str) -> None:
    """ValueError where a tag is there already, at another commit: a release does not move."""
    if tag and branches.tags(repository).get(tag, commit) != commit:
        raise ValueError(f"--tag {tag}: {repository.name} has it already, at another commit; give another.")


def read_run(run_dir: Path) -> dict:
    """run.json of a run; ValueError where there is none."""
    path = run_dir / "run.json"
    if not path.is_file():
        raise ValueError(f"{run_dir} has no run.json: give the output_dir of a run.")
    return json.loads(path.read_text(encoding="utf-8"))


def prepare(args, repository: Repository, run: dict, target: Path) -> None:
    """Everything before the first byte is sent: identity, then the folder of the finished model, built and checked.

    Raises ValueError: Something to mend.
    """
    run_dir = Path(args.run_dir)
    if not args.dry_run:
        check_license(f"--license {args.license}", args.license)
        claim(repository, args.tag)
    clear(target)
    if args.unsent:
        return
    build(run_dir, target / "main", repository.name, args.license, DTYPES.get(args.dtype), args.card)
    for sentence in folder.check(target / "main", args.license, run_dir):
        print(sentence)
    print(reproduce(run_dir, target / "main", run) if not args.unscored else "its score was not reproduced.")
    print(f"{target / 'main'}:")
    show(target / "main")


def clear(target: Path) -> None:
    """Remove what an earlier publish left in its own directory; ValueError where something else is there."""
    for name in folder.files(target):
        if not folder.ALLOWED.fullmatch(name.partition("/")[2]):
            raise ValueError(f"{target / name} is not of this command: give another --output_dir.")
    shutil.rmtree(target, ignore_errors=True)


def rehearse(args, repository: Repository, run: dict, target: Path) -> None:
    """Build and check the branches too, and send nothing. Raises ValueError."""
    for source in branches.find(Path(args.run_dir), run, unsent_only=False) if args.checkpoints else []:
        branches.build(source, target / source.branch, repository.name, args.license, DTYPES.get(args.dtype), run)
        folder.check(target / source.branch, args.license, args.run_dir)
        print(f"{target / source.branch}, a branch:")
        show(target / source.branch)
    print(f"dry run: nothing was sent to {repository.name}.")


def send(args, repository: Repository, run: dict, target: Path) -> None:
    """The finished model to main, its tag, then the branches.

    Raises ValueError, OSError or RuntimeError: Not all of it is on the Hub.
    """
    if not args.unsent:
        before = repository.call(repository.api.repo_info, repository.name).sha
        paths = {path: target / "main" / path for path in folder.files(target / "main")}
        title = f"{run.get('result', {}).get('tokens_seen', 0):,} tokens"
        commit = repository.commit(paths, title, stale=folder.ALLOWED.fullmatch)
        print(f"{'there already' if commit == before else 'sent'}: main, commit {commit[:12]}", flush=True)
        if args.tag:
            check_tag(repository, args.tag, commit)
            repository.call(repository.api.create_tag, repository.name, tag=args.tag, revision=commit, exist_ok=True)
    if args.unsent or args.checkpoints:
        for source in branches.find(Path(args.run_dir), run, unsent_only=args.unsent):
            how = (args.license, DTYPES.get(args.dtype), run, args.run_dir)
            was_sent = branches.send(source, target / source.branch, repository, *how)
            print(f"{'sent' if was_sent else 'there already'}: {source.branch}", flush=True)


def parse(argv) -> argparse.Namespace:
    parser = Parser("publish.py", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of run_pretrain.py")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="the model repository")
    parser.add_argument(
        "--license", required=True, metavar="ID", help="as the Hub names it: apache-2.0, mit, odc-by ..."
    )
    parser.add_argument("--card", metavar="README.md", help="your own card; default: made from the run's record")
    parser.add_argument("--public", action="store_true", help="anybody may see it; default: you alone")
    parser.add_argument("--checkpoints", action="store_true", help="each checkpoint a branch, step 0 among them")
    parser.add_argument("--tag", help="name the commit of the release, as in v1")
    parser.add_argument("--dry_run", action="store_true", help="build, check and list the folder, send nothing")
    parser.add_argument("--output_dir", help="where the folder is built; default RUN_DIR/publish")
    parser.add_argument("--unscored", action="store_true", help="do not score the held-out documents again")
    parser.add_argument("--unsent", action="store_true", help=argparse.SUPPRESS)  # what waits alone, as a run asks it
    dtype = parser.add_mutually_exclusive_group()
    dtype.add_argument("--bf16", dest="dtype", action="store_const", const="bf16", help="round the weights to bfloat16")
    dtype.add_argument(
        "--fp32", dest="dtype", action="store_const", const="fp32", help="widen them: no digit is gained"
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Exit status 2 and one line for what the user can mend, 6 where the Hub has not got all of it."""
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()  # it warns of a commit that changes nothing
    transformers.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    target, repository = Path(args.output_dir or Path(args.run_dir, "publish")), None
    try:
        repository = Repository(args.repo, public=args.public, asked=f"--repo {args.repo}", remedies=REMEDIES)
        run = read_run(Path(args.run_dir))
        with alone(args.run_dir):
            prepare(args, repository, run, target)
            if args.dry_run:
                rehearse(args, repository, run, target)
                return
            try:
                send(args, repository, run, target)
            except (ValueError, OSError, RuntimeError) as error:  # the last two are hf-xet's
                words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--unsent"]
                command = shlex.join(["python", "hub/publish.py", *map(str, words)])
                refuse(f"{args.run_dir} is saved, NOT uploaded: {reason(error)}; then: {command}", status.NOT_UPLOADED)
            finally:
                shutil.rmtree(target, ignore_errors=True)
    except (ValueError, OSError) as error:
        refuse(error, status.BAD_INPUT)
    print(f"published: {repository.address}")


def refuse(error, code: int) -> None:
    Parser("publish.py").exit(code, f"publish.py: error: {one_line(error)}\n")


@contextlib.contextmanager
def alone(run_dir):
    """Wait until no other publish of this run is at work; the kernel lets go when a process dies."""
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
