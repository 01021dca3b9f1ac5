"""A run's checkpoints as branches of its repository, step{N}-tokens{M}M, from random weights (step 0) on."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from smolpretrain.core import files

from . import folder
from .connection import Repository

MANIFEST = "manifest.json"  # of a checkpoint: without it, it does not count
UNSENT = "unsent"  # in a run's directory: models of checkpoints that wait for the Hub, one directory a branch
BRANCH = re.compile(r"step(\d+)-tokens(\d+)M")


@dataclass(frozen=True)
class Source:
    """Where a branch's model comes from: a directory with its weights, or at step 0 the seed that they are drawn from.

    `origin` changes with whatever would make another branch of it.
    """

    directory: Path
    step: int
    tokens: int
    origin: str
    seed: int | None = None

    @property
    def branch(self) -> str:
        return name_of(self.step, self.tokens)

    @property
    def waits(self) -> bool:
        return self.directory.parent.name == UNSENT


def name_of(step: int, tokens: int) -> str:
    """As Pythia's and OLMo's: step1000-tokens2097M."""
    return f"step{step}-tokens{round(tokens / 1e6)}M"


def read_manifest(directory: Path) -> dict | None:
    path = directory / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def find(run_dir: Path, run: dict, unsent_only: bool) -> Iterator[Source]:
    """Yield what can be a branch, by step: what waits in UNSENT, then the whole checkpoints, and step 0."""
    places = [path for path in (run_dir / UNSENT).glob("*") if BRANCH.fullmatch(path.name)]
    if not unsent_only:
        places += [path for path in run_dir.glob("checkpoint-*") if (path / MANIFEST).is_file()]
    found, zero_stage = {}, None
    for place in places:
        if manifest := read_manifest(place):
            zero_stage = manifest["same"].get("zero stage")
            weights = {name: entry for name, entry in manifest["files"].items() if folder.MODEL.fullmatch(name)}
            source = Source(place, manifest["step"], manifest["tokens_seen"], _digest(weights))
            found.setdefault(source.branch, source)
    seed = (run.get("arguments") or {}).get("seed")
    begun = run_dir / UNSENT / name_of(0, 0)
    if begun.is_dir() or not unsent_only:
        if refused := why_no_step_0(run, zero_stage):
            print(f"no branch of step 0: {refused}.")
        else:
            place = begun if begun.is_dir() else run_dir
            versions = {name: run["versions"][name] for name in ("torch", "transformers")}
            found[name_of(0, 0)] = Source(place, 0, 0, _digest([seed, versions]), seed)
    yield from sorted(found.values(), key=lambda source: source.step)


def why_no_step_0(run: dict, zero_stage: int | None) -> str | None:
    """Why the weights before the first step cannot be drawn again from the record of a run; None where they can."""
    arguments = run.get("arguments") or {}
    if arguments.get("init_from"):
        return f"the run began from {arguments['init_from']}, not from random weights"
    if zero_stage == 3:
        return "ZeRO-3 draws the weights split over its ranks"
    for name in ("torch", "transformers"):
        if (then := (run.get("versions") or {}).get(name)) != (now := version(name)):
            return f"its weights were drawn by {name} {then}, here is {now}, and another version may draw others"
    return None


def build(source: Source, target: Path, repo_id: str, license: str, dtype: torch.dtype | None, run: dict) -> None:
    """Build the folder of a branch in `target`, which must not exist.

    Args:
        dtype: None: what the run exports.

    Raises:
        ValueError: A file of the checkpoint is not what its manifest says.
    """
    for name, entry in (read_manifest(source.directory) or {"files": {}})["files"].items():
        path = source.directory / name
        if folder.MODEL.fullmatch(name):
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise ValueError(f"{path} is damaged: it is not what its {MANIFEST} says.")
    if dtype is None and (run.get("arguments") or {}).get("bf16"):
        dtype = torch.bfloat16
    folder.write_model(source.directory, target, dtype, source.seed)
    folder.write_card(target, card(source, repo_id, license))


def card(source: Source, repo_id: str, license: str) -> str:
    """A branch's README.md: what it is and where the card is; the run's results are not this checkpoint's."""
    what = f"random weights, drawn with seed {source.seed}" if source.step == 0 else "an unfinished model"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: {license}
tags:
- pre-training
- smolpretrain
---

# Step {source.step:,} of {repo_id}

A checkpoint of a pre-training run after {source.step:,} steps and {source.tokens:,} tokens: {what}, here for those who
study how a model learns. The card on `main` says what it is trained on, how, and how good it is in the end.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}", revision="{source.branch}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}", revision="{source.branch}")
```
"""


def send(source: Source, target: Path, repository: Repository, license: str, dtype, run: dict, run_dir: Path) -> bool:
    """Put a branch on the Hub as one commit, unless that commit stands there; returns whether it had to be sent.

    Raises as Repository.commit, and ValueError for what may not be published.
    """
    api, name = repository.api, repository.name
    title = f"Step {source.step}, {source.tokens} tokens, of {_digest([source.origin, str(dtype), license])}"
    heads = {ref.name: ref.target_commit for ref in repository.call(api.list_repo_refs, name).branches}
    stands = source.branch in heads and repository.call(api.list_repo_commits, name, revision=source.branch)[0]
    if not stands or stands.title != title:
        build(source, target, name, license, dtype, run)
        folder.check(target, license, run_dir)
        if not stands:  # from the first commit, which has no file: a branch never shows main's model as its own
            first = repository.call(api.list_repo_commits, name)[-1].commit_id
            repository.call(api.create_branch, name, branch=source.branch, revision=first, exist_ok=True)
        paths = {path: target / path for path in folder.files(target)}
        repository.commit(paths, title, revision=source.branch, stale=folder.ALLOWED.fullmatch)
        shutil.rmtree(target)
    if source.waits:
        shutil.rmtree(source.directory)
    return not stands or stands.title != title


def tags(repository: Repository) -> dict[str, str]:
    """{tag: commit}; for an annotated tag the Hub gives the commit too."""
    found = repository.call(repository.api.list_repo_refs, repository.name).tags
    return {ref.name: ref.target_commit for ref in found}


def _digest(value) -> str:
    return files.digest(value)[:12]
