"""Commands that compare whole data sets, on any number of ranks: copies, duplicates."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated

import tyro

from pipeline.cli.model import Run
from pipeline.cli.output import Json, print_json
from pipeline.errors import exit_on_input_error, leave_on_failure, leave_when_asked, record_exit

if TYPE_CHECKING:
    from accelerate import Accelerator

_KINDS = "efficientnet-lite0 to -lite2, cifar10-cnn64, timm:NAME or a .safetensors file"
Encoder = Annotated[str, tyro.conf.arg(help=f"What is compared: pixels, or features of {_KINDS}.")]
Force = Annotated[bool, tyro.conf.arg(help="Give up an audit that was interrupted there and had other options.")]


def copies(
    run: Run,
    /,
    *,
    data: str | None = None,
    samples: int = 10_000,
    encoder: Encoder = "pixels",
    threshold: float | None = None,
    seed: int = 0,
    to: str = "",
    force: Force = False,
    json: Json = False,
) -> None:
    """Find samples that copy training images: the nearest of all of these, also mirrored, to each sample.

    Args:
        data: Packed data set; default: the one it was trained on.
        samples: How many samples to draw.
        threshold: Distance up to which a sample counts as a copy; default: that of the nearest 1 % of test images.
        seed: The same seed draws the same samples.
        to: Folder or s3://bucket/prefix for copies.json, copies.csv and copies.png; default: the run's evaluation/.
    """

    from pipeline.neighbours.copies import copies as find

    with _ranks() as ranks:
        found = find(
            run, ranks, data, samples=samples, encoder=encoder, threshold=threshold, seed=seed, to=to, force=force
        )
        if ranks.is_main_process and json:
            print_json(found)
        elif ranks.is_main_process:
            shares = f"{found['share']:.2%} of samples, {found['test_share']:.2%} of test images"
            print(f"within {found['threshold']:.4g} of a training image: {shares}")
            print(f"median distance to the nearest: {found['median']:.4g}, of test images {found['test_median']:.4g}")


def duplicates(
    *,
    data: str,
    index: str = "",
    encoder: Encoder = "pixels",
    threshold: float | None = None,
    to: str = "duplicates",
    drop: str = "",
    force: Force = False,
    json: Json = False,
) -> None:
    """Find near-duplicates in a data set, within and across its splits, also mirrored.

    Args:
        data: Folder or s3://bucket/prefix of shards.
        index: Folder or s3://bucket/prefix of its index.json and page tables; default: beside the shards.
        threshold: Distance up to which images are near-duplicates; default: 8 for pixels (levels of 255).
        to: Folder or s3://bucket/prefix for duplicates.json, groups.csv and groups.png.
        drop: Folder or s3://bucket/prefix for an index without redundant training images, for --data.index.
    """
    from pipeline.neighbours.duplicates import duplicates as find

    with _ranks() as ranks:
        found = find(data, ranks, index, encoder=encoder, threshold=threshold, to=to, drop=drop, force=force)
        if ranks.is_main_process and json:
            print_json(found)
        elif ranks.is_main_process:
            print(f"{found['images_in_groups']} of {found['images']} images are in {found['groups']} groups")
            print(f"test images near a training image: {found['test_images_near_training']}")
            print(f"redundant training images: {found['redundant']}{f', left out by {drop}' if drop else ''}")


@contextmanager
def _ranks() -> Iterator["Accelerator"]:
    """The ranks that a launcher started, which then end as those of a training do, or this process alone."""
    with ExitStack() as stack:
        if "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
            leave_when_asked()
            stack.enter_context(leave_on_failure())
            stack.enter_context(exit_on_input_error("naign"))
        from pipeline.distributed.connect import build_accelerator
        from pipeline.distributed.host import set_threads
        from pipeline.distributed.ranks import part, peers_missed

        stack.enter_context(peers_missed())
        set_threads(0)
        accelerator = build_accelerator()
        yield accelerator
        part()
        accelerator.end_training()
        record_exit(0)
