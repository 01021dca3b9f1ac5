"""Publish: a finished set to the Hub as a dataset, with a card made from its manifest; private unless told otherwise.

    python data/prepare.py [prepare.json] [key=value ...] --push_to_hub user/name [--public] [--license ID]
    python data/prepare.py --push_to_hub user/name prepared_dir=DIR      a finished set, as it is

Whoever asks is known by HF_TOKEN or `hf auth login`, and by nothing else.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smolpretrain.core.text import reason

from .pack.manifest import FILE_NAME, Manifest, verify

REMEDIES = {
    402: "the Hub asks for payment ({said}); free some private storage, choose a paid plan, or add --public",
    413: "the Hub takes no commit of this size ({said}); hold out less text (validation_fraction), or prepare the text "
    "as several sets",
}


class NotUploaded(Exception):
    """The set is whole on the disk but not on the Hub; the message says why, and how to go on."""


@dataclass
class Publication:
    """Where a set goes and how: a repository, who may see it, and under which licence (None: not said)."""

    repo_id: str
    public: bool = False
    license: str | None = None

    def __post_init__(self):
        from smolpretrain.hub.connection import Repository  # a third of a second to import, for who publishes

        self.repository = Repository(
            self.repo_id, "dataset", self.public, asked=f"--push_to_hub {self.repo_id}", remedies=REMEDIES
        )


def claim(publication: Publication) -> None:
    """Make sure that the set will be taken, before anything expensive: identity, licence, repository, write right.

    Raises ValueError: one sentence with what to do.
    """
    if publication.license:
        from smolpretrain.hub.connection import check_license

        check_license(f"--license {publication.license}", publication.license)
    there = publication.repository.claim()
    files = {file.rfilename for file in there.siblings or []} - {".gitattributes", "README.md"}
    if files and FILE_NAME not in files:
        raise ValueError(
            f"{publication.repository.asked}: it holds something else ({min(files)}) than a prepared set; give another "
            "name."
        )


def publish(publication: Publication, prepared_dir: str, make: Callable[[], None] | None) -> str:
    """Check first, then make the set (None: it is finished), check every byte of it, push it; returns its address.

    Raises:
        ValueError: The set is damaged, or the Hub will not take it; nothing was made.
        NotUploaded: Made, but not uploaded.
    """
    manifest = None if make else verify(prepared_dir, sha256=True)
    claim(publication)
    if make:
        make()
        manifest = verify(prepared_dir, sha256=True)
    return push(publication, prepared_dir, manifest)


def push(publication: Publication, prepared_dir: str, manifest: Manifest) -> str:
    """Put a set that was found whole on the Hub with its card, as one commit; returns its address.

    What an earlier, interrupted push has uploaded is not uploaded again, and files of an earlier set go.

    Raises NotUploaded where the Hub refuses for good, or does not answer in several tries.
    """
    from huggingface_hub.utils import disable_progress_bars

    from .dataset_card import make_card

    if not sys.stderr.isatty():
        disable_progress_bars()
    name, repository = publication.repo_id, publication.repository
    card = str(make_card(manifest, name, publication.license)).encode("utf-8")
    paths = {path: Path(prepared_dir, path) for path in [*manifest.files, FILE_NAME]} | {"README.md": card}
    try:
        title = f"Prepared set {manifest.fingerprint}"
        repository.commit(paths, title, stale=lambda path: path != ".gitattributes")
    except (ValueError, OSError, RuntimeError) as error:  # the last two are hf-xet's, which has retried by then
        command = f"python data/prepare.py --push_to_hub {name} prepared_dir={prepared_dir}"
        command += " --public" * publication.public
        command += f" --license {publication.license}" if publication.license else ""
        raise NotUploaded(f"{prepared_dir} is whole, but not on the Hub: {reason(error)}. Then: {command}") from error
    return repository.address
