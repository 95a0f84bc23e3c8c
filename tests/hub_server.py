"""A Hub on the loopback interface, with as much of the protocol as the unmodified huggingface_hub client needs for models.

In a test: `with HubServer(tokens={"hf_a": "user"}) as hub:` and a client process with HF_ENDPOINT=hub.url. By hand, in two terminals:

    python tests/hub_server.py --port 8123 --token hf_secret=user
    HF_ENDPOINT=http://127.0.0.1:8123 HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_secret python

Repositories, branches, tags, pull requests, commits (regular files, LFS in one part or several, deletions), private and gated repositories,
ETags with 304, ranges with 206, and faults on demand (`HubServer.fail`). Everything is kept in memory. There is no Xet storage: a client
that has hf_xet must be told HF_HUB_DISABLE_XET=1, or the server `lfs=()`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool = False

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\x00" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    sha: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, Blob]) -> Commit:
        text = json.dumps(
            [self.id, branch, self.refs.get(branch), message, {p: b.etag for p, b in files.items()}, len(self.commits)]
        )
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), message, files)
        self.commits[made.sha] = made
        self.refs[branch] = made.sha
        return made

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" the pattern is found in."""

    pattern: str
    kind: str
    """status: it is answered with that. cut: half of the request's or the answer's body, then the connection closes. stall: half of it,
    and then nothing, until `HubServer.release`. held: it is done, and the answer waits for that. lost: done, but no answer. short: half of
    the answer, as if that were all. garbled: other bytes."""
    times: int = 1
    status: int = 503


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **body: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body


class HubServer:
    """tokens: token -> user; a user writes in the namespace of that name. lfs: patterns of files that go through LFS, as *.safetensors do."""

    def __init__(
        self,
        tokens: dict[str, str] | None = None,
        *,
        port: int = 0,
        lfs: tuple[str, ...] = ("*.safetensors", "*.bin"),
        part_size: int | None = None,
    ) -> None:
        self.tokens, self.lfs, self.part_size = dict(tokens or {}), lfs, part_size
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.stalled, self.released = threading.Event(), threading.Event()
        self.lock = threading.RLock()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.cdn_url = f"http://localhost:{self.http.server_port}"  # another host to the client, as the real one's is

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fail(self, pattern: str, kind: str = "status", *, times: int = 1, status: int = 503) -> None:
        self.released.clear()
        self.faults.append(Fault(pattern, kind, times, status))

    def release(self) -> None:
        """Ends all faults, and lets the requests go that stand still."""
        self.faults.clear()
        self.released.set()
        self.stalled.clear()

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, *, private: bool = False, gated: bool = False) -> Repo:
        """A repository made on the server's side, with a first commit as the Hub makes one."""
        repo = self.repos[repo_id] = Repo(repo_id, private, gated)
        repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")})
        if files:
            self.write(repo_id, files)
        return repo

    def write(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commits files on the server's side, as if someone else had; returns the commit's id."""
        repo = self.repos[repo_id]
        blobs = {path: Blob(data, self.is_lfs(path)) for path, data in files.items()}
        return repo.commit(branch, "written on the server", {**repo.commits[repo.refs[branch]].files, **blobs}).sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.repos[repo_id].at(revision).files.items()}

    def is_lfs(self, path: str) -> bool:
        return any(fnmatch(path, pattern) for pattern in self.lfs)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # -- one request --

    def _serve(self) -> None:
        split = urlsplit(self.path)
        line = f"{self.command} {unquote(split.path)}"
        self.finish_later = False
        with self.hub.lock:
            self.hub.requests.append(line)
            self.fault = next((f for f in self.hub.faults if f.times > 0 and re.search(f.pattern, line)), None)
            if self.fault is not None:
                self.fault.times -= 1
        kind = self.fault.kind if self.fault is not None else None
        size = int(self.headers.get("Content-Length") or 0)
        if kind in ("cut", "stall") and size:
            self.rfile.read(size // 2)
            if kind == "stall":
                self._stand_still()
            return self._hang_up()
        body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(size)
        try:
            if kind == "status":
                raise Refused(self.fault.status, "", "the loopback Hub was told to fail here")
            self._route(split.path, parse_qs(split.query), body)
            if self.finish_later:  # without the Hub's lock: others are served meanwhile
                self._stand_still()
                self._hang_up()
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._json({"error": refused.message, **refused.body}, refused.status, {k: v for k, v in headers.items() if v})

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def _stand_still(self) -> None:
        self.hub.stalled.set()
        self.hub.released.wait(120)

    def _json(self, data: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(json.dumps(data).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        kind = self.fault.kind if self.fault is not None else None
        if kind == "lost":
            return self._hang_up()
        if kind == "held":
            self.finish_later = True
            return None
        if kind == "short" and self.command != "HEAD":
            body = body[: len(body) // 2]
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind in ("cut", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.finish_later = kind == "stall"
            return None if self.finish_later else self._hang_up()
        self.wfile.write(bytes(255 - byte for byte in body) if kind == "garbled" else body)

    # -- who may do what --

    def _user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        user = self.hub.tokens.get(given.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return user

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        user, repo = self._user(), self.hub.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        if repo is None or (repo.private and user != owner):
            # a private repository looks like none at all; without a token the status is 401 in both cases
            raise Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if repo.gated and user is None:
            raise Refused(401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        if write and user is None:
            raise Refused(401, "", "Invalid username or password.")
        if write and user != owner:
            raise Refused(403, "", f"You don't have the rights to write to {repo_id}")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # -- routes --

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        kind = self.headers.get("Content-Type", "")
        data = json.loads(body) if body and kind.endswith("json") and "ndjson" not in kind else None
        data = parse_qs(body.decode()) if "form-urlencoded" in kind else data
        with self.hub.lock:
            for methods, pattern, handler in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in methods.split():
                    args = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                    return handler(self, query=query, data=data, body=body, **args)
        raise Refused(404, "", f"the loopback Hub has no {self.command} {path}")

    def whoami(self, **_: object) -> None:
        user = self._user()
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        self._json({"type": "user", "name": user, "orgs": []})

    def create_repo(self, data: dict, **_: object) -> None:
        user = self._user()
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        repo_id = f"{data.get('organization') or user}/{data['name']}"
        if repo_id.split("/")[0] != user:
            raise Refused(403, "", f'You don\'t have the rights to create a model under the namespace "{repo_id.split("/")[0]}"')
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            raise Refused(409, "", "You already created this model repo", url=url)
        self.hub.create(repo_id, private=data.get("visibility") == "private" or bool(data.get("private")))
        self._json({"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self, **_: object) -> None:
        self._json({"errors": [], "warnings": []})

    def info(self, repo_id: str, query: dict, revision: str = "main", **_: object) -> None:
        repo = self._repo(repo_id)
        commit = self._commit(repo, revision)
        siblings = [
            {"rfilename": path} | ({"size": len(blob.data), "blobId": blob.git_oid} if "blobs" in query else {})
            for path, blob in sorted(commit.files.items())
        ]
        facts = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit.sha, "private": repo.private, "gated": repo.gated}
        self._json(facts | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "disabled": False})

    def refs(self, repo_id: str, **_: object) -> None:
        repo = self._repo(repo_id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in repo.refs.items()
            if not name.startswith("refs/")
        ]
        self._json({"branches": branches, "tags": [], "converts": []})

    def make_ref(self, repo_id: str, revision: str, data: dict | None, **_: object) -> None:
        repo = self._repo(repo_id, write=True)
        name = (data or {}).get("tag") or revision
        if name in repo.refs:
            raise Refused(409, "", f"Reference already exists: {name}")
        start = revision if (data or {}).get("tag") else (data or {}).get("startingPoint", "main")
        repo.refs[name] = self._commit(repo, start).sha
        self._json({})

    def _entries(self, files: dict[str, Blob]) -> Iterator[dict]:
        for path, blob in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid}
            yield entry | ({"lfs": {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}} if blob.lfs else {})

    def tree(self, repo_id: str, revision: str, query: dict, folder: str = "", **_: object) -> None:
        files = self._commit(self._repo(repo_id), revision).files
        prefix = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        if query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            folders = sorted({path[len(prefix) :].split("/")[0] for path in inside if "/" in path[len(prefix) :]})
            inside = {path: blob for path, blob in inside.items() if "/" not in path[len(prefix) :]}
            entries = [{"type": "directory", "path": prefix + name, "oid": "0" * 40, "size": 0} for name in folders]
        else:
            entries = []
        self._json(entries + list(self._entries(inside)))

    def paths_info(self, repo_id: str, revision: str, data: dict, **_: object) -> None:
        files = self._commit(self._repo(repo_id), revision).files
        self._json(list(self._entries({path: files[path] for path in data["paths"] if path in files})))

    def preupload(self, repo_id: str, revision: str, data: dict, query: dict, **_: object) -> None:
        files = self._commit(self._repo(repo_id, write="create_pr" not in query), revision).files
        answer = [
            {
                "path": item["path"],
                "uploadMode": "lfs" if self.hub.is_lfs(item["path"]) else "regular",
                "shouldIgnore": False,
                "oid": files[item["path"]].etag if item["path"] in files else None,
            }
            for item in data["files"]
        ]
        self._json({"files": answer})

    def lfs_batch(self, repo_id: str, data: dict, **_: object) -> None:
        self._repo(repo_id)
        objects = []
        for item in data["objects"]:
            actions = {}
            if item["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{item['oid']}"
                upload: dict = {"href": href}
                if self.hub.part_size is not None and item["size"] > self.hub.part_size:
                    parts = range(1, -(-item["size"] // self.hub.part_size) + 1)
                    header = {"chunk_size": str(self.hub.part_size), **{str(n): f"{href}/part/{n}" for n in parts}}
                    upload = {"href": f"{href}/complete", "header": header}
                actions = {"actions": {"upload": upload, "verify": {"href": f"{href}/verify"}}}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, body: bytes, **_: object) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "", "the object's SHA-256 is not its name")
        self.hub.objects[oid] = body
        self._answer(b"")

    def lfs_part(self, oid: str, number: str, body: bytes, **_: object) -> None:
        self.hub.parts[oid, int(number)] = body
        self._answer(b"", headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def lfs_complete(self, oid: str, data: dict, **_: object) -> None:
        self.lfs_put(oid, b"".join(self.hub.parts.pop((oid, part["partNumber"]), b"") for part in data["parts"]))

    def lfs_verify(self, oid: str, data: dict, **_: object) -> None:
        if len(self.hub.objects.get(oid, b"")) != data["size"]:
            raise Refused(404, "", "the object was not uploaded")
        self._json({})

    def commit(self, repo_id: str, revision: str, query: dict, body: bytes, **_: object) -> None:
        pull_request = "create_pr" in query
        repo = self._repo(repo_id, write=not pull_request)
        if self._user() is None:
            raise Refused(401, "", "Invalid username or password.")
        parent = self._commit(repo, revision)
        files, message = dict(parent.files), ""
        for line in filter(None, body.split(b"\n")):
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", parent.sha) != parent.sha:
                    raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, "", f"LFS pointer of {value['path']} points to no object")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        made = repo.commit(f"refs/pr/{number}" if pull_request else revision, message, files)
        answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{made.sha}"}
        self._json(answer | ({"pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/{number}"} if pull_request else {}))

    def resolve(self, repo_id: str, revision: str, path: str, **_: object) -> None:
        commit = self._commit(self._repo(repo_id), revision)
        headers = {"X-Repo-Commit": commit.sha}
        blob = commit.files.get(path)
        if blob is None:
            return self._json(
                {"error": "Entry not found"}, 404, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            )
        if blob.lfs:  # the content is elsewhere, and the ETag of the link is the content's
            headers |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-ETag": f'"{blob.etag}"'}
            self.hub.objects[blob.sha256] = blob.data
            return self._answer(b"", 302, headers | {"Location": f"{self.hub.cdn_url}/cdn/{blob.sha256}"})
        self._content(blob.data, blob.etag, headers)

    def cdn(self, oid: str, **_: object) -> None:
        if "Authorization" in self.headers:
            raise Refused(400, "", "a token was sent to the content network")
        self._content(self.hub.objects[oid], oid, {})

    def _content(self, data: bytes, etag: str, headers: dict[str, str]) -> None:
        headers = headers | {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if self.headers.get("If-None-Match", "").strip('"') == etag:
            return self._answer(b"", 304, headers)
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(data) - 1), len(data) - 1)
            if first > last:
                return self._answer(b"", 416, headers | {"Content-Range": f"bytes */{len(data)}"})
            return self._answer(data[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})
        self._answer(data, 200, headers)


_ID = r"(?P<repo_id>[^/]+/[^/]+)"
_MODEL = rf"/api/models/{_ID}"
ROUTES = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"{_MODEL}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"{_MODEL}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"{_MODEL}/(branch|tag)/(?P<revision>[^/]+)", _Handler.make_ref),
    ("POST", rf"{_MODEL}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("GET", rf"{_MODEL}/refs", _Handler.refs),
    ("GET", rf"{_MODEL}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("GET", rf"{_MODEL}(/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.lfs_put),
    ("PUT", r"/lfs/(?P<oid>\w+)/part/(?P<number>\d+)", _Handler.lfs_part),
    ("POST", r"/lfs/(?P<oid>\w+)/complete", _Handler.lfs_complete),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", _Handler.lfs_verify),
    ("GET HEAD", r"/cdn/(?P<oid>\w+)", _Handler.cdn),
    ("GET HEAD", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token", action="append", default=[], metavar="TOKEN=USER", help="may be given several times")
    args = parser.parse_args()
    with HubServer(dict(token.split("=", 1) for token in args.token), port=args.port) as hub:
        print(hub.url, flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
