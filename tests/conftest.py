"""What tests share: small packed data sets, a real S3 server, and the real program started as a user starts it."""

import contextlib
import dataclasses
import os
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from naign.data.format.writer import pack
from naign.data.sources.catalog import load
from naign.model.naign import NAIGN
from naign.model.networks import NetworkConfig, build_network
from tests import forks
from tests.data.numbered import numbered
from tests.hub import Hub
from tests.proxy import FaultProxy
from tests.servers import S3Server

ROOT = Path(__file__).parent.parent
PYTHONPATH = os.pathsep.join([str(ROOT / "pipeline"), str(ROOT)])
subprocess.Popen = forks.Popen  # type: ignore[misc]  # the same, but for programs with the environment of forked()


LONG = ("hosts/test_job.py", "hosts/test_slurm.py", "e2e/test_kills.py", "e2e/test_restarts.py", "release/")
LONG += ("test_benchmarks.py", "e2e/", "hosts/", "test_tables.py", "data/test_faults.py", "distributed/")
"""Files that take longest, the longest first."""


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[None]:
    """Their folder on the path, as it is where one is started."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest-xdist, which are started later, share a server: its imports take ten seconds and 0.5 GB."""
    if getattr(config.option, "numprocesses", None):
        forks.server()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: the last tests, which workers share out among themselves, are short."""

    def turn(item: pytest.Item) -> int:
        name = item.path.relative_to(ROOT / "tests").as_posix()
        return next((number for number, long in enumerate(LONG) if name.startswith(long)), len(LONG))

    items.sort(key=turn)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run side by side: more threads than cores would make each of them slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the first precision and device of a process: the next file of tests may ask for others."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The packed 8x8 digits in four shards a split."""
    folder = str(tmp_path_factory.mktemp("digits"))
    pack(load("digits"), folder, shards=4)
    return folder


@pytest.fixture(scope="session")
def points(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A packed 2-D toy set in four shards a split."""
    folder = str(tmp_path_factory.mktemp("points"))
    pack(load("toy2d:gaussians"), folder, shards=4)
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One SeaweedFS for all tests of this process; its log is in its folder."""
    with S3Server(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, which this process and those it starts find through the environment, and nothing but it."""
    from naign.storage.s3_client import forget_clients

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    forget_clients()
    yield s3_server
    forget_clients()


@pytest.fixture
def bucket(s3: S3Server) -> Iterator[str]:
    """A new bucket for this test, as "s3://name"."""
    from botocore.exceptions import ClientError

    name = f"bucket-{secrets.token_hex(8)}"
    yield s3.bucket(name)
    with contextlib.suppress(ClientError):  # the test may have removed it
        s3.client().delete_bucket(Bucket=name)  # SeaweedFS deletes what is in it


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server, which stands in the environment in the server's place. No faults at first."""
    from naign.storage.s3_client import forget_clients

    with FaultProxy("127.0.0.1", s3.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        forget_clients()
        yield proxy


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub for this process, and for programs with the environment of `Hub.environment`; the login is its token."""
    from huggingface_hub import constants

    with Hub(tmp_path / "hub-home") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", hub.environment["HF_HUB_CACHE"])
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", hub.environment["HF_TOKEN_PATH"])
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


SMALL = [
    *("--match.round=256", "--match.ratio=2", "--match.block=64", "--train.batch=32", "--train.warmup=256"),
    *("--train.threads=1", "--train.precision=fp32", "--model.width=8", "--model.code=16", "--report.pictures=0"),
    *("--prior.name=none", "--objective.imle=0.3"),
]
"""A network and rounds so small that a round takes a fraction of a second on the digits."""


@pytest.fixture(scope="session")
def small(digits: str) -> list[str]:
    """SMALL, on the digits."""
    return [f"--data.path={digits}", *SMALL]


Program = Callable[..., subprocess.CompletedProcess[str]]


def environment(**more: str) -> dict[str, str]:
    """The environment of a started program: this checkout first on the path, one thread."""
    return {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


def forked(**more: str) -> dict[str, str]:
    """The environment of a program whose start is not what the test is about: see tests/forks.py."""
    server = forks.server()
    return environment(**({forks.SERVER: server} if server else {}), **more)


def ended_as_bad_input(stderr: str) -> bool:
    """Whether torch's agent names code 2. It does not where its own clean-up fails: os.killpg finds no process."""
    return "exitcode  : 2" in stderr or ("train: error: " in stderr and "ProcessLookupError" in stderr)


def train_command(*options: str, ranks: int = 1) -> list[str]:
    """The command line that starts the main job, alone or on several gloo ranks."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if ranks > 1:
        launcher += ["--config_file", str(ROOT / "launch/cpu.yaml"), "--num_processes", str(ranks)]
        launcher += ["--main_process_port", "0"]
    return [*launcher, str(ROOT / "pipeline/train.py"), *options]


def direct_command(*options: str) -> list[str]:
    """The command line of the main job without a launcher."""
    return [sys.executable, str(ROOT / "pipeline/train.py"), *options]


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """The main job without a launcher between, so that a signal reaches it."""
    return subprocess.Popen(
        direct_command(*options),
        cwd=folder,
        env=forked(),
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def train(tmp_path: Path) -> Program:
    """Run the main job in an empty folder to its end; one rank without a launcher, unless asked."""
    from tests.programs import execute

    def run(*options: str, ranks: int = 1, launcher: bool = False) -> subprocess.CompletedProcess[str]:
        command = train_command(*options, ranks=ranks) if launcher or ranks > 1 else direct_command(*options)
        return execute(command, tmp_path)

    return run


@pytest.fixture
def train_thrice(train: Program, tmp_path: Path) -> Callable[..., None]:
    """Train eight rounds with some options: in `run`, in `ranks` on two ranks, and in `stopped` from the fourth on."""

    def run(*options: str) -> None:
        options = (*options, "--checkpoint.rounds=1", "--checkpoint.keep=0")
        for name, ranks in (("run", 1), ("ranks", 2), ("stopped", 1)):
            if name == "stopped":
                shutil.copytree(tmp_path / "run", tmp_path / name)
                for later in sorted((tmp_path / name / "checkpoints").iterdir())[4:]:
                    shutil.rmtree(later)
            done = train(*options, f"--run.path={name}", ranks=ranks)
            assert done.returncode == 0, done.stderr

    return run


@pytest.fixture
def naign(tmp_path: Path) -> Program:
    """Run the command line program in an empty folder; its words are given as a line, or one by one."""
    from tests.programs import execute

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        if len(words) == 1:
            words = tuple(shlex.split(words[0]))
        command = [sys.executable, "-m", "naign.cli", *words]
        return execute(command, tmp_path)

    return run


@pytest.fixture
def packed(tmp_path: Path) -> str:
    """23 training images in 4 shards of 5, 6, 6, 6; 5 test images in 4 shards."""
    path = str(tmp_path / "packed")
    pack(numbered(), path, shards=4)
    return path


@pytest.fixture(scope="session")
def save_untrained() -> Callable[..., str]:
    """Writes a model as training would export it, weights still random, and returns its folder."""

    def save(
        folder: Path,
        *,
        data: str | None,
        shape: tuple[int, ...],
        config: NetworkConfig,
        dataset: str | None = None,
        encoder: str | None = None,
    ) -> str:
        torch.manual_seed(0)
        metadata: dict[str, Any] = {
            "shape": list(shape),
            "latents": {"name": "gaussian"},
            "prior": {"name": "none"},
            "model": dataclasses.asdict(config),
        }
        metadata |= {"seed": 7, "images_seen": 12_345, "config": {"data": {"path": data}} if data else {}}
        metadata |= {"dataset": dataset} if dataset else {}
        metadata["config"] |= {"objective": {"encoder": encoder}} if encoder else {}
        NAIGN(build_network(config, shape), metadata).save_pretrained(folder)
        return str(folder)

    return save
