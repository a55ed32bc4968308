"""A Hub on loopback, in memory: models and data sets over HTTP, as huggingface_hub speaks it.

It refuses what the real one refuses, with the same status and ``X-Error-Code``. Not served: Xet, multipart LFS, pull requests,
Spaces, gated access.
"""

import base64
import hashlib
import json
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# The ids of https://hf.co/docs/hub/repositories-licenses that models mostly have
LICENSES = {
    "apache-2.0", "mit", "openrail", "creativeml-openrail-m", "openrail++", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0",
    "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "agpl-3.0", "gpl-3.0",
    "lgpl-3.0", "mpl-2.0", "odc-by", "odbl", "unlicense", "llama3.1", "gemma", "unknown", "other",
}  # fmt: skip
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
LANGUAGE = re.compile(r"[a-z]{2,3}(-\w+)?|code|multilingual")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
YAML_BLOCK = re.compile(r"^\s*---[\r\n]+([\S\s]*?)[\r\n]+---(\r\n|\n|$)")
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow")
LARGE = 10 * 2**20  # bytes that a regular file may have
STALE = "A commit has happened since. Please refresh and try again."


def validate(content: str) -> tuple[dict, list[str], list[str]]:
    """A card's metadata, with errors and warnings."""
    block = YAML_BLOCK.match(content)
    if block is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return {}, [f"Invalid YAML: {error}"], []
    if not isinstance(card, dict):
        return {}, ["YAML metadata must be a mapping"], []
    errors: list[str] = []

    def must(fine: bool, name: str, what: str) -> None:
        if not fine:
            errors.append(f'"{name}" {what}')

    def strings(name: str) -> list[str]:
        values = card.get(name, [])
        values = values if isinstance(values, list) else [values]
        must(all(isinstance(value, str) and value for value in values), name, "must be a string and not empty")
        return [value for value in values if isinstance(value, str) and value]

    for license in strings("license"):
        must(license in LICENSES, "license", f"must be one of {sorted(LICENSES)}")
    for name, page in (("base_model", "models"), ("datasets", "datasets")):
        for value in strings(name):
            known = HUB_ID.fullmatch(value) is not None
            must(known, name, f'with value "{value}" is not valid. Use an id from https://hf.co/{page}.')
    for language in strings("language"):
        must(LANGUAGE.fullmatch(language) is not None, "language", "must be an ISO 639 code")
    must(card.get("base_model_relation", "adapter") in RELATIONS, "base_model_relation", f"must be one of {RELATIONS}")
    strings("tags")
    must(isinstance(card.get("tags", []), list), "tags", "must be an array")
    index = card.get("model-index", [])
    must(isinstance(index, list), "model-index", "must be an array")

    def required(entry, path: str, *names: str) -> None:
        for name in names:
            must(isinstance(entry, dict) and entry.get(name) not in (None, "", []), f"{path}.{name}", "is required")

    for i, model in enumerate(index if isinstance(index, list) else []):
        required(model, f"model-index[{i}]", "name")
        for j, result in enumerate(model.get("results") or [] if isinstance(model, dict) else []):
            path = f"model-index[{i}].results[{j}]"
            required(result, path, "task", "dataset", "metrics")
            required(result.get("task"), f"{path}.task", "type")
            required(result.get("dataset"), f"{path}.dataset", "type", "name")
            for k, metric in enumerate(result.get("metrics") or []):
                required(metric, f"{path}.metrics[{k}]", "type", "value")
    return card, errors, []


def base_tags(card: dict) -> list[str]:
    """The tags that the Hub makes of ``base_model``; the relation is an adapter's or a fine-tuned model's where none is given."""
    bases = card.get("base_model", [])
    relation = card.get("base_model_relation", "adapter" if card.get("library_name") == "peft" else "finetune")
    bases = [bases] if isinstance(bases, str) else bases
    return [tag for base in bases for tag in (f"base_model:{base}", f"base_model:{relation}:{base}")]


@dataclass(frozen=True)
class Blob:
    """One file's content; ``lfs`` says how it is stored."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """Git's SHA-1, or the SHA-256 of an LFS object."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def describe(self, path: str) -> dict:
        lfs = {"lfs": {"oid": self.oid, "size": len(self.content), "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.oid} | lfs


@dataclass
class Commit:
    title: str
    files: dict[str, Blob]
    oid: str = field(default_factory=lambda: secrets.token_hex(20))
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))

    @property
    def card(self) -> str:
        return self.files["README.md"].content.decode() if "README.md" in self.files else ""


@dataclass
class Repo:
    owner: str
    private: bool
    branches: dict[str, list[Commit]]  # oldest first
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256

    def commit(self, revision: str) -> Commit:
        if revision in self.branches:
            return self.branches[revision][-1]
        for commits in self.branches.values():
            for commit in commits:
                if commit.oid == revision:
                    return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Refusal(Exception):
    """An answer with an error."""

    def __init__(self, status: int, message: str, code: str = "", content: dict | None = None, **headers: str):
        self.status, self.content = status, {"error": message} | (content or {})
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.headers |= {"X-Error-Message": message.splitlines()[0]} | ({"X-Error-Code": code} if code else {})


class HubServer(ThreadingHTTPServer):
    """Start it with ``with HubServer({token: user}) as hub``; ``hub.url`` is the endpoint.

    Attributes:
        repos: by ``models`` or ``datasets`` and id.
        faults: what goes wrong next, each once: ``drop_put`` (the connection, half-way in an LFS upload), ``slow_put`` (half a
            second), ``lose_answer`` (the connection, after a commit), ``409`` or ``412`` (a commit is refused).
            ``POST /faults/<name>`` adds one.
        requests: method and path of every request.
    """

    daemon_threads = True

    def __init__(self, tokens: dict[str, str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens = tokens
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: dict[str, Repo] = {}  # by the signature of the upload's address
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def take_fault(self, *names: str) -> str | None:
        with self.lock:
            name = next((name for name in self.faults if name in names), None)
            if name:
                self.faults.remove(name)
            return name


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def handle_one(self) -> None:
        hub, address = self.server, urlsplit(self.path)
        hub.requests.append(f"{self.command} {address.path}")
        self.query = {name: values[0] for name, values in parse_qs(address.query).items()}
        length = int(self.headers.get("Content-Length", 0))
        if self.command == "PUT" and hub.take_fault("drop_put"):
            self.rfile.read(length // 2)
            return self.hang_up()
        if self.command == "PUT" and hub.take_fault("slow_put"):
            time.sleep(0.5)
        self.body = self.rfile.read(length)
        try:
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, address.path)
                if match and self.command in method.split("|"):
                    return getattr(self, name)(*(part and unquote(part) for part in match.groups()))
            raise Refusal(404, f"No {self.command} {address.path} here")
        except Refusal as refusal:
            return self.answer(refusal.content, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, content, status: int = 200, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ---- Who may do what --------------------------------------------------------------------------------------------

    def user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        if given.removeprefix("Bearer ") not in self.server.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server.tokens[given.removeprefix("Bearer ")]

    def known_user(self) -> str:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def repo(self, kind: str | None, name: str, write: bool = False) -> Repo:
        user, repo = self.user(), self.server.repos.get(((kind or "models").rstrip("/"), name))
        if repo is None or (repo.private and user != repo.owner):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and self.known_user() != repo.owner:
            raise Refusal(403, f"You don't have the rights to write to {name}")
        return repo

    def whoami(self) -> None:
        self.answer({"type": "user", "name": self.known_user(), "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked, user = json.loads(self.body), self.known_user()
        if (asked.get("organization") or user) != user:
            raise Refusal(403, f"You don't have the rights to create a repository under {asked['organization']}")
        kind, name = asked.get("type", "model") + "s", f"{user}/{asked['name']}"
        place = {"url": f"{self.server.url}/{'' if kind == 'models' else kind + '/'}{name}", "id": name}
        with self.server.lock:
            if (kind, name) in self.server.repos:
                raise Refusal(409, "You already created this repository", content=place)
            rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
            first = Commit("initial commit", {".gitattributes": Blob(rules.encode(), False)})
            private = asked.get("visibility") == "private"
            self.server.repos[kind, name] = Repo(user, private, {"main": [first]})
        self.answer(place)

    # ---- Upload -----------------------------------------------------------------------------------------------------

    def validate_yaml(self) -> None:
        _, errors, warnings = validate(json.loads(self.body)["content"])
        content = {name: [{"message": m} for m in told] for name, told in (("errors", errors), ("warnings", warnings))}
        if errors:
            raise Refusal(400, "\n".join(errors), content=content)
        self.answer(content)

    def preupload(self, kind: str, name: str, revision: str) -> None:
        files = self.repo(kind, name, write=True).commit(revision).files
        modes = []
        for asked in json.loads(self.body)["files"]:
            binary = b"\0" in base64.b64decode(asked["sample"])
            lfs = binary or asked["path"].endswith(LFS_SUFFIXES) or asked["size"] > LARGE
            old = files.get(asked["path"])
            mode = {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": old and old.oid}
            modes.append({"path": asked["path"]} | mode)
        self.answer({"files": modes})

    def lfs_batch(self, kind: str | None, name: str) -> None:
        repo, objects = self.repo(kind, name, write=True), []
        for asked in json.loads(self.body)["objects"]:
            told = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in repo.objects:
                signature = secrets.token_hex(8)
                self.server.uploads[signature] = repo
                upload = {"href": f"{self.server.url}/lfs/{asked['oid']}/{signature}"}
                verify = {"href": f"{self.server.url}/{kind or ''}{name}.git/lfs/verify"}
                told["actions"] = {"upload": upload, "verify": verify}
            objects.append(told)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, signature: str) -> None:
        if signature not in self.server.uploads:
            raise Refusal(403, "SignatureDoesNotMatch")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "XAmzContentSHA256Mismatch")
        self.server.uploads[signature].objects[oid] = self.body
        self.answer(b"")

    def lfs_verify(self, kind: str | None, name: str) -> None:
        repo, asked = self.repo(kind, name, write=True), json.loads(self.body)
        if len(repo.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "Object not found or of another size")
        self.answer({})

    def make_commit(self, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        refused = self.server.take_fault("409", "412")
        if refused:
            raise Refusal(int(refused), STALE)
        with self.server.lock:
            head = repo.commit(revision)
            if revision not in repo.branches:
                raise Refusal(400, f"{revision} is no branch")
            if not head.oid.startswith(header.get("parentCommit", "")):
                raise Refusal(412, STALE)
            files = dict(head.files)
            commit = Commit(header["summary"], files)
            for line in lines:
                _apply(files, line["key"], line["value"], repo.objects)
            _, errors, _ = validate(commit.card)
            if errors:
                raise Refusal(400, "\n".join(errors))
            repo.branches[revision].append(commit)
        if self.server.take_fault("lose_answer"):
            return self.hang_up()
        url = f"{self.server.url}/{'' if kind == 'models' else kind + '/'}{name}/commit/{commit.oid}"
        return self.answer({"success": True, "commitUrl": url, "commitOid": commit.oid})

    def make_branch(self, kind: str, name: str, branch: str) -> None:
        repo = self.repo(kind, name, write=True)
        with self.server.lock:
            if branch in repo.branches:
                raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
            start = repo.commit(json.loads(self.body or b"{}").get("startingPoint", "main"))
            of = next(commits for commits in repo.branches.values() if start in commits)
            repo.branches[branch] = of[: of.index(start) + 1]
        self.answer({}, 201)

    def add_fault(self, name: str) -> None:
        self.server.faults.append(name)
        self.answer({})

    # ---- Download ---------------------------------------------------------------------------------------------------

    def info(self, kind: str, name: str, revision: str | None) -> None:
        self.answer(self.about(name, self.repo(kind, name), revision or "main"))

    def about(self, name: str, repo: Repo, revision: str) -> dict:
        commit = repo.commit(revision)
        card, _, _ = validate(commit.card)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        about = {"_id": name, "id": name, "author": repo.owner, "sha": commit.oid, "private": repo.private}
        about |= {"createdAt": repo.branches["main"][0].date, "lastModified": commit.date}
        about |= {"tags": [*card.get("tags", []), *base_tags(card)], "cardData": card, "siblings": siblings}
        return about | {"gated": False, "disabled": False, "downloads": 0, "likes": 0}

    def list(self, kind: str) -> None:
        """Repositories that have every tag of ``filter``."""
        user, wanted = self.user(), parse_qs(urlsplit(self.path).query).get("filter", [])
        repos = {n: r for (k, n), r in self.server.repos.items() if k == kind and (not r.private or r.owner == user)}
        found = [self.about(name, repo, "main") for name, repo in repos.items()]
        found = [about for about in found if set(wanted) <= set(about["tags"])]
        self.answer(found[: int(self.query.get("limit", len(found)))])

    def tree(self, kind: str, name: str, revision: str, folder: str | None) -> None:
        commit = self.repo(kind, name).commit(revision)
        inside = f"{folder.rstrip('/')}/" if folder else ""
        files = {path: blob for path, blob in commit.files.items() if path.startswith(inside)}
        if inside and not files:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        found = _folders(path.removeprefix(inside) for path in files)
        entries = [{"type": "directory", "path": inside + path, "oid": commit.oid, "size": 0} for path in found]
        entries += [blob.describe(path) for path, blob in files.items()]
        if self.query.get("recursive", "false").lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(inside)]
        self.answer(_expanded(entries, commit))

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        commit = self.repo(kind, name).commit(revision)
        found = _folders(commit.files)
        entries = []
        for path in parse_qs(self.body.decode()).get("paths", []):
            if path in commit.files:
                entries.append(commit.files[path].describe(path))
            elif path in found:
                entries.append({"type": "directory", "path": path, "oid": commit.oid, "size": 0})
        self.answer(_expanded(entries, commit))

    def refs(self, kind: str, name: str) -> None:
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commits[-1].oid}
            for branch, commits in self.repo(kind, name).branches.items()
        ]
        self.answer({"branches": branches, "converts": [], "tags": []})

    def commits(self, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name)
        repo.commit(revision)
        told = [
            {"id": c.oid, "title": c.title, "message": "", "date": c.date, "authors": [{"user": repo.owner}]}
            for c in reversed(repo.branches.get(revision, []))
        ]
        self.answer(told)

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        commit = self.repo(kind, name).commit(revision)
        blob = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        oid, size = blob.oid, len(blob.content)
        headers |= {"ETag": f'"{oid}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(size)}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return self.answer(blob.content, 200, headers)
        first, last = int(part[1]), min(int(part[2] or size), size - 1)
        if first >= size:
            raise Refusal(416, "The range is not satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return self.answer(blob.content[first : last + 1], 206, headers)


def _apply(files: dict[str, Blob], key: str, value: dict, objects: dict[str, bytes]) -> None:
    """One line of a commit."""
    path = value.get("path")
    if key == "file":
        content = base64.b64decode(value["content"])
        if len(content) > LARGE:
            raise Refusal(400, f"{path} is too large for a regular file")
        files[path] = Blob(content, False)
    elif key == "lfsFile":
        if value["oid"] not in objects:
            raise Refusal(400, f"Your push was rejected: the LFS object of {path} was not uploaded")
        files[path] = Blob(objects[value["oid"]], True)
    elif key in ("deletedFile", "deletedFolder"):
        gone = [
            name
            for name in files
            if name == path or (key == "deletedFolder" and name.startswith(path.rstrip("/") + "/"))
        ]
        if not gone:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]


def _folders(paths) -> set[str]:
    return {"/".join(path.split("/")[:depth]) for path in paths for depth in range(1, path.count("/") + 1)}


def _expanded(entries: list[dict], commit: Commit) -> list[dict]:
    last = {"id": commit.oid, "title": commit.title, "date": commit.date}
    return [entry | {"lastCommit": last} for entry in entries]


REPO = r"/api/(models|datasets)/([^/]+/[^/]+)"
ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", REPO + r"/preupload/([^/]+)", "preupload"),
    ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/([0-9a-f]{64})/(\w+)", "lfs_put"),
    ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/lfs/verify", "lfs_verify"),
    ("POST", REPO + r"/commit/([^/]+)", "make_commit"),
    ("POST", REPO + r"/branch/([^/]+)", "make_branch"),
    ("POST", r"/faults/(\w+)", "add_fault"),
    ("GET", r"/api/(models|datasets)", "list"),
    ("GET", REPO + r"(?:/revision/([^/]+))?", "info"),
    ("GET", REPO + r"/tree/([^/]+)(?:/(.+))?", "tree"),
    ("POST", REPO + r"/paths-info/([^/]+)", "paths_info"),
    ("GET", REPO + r"/refs", "refs"),
    ("GET", REPO + r"/commits/([^/]+)", "commits"),
    ("GET|HEAD", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
)
