"""A Hub on loopback: models, datasets and Spaces in memory behind the real protocol; it can fail on command.

    with LoopbackHub() as hub:
        hub.add("dataset", "user/name", {"data/train.jsonl": b"..."})
        hub.fail("POST", r"/commit/", status=503, times=2, Retry_After=1)
        launch("python", ..., **hub.environment(tmp_path / "home"))

It serves what huggingface_hub 2.4, datasets 5.2 and transformers 5.23 ask of huggingface.co (uploads by LFS, without
Xet). The clients are real, in processes of their own: they read HF_ENDPOINT when they are imported.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "odc-by", "other"}  # some of those that the Hub takes
TIME = "2026-01-01T00:00:00.000Z"


class Refusal(Exception):
    """Status, X-Error-Code, sentence."""


@dataclass
class Repo:
    """`commits` from sha to {path: content}; `refs` from branch or tag to sha; `log` of (sha, title).

    `tags` are the names among `refs` that do not move; `parents` leads from a sha to the one before it.
    Of a Space also `asked`, the request that made it, and its `variables`.
    """

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    parents: dict[str, str | None] = field(default_factory=dict)
    asked: dict = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], title: str, branch: str = "main") -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{title}{sorted(files)}".encode()).hexdigest()
        self.parents[sha] = self.refs.get(branch)
        self.commits[sha], self.refs[branch] = dict(files), sha
        self.log.append((sha, title))
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)]


@dataclass
class Fault:
    """What the next `times` matching requests get: a status, or None for no answer; `after`: once carried out."""

    method: str
    path: str
    times: int
    status: int | None
    after: bool
    headers: dict[str, str]


class LoopbackHub:
    """Attributes: endpoint; repos[kind, id]; tokens to (user, role); objects by sha256; requests as (method, path)."""

    def __init__(self):
        self.repos, self.objects, self.faults, self.requests = {}, {}, [], []
        self.pro = False  # whether the user pays; who does not gets no live Space but on ZeroGPU
        self.tokens = {f"hf_loopback_{role}": ("user", role) for role in ("read", "fineGrained")}  # these may not write
        self.tokens["hf_loopback"] = ("user", "write")
        self.lock = threading.RLock()

    def __enter__(self) -> "LoopbackHub":
        server = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 128})  # 5 would make a crowd wait
        self._server = server(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home, token: str = "hf_loopback") -> dict[str, str]:
        """Return what a process needs to talk to this Hub and to keep what it downloads in `home`."""
        values = {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return values | {"HF_HOME": str(home), "HF_TOKEN": token}

    def add(self, kind: str, name: str, files: dict[str, bytes], private: bool = False) -> str:
        """Put a commit of these files there; returns its sha."""
        return self.repos.setdefault((kind, name), Repo(private)).commit(files, "added by the test")

    def fail(self, method, path, status=None, times=1, after=False, **headers) -> None:
        headers = {name.replace("_", "-"): str(value) for name, value in headers.items()}
        self.faults.append(Fault(method, path, times, status, after, headers))

    def count(self, method: str, path: str) -> int:
        return sum(how == method and re.search(path, at) is not None for how, at in list(self.requests))

    def downloads(self, name: str) -> Counter:
        """Return how often each file of a repository was asked for, whole or in part."""
        pattern = re.compile(rf"/{re.escape(name)}/resolve/[^/]+/(.+)")
        return Counter(m[1] for how, at in list(self.requests) if how == "GET" and (m := pattern.search(at)))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args) -> None:
        """Say nothing."""

    def answer(self) -> None:
        split = urlsplit(self.path)
        self.at, self.query = unquote(split.path), parse_qs(split.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append((self.command, self.at))
            matching = [
                f for f in self.hub.faults if f.times and f.method == self.command and re.search(f.path, self.at)
            ]
            fault = matching[0] if matching else None
            if fault:
                fault.times -= 1
            reply = self.carry_out() if fault is None or fault.after else None
        if fault is None:
            self.reply(*reply)
        elif fault.status is None:
            self.close_connection = True
        else:
            self.reply(fault.status, {"error": "failing on command"}, fault.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def carry_out(self) -> tuple:
        try:
            for method, pattern, serve in ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, self.at)):
                    reply = serve(self, **match.groupdict())
                    return (*reply, {}) if len(reply) == 2 else reply
            raise Refusal(404, "", f"no such endpoint: {self.command} {self.at}")
        except Refusal as refusal:
            status, code, sentence = refusal.args
            return status, {"error": sentence}, {"X-Error-Code": code, "X-Error-Message": sentence}

    def reply(self, status: int, value, headers: dict) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def user(self) -> tuple[str | None, str]:
        """Return who the token says is asking, and what they may."""
        header = self.headers.get("Authorization")
        if header and header.removeprefix("Bearer ") not in self.hub.tokens:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens[header.removeprefix("Bearer ")] if header else (None, "read")

    def repo(self, kind: str | None, id: str, write: bool = False) -> Repo:
        """Return a repository that the asker may see, and change."""
        (user, role), repo = self.user(), self.hub.repos.get((kind or "model", id))
        owns = user == id.split("/")[0]
        if repo is None or (repo.private and not owns):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (owns and role == "write"):
            raise Refusal(403, "", f"You have no write right on {id}.")
        return repo

    def snapshot(self, kind: str | None, id: str, rev: str, write: bool = False) -> tuple[Repo, str, dict]:
        repo = self.repo(kind, id, write)
        if (sha := repo.refs.get(rev, rev)) not in repo.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return repo, sha, repo.commits[sha]

    def whoami(self):
        user, role = self.user()
        if user is None:
            raise Refusal(401, "", "Invalid username or password.")
        me = {"type": "user", "name": user, "isPro": self.hub.pro, "orgs": []}
        return 200, me | {"auth": {"accessToken": {"role": role}}}

    def create(self):
        asked, (user, role) = json.loads(self.body), self.user()
        kind, id = asked.get("type", "model"), f"{asked.get('organization') or user}/{asked['name']}"
        if role != "write" or not id.startswith(f"{user}/"):
            raise Refusal(403, "", f"You have no right to create {id}.")
        made = {"url": f"{self.hub.endpoint}/{'' if kind == 'model' else f'{kind}s/'}{id}"}
        if (kind, id) in self.hub.repos:
            return 409, made | {"error": "You already created this repo"}
        if kind == "space" and asked["sdk"] != "static" and asked.get("hardware") != "zero-a10g" and not self.hub.pro:
            raise Refusal(402, "", "Subscribe to PRO to create a Space on this hardware")
        self.hub.repos[kind, id] = repo = Repo(asked.get("visibility") == "private", asked=asked)
        repo.commit({".gitattributes": b""}, "initial commit")
        return 200, made

    def validate_yaml(self):
        try:
            front = yaml.safe_load(json.loads(self.body)["content"].split("---\n")[1])
            wrong = [] if front.get("license", "other") in LICENSES else ['"license" must be one of ...']
        except (IndexError, AttributeError, yaml.YAMLError) as error:
            wrong = [str(error)]
        return 400 if wrong else 200, {"errors": [{"message": message} for message in wrong], "warnings": []}

    def info(self, kind, id, rev="main"):
        repo, sha, files = self.snapshot(kind, id, rev)
        found = {"_id": id, "id": id, "sha": sha, "private": repo.private, "gated": False, "tags": []}
        found |= {"siblings": [{"rfilename": path} for path in files], "lastModified": TIME, "createdAt": TIME}
        card = re.match(r"---\n(.*?)\n---\n", files.get("README.md", b"").decode(), re.DOTALL)
        return 200, found | {"downloads": 0, "likes": 0, "cardData": yaml.safe_load(card[1]) if card else None}

    def tree(self, kind, id, rev, below=None):
        _, sha, files = self.snapshot(kind, id, rev)
        top = f"{below}/" if below else ""
        found = {path: entry(path, content) for path, content in files.items() if path.startswith(top)}
        if not found and top:
            raise Refusal(404, "EntryNotFound", f"{below} does not exist")
        for path in list(found):
            parts = path[len(top) :].split("/")
            folders = [top + "/".join(parts[:depth]) for depth in range(1, len(parts))]
            found |= {folder: {"type": "directory", "path": folder, "oid": sha} for folder in folders}
        deep = self.query.get("recursive", [""])[0].lower() in ("true", "1")
        return 200, [item for path, item in sorted(found.items()) if deep or "/" not in path[len(top) :]]

    def paths_info(self, kind, id, rev):
        _, sha, files = self.snapshot(kind, id, rev)
        asked = parse_qs(self.body.decode()).get("paths", [])
        folders = [path for path in asked if any(name.startswith(f"{path}/") for name in files)]
        found = [entry(path, files[path]) for path in asked if path in files]
        return 200, found + [{"type": "directory", "path": path, "oid": sha} for path in folders]

    def preupload(self, kind, id, rev):
        _, _, files = self.snapshot(kind, id, rev, write=True)
        asked = {file["path"]: is_binary(base64.b64decode(file["sample"])) for file in json.loads(self.body)["files"]}
        modes = {path: {"path": path, "uploadMode": "lfs" if lfs else "regular"} for path, lfs in asked.items()}
        held = {path: oid(files[path]) if path in files else None for path in asked}
        return 200, {"files": [modes[path] | {"shouldIgnore": False, "oid": held[path]} for path in asked]}

    def lfs_batch(self, kind, id):
        self.repo(kind, id, write=True)
        objects = json.loads(self.body)["objects"]
        for asked in objects:
            if asked["oid"] not in self.hub.objects:
                asked["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}", "header": {}}}
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_put(self, sha256):
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refusal(400, "", "sha256 differs")
        self.hub.objects[sha256] = self.body
        return 200, b""

    def commit(self, kind, id, rev):
        repo, parent, files = self.snapshot(kind, id, rev, write=True)
        files, title = dict(files), ""
        for item in map(json.loads, self.body.splitlines()):
            value, path = item["value"], item["value"].get("path", "").rstrip("/")
            if item["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[path] = self.hub.objects[value["oid"]]
            else:
                files = {name: kept for name, kept in files.items() if name != path and not name.startswith(f"{path}/")}
        sha = repo.commit(files, title, rev)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{id}/commit/{sha}"}

    def make_ref(self, kind, id, what, rev):
        """Make a branch `rev` from its startingPoint, or at `rev` the tag that the body names."""
        asked = json.loads(self.body or b"{}")
        name, start = (asked["tag"], rev) if what == "tag" else (rev, asked.get("startingPoint", "main"))
        repo, sha, _ = self.snapshot(kind, id, start, write=True)
        if name in repo.refs:
            return 409, {"error": f"Reference already exists: {name}"}
        repo.refs[name] = sha
        repo.tags |= {name} if what == "tag" else set()
        return 200, {}

    def list_refs(self, kind, id):
        repo = self.repo(kind, id)
        refs = [{"name": name, "ref": name, "targetCommit": sha} for name, sha in repo.refs.items()]
        tags = [ref for ref in refs if ref["name"] in repo.tags]
        return 200, {"branches": [ref for ref in refs if ref not in tags], "converts": [], "tags": tags}

    def history(self, kind, id, rev):
        """Commits of a branch, the newest first."""
        repo, sha, _ = self.snapshot(kind, id, rev)
        found, titles = [], dict(repo.log)
        while sha:
            found.append({"id": sha, "title": titles[sha], "message": "", "date": TIME, "authors": []})
            sha = repo.parents[sha]
        return 200, found

    def settings(self, kind, id):
        self.repo(kind, id, write=True).private = json.loads(self.body)["visibility"] == "private"
        return 200, {}

    def space_variables(self, id):
        repo, asked = self.repo("space", id, write=True), json.loads(self.body or b"{}")
        if self.command == "POST":
            repo.variables[asked["key"]] = asked["value"]
        elif self.command == "DELETE":
            del repo.variables[asked["key"]]
        return 200, {key: {"key": key, "value": value} for key, value in repo.variables.items()}

    def resolve(self, kind, id, rev, path):
        _, sha, files = self.snapshot(kind, id, rev)
        if path not in files:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        content, headers = files[path], {"ETag": f'"{oid(files[path])}"', "X-Repo-Commit": sha}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return 206, content[first : last + 1], headers
        return 200, content, headers


def is_binary(content: bytes) -> bool:
    return b"\0" in content[:512]


def oid(content: bytes) -> str:
    """Return the sha256 of what LFS holds, git's blob id of anything else."""
    if is_binary(content):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    lfs = {"lfs": {"oid": oid(content), "size": len(content), "pointerSize": 130}} if is_binary(content) else {}
    return {"type": "file", "path": path, "size": len(content), "oid": oid(content)} | lfs


ID = r"(?P<id>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>model|dataset|space)s/{ID}"
FILES = rf"/(?:(?P<kind>dataset|space)s/)?{ID}"
ROUTES = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate_yaml),
    (("GET",), API, Handler.info),
    (("GET",), rf"{API}/revision/(?P<rev>.+)", Handler.info),
    (("GET",), rf"{API}/tree/(?P<rev>[^/]+)(?:/(?P<below>.+))?", Handler.tree),
    (("POST",), rf"{API}/paths-info/(?P<rev>[^/]+)", Handler.paths_info),
    (("PUT",), rf"{API}/settings", Handler.settings),
    (("POST",), rf"{API}/preupload/(?P<rev>.+)", Handler.preupload),
    (("POST",), rf"{API}/commit/(?P<rev>.+)", Handler.commit),
    (("GET",), rf"{API}/refs", Handler.list_refs),
    (("GET",), rf"{API}/commits/(?P<rev>.+)", Handler.history),
    (("POST",), rf"{API}/(?P<what>branch|tag)/(?P<rev>.+)", Handler.make_ref),
    (("GET", "POST", "DELETE"), rf"/api/spaces/{ID}/variables", Handler.space_variables),
    (("POST",), rf"{FILES}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<sha256>\w+)", Handler.lfs_put),
    (("GET", "HEAD"), rf"{FILES}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", Handler.resolve),
]
