"""The command that compares samples with a whole data set, on any number of ranks: copies."""

import os
from contextlib import ExitStack
from typing import Annotated

import tyro

from naign.cli.model import Run
from naign.errors import exit_on_input_error
from naign.neighbours import CopiesOptions
from naign.process import leave_on_failure, leave_when_asked


def copies(
    run: Run,
    /,
    *,
    options: Annotated[CopiesOptions, tyro.conf.arg(name="")],
) -> None:
    """Find samples that copy training images: the nearest of all of these, also mirrored, to each sample."""
    with ExitStack() as stack:
        if "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
            # A launcher started this rank, which then ends as one of a training does.
            leave_when_asked()
            stack.enter_context(leave_on_failure())
            stack.enter_context(exit_on_input_error("naign"))
        from naign.distributed.connect import build_accelerator
        from naign.distributed.host import keep_memory, set_threads
        from naign.distributed.ranks import part, peers_missed
        from naign.neighbours.copies import copies as find

        stack.enter_context(peers_missed())
        set_threads(0)
        keep_memory()
        ranks = build_accelerator()
        result = find(run, options, ranks)
        if ranks.is_main_process:
            shares = f"{result['share']:.2%} of samples, {result['test_share']:.2%} of test images"
            print(f"within {result['threshold']:.4g} of a training image: {shares}")
            print("a much larger share of samples than of test images is a sign of copies")
            if not result["threshold"]:
                print("the threshold is 0, as test images are training images, too: give --threshold, or drop them")
        part()
        ranks.end_training()
