"""Contenders of data.py that are libraries with formats of their own, in a Python that need not have this project.

Each has a reader, and a writer that makes its files of the tars.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from data_job import Item, Job, Read, Record, tar_samples


@dataclass(kw_only=True, slots=True, frozen=True)
class Peer:
    """A library whose readers run in a Python of its own, on files that `write ...` makes of the tars."""

    package: str
    module: str
    files: str
    """Which of its files hold images."""


PEERS = {
    "mosaic": Peer(package="mosaicml-streaming", module="streaming", files="*.mds"),
    "litdata": Peer(package="litdata", module="litdata", files="*.bin"),
    "energon": Peer(package="megatron-energon", module="megatron", files="*.tar"),
}


def mosaic(job: Job) -> Read:
    """Its png and jpeg columns decode by the same call of Pillow, but could not be written with the same bytes.

    It may fetch the whole set ahead: the less it may, the longer it waits between polls, and by its default it gives a
    tenth to a third as many small images a second.
    """
    from PIL import Image
    from streaming import StreamingDataset  # type: ignore[import-not-found]
    from streaming.base.util import clean_stale_shared_memory  # type: ignore[import-not-found]

    clean_stale_shared_memory()

    def read() -> Iterator[Item]:
        with tempfile.TemporaryDirectory() as cache:
            where = {"remote": job.path, "local": cache} if job.path.startswith("s3://") else {"local": job.path}
            dataset = StreamingDataset(**where, shuffle=False, batch_size=256, predownload=job.images)
            for sample in dataset:
                yield 1, 0, np.asarray(Image.open(io.BytesIO(sample["image"])))

    return read


def shard_size(job: Job) -> int:
    """Bytes with which a peer's shards are about as many as the tars."""
    size = sum(len(data) + 24 for data, _ in tar_samples(job))
    return max(1 << 16, -(-size // len(job.shards)))


def write_mosaic(job: Job) -> Read:
    """No contender: writes the tars' samples, byte for byte, as MDS shards in `path`."""
    from streaming import MDSWriter

    def read() -> Iterator[Item]:
        columns = {"image": "bytes", "label": "int"}
        with MDSWriter(out=job.path, columns=columns, size_limit=shard_size(job)) as writer:
            for data, label in tar_samples(job):
                writer.write({"image": data, "label": label})
                yield 1, len(data), None

    return read


def litdata_samples(job: Job) -> Iterator[Record]:
    for data, label in tar_samples(job):
        yield {"image": data, "label": label}


def write_litdata(job: Job) -> Read:
    """No contender: writes the tars' samples, byte for byte, as LitData's chunks in `path`."""
    from litdata import optimize  # type: ignore[import-not-found]

    def read() -> Iterator[Item]:
        optimize(
            litdata_samples,
            [job],
            job.path,
            chunk_bytes=shard_size(job),
            num_workers=1,
            start_method="fork",
            verbose=False,
        )
        yield job.images, job.bytes, None

    return read


def litdata(job: Job) -> Read:
    from litdata import StreamingDataset
    from litdata.streaming import downloader  # type: ignore[import-not-found]
    from PIL import Image

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it has no option for a server without TLS

    def read() -> Iterator[Item]:
        with tempfile.TemporaryDirectory() as cache:
            server = {"endpoint_url": os.environ["S3_ENDPOINT_URL"]} if job.path.startswith("s3://") else {}
            for sample in StreamingDataset(job.path, cache_dir=cache, shuffle=False, storage_options=server):
                yield 1, 0, np.asarray(Image.open(io.BytesIO(sample["image"])))

    return read


def write_energon(job: Job) -> Read:
    """No contender: copies the tars and adds Energon's index and description of them."""

    def read() -> Iterator[Item]:
        Path(job.path).mkdir()
        for shard in job.shards:
            shutil.copy(Path(job.local) / shard, job.path)
        fields = json.dumps({"image": job.suffix, "label": "cls"})
        subprocess.run(
            [
                *(str(Path(sys.executable).with_name("energon")), "prepare", job.path, "--non-interactive"),
                *("--no-progress", "--num-workers=1", r"--split-parts=train:.*\.tar"),
                *("--sample-type=ImageClassificationSample", f"--field-map={fields}"),
            ],
            check=True,
            capture_output=True,
        )
        yield job.images, job.bytes, None

    return read


def energon(job: Job) -> Read:
    """Its loader in this process; from S3 by the Multi-Storage Client that it has for object stores."""
    from megatron.energon import (  # type: ignore[import-not-found]
        DefaultTaskEncoder,
        SampleDecoder,
        WorkerConfig,
        get_loader,
        get_val_dataset,
    )

    class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
        decoder = SampleDecoder(image_decode="l8" if job.grey else "rgb8")

    def read() -> Iterator[Item]:
        with tempfile.TemporaryDirectory() as folder:
            path = job.path
            if path.startswith("s3://"):
                provider = {"type": "s3", "options": {"base_path": "", "endpoint_url": os.environ["S3_ENDPOINT_URL"]}}
                config = Path(folder) / "msc.json"
                config.write_text(json.dumps({"profiles": {"server": {"storage_provider": provider}}}))
                os.environ["MSC_CONFIG"] = str(config)
                path = path.replace("s3://", "msc://server/")
            alone = WorkerConfig(rank=0, world_size=1, num_workers=0)
            dataset = get_val_dataset(
                path, split_part="train", worker_config=alone, batch_size=None, task_encoder=Encoder()
            )
            for sample in get_loader(dataset):
                yield 1, 0, np.asarray(sample.image)

    return read


READERS: dict[str, Callable[[Job], Read]] = {"mosaic": mosaic, "litdata": litdata, "energon": energon}
WRITERS: dict[str, Callable[[Job], Read]] = {
    "mosaic": write_mosaic,
    "litdata": write_litdata,
    "energon": write_energon,
}
