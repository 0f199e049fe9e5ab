"""A small Hugging Face hub on loopback that speaks what huggingface_hub asks for to read models.

Xet, its protocol for chunks of files, is not spoken: programs are given HF_HUB_DISABLE_XET.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """A context manager; `endpoint` is its address, and `token` the one with which private models may be read.

    `environment` holds the variables with which programs find it, and nobody's own login and cache.
    `models` holds the files of each model by path; `private` the names of those that are read with the token only;
    `requests` what was asked for, as "METHOD /path". With `broken` every request is answered by that status.
    """

    def __init__(self, home):
        self.token = "hf_a-token-that-nothing-may-print"
        self.models = {}
        self.private = set()
        self.requests = []
        self.broken = 0
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_CACHE": str(home / "cache"),
            "HF_HUB_DISABLE_XET": "1",
        }
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method, path, body, known):
        """Status, headers and body; `known`: the request bears the token."""
        self.requests.append(f"{method} {path}")
        if self.broken:
            return self.broken, {}, b"{}"
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[\w.-]+/(.+)", path):
            return self._resolve(found[1], found[2], known)
        if not known:
            return _said({"error": "Invalid username or password."}, 401)
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/main)?", path):
            about = {
                "id": found[1],
                "private": found[1] in self.private,
                "tags": [],
                "siblings": [],
            }
            return _said(about | {"sha": self._version(found[1])})
        return _said({"error": f"this hub does not know {method} {path}"}, 404)

    def _resolve(self, name, file, known):
        if name not in self.models or (name in self.private and not known):
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
        commit = {"X-Repo-Commit": self._version(name)}
        content = self.models[name].get(file)
        if content is None:
            return 404, commit | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b""
        return 200, commit | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content

    def _version(self, name):
        return hashlib.sha1(repr(sorted(self.models[name].items())).encode()).hexdigest()


def _said(content, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        known = self.headers.get("Authorization") == f"Bearer {self.state.token}"
        status, headers, content = self.state.answer(self.command, self.path.partition("?")[0], body, known)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST

    def log_message(self, *_):
        pass
