"""A small Hugging Face hub on loopback that speaks what huggingface_hub asks for: models are made, written and read.

Files are kept by git LFS (.safetensors, .png) or sent within a commit, as the real hub decides. Xet, its protocol for
chunks of files, is not spoken: programs are given HF_HUB_DISABLE_XET.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

LICENSES = ("apache-2.0", "mit", "cc-by-4.0")


class Hub:
    """A context manager; `endpoint` is its address, and `token` the one with which it may be written to.

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
        self._objects = {}  # of git LFS, by SHA-256
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
        if path == "/api/validate-yaml":
            return _validate(json.loads(body)["content"])
        if method == "PUT":
            self._objects[path.rpartition("/")[2]] = body
            return _said({})
        if not known:
            return _said({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith("/preupload/main"):
            return _preupload(json.loads(body)["files"])
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body)["objects"])
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", path):
            return self._commit(found[1], body)
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/main)?", path):
            about = {
                "id": found[1],
                "private": found[1] in self.private,
                "tags": [],
                "siblings": [],
            }
            return _said(about | {"sha": self._version(found[1])})
        return _said({"error": f"this hub does not know {method} {path}"}, 404)

    def _create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        address = {"url": f"{self.endpoint}/{name}"}
        if name in self.models:
            return _said(address, 409)
        self.models[name] = {}
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.private.add(name)
        return _said(address)

    def _batch(self, objects):
        """Where git LFS may send these objects."""
        for one in objects:
            one["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{one['oid']}"}}
        return _said({"transfer": "basic", "objects": objects})

    def _commit(self, name, body):
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.models[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self._objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.models[name][value["path"]] = content
        commit = self._version(name)
        where = f"{self.endpoint}/{name}/commit/{commit}"
        return _said({"success": True, "commitOid": commit, "commitUrl": where, "hookOutput": ""})

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


def _preupload(files):
    """Whether each file is kept by git LFS or sent within the commit."""
    for file in files:
        large = file["path"].endswith((".safetensors", ".png"))
        file["uploadMode"] = "lfs" if large else "regular"
        file["shouldIgnore"] = False
    return _said({"files": files})


def _validate(card):
    front = yaml.safe_load(card.split("---\n")[1])
    if front.get("license", LICENSES[0]) in LICENSES:
        return _said({"errors": [], "warnings": []})
    return _said({"errors": [{"message": f'"license" must be one of {LICENSES}'}], "warnings": []}, 400)


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
