"""What a run has written: its reports, losses and weights."""

import json
import time

import torch
from safetensors.torch import load_file

from naign.checkpoint.writer import newest_checkpoint


def reports(run):
    """The lines of metrics.jsonl; none before the first report."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def rounds_of(run):
    """How many reports there are, also while one is being written."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return 0
    return file.read_text().count("\n")


def metrics_of(run):
    """What `naign evaluate` has measured."""
    return json.loads((run / "evaluation/metrics.json").read_text())


def column(run, name):
    """One value of each report."""
    return [line[name] for line in reports(run)]


def losses(run, *more):
    """The losses of each round of stage 1, and what else begins with one of `more`."""
    found = []
    for line in reports(run):
        if line["train/stage"] == 1:
            found.append({name: value for name, value in line.items() if name.startswith(("loss/", *more))})
    return found


def newest(run):
    """The folder of the newest complete checkpoint."""
    found = newest_checkpoint(run / "checkpoints")
    assert found, "no complete checkpoint"
    return found


def weights(run, name="model"):
    """The tensors of the newest checkpoint's model file, or of another of its files."""
    return load_file(newest(run) / f"{name}.safetensors")


def same(ours, theirs):
    """Whether both have the same tensors, to the last bit."""
    if ours.keys() != theirs.keys():
        return False
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def wait_for_rounds(job, run, count):
    """Wait until a training has reported so many rounds, or has ended."""
    while job.poll() is None and rounds_of(run) < count:
        time.sleep(0.01)
