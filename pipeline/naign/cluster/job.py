"""A job that `naign render` writes: the size of its cluster, its data, its run and its surroundings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from naign.cluster.place import read_hosts


@dataclass(kw_only=True, slots=True)
class Job:
    """Fields are the options of `naign render`, and the comments beside them their help."""

    data: str  # Packed data: s3://bucket/prefix, gs:// or az://; with --claim a path in that volume.
    run: str  # Where the run is kept, likewise.
    kind: Literal["job", "jobset"] = "job"  # The second needs JobSet.
    nodes: str = "1"  # Machines; 2:4 trains with two to four of them, as many as there are.
    gpus: int = 1  # GPUs of each; 0 trains on CPUs.
    engine: str = ""  # A name in launch/, such as zero2; default: DDP.
    image: str = ""  # Of launch/Dockerfile; default: naign:cuda, or naign:latest without GPUs.
    config: Path | None = None  # Settings of the run; default: the recommended recipe, configs/mnist.yaml.
    claim: str = ""  # A PersistentVolumeClaim, ReadWriteMany, that holds data and run instead of a bucket.
    name: str = ""  # Of the Job, its Service and its ConfigMaps; default: the last part of --run.
    service_account: str = ""  # Of the pods, where a role instead of a Secret gives access to the bucket.
    endpoint: str = ""  # Address of the S3 server, where it is not AWS's.
    region: str = "us-east-1"  # Of the bucket.

    def __post_init__(self) -> None:
        self.image = self.image or ("naign:cuda" if self.gpus else "naign:latest")
        self.name = self.name or self.run.rstrip("/").rpartition("/")[2]

    @property
    def hosts(self) -> tuple[int, int]:
        """The least and the most. Raises InputError."""
        return read_hosts("--nodes", self.nodes)

    @property
    def head(self) -> str:
        """The host name of the first pod."""
        role = "-train-0" if self.kind == "jobset" else ""
        return f"{self.name}{role}-0.{self.name}"
