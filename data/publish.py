"""Publish: a finished set to the Hub as a dataset, with a card made from its manifest; private unless told otherwise.

    python data/prepare.py [prepare.json] [key=value ...] --push_to_hub user/name [--public] [--license ID]
    python data/prepare.py --push_to_hub user/name prepared_dir=DIR      a finished set, as it is

Whoever asks is known by HF_TOKEN or `hf auth login`, and by nothing else.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, DatasetCardData, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from .dataset_card import make_card
from .manifest import FILE_NAME, Manifest, verify

LOGIN = "set HF_TOKEN or run `hf auth login`"
TRIES = 5
LONGEST_WAIT = 300  # seconds: the Hub's rate limits are counted in windows of five minutes
PASSING = (408, 429, 500, 502, 503, 504)


class NotUploaded(Exception):
    """The set is whole on the disk but not on the Hub; the message says why, and how to go on."""


@dataclass
class Publication:
    """Where a set goes and how: a repository, who may see it, and under which licence (None: not said)."""

    repo_id: str
    public: bool = False
    license: str | None = None

    def __post_init__(self):
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ValueError(f"--push_to_hub {self.repo_id}: {error}") from None
        if "/" not in self.repo_id:
            raise ValueError(f"--push_to_hub {self.repo_id} names no owner: write user/{self.repo_id}.")


def take_flags(argv: list[str]) -> tuple[list[str], Publication | None]:
    """Part a command line: what is left of it, and what --push_to_hub, --public and --license ask for, if anything."""
    rest, given, words = [], {}, iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word == "--public":
            given["public"] = True
        elif word.startswith("--") and name in ("push_to_hub", "license"):
            given[name] = value if equals else next(words, "")
            if not given[name] or given[name].startswith("-"):
                raise ValueError(f"--{name} needs a value, as in: --push_to_hub user/name --license apache-2.0")
        else:
            rest.append(word)
    if given and "push_to_hub" not in given:
        raise ValueError(f"--{next(iter(given))} says how a set is published: give --push_to_hub user/name too.")
    return rest, Publication(given.pop("push_to_hub"), **given) if given else None


def claim(publication: Publication) -> None:
    """Make sure that the set will be taken, before anything expensive: identity, licence, repository, write right.

    Raises ValueError: one sentence with what to do.
    """
    api, name = HfApi(), publication.repo_id
    if publication.license:
        card = DatasetCard(f"---\n{DatasetCardData(license=publication.license).to_yaml()}\n---\n")
        try:
            persist(card.validate, name)
        except ValueError as error:
            reason = f"the Hub does not take it ({_one_line(error)})"
            raise ValueError(f"--license {publication.license}: {reason}.") from error
    try:
        me = persist(api.whoami, name)
    except LocalTokenNotFoundError:
        raise ValueError(f"--push_to_hub {name}: there is no access token; {LOGIN}.") from None
    owners = [me["name"], *(owner["name"] for owner in me.get("orgs", []))]
    if name.split("/")[0] not in owners:
        raise ValueError(f"--push_to_hub {name}: the access token is {me['name']}'s; push to {', '.join(owners)}.")
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"--push_to_hub {name}: the access token may only read; make one that may write and {LOGIN}.")
    persist(api.create_repo, name, name, repo_type="dataset", private=not publication.public, exist_ok=True)
    nothing = CommitOperationAdd("README.md", b" ")  # never sent: asking how to upload it takes the right to write
    persist(api.preupload_lfs_files, name, name, additions=[nothing], repo_type="dataset")
    there = persist(api.dataset_info, name, name)
    if bool(there.private) == publication.public:
        found, remedy = ("private", "leave --public out") if there.private else ("public", "add --public")
        raise ValueError(f"--push_to_hub {name}: it is there already and {found}; {remedy}, or change its settings.")
    files = {file.rfilename for file in there.siblings or []} - {".gitattributes", "README.md"}
    if files and FILE_NAME not in files:
        raise ValueError(
            f"--push_to_hub {name}: it holds something else ({min(files)}) than a prepared set; give another name."
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

    What an earlier, interrupted push has uploaded is not uploaded again, and files of an earlier set go. Not by
    `upload_folder`: with hf-xet it makes several commits of a large folder (huggingface_hub 2.4), mixed states between.

    Raises NotUploaded where the Hub refuses for good, or does not answer in several tries.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    api, name = HfApi(), publication.repo_id
    card = str(make_card(manifest, name, publication.license)).encode("utf-8")
    paths = {path: Path(prepared_dir, path) for path in [*manifest.files, FILE_NAME]} | {"README.md": card}

    def commit():  # operations anew each time: a try leaves its marks on them
        there = set(api.list_repo_files(name, repo_type="dataset")) - {".gitattributes"}
        operations = [CommitOperationAdd(path, source) for path, source in paths.items()]
        operations += [CommitOperationDelete(path) for path in sorted(there - set(paths))]
        title = f"Prepared set {manifest.fingerprint}"
        return api.create_commit(name, operations, commit_message=title, repo_type="dataset")

    try:
        persist(commit, name)
    except (ValueError, OSError, RuntimeError) as error:  # the last two are hf-xet's, which has retried by then
        command = f"python data/prepare.py --push_to_hub {name} prepared_dir={prepared_dir}"
        command += " --public" * publication.public
        command += f" --license {publication.license}" if publication.license else ""
        raise NotUploaded(
            f"{prepared_dir} is whole, but not on the Hub: {_one_line(error)}. Then: {command}"
        ) from error
    return f"{api.endpoint}/datasets/{name}"


def persist(call: Callable, name: str, *args, **options):
    """Call; again, with growing waits, where that may help. A refusal becomes a ValueError with the remedy."""
    for attempt in range(TRIES):
        try:
            return call(*args, **options)
        except (HTTPError, RuntimeError) as error:  # an upload's own error comes inside a RuntimeError
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            if not isinstance(cause, HTTPError):
                raise
            response = cause.response if isinstance(cause, HfHubHTTPError) else None
            status = response.status_code if response is not None else None
            if status is not None and status not in PASSING:
                raise ValueError(f"--push_to_hub {name}: {_refusal(status, cause)}") from error
            wait = _wait(response, attempt)
            if attempt == TRIES - 1 or wait > LONGEST_WAIT:
                reason = f"answered {status}" if status else f"could not be reached ({_one_line(cause)})"
                raise ValueError(f"--push_to_hub {name}: the Hub {reason}; try again later.") from error
            time.sleep(wait)
    return None


def _wait(response, attempt: int) -> float:
    """Return the seconds until the next try: what Retry-After says, else 1, 2, 4, 8."""
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return int(asked) if asked.isdigit() else 2**attempt


def _refusal(status: int, error: HfHubHTTPError) -> str:
    """Say what a permanent refusal means and what to do."""
    said = f"{status}: {_one_line(error.server_message)}" if error.server_message else str(status)
    remedies = {
        401: f"the Hub does not know the access token ({said}); make a new one that may write and {LOGIN}.",
        402: f"the Hub asks for payment ({said}); free some private storage, choose a paid plan, or add --public.",
        403: f"the access token has no write right there ({said}); give it one, or push to a name of your own.",
        413: f"the Hub takes no commit of this size ({said}); hold out less text (validation_fraction), or prepare "
        "the text as several sets.",
    }
    return remedies.get(status, f"the Hub refuses ({said}).")


def _one_line(error) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300]
