"""A double of the Hub's HTTP API for models, on this machine: create, preupload, LFS batch, commit, tree, resolve.

It speaks what huggingface_hub's client speaks without Xet, keeps everything in memory, and logs what was asked of it.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

# Tokens: who they belong to, and whether they may write.
TOKENS = {"hf_writer": ("user", True), "hf_reader": ("user", False), "hf_other": ("other", True)}
LARGE = (".safetensors", ".png")


class Repo:
    """Branches of commits, each a dict of files."""

    def __init__(self, owner: str, private: bool):
        self.owner, self.private, self.pull_requests = owner, private, 0
        self.branches: dict[str, list[tuple[str, dict[str, bytes]]]] = {"main": []}
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(branch.encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        digest.update(str(len(self.branches[branch])).encode())
        self.branches[branch].append((digest.hexdigest(), files))
        return digest.hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = [commit for branch in self.branches.values() for commit in branch]
        return next((commit for commit in commits if commit[0] == revision), None)


class Refused(Exception):
    """Ends a request with a status and the headers by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **content: str):
        super().__init__(message)
        self.status, self.code, self.content = status, code, {"error": message} | content


class Hub(ThreadingHTTPServer):
    """`with Hub() as hub:` listens on `hub.url`; `hang_after` LFS uploads it answers no further one."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str, int]] = []
        self.hang_after: int | None = None
        self.hanging, self.release = threading.Event(), threading.Event()
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.release.set()
        self.shutdown()
        self.server_close()

    def uploads(self) -> list[str]:
        """The LFS objects that were sent, in order."""
        return [path.rpartition("/")[2] for method, path, _ in self.log if method == "PUT"]


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else blob(content)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments):
        pass

    def handle_one(self):
        length, body = self.headers.get("Content-Length"), b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        elif length:
            body = self.rfile.read(int(length))
        address = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(address.path), urllib.parse.parse_qs(address.query)
        try:
            for method, pattern, handler in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    with self.server.lock:
                        answer = handler(self, *found.groups(), body=body, query=query)
                    break
            else:
                raise Refused(404, f"no endpoint {self.command} {path}")
            self.answer(200, *(answer if isinstance(answer, tuple) else (answer, {})))
        except Refused as refused:
            headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
            self.answer(refused.status, refused.content, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def answer(self, status: int, content, headers: dict[str, str]):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        with self.server.lock:
            self.server.log.append((self.command, urllib.parse.unquote(self.path), status))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if status == 200 else None
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            data, status = data[first : last + 1], 206
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def user(self, write: bool = False) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in TOKENS:
            raise Refused(401, "Invalid username or password.")
        name, may_write = TOKENS[token]
        if write and not may_write:
            raise Refused(403, "You don't have the rights to write with this token")
        return name

    def repo(self, name: str, write: bool = False, create_pr: bool = False) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.user() != repo.owner):
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write and self.user(write=True) != repo.owner and not create_pr:
            raise Refused(403, f"You don't have the rights to write to {name}")
        return repo

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        found = self.repo(name).at(revision)
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def create(self, body, query):
        asked, user = json.loads(body), self.user(write=True)
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if owner != user:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        if name in self.server.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.server.url}/{name}")
        self.server.repos[name] = Repo(owner, asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": f"{self.server.url}/{name}", "name": name, "id": name}

    def validate(self, body, query):
        """What the Hub is known to check of the metadata of a card, in part."""
        content = json.loads(body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", content, re.S)
        try:
            data = yaml.safe_load(front[1]) if front else {}
        except yaml.YAMLError as error:
            raise Refused(400, f"Invalid YAML: {error}") from None
        errors = [
            f"{key} must be a string" for key in ("license", "pipeline_tag") if not isinstance(data.get(key, ""), str)
        ]
        if data.get("base_model_relation", "finetune") not in ("finetune", "adapter", "merge", "quantized"):
            errors.append("base_model_relation")
        for model in data.get("model-index", ()):
            for result in model["results"]:
                errors += [f"model-index: {key}" for key in ("task", "dataset", "metrics") if not result.get(key)]
        if errors:
            raise Refused(400, "; ".join(errors))
        return {"errors": [], "warnings": []}

    def preupload(self, name, revision, body, query):
        repo = self.repo(name, write=True, create_pr="create_pr" in query)
        _, files = repo.at(revision) or (None, {})
        return {
            "files": [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False, "oid": self.oid(files, file["path"])}
                for file in json.loads(body)["files"]
            ]
        }  # fmt: skip

    def oid(self, files, path):
        return etag(path, files[path]) if path in files else None

    def batch(self, name, body, query):
        self.repo(name)
        entries = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}},
                    "verify": {"href": f"{self.server.url}/lfs-verify", "header": {}},
                }
            entries.append(entry)
        return {"transfer": "basic", "objects": entries}

    def store(self, oid, body, query):
        if self.server.hang_after is not None and len(self.server.objects) >= self.server.hang_after:
            self.server.hanging.set()
            self.server.lock.release()
            self.server.release.wait(60)
            self.server.lock.acquire()
            raise Refused(400, "interrupted")
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the content has another sha256")
        self.server.objects[oid] = body
        return {}

    def verify(self, body, query):
        if json.loads(body)["oid"] not in self.server.objects:
            raise Refused(404, "no such object")
        return {}

    def commit(self, name, revision, body, query):
        repo = self.repo(name, write=True, create_pr="create_pr" in query)
        _, files = self.files(name, revision)
        files = dict(files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refused(400, f"{value['path']} points to an object that was not uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] != "header":
                raise Refused(400, f"this double does not know the operation {entry['key']}")
        answer = {"success": True, "hookOutput": ""}
        if "create_pr" in query:
            repo.pull_requests += 1
            revision = f"refs/pr/{repo.pull_requests}"
            repo.branches[revision] = []
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{repo.pull_requests}"
        elif revision not in repo.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        sha = repo.commit(revision, files)
        return answer | {"commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"}

    def branch(self, name, branch, body, query):
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise Refused(409, "Reference already exists")
        repo.branches[branch] = list(repo.branches["main"])
        return {}

    def info(self, name, revision="main", *, body, query):
        sha, files = self.files(name, revision or "main")
        times = dict.fromkeys(("createdAt", "lastModified"), "2026-01-01T00:00:00.000Z")
        siblings = [{"rfilename": path} for path in files]
        private = self.repo(name).private
        return {"_id": "0", "id": name, "sha": sha, "private": private, "tags": [], "siblings": siblings} | times

    def tree(self, name, revision, body, query):
        entries = []
        for path, content in sorted(self.files(name, revision)[1].items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": etag(path, content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries

    def resolve(self, name, revision, path, body, query):
        sha, files = self.files(name, revision)
        if path not in files:
            raise Refused(404, f"Entry not found: {path}", "EntryNotFound")
        headers = {"ETag": f'"{etag(path, files[path])}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        return files[path], headers | {"Content-Type": "application/octet-stream"}


NAME = r"([^/]+/[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", lambda h, **_: {"type": "user", "name": h.user(), "orgs": []}),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(\w+)", Handler.store),
    ("POST", "/lfs-verify", Handler.verify),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("GET", rf"/api/models/{NAME}", Handler.info),
    ("GET", rf"/api/models/{NAME}/revision/(.+)", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+|refs/pr/\d+)", Handler.tree),
    ("GET HEAD", rf"/{NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", Handler.resolve),
)
