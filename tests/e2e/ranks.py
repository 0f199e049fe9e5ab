"""The main job on several ranks without a launcher between, so that each rank's signals and exit codes are its own."""

import contextlib
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import ROOT, forked
from tests.distributed.ranks import free_port


@dataclass(slots=True)
class Job:
    """A run under way. What rank k says is in rank-k.log."""

    folder: Path
    world: int
    options: tuple[str, ...]
    places: tuple[str, ...] = ()
    """Folders that the ranks are in, below `folder`; none: all are in it."""
    program: str = "pipeline/train.py"
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self):
        address = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(self.world),
        }
        for rank in range(self.world):
            numbers = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(self.world),
            }
            with self.log(rank).open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(ROOT / self.program), *self.options],
                        cwd=self.folder / (self.places[rank] if self.places else ""),
                        env=forked(ACCELERATE_USE_CPU="true", **(address | numbers if self.world > 1 else {})),
                        stdout=log,
                        stderr=log,
                    )
                )
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, rank):
        return self.folder / f"rank-{rank}.log"

    def said(self, rank=0):
        return self.log(rank).read_text(errors="replace")

    @property
    def running(self):
        return all(process.poll() is None for process in self.processes)

    def wait_for(self, happened, seconds=60):
        end = time.monotonic() + seconds
        while not happened():
            assert self.running and time.monotonic() < end, "\n".join(map(self.said, range(self.world)))
            time.sleep(0.005)

    def phases(self, rank=0):
        """What the threads of a rank say that they are doing: take, match, fit, report, checkpoint; write, upload."""
        names = set()
        for task in Path(f"/proc/{self.processes[rank].pid}/task").glob("*/comm"):
            with contextlib.suppress(OSError):  # a thread that ended meanwhile
                names.add(task.read_text().strip())
        return {name.removeprefix("naign ") for name in names if name.startswith("naign ")}

    def ends(self, *codes, within=60):
        """All ranks end with these codes, or all with this one, within so many seconds."""
        if len(codes) == 1:
            codes *= self.world
        assert self.ended(within) == [*codes], self.said()

    def ended(self, seconds=60):
        """The exit codes of all ranks, which must come within so many seconds."""
        end = time.monotonic() + seconds
        return [process.wait(timeout=max(0.01, end - time.monotonic())) for process in self.processes]
