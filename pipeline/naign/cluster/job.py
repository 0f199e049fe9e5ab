"""A job that `naign render` writes: the size of its cluster, its data, its run and its surroundings."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True, slots=True)
class Job:
    """Fields are the options of `naign render`, and the comments beside them their help."""

    data: str  # Packed data: s3://bucket/prefix.
    run: str  # Where the run is kept: s3://bucket/prefix.
    nodes: int = 1  # Machines.
    gpus: int = 1  # GPUs of each; 0 trains on CPUs.
    image: str = "naign:cuda"  # Of launch/Dockerfile.
    config: Path | None = None  # Settings of the run; default: the recommended recipe, configs/mnist.yaml.
    name: str = ""  # Of the Job, its Service and its ConfigMaps; default: the last part of --run.
    service_account: str = ""  # Of the pods, where a role instead of a Secret gives access to the bucket.
    endpoint: str = ""  # Address of the S3 server, where it is not AWS's.
    region: str = "us-east-1"  # Of the bucket.

    def __post_init__(self) -> None:
        self.name = self.name or self.run.rstrip("/").rpartition("/")[2]

    @property
    def ranks(self) -> int:
        return self.nodes * max(1, self.gpus)
