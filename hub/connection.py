"""Talking to the Hub: who is asking, whether they may write, what is worth another try, and what a refusal means.

    repository = Repository("user/name", asked="--repo user/name")
    repository.claim()                                      before anything expensive
    repository.commit({"README.md": b"...", "model.safetensors": path}, "Model")

Whoever asks is known by HF_TOKEN or `hf auth login`, and by nothing else. Every refusal is a ValueError of one
sentence that begins with what the user typed (`asked`) and ends with what to do.
"""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CardData, CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from smolpretrain.core import text

LOGIN = "set HF_TOKEN or run `hf auth login`"
TRIES = 5
LONGEST_WAIT = 300  # seconds: the Hub's rate limits are counted in windows of five minutes
PASSING = (408, 429, 500, 502, 503, 504)
REMEDIES = {  # {status: what it means and what to do}, around what the Hub said
    401: "the Hub does not know the access token ({said}); make a new one that may write and " + LOGIN,
    402: "the Hub asks for payment ({said}); free some private storage, choose a paid plan, or make it public",
    403: "the access token has no write right there ({said}); give it one, or push to a name of your own",
    413: "the Hub takes no commit of this size ({said}); send less",
}


@dataclass
class Repository:
    """A repository that is to be written.

    Attributes:
        asked: How every sentence begins: what the user typed, as in "--push_to_hub user/name".
        say_public: How the user asks for a public one, in the words of the command.
        remedies: What else than REMEDIES a status means here.
        tries: How often a call is made that fails for a passing reason.
        pause: What waits so many seconds between them. Default: time.sleep.
    """

    name: str
    kind: str = "model"  # or dataset, space: what huggingface_hub calls repo_type
    public: bool = False
    asked: str = ""
    say_public: str = "--public"
    remedies: Mapping[int, str] = field(default_factory=dict)
    tries: int = TRIES
    pause: Callable | None = None

    def __post_init__(self):
        self.api, self.asked = HfApi(), self.asked or self.name
        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise ValueError(f"{self.asked}: {error}") from None
        if "/" not in self.name:
            raise ValueError(f"{self.asked} names no owner: write user/{self.name}.")

    @property
    def address(self) -> str:
        return f"{self.api.endpoint}/{'' if self.kind == 'model' else f'{self.kind}s/'}{self.name}"

    def claim(self, **creation):
        """Make sure that it can be written, and make it where it is not there: identity, owner, write right.

        Args:
            creation: More arguments of `create_repo`, as a Space needs them.

        Returns:
            What the Hub says of it: huggingface_hub's ModelInfo, DatasetInfo or SpaceInfo.

        Raises ValueError: one sentence with what to do.
        """
        owner(self.asked, self.name.split("/")[0], remedies=self.remedies, tries=self.tries, pause=self.pause)
        private = not self.public
        self.call(self.api.create_repo, self.name, repo_type=self.kind, private=private, exist_ok=True, **creation)
        nothing = CommitOperationAdd("README.md", b" ")  # never sent: asking how to upload it takes the right to write
        self.call(self.api.preupload_lfs_files, self.name, additions=[nothing], repo_type=self.kind)
        there = self.call(self.api.repo_info, self.name, repo_type=self.kind)
        if bool(there.private) == self.public:
            found = f"private; leave {self.say_public} out" if there.private else f"public; add {self.say_public}"
            raise ValueError(f"{self.asked}: it is there already and {found}, or change its settings.")
        return there

    def commit(self, paths: Mapping[str, Path | bytes], title: str, revision: str = "main", stale=lambda path: False):
        """Put these files there as one commit; what is there already is not sent again, nor committed.

        Not by `upload_folder`: with hf-xet it makes several commits of a large folder (huggingface_hub 2.4), mixed
        states between.

        Args:
            stale: Which of the files that are there and not in `paths` go: a path to a truth value.

        Returns:
            The commit's sha.

        Raises:
            ValueError: The Hub refuses for good, or does not answer in several tries.
            OSError, RuntimeError: hf-xet's, which has retried by then.
        """

        def send():  # operations anew each time: a try leaves its marks on them
            there = self.api.list_repo_files(self.name, repo_type=self.kind, revision=revision)
            gone = sorted(path for path in set(there) - set(paths) if stale(path))
            operations = [CommitOperationAdd(path, source) for path, source in paths.items()]
            operations += [CommitOperationDelete(path) for path in gone]
            return self.api.create_commit(
                self.name, operations, commit_message=title, repo_type=self.kind, revision=revision
            )

        return self.call(send).oid

    def call(self, function: Callable, *args, **options):
        """`persist` with what this repository says of itself."""
        how = {"remedies": self.remedies, "tries": self.tries, "pause": self.pause}
        return persist(functools.partial(function, *args, **options), self.asked, **how)


def persist(function: Callable, asked: str, remedies: Mapping[int, str] = REMEDIES, tries: int = TRIES, pause=None):
    """Call; again, with growing waits, where that may help. A refusal becomes a ValueError with the remedy."""
    for attempt in range(tries):
        try:
            return function()
        except OfflineModeIsEnabled:
            raise ValueError(f"{asked}: HF_HUB_OFFLINE is set; unset it to reach the Hub.") from None
        except (HTTPError, RuntimeError) as error:  # an upload's own error comes inside a RuntimeError
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            if not isinstance(cause, HTTPError):
                raise
            response = cause.response if isinstance(cause, HfHubHTTPError) else None
            status = response.status_code if response is not None else None
            if status is not None and status not in PASSING:
                said = f"{status}: {text.reason(cause.server_message)}" if cause.server_message else str(status)
                meaning = (REMEDIES | dict(remedies)).get(status, "the Hub refuses ({said})").format(said=said)
                raise ValueError(f"{asked}: {meaning}.") from error
            wait = _wait(response, attempt)
            if attempt == tries - 1 or wait > LONGEST_WAIT:
                reason = f"answered {status}" if status else f"could not be reached ({text.reason(cause)})"
                raise ValueError(f"{asked}: the Hub {reason}; try again later.") from error
            (pause or time.sleep)(wait)
    return None


def _wait(response, attempt: int) -> float:
    """Return the seconds until the next try: what Retry-After says, else 1, 2, 4, 8."""
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return int(asked) if asked.isdigit() else min(2**attempt, LONGEST_WAIT)


def owner(asked: str, name: str | None = None, **how) -> str:
    """Return who HF_TOKEN or `hf auth login` makes us, having seen that `name`, if any, is theirs to write to.

    Args:
        how: More arguments of `persist`.

    Raises ValueError: There is no token, or it may only read, or the name is somebody else's.
    """
    try:
        me = persist(HfApi().whoami, asked, **how)
    except LocalTokenNotFoundError:
        raise ValueError(f"{asked}: there is no access token; {LOGIN}.") from None
    owners = [me["name"], *(organisation["name"] for organisation in me.get("orgs", []))]
    if name is not None and name not in owners:
        raise ValueError(f"{asked}: the access token is {me['name']}'s; push to {', '.join(owners)}.")
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"{asked}: the access token may only read; make one that may write and {LOGIN}.")
    return me["name"]


def check_license(asked: str, license: str, **how) -> None:
    """Ask the Hub whether it knows a licence; ValueError where it does not."""
    card = RepoCard(f"---\n{CardData(license=license).to_yaml()}\n---\n")

    def ask():
        try:
            card.validate()
        except ValueError as error:
            return text.reason(error)
        return None

    if refused := persist(ask, asked, **how):
        raise ValueError(f"{asked}: the Hub does not take it ({refused}).")
