"""A model hub on 127.0.0.1 for tests: it serves and takes repositories, misbehaves on request and keeps a log."""

import base64
import hashlib
import json
import re
import threading
import time
import types
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.utils._http
import pytest
from huggingface_hub import constants, file_download


@dataclass
class Request:
    """One answered request: what was asked for and how much of a body went out."""

    method: str
    path: str
    range: str | None
    status: int = 0
    sent_bytes: int = 0
    token: str | None = None


@dataclass
class FakeHub:
    """Use as a context manager; url is the endpoint. Knobs may be set at any time.

    cut: file name -> bytes after which the connection is cut, once. refuse: repository -> (status, error code).
    down: every answer is status 500. delay_s: before each chunk of a body. tokens: token -> owner whose repositories it may
    write. public: repositories that are not private, of those that were made here. bad_card: what is wrong with every card.
    """

    cut: dict[str, int] = field(default_factory=dict)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    down: bool = False
    delay_s: float = 0.0
    requests: list[Request] = field(default_factory=list)
    # repository -> commit -> files
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict, repr=False)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    public: set[str] = field(default_factory=set)
    bad_card: str | None = None
    uploaded: dict[str, bytes] = field(default_factory=dict, repr=False)  # SHA-256 -> content, before a commit names it

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def stand_in(self, patch: pytest.MonkeyPatch, home: Path, token: str | None = None) -> None:
        """Be the hub of this process, whose cache is in `home`, with no token but this one."""
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        # Its retries wait for seconds; where a version keeps them elsewhere, they do.
        impatient = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        for module in (file_download, huggingface_hub.utils._http):
            patch.setattr(module, "time", impatient, raising=False)
        if token is None:
            patch.delenv("HF_TOKEN", raising=False)
        else:
            patch.setenv("HF_TOKEN", token)

    def files_of(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        return self.commits[repo_id][self.branches[repo_id][branch]]

    def add(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Push a commit with exactly these files to a branch; return the commit."""
        digest = hashlib.sha1(repo_id.encode())
        for name in sorted(files):
            digest.update(name.encode() + hashlib.sha1(files[name]).digest())
        commit = digest.hexdigest()
        self.commits.setdefault(repo_id, {})[commit] = dict(files)
        self.branches.setdefault(repo_id, {})[branch] = commit
        return commit

    def fetched(self) -> list[str]:
        """The names of the files that were sent, to the end, sorted, each once."""
        whole = (r for r in self.gets() if not r.range or r.range.endswith("-"))
        downloads = (re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", request.path) for request in whole)
        return sorted({match[1] for match in downloads if match})

    def gets(self, name: str | None = None) -> list[Request]:
        """The GET requests, all or those of one file, in order."""
        return [r for r in self.requests if r.method == "GET" and (name is None or r.path.endswith(f"/{name}"))]

    def find(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches[repo_id].get(revision, revision)
        files = self.commits[repo_id].get(commit)
        return None if files is None else (commit, files)


class _Handler(BaseHTTPRequestHandler):
    owner: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    # What uploads call: a repository, a branch, the card's check, large files beside the commit, the commit.

    def _take(self) -> None:
        hub, path = self.owner, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._request = Request(self.command, path, None)
        hub.requests.append(self._request)
        if hub.down:
            return self._send(500, b"down")
        if self.command == "PUT" and path.startswith("/large/"):
            hub.uploaded[path.rpartition("/")[2]] = body
            return self._send(200, b"")
        if path == "/api/validate-yaml":
            errors = [{"message": hub.bad_card}] if hub.bad_card else []
            return self._reply({"errors": errors, "warnings": []}, 400 if errors else 200)
        owner = hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        content = [json.loads(line) for line in body.splitlines()]
        if path == "/api/repos/create":
            return self._create(owner, content[0])
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git/info)?/(branch|preupload|commit|lfs)/(.+)", path)
        if match is None or match[1] not in hub.commits:
            return self._send(404, b"no repository", {"X-Error-Code": "RepoNotFound"})
        if owner != match[1].partition("/")[0]:
            return self._send(403, b"forbidden")
        return getattr(self, f"_take_{match[2]}")(match[1], match[3], content)

    def _create(self, owner: str | None, wanted: dict[str, str]) -> None:
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if owner != wanted["organization"]:
            return self._send(401 if owner is None else 403, b"forbidden")
        if repo_id in self.owner.commits:
            return self._reply({"url": f"{self.owner.url}/{repo_id}"}, 409)
        self.owner.add(repo_id, {".gitattributes": b""})
        if wanted.get("visibility") != "private" and wanted.get("private") is not True:
            self.owner.public.add(repo_id)
        return self._reply({"url": f"{self.owner.url}/{repo_id}"})

    def _take_branch(self, repo_id: str, branch: str, content: list[dict[str, object]]) -> None:
        branches = self.owner.branches[repo_id]
        if branch in branches:
            return self._send(409, b"exists")
        branches[branch] = branches["main"]
        return self._send(200, b"{}")

    def _take_preupload(self, repo_id: str, revision: str, content: list[dict[str, list[dict[str, object]]]]) -> None:
        names = [str(file["path"]) for file in content[0]["files"]]
        modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
        self._reply({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})

    def _take_lfs(self, repo_id: str, rest: str, content: list[dict[str, list[dict[str, object]]]]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.owner.url}/large/{one['oid']}", "header": {}}}}
            for one in content[0]["objects"]
        ]
        self._reply({"transfer": "basic", "objects": objects})

    def _take_commit(self, repo_id: str, branch: str, content: list[dict[str, dict[str, str]]]) -> None:
        found = self.owner.find(repo_id, branch)
        if found is None:
            return self._send(404, b"no revision", {"X-Error-Code": "RevisionNotFound"})
        files = dict(found[1])
        for line in content:
            value = line["value"]
            if line["key"] == "file":  # type: ignore[comparison-overlap]
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":  # type: ignore[comparison-overlap]
                files[value["path"]] = self.owner.uploaded[value["oid"]]
        commit = self.owner.add(repo_id, files, branch)
        return self._reply({"commitUrl": f"{self.owner.url}/{repo_id}/commit/{commit}", "commitOid": commit})

    def _reply(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self) -> None:
        hub, path = self.owner, unquote(urlsplit(self.path).path)
        self._request = Request(self.command, path, self.headers.get("Range"))
        self._request.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        hub.requests.append(self._request)
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = info or file
        if hub.down:
            return self._send(500, b"down")
        if match is None:
            return self._send(404, b"no such page")
        repo_id = match[1]
        if repo_id in hub.refuse:
            status, code = hub.refuse[repo_id]
            return self._send(status, b"refused", {"X-Error-Code": code} if code else {})
        if repo_id not in hub.commits:
            return self._send(404, b"no repository", {"X-Error-Code": "RepoNotFound"})
        found = hub.find(repo_id, (info[3] if info else match[2]) or "main")
        if found is None:
            return self._send(404, b"no revision", {"X-Error-Code": "RevisionNotFound"})
        if info:
            return self._send_info(repo_id, info[2], *found)
        return self._send_file(match[3], *found)

    def _send_info(self, repo_id: str, kind: str | None, commit: str, files: dict[str, bytes]) -> None:
        if kind == "tree":
            content: object = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
        else:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            content = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
            content["private"] = repo_id not in self.owner.public
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send_file(self, name: str, commit: str, files: dict[str, bytes]) -> None:
        if name not in files:
            return self._send(404, b"no file", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._send(200, data, headers, name)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data) - 1) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._send(206, data[start:stop], headers, "" if wanted[2] else name)  # cut: of downloads only

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, name: str = "") -> None:
        self._request.status = status
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.owner.cut.pop(name, len(body))
        step = 1 << 16
        for start in range(0, min(limit, len(body)), step):
            chunk = body[start : min(start + step, limit)]
            time.sleep(self.owner.delay_s)
            try:
                self.wfile.write(chunk)
            except OSError:  # the client is gone
                break
            self._request.sent_bytes += len(chunk)
        if limit < len(body):
            self.close_connection = True

    do_GET = do_HEAD = _answer
    do_POST = do_PUT = _take
