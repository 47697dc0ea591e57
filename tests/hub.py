"""A small Hugging Face Hub on loopback: what the real client asks of it for models, and a count of the bytes that it sends.

Commits are kept in memory. Files are uploaded in the commit itself ("regular"), never by LFS or Xet. Faults are put in by tests.
"""

import atexit
import base64
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class LoopbackHub:
    """Repositories by id, each a list of commits `(sha, {path: bytes})`, and branches by name."""

    def __init__(self):
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.sent: Counter[str] = Counter()  # bytes of files, by path in their repository
        self.asked: list[str] = []  # "METHOD path"
        self.cut_after: dict[str, list[int]] = {}  # path in repository -> after how many bytes to hang up, a number a request
        hub = self

        class Handler(_Handler):
            def __init__(self, *args):
                self.hub = hub
                super().__init__(*args)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self._server.server_port}"

    def files(self, repo_id, revision="main"):
        """`{path: bytes}` at a branch or commit; None if there is no such repository or revision."""
        commits = self.commits.get(repo_id)
        return None if commits is None else commits.get(self.branches[repo_id].get(revision, revision))

    def sha(self, repo_id, revision="main"):
        return self.branches[repo_id].get(revision, revision)

    def create(self, repo_id):
        if repo_id not in self.commits:
            self.commits[repo_id], self.branches[repo_id] = {}, {}
            self.commit(repo_id, {})

    def commit(self, repo_id, changes, revision="main"):
        """Add a commit: `{path: bytes, or None to delete}`; returns its sha."""
        self.create(repo_id) if repo_id not in self.commits else None
        files = {**(self.files(repo_id, revision) or {}), **changes}
        files = {path: content for path, content in files.items() if content is not None}
        sha = secrets.token_hex(20)
        self.commits[repo_id][sha] = files
        self.branches[repo_id][revision] = sha
        return sha

    def forget_traffic(self):
        self.sent.clear()
        self.asked.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args):
        pass

    def answer(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code):
        self.answer({"error": code}, 404, X_Error_Code=code)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/(.+)|/tree/(.+?)(/.*)?)?", path):
            repo_id, revision, of_tree, folder = match.groups()
            files = self.hub.files(repo_id, revision or of_tree or "main")
            if files is None:
                return self.missing("RepoNotFound" if repo_id not in self.hub.commits else "RevisionNotFound")
            if folder:
                return self.missing("EntryNotFound")
            if of_tree:
                entries = [{"type": "file", "path": name, "size": len(body), "oid": _oid(body)} for name, body in files.items()]
                return self.answer(entries)
            sha = self.hub.sha(repo_id, revision or "main")
            return self.answer({"id": repo_id, "sha": sha, "siblings": [{"rfilename": name} for name in files], "private": False})
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self.send_file(*match.groups())
        return self.missing("RepoNotFound" if "/resolve/" in path or path.startswith("/api/models") else "EntryNotFound")

    def send_file(self, repo_id, revision, name):
        files = self.hub.files(repo_id, revision)
        if files is None:
            return self.missing("RepoNotFound" if repo_id not in self.hub.commits else "RevisionNotFound")
        if name not in files:
            return self.missing("EntryNotFound")
        body = files[name]
        headers = {"X_Repo_Commit": self.hub.sha(repo_id, revision), "ETag": f'"{_oid(body)}"', "Accept_Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", ""))
        status = 206 if start else 200
        if start:
            headers["Content_Range"] = f"bytes {start[1]}-{len(body) - 1}/{len(body)}"
            body = body[int(start[1]) :]
        cuts = self.hub.cut_after.get(name)
        if self.command == "GET" and cuts:
            cut = body[: cuts.pop(0)]
            self.send_response(status)
            for header, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(header.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(cut)
            self.hub.sent[name] += len(cut)
            self.close_connection = True
            return None
        if self.command == "GET":
            self.hub.sent[name] += len(body)
        return self.answer(body, status, **headers)

    def do_POST(self):
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
            existed = repo_id in self.hub.commits
            self.hub.create(repo_id)
            return self.answer({"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}, 409 if existed else 200)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/branch/(.+)", path):
            repo_id, branch = match.groups()
            existed = branch in self.hub.branches[repo_id]
            self.hub.branches[repo_id].setdefault(branch, self.hub.sha(repo_id))
            return self.answer({}, 409 if existed else 200)
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/([^/]+)", path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/([^/]+)", path):
            changes = {}
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    changes[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    changes[entry["value"]["path"]] = None
            repo_id, revision = match.groups()
            sha = self.hub.commit(repo_id, changes, revision)
            return self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}"})
        return self.missing("EntryNotFound")


def _oid(body):
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


# The only Hub that the tests, and the processes that they start, can reach. huggingface_hub reads these when it is imported, so this
# file is imported before.
HUB = LoopbackHub()
_HOME = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ |= {"HF_ENDPOINT": HUB.endpoint, "HF_HOME": _HOME, "HF_TOKEN": "hf_of_the_tests", "HF_HUB_DISABLE_TELEMETRY": "1"}
