"""A server that speaks the few endpoints of the Hub that publishing and loading use, and keeps all in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_atokenthatnobodymaysee"
USER = "org"
LFS_SUFFIXES = (".safetensors", ".mp4")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Commit:
    """The files after it, and what it said and changed."""

    sha: str
    files: dict[str, bytes]
    title: str = "initial commit"
    changed: list[str] = field(default_factory=list)


@dataclass
class Repository:
    """Branches and pull requests by name, each a list of commits."""

    private: bool
    refs: dict[str, list[Commit]]

    def find(self, revision: str) -> Commit | None:
        if revision in self.refs:
            return self.refs[revision][-1]
        commits = (commit for history in self.refs.values() for commit in history)
        return next((commit for commit in commits if commit.sha == revision), None)


class Hub:
    """
    What the server holds, and how it fails: `failing_uploads` has statuses by the number, from 0, of an upload of a
    large file. `uploads` counts those that arrived, `requests` has method and path of all.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads, self.tried = 0, 0
        self.failing_uploads: dict[int, int] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def create(self, name: str, private: bool) -> None:
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        first = Commit(git_oid(name.encode()), {".gitattributes": attributes})
        self.repositories[name] = Repository(private, {"main": [first]})

    def commit(self, repository: Repository, ref: str, lines: list[dict]) -> Commit:
        files, changed = dict(repository.refs[ref][-1].files), []
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            else:
                assert line["key"] == "deletedFile", line
                del files[value["path"]]
            changed.append(value["path"])
        content = json.dumps([ref, len(repository.refs[ref]), changed])
        commit = Commit(git_oid(content.encode()), files, lines[0]["value"]["summary"], changed)
        repository.refs[ref].append(commit)
        return commit


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    function(self, body, parse_qs(url.query), *match.groups())
                    return
        self.refuse(404, "EntryNotFound", f"nothing at {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    # Who and what

    def whoami(self, body, query):
        if self.is_known:
            self.answer(200, {"type": "user", "name": USER, "orgs": []})
        else:
            self.refuse(401, "", "Invalid username or password.")

    def validate_card(self, body, query):
        content = json.loads(body)["content"]
        self.answer(200 if content.startswith("---\n") else 400, {"warnings": [], "errors": []})

    def create_repository(self, body, query):
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if not self.is_known:
            self.refuse(401, "", "Invalid username or password.")
        elif name in self.hub.repositories:
            self.answer(409, {"error": "You already created this model repo", "url": f"/{name}"})
        else:
            self.hub.create(name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
            self.answer(200, {"url": f"{self.root}/{name}", "name": name})

    @property
    def root(self) -> str:
        return f"http://{self.headers['Host']}"

    def find(self, name: str, writes: bool = False) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or ((writes or repository.private) and not self.is_known):
            self.refuse(401 if not self.is_known else 404, "RepoNotFound", "Repository not found")
            return None
        return repository

    def find_commit(self, name: str, revision: str) -> tuple[Repository, Commit] | None:
        repository = self.find(name)
        if repository is None:
            return None
        commit = repository.find(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def info(self, body, query, name, revision="main"):
        if found := self.find_commit(name, revision):
            siblings = [{"rfilename": path} for path in sorted(found[1].files)]
            self.answer(200, {"id": name, "sha": found[1].sha, "private": found[0].private, "siblings": siblings})

    def tree(self, body, query, name, revision, folder):
        if found := self.find_commit(name, revision):
            paths = [path for path in sorted(found[1].files) if path.startswith((folder or "").lstrip("/"))]
            if folder and not paths:
                self.refuse(404, "EntryNotFound", f"{folder} does not exist")
                return
            self.answer(200, [self.describe(path, found[1].files[path]) for path in paths])

    @staticmethod
    def describe(path: str, content: bytes) -> dict:
        row = {"type": "file", "path": path, "oid": git_oid(content), "size": len(content)}
        if path.endswith(LFS_SUFFIXES):
            row["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        return row

    def discussions(self, body, query, name):
        if repository := self.find(name):
            numbers = [int(ref.split("/")[-1]) for ref in repository.refs if ref.startswith("refs/pr/")]
            common = {"title": "", "status": "open", "isPullRequest": True, "createdAt": "2026-01-01T00:00:00.000Z"}
            common |= {"author": {"name": USER}, "repo": {"name": name, "type": "model"}}
            found = [{"num": number, **common} for number in numbers]
            self.answer(200, {"discussions": found, "count": len(found), "start": 0})

    # Writing

    def branch(self, body, query, name, branch):
        if repository := self.find(name, writes=True):
            if branch in repository.refs:
                self.answer(409, {"error": "Reference already exists"})
                return
            repository.refs[branch] = list(repository.refs["main"])
            self.answer(200, {})

    def preupload(self, body, query, name, revision):
        if repository := self.find(name, writes=True):
            there = repository.refs[revision][-1].files
            self.answer(200, {"files": [self.upload_mode(file["path"], there) for file in json.loads(body)["files"]]})

    @staticmethod
    def upload_mode(path: str, there: dict[str, bytes]) -> dict:
        is_large = path.endswith(LFS_SUFFIXES)
        found = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        if path in there:
            found["oid"] = sha256(there[path]) if is_large else git_oid(there[path])
        return found

    def batch(self, body, query, name):
        if self.find(name, writes=True):
            objects = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in self.hub.blobs:
                    secret = "X-Signature=signedbynobody"
                    one["actions"] = {"upload": {"href": f"{self.root}/lfs/{one['oid']}?{secret}"}}
            self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body, query, oid):
        number, self.hub.tried = self.hub.tried, self.hub.tried + 1
        if number in self.hub.failing_uploads:
            self.answer(self.hub.failing_uploads[number], {"error": "the storage is closed"})
            return
        assert sha256(body) == oid
        self.hub.blobs[oid], self.hub.uploads = body, self.hub.uploads + 1
        self.answer(200, {})

    def write_commit(self, body, query, name, revision):
        if repository := self.find(name, writes=True):
            ref, answer = revision, {}
            if "create_pr" in query:
                ref = f"refs/pr/{len(repository.refs)}"
                repository.refs[ref] = list(repository.refs[revision])
                answer["pullRequestUrl"] = f"{self.root}/{name}/discussions/{ref.split('/')[-1]}"
            commit = self.hub.commit(repository, ref, [json.loads(line) for line in body.splitlines()])
            answer |= {"commitUrl": f"{self.root}/{name}/commit/{commit.sha}", "commitOid": commit.sha}
            self.answer(200, {"success": True, **answer})

    # Reading

    def resolve(self, body, query, name, revision, path):
        if found := self.find_commit(name, revision):
            if path not in found[1].files:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[1].sha})
                return
            content = found[1].files[path]
            self.answer(200, content, {"ETag": f'"{sha256(content)}"', "X-Repo-Commit": found[1].sha})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_card),
    ("POST", "/api/repos/create", Handler.create_repository),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/(.+)", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/(refs/pr/[0-9]+|[^/]+)(/.+)?", Handler.tree),
    ("GET", f"/api/models/{NAME}/discussions", Handler.discussions),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/([0-9a-f]{64})", Handler.upload),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Handler.write_commit),
    (("GET", "HEAD"), f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def serve() -> Iterator[tuple[Hub, str]]:
    """The hub, and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
