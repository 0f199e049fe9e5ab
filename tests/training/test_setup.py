"""What a run is built from, before anything is trained."""

from types import SimpleNamespace

import pytest
import torch

from naign.config import parse
from naign.training.setup import count_codes, open_stream

ALONE = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        ([], 1438),
        (["--data.flip"], 5000),
        (["--prior.images=99"], 99),
    ],
)
def test_no_image_is_encoded_twice_unless_its_code_differs(options, codes, small):
    config = parse([*small, "--prior.name=gmm", "--prior.images=5000", *options])
    with open_stream(config, ALONE) as stream:
        assert count_codes(config, stream) == codes
