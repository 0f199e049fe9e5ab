"""What a run is built from, before anything is trained."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.config import parse
from pipeline.training.prepare import build_model
from tests.conftest import SMALL

ALONE = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["--objective.imle=0"], True),
        (["--objective.imle=0", "--objective.third=matched"], False),
        (["--objective.imle=0", "--prior.name=gmm", "--prior.components=3", "--train.images=2560"], False),
        ([], False),
    ],
)
def test_latents_that_f_is_not_trained_on_are_warned_of(options, warned, digits, caplog):
    stream, *_ = build_model(parse([f"--data.path={digits}", *SMALL, *options]), ALONE, None)
    stream.close()
    assert ("so f(z) is no sample" in caplog.text) == warned
