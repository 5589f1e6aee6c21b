"""A Hub on 127.0.0.1: what huggingface_hub and kernels ask of the real one, over bare git repositories.

Reading is open to all, writing wants the token. Errors carry the headers from which huggingface_hub makes its own
exceptions. Every file is a regular file: a kernel made of sources has nothing that the Hub would put into LFS.
"""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.repository import Repository

TOKEN = "hf_loopback"
REPOSITORY = r"/api/kernels/(?P<repo_id>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/organizations/(?P<organization>[^/]+)/overview", "organization"),
    ("GET", REPOSITORY + r"/refs", "refs"),
    ("GET", REPOSITORY + r"(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", REPOSITORY + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    ("GET", r"/kernels/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "file"),
    ("POST", r"/api/repos/create", "create_repository"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", REPOSITORY + r"/branch/(?P<branch>[^/]+)", "create_branch"),
    ("POST", REPOSITORY + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", REPOSITORY + r"/commit/(?P<revision>[^/]+)", "commit"),
]


class HubError(Exception):
    """An answer other than 200: its status, the code by which huggingface_hub knows it, and its content."""

    def __init__(self, status: int, code: str, **content: str):
        super().__init__(code)
        self.status, self.code, self.content = status, code, content


class Hub:
    """Serves the repositories below ``root`` until closed; ``requests`` lists what was asked.

    Args:
        root: an empty folder.
        trusted: organizations whose kernels load without ``trust_remote_code``.
    """

    def __init__(self, root: Path, trusted: set[str]):
        self.root, self.trusted = root, trusted
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def repository(self, repo_id: str) -> Repository:
        """The repository of that id; KeyError if there is none."""
        path = self.root / f"{repo_id}.git"
        if not path.is_dir():
            raise KeyError(repo_id)
        return Repository(path)


class _Handler(BaseHTTPRequestHandler):
    """One request: finds its route, answers with JSON or with a file."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {url.path}")
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for verb, pattern, name in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and verb == method:
                    self._authorize()
                    return getattr(self, name)(**{k: v and unquote(v) for k, v in match.groupdict().items()})
            raise HubError(404, "NotFound")
        except HubError as error:
            self._json(error.content, error.status, {"X-Error-Code": error.code})

    do_HEAD = do_POST = do_GET

    def organization(self, organization: str) -> None:
        trusted = organization in self.hub.trusted
        self._json({"name": organization, "fullname": organization, "avatarUrl": "", "trustedKernelPublisher": trusted})

    def refs(self, repo_id: str) -> None:
        branches = self._repository(repo_id).branches().items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in branches]
        self._json({"branches": listed, "tags": [], "converts": []})

    def info(self, repo_id: str, revision: str | None) -> None:
        commit = self._commit(self._repository(repo_id), revision or "main")
        self._json({"_id": repo_id, "id": repo_id, "sha": commit, "private": False, "gated": False})

    def tree(self, repo_id: str, revision: str, folder: str | None) -> None:
        repository = self._repository(repo_id)
        recursive = self.query.get("recursive", [""])[0].lower() in ("true", "1")
        try:
            self._json(repository.entries(self._commit(repository, revision), folder or "", recursive))
        except KeyError:
            raise HubError(404, "EntryNotFound") from None

    def file(self, repo_id: str, revision: str, path: str) -> None:
        repository = self._repository(repo_id)
        commit = self._commit(repository, revision)
        try:
            oid, content = repository.read(commit, path)
        except KeyError:
            raise HubError(404, "EntryNotFound") from None
        self._send(200, content, {"ETag": f'"{oid}"', "X-Repo-Commit": commit})

    def create_repository(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        path, url = self.hub.root / f"{repo_id}.git", f"{self.hub.endpoint}/kernels/{repo_id}"
        if path.exists():
            raise HubError(409, "RepoExists", url=url)
        path.parent.mkdir(exist_ok=True)
        Repository.create(path)
        self._json({"url": url})

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def create_branch(self, repo_id: str, branch: str) -> None:
        repository = self._repository(repo_id)
        if branch in repository.branches():
            raise HubError(409, "BranchExists")
        repository.branch(branch, "main")
        self._json({})

    def preupload(self, repo_id: str, revision: str) -> None:
        repository = self._repository(repo_id)
        entries = repository.entries(self._commit(repository, revision), recursive=True)
        oids = {entry["path"]: entry["oid"] for entry in entries}
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {"uploadMode": "regular", "shouldIgnore": False}
        self._json({"files": [{"path": path, "oid": oids.get(path), **modes} for path in paths]})

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self._repository(repo_id)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        files, deleted = {}, []
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                deleted.append(value["path"])
            else:
                raise HubError(400, f"Unsupported {operation['key']}")
        commit = repository.commit(revision, header["value"]["summary"], files, deleted)
        self._json({"commitUrl": f"{self.hub.endpoint}/kernels/{repo_id}/commit/{commit}", "commitOid": commit})

    def log_message(self, *_) -> None:
        """Quiet: ``Hub.requests`` keeps what was asked."""

    def _authorize(self) -> None:
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "Unauthorized")

    def _repository(self, repo_id: str) -> Repository:
        try:
            return self.hub.repository(repo_id)
        except KeyError:
            raise HubError(404, "RepoNotFound") from None

    def _commit(self, repository: Repository, revision: str) -> str:
        try:
            return repository.resolve(revision)
        except KeyError:
            raise HubError(404, "RevisionNotFound") from None

    def _json(self, answer: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
