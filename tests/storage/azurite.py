"""A real Azure blob server on loopback for tests: Azurite, from npm (`npm install -g azurite`)."""

import base64
import hashlib
import hmac
import secrets
import shutil
import subprocess
import time
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from typing import Self
from urllib.parse import urlencode

from tests.servers import free_port

PROGRAM = shutil.which("azurite-blob")
VERSION = "2023-11-03"


class Azurite:
    """The server in a process of its own; a context manager. `environment` has the variables that lead to it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.port, self._account = folder, free_port(), "naigntests"
        self._key = base64.b64encode(secrets.token_bytes(32)).decode()
        self.environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": self._account,
            "AZURE_STORAGE_ACCOUNT_KEY": self._key,
            "AZURE_STORAGE_ENDPOINT": self.endpoint(self.port),
        }

    def endpoint(self, port: int) -> str:
        return f"http://127.0.0.1:{port}/{self._account}"

    def __enter__(self) -> Self:
        assert PROGRAM
        command = [PROGRAM, "--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", str(self._folder)]
        command += ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
        account = {
            "AZURITE_ACCOUNTS": f"{self._account}:{self._key}",
            "PATH": str(Path(shutil.which("node") or "").parent),
        }
        self._process = subprocess.Popen(command, env=account, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.container("ready")
                return self
            except OSError:
                assert self._process.poll() is None and time.monotonic() < deadline, "no Azurite in 60 s"
                time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def container(self, name: str) -> str:
        """Create a container; returns "az://name"."""
        headers = {"x-ms-date": f"{datetime.now(UTC):%a, %d %b %Y %H:%M:%S} GMT", "x-ms-version": VERSION}
        signed = "".join(f"{key}:{value}\n" for key, value in headers.items())
        lines = "\n" * 12
        text = f"PUT{lines}{signed}/{self._account}/{self._account}/{name}\nrestype:container"
        headers["Authorization"] = f"SharedKey {self._account}:{self._sign(text)}"
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("PUT", f"/{self._account}/{name}?restype=container", headers=headers)
        assert connection.getresponse().status == 201
        return f"az://{name}"

    def reader(self) -> dict[str, str]:
        """The variables of one who may list and read, and nothing else: a shared access signature of the account."""
        until = f"{datetime.now(UTC) + timedelta(days=1):%Y-%m-%dT%H:%M:%SZ}"
        fields = {
            "sp": "rl",
            "ss": "b",
            "srt": "sco",
            "st": "",
            "se": until,
            "sip": "",
            "spr": "",
            "sv": VERSION,
            "ses": "",
        }
        text = "\n".join([self._account, *fields.values(), ""])
        token = urlencode({key: value for key, value in fields.items() if value} | {"sig": self._sign(text)})
        return {"AZURE_STORAGE_SAS_TOKEN": token, "AZURE_STORAGE_ACCOUNT_KEY": ""}

    def _sign(self, text: str) -> str:
        return base64.b64encode(hmac.digest(base64.b64decode(self._key), text.encode(), hashlib.sha256)).decode()
