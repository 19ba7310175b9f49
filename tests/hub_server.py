"""A server that speaks the part of the Hugging Face Hub's HTTP API that uploads and downloads need, for tests.

Repositories, of models and data sets, live in memory. Every commit has an id and a tree; large files go the LFS way
(batch, PUT, verify, a redirect at download), the rest inside the commit. Answers follow what huggingface_hub reads:
status codes, X-Error-Code, ETag, X-Repo-Commit, X-Linked-*. `faults` breaks connections on purpose.
"""

import base64
import collections
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import yaml
from huggingface_hub import constants

WRITER, READER = "hf_writer", "hf_reader"
USERS = {
    WRITER: {"name": "ahab", "role": "write", "orgs": ["pequod"]},
    READER: {"name": "ahab", "role": "read", "orgs": []},
}
LFS = (".safetensors", ".bin", ".gguf")


@dataclass
class File:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """SHA-256 of an LFS file, git's blob id of another: what the client compares with its own."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # commit id -> path -> file
    branches: dict[str, str] = field(default_factory=dict)  # branch -> commit id
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, tree: dict[str, File], message: str) -> str:
        number = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[number], self.branches[branch] = tree, number
        self.messages.append(message)
        return number

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.commits[self.resolve(revision)].items()}


class HubServer(ThreadingHTTPServer):
    """Context manager; `url` is its endpoint.

    faults: part of a request, "METHOD /path", to the number of times that a matching request loses its connection:
    before its body is read, or, if the part ends in "!", after it has been carried out and before it is answered.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        # large files are redirected to another host, as the Hub does; its client stops there to read the headers
        self.content_url = f"http://localhost:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS content by SHA-256
        self.requests: list[str] = []
        self.faults: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Broken connections are what some tests are about."""

    def seen(self, part: str) -> list[str]:
        return [line for line in self.requests if part in line]


def take_for_the_hub(server: HubServer, monkeypatch):
    """Have huggingface_hub and datasets, in this process, speak to the server."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)


class Lost(Exception):
    """The connection breaks here."""


ROUTES = []  # (method, pattern, handler)


def route(method: str, pattern: str):
    def enter(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return enter


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = rf"/api/(?:models|datasets)/{REPO}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.url = urlsplit(self.path)
        line = f"{self.command} {self.url.path}"
        with self.server.lock:
            self.server.requests.append(line)
        try:
            self.lose(line, carried_out=False)
            length = int(self.headers.get("Content-Length") or 0)
            self.body = self.rfile.read(length) if "chunked" not in self.headers.get("Transfer-Encoding", "") else b""
            self.dispatch(line)
        except Lost:
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

    def lose(self, line: str, carried_out: bool):
        with self.server.lock:
            for part, times in self.server.faults.items():
                if times and part.endswith("!") == carried_out and part.rstrip("!") in line:
                    self.server.faults[part] -= 1
                    raise Lost

    def dispatch(self, line: str):
        for method, pattern, function in ROUTES:
            match = pattern.fullmatch(self.url.path)
            if match and self.command in (method, "HEAD" if method == "GET" else method):
                arguments = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                if "repo" in arguments and not self.visible(arguments["repo"]):
                    # as the Hub does: a private repository looks as if it were not there
                    return self.answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                if method in ("POST", "PUT") and not line.startswith("PUT /lfs/") and not self.may_write(arguments):
                    return
                return function(self, line=line, **arguments)
        return self.answer(404, {"error": f"no such route: {line}"})

    # who asks

    @property
    def user(self) -> dict | None:
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def visible(self, repo: str) -> bool:
        repository = self.server.repositories.get(repo)
        return repository is not None and (not repository.private or self.owns(repo))

    def owns(self, repo: str) -> bool:
        return self.user is not None and repo.partition("/")[0] in (self.user["name"], *self.user["orgs"])

    def may_write(self, arguments: dict) -> bool:
        if self.user is None:
            self.refuse_token()
            return False
        if self.user["role"] != "write" or not self.owns(arguments.get("repo", self.user["name"] + "/")):
            self.answer(403, {"error": "Forbidden"}, {"X-Error-Message": "You have read access only"})
            return False
        return True

    def refuse_token(self):
        message = "Invalid credentials in Authorization header"
        self.answer(401, {"error": message}, {"X-Error-Message": message})

    # answers

    def answer(self, status: int, content, headers: dict | None = None, line: str | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        if line is not None:
            self.lose(line, carried_out=True)
        self.send_response(status)
        headers = {"Content-Length": len(body), "Content-Type": "application/json", **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self) -> dict:
        return json.loads(self.body)

    def tree(self, repo: str, revision: str) -> tuple[str, dict[str, File]] | None:
        """Commit id and files of a revision; answers and returns None if there is no such revision."""
        repository = self.server.repositories[repo]
        commit = repository.resolve(revision)
        if commit is None:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, repository.commits[commit]


@route("GET", "/api/whoami-v2")
def whoami(self, line):
    user = self.user
    if user is None:
        return self.refuse_token()
    token = {"displayName": "test", "role": user["role"]}
    self.answer(
        200,
        {
            "type": "user",
            "name": user["name"],
            "orgs": [{"name": name, "roleInOrg": "write"} for name in user["orgs"]],
            "auth": {"type": "access_token", "accessToken": token},
        },
    )


@route("POST", "/api/repos/create")
def create_repo(self, line):
    asked = self.json()
    name = f"{asked.get('organization') or self.user['name']}/{asked['name']}"
    url = f"{self.server.url}/{name}"
    if not self.owns(name):
        return self.answer(403, {"error": "Forbidden"}, {"X-Error-Message": f"no rights to {name}"})
    if name in self.server.repositories:
        return self.answer(409, {"error": "You already created this model repo", "url": url})
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repository = self.server.repositories[name] = Repository(private)
    repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
    self.answer(200, {"url": url, "name": name, "private": private}, line=line)


@route("POST", "/api/validate-yaml")
def validate_yaml(self, line):
    """Rejects a card whose metadata is no mapping, or whose model-index lacks what the Hub requires."""
    _, block, _ = self.json()["content"].split("---\n", 2)
    data, errors = yaml.safe_load(block), []
    if not isinstance(data, dict):
        errors.append({"message": "metadata is no mapping"})
    else:
        for model in data.get("model-index", []):
            for result in model["results"]:
                missing = {"type", "name"} - set(result["dataset"]) or {"type"} - set(result["task"])
                if missing or any("value" not in metric for metric in result["metrics"]):
                    errors.append({"message": f"model-index lacks {missing}"})
    self.answer(400 if errors else 200, {"errors": errors, "warnings": []})


@route("GET", rf"{API}(/revision/(?P<revision>[^/]+))?")
def info(self, line, repo, revision="main"):
    found = self.tree(repo, revision)
    if found:
        commit, files = found
        self.answer(
            200,
            {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "private": self.server.repositories[repo].private,
                "tags": [],
                "siblings": [{"rfilename": path} for path in files],
            },
        )


@route("GET", rf"{API}/auth-check(/write)?")
def auth_check(self, line, repo):
    if line.endswith("/write") and not self.may_write({"repo": repo}):
        return
    self.answer(200, {})


@route("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
def list_tree(self, line, repo, revision, folder=""):
    found = self.tree(repo, revision)
    if not found:
        return
    recursive = parse_qs(self.url.query).get("recursive", ["false"])[0].lower() == "true"
    entries, prefix = {}, f"{folder}/" if folder else ""
    for path, file in found[1].items():
        if path.startswith(prefix):
            inside = path.removeprefix(prefix)
            if "/" in inside and not recursive:
                path = prefix + inside.partition("/")[0]
                entries[path] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
                continue
            entries[path] = {"type": "file", "oid": file.oid, "size": len(file.content), "path": path}
            if file.lfs:
                entries[path]["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 100}
    if folder and not entries:
        return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
    self.answer(200, list(entries.values()))


@route("POST", rf"{API}/branch/(?P<branch>[^/]+)")
def create_branch(self, line, repo, branch):
    repository = self.server.repositories[repo]
    if branch in repository.branches:
        return self.answer(409, {"error": "Reference already exists"})
    start = repository.resolve(self.json().get("startingPoint", "main"))
    repository.branches[branch] = start
    self.answer(201, {}, line=line)


@route("POST", rf"{API}/preupload/(?P<revision>[^/]+)")
def preupload(self, line, repo, revision):
    found = self.tree(repo, revision)
    if found:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                "shouldIgnore": False,
                "oid": found[1][file["path"]].oid if file["path"] in found[1] else None,
            }
            for file in self.json()["files"]
        ]
        self.answer(200, {"files": files})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(self, line, repo):
    objects = []
    for wanted in self.json()["objects"]:
        if wanted["oid"] not in self.server.objects:  # without actions: it is here already
            actions = {
                "upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}},
                "verify": {"href": f"{self.server.url}/{repo}/lfs-verify", "header": {}},
            }
            objects.append({**wanted, "authenticated": True, "actions": actions})
        else:
            objects.append(wanted)
    self.answer(200, {"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(self, line, oid):
    if hashlib.sha256(self.body).hexdigest() != oid:
        return self.answer(400, {"error": "content and oid differ"})
    self.server.objects[oid] = self.body
    self.answer(200, {}, line=line)


@route("POST", rf"/{REPO}/lfs-verify")
def lfs_verify(self, line, repo):
    asked = self.json()
    right = len(self.server.objects.get(asked["oid"], b"")) == asked["size"]
    self.answer(200 if right else 404, {})


@route("POST", rf"{API}/commit/(?P<revision>[^/]+)")
def commit(self, line, repo, revision):
    found = self.tree(repo, revision)
    if not found:
        return
    tree, message = dict(found[1]), ""
    for entry in map(json.loads, self.body.decode().splitlines()):
        value = entry["value"]
        if entry["key"] == "header":
            message = value["summary"]
        elif entry["key"] == "file":
            tree[value["path"]] = File(base64.b64decode(value["content"]), False)
        elif entry["key"] == "lfsFile":
            if value["oid"] not in self.server.objects:
                return self.answer(400, {"error": f"{value['path']}: content was not uploaded"})
            tree[value["path"]] = File(self.server.objects[value["oid"]], True)
        elif entry["key"] == "deletedFile":
            if value["path"] not in tree:
                message = "A file with this name doesn't exist"
                return self.answer(404, {"error": message}, {"X-Error-Code": "EntryNotFound"})
            del tree[value["path"]]
    number = self.server.repositories[repo].commit(revision, tree, message)
    url = f"{self.server.url}/{repo}/commit/{number}"
    self.answer(200, {"commitUrl": url, "commitOid": number, "success": True}, line=line)


@route("GET", rf"(?:/datasets)?/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(self, line, repo, revision, path):
    found = self.tree(repo, revision)
    if not found:
        return
    number, files = found
    headers = {"X-Repo-Commit": number}
    if path not in files:
        return self.answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
    file = files[path]
    if file.lfs:
        linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": len(file.content)}
        return self.answer(302, b"", {**headers, **linked, "Location": f"{self.server.content_url}/content/{file.oid}"})
    self.answer(200, file.content, {**headers, "ETag": f'"{file.oid}"', "Content-Type": "application/octet-stream"})


@route("GET", "/content/(?P<oid>[0-9a-f]{64})")
def content(self, line, oid):
    body, headers, status = self.server.objects[oid], {"ETag": f'"{oid}"'}, 200
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    if asked:
        first, last = int(asked[1]), min(int(asked[2] or len(body) - 1), len(body) - 1)
        headers["Content-Range"], status = f"bytes {first}-{last}/{len(body)}", 206
        body = body[first : last + 1]
    self.answer(status, body, headers)
