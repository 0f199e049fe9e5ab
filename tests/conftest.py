"""What tests share: small packed data sets, and the real program started as a user starts it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run side by side: more threads than cores would make each of them slower."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The packed 8x8 digits in four shards a split."""
    from pipeline.data.shards import pack
    from pipeline.data.sources import load

    folder = str(tmp_path_factory.mktemp("digits"))
    pack(load("digits"), folder, shards=4, progress=False)
    return folder


@pytest.fixture(scope="session")
def points(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A packed 2-D toy set in four shards a split."""
    from pipeline.data.shards import pack
    from pipeline.data.sources import load

    folder = str(tmp_path_factory.mktemp("points"))
    pack(load("toy2d:gaussians"), folder, shards=4, progress=False)
    return folder


SMALL = [
    *("--match.round=256", "--match.ratio=2", "--match.block=64", "--train.batch=32", "--train.warmup=256"),
    *("--train.threads=1", "--model.width=8", "--model.code=16", "--report.pictures=0"),
]
"""A network and rounds so small that a round takes a fraction of a second on the digits."""

Program = Callable[..., subprocess.CompletedProcess[str]]


def environment(**more: str) -> dict[str, str]:
    """The environment of a started program: this checkout first on the path, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


def train_command(*options: str, ranks: int = 1) -> list[str]:
    """The command line that starts the main job, alone or on several gloo ranks."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    if ranks > 1:
        launcher += ["--config_file", str(ROOT / "launch/cpu.yaml"), "--num_processes", str(ranks)]
        launcher += ["--main_process_port", "0"]
    return [*launcher, str(ROOT / "pipeline/train.py"), *options]


@pytest.fixture
def train(tmp_path: Path) -> Program:
    """Run the main job in an empty folder to its end."""

    def run(*options: str, ranks: int = 1, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = train_command(*options, ranks=ranks)
        return subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


@pytest.fixture
def naign(tmp_path: Path) -> Program:
    """Run the command line program in an empty folder."""

    def run(*options: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline.cli", *options]
        return subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
        )

    return run
