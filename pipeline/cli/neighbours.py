"""Commands that compare whole data sets, on any number of ranks: copies, duplicates."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from pipeline.cli.model import Run
from pipeline.cli.output import Json, print_json
from pipeline.errors import exit_on_input_error, leave_on_failure, leave_when_asked, record_exit

if TYPE_CHECKING:
    from accelerate import Accelerator

_KINDS = "efficientnet-lite0 to -lite2, cifar10-cnn64, timm:NAME or a .safetensors file"
Encoder = Annotated[str, tyro.conf.arg(help=f"What to compare: pixels, or features of {_KINDS}.")]
Force = Annotated[
    bool, tyro.conf.arg(help="Replace an index; give up an interrupted audit that differs from this one.")
]


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
    from pipeline.neighbours import copies as audit

    def find(ranks: "Accelerator") -> dict[str, Any]:
        return audit.copies(
            run,
            accelerator=ranks,
            data=data,
            samples=samples,
            encoder=encoder,
            threshold=threshold,
            seed=seed,
            to=to,
            force=force,
        )

    def describe(found: dict[str, Any]) -> str:
        shares = f"{found['share']:.2%} of {samples} samples, {found['test_share']:.2%} of test images"
        medians = f"{found['median']:.4g}, of test images {found['test_median']:.4g}"
        return (
            f"within {found['threshold']:.4g} of a training image: {shares}\nmedian distance to the nearest: {medians}"
        )

    _on_ranks(find, describe, json)


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
        threshold: Distance up to which images are near-duplicates; default: 8 of pixels (levels of 255), 0.3 of features.
        to: Folder or s3://bucket/prefix for duplicates.json, groups.csv and groups.png.
        drop: Folder or s3://bucket/prefix for an index without redundant training images, for --data.index.
    """
    from pipeline.neighbours import duplicates as audit

    def find(ranks: "Accelerator") -> dict[str, Any]:
        return audit.duplicates(
            data,
            accelerator=ranks,
            index=index,
            encoder=encoder,
            threshold=threshold,
            to=to,
            drop=drop,
            force=force,
        )

    def describe(found: dict[str, Any]) -> str:
        near = f"{found['test_images_near_training']} test images have a near-duplicate in the training set"
        grouped = f"{found['images_in_groups']} of {found['images']} images in {found['groups']} groups"
        return f"within {found['threshold']:g}: {grouped}; {near}\nredundant training images: {found['redundant']}"

    _on_ranks(find, describe, json)


def _on_ranks(find: Callable[["Accelerator"], dict[str, Any]], describe: Callable[[Any], str], json: bool) -> None:
    """Run an audit on the ranks that a launcher started, or in this process alone, and print on rank 0 what it found.
    Under a launcher the process ends as a rank of a training does.
    """
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
        ranks = build_accelerator()
        found = find(ranks)
        if ranks.is_main_process:
            print_json(found) if json else print(describe(found))
        part()
        ranks.end_training()
        record_exit(0)
