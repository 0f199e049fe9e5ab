"""What tables say of a model's samples beside `naign evaluate`, which has been run.

    python benchmarks/samples.py RUN   # writes RUN/evaluation/samples.json

`unlabelled` are Frechet distances on the encoder DATASET-simclr64, which was trained without labels (train_encoder.py),
as those of `naign evaluate`: of 10,000 f(z), of f of as many training images (real), and the floor, a mean over draws.
`accuracy` is the share of real test images that a classifier names rightly after learning from f(z) alone (arXiv
1905.10887), labelled by the set's encoder; `accuracy_of_real` is that of as many training images, labelled likewise.
`parameters` are those of f and of its prior.
"""

import json
from pathlib import Path

import torch
import tyro
from output import Record
from train_encoder import accuracy, train

from naign.data.loader import read_split
from naign.data.scale import eight_bits, scaled
from naign.errors import exit_on_input_error
from naign.evaluate import measures
from naign.evaluate.recorded import recorded
from naign.model.encoders import choose_encoder, load_encoder, names
from naign.model.naign import NAIGN
from naign.storage.local import write_atomically

SAMPLES = 10_000
WIDTH = 16  # of the classifier
SHOWN = ("floor", "once", "once_ratio", "real", "real_ratio")


def main(run: tyro.conf.Positional[Path]) -> None:
    """Measure the samples of a run, or of an exported folder."""
    torch.set_num_threads(1)
    model = NAIGN.from_pretrained(str(run))
    config, manifest = recorded(model, str(run), None)
    train_images, test = measures.read(config, manifest.shape, seed=0)
    some = train_images[:SAMPLES]
    subject = measures.Subject(
        model=model,
        manifest=manifest,
        encoder=choose_encoder(manifest),
        second=None,
        train=train_images,
        test=test,
        samples=SAMPLES,
        seed=0,
    )
    samples = model.project(measures.draw_latents(subject, SAMPLES))
    found: Record = {"parameters": count_parameters(model)}
    name = f"{manifest.name}-simclr64"
    if name in names():
        subject.once = samples
        subject.twice = samples  # which is not shown
        if model.prior.decodes:
            subject.real = model.project(scaled(some))
        fd, _ = measures.distances(load_encoder(name), subject, measures.FLOORS)
        found["unlabelled"] = {key: fd[key] for key in SHOWN}
    encoder = subject.encoder
    if encoder.labels:
        images, labels = read_split(config.path, "test")
        shown = {
            "accuracy": eight_bits(samples),
            "accuracy_of_real": some,
        }
        for key, learned in shown.items():
            seen = encoder.logits(scaled(learned)).argmax(1)
            network = train(
                learned,
                seen,
                classes=len(encoder.labels),
                width=WIDTH,
            )
            found[key] = accuracy(network, images, labels)
    text = json.dumps(found, indent=1) + "\n"
    write_atomically(run / "evaluation/samples.json", text)
    print(text)


def count_parameters(model: NAIGN) -> int:
    modules = [model.network]
    if model.prior.decodes:
        modules.append(model.prior)
    count = 0
    for module in modules:
        for value in module.parameters():
            count += value.numel()
    return count


if __name__ == "__main__":
    with exit_on_input_error("samples"):
        tyro.cli(main)
