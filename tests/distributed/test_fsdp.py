"""FSDP2 on gloo ranks trains as DDP does, and goes on bit for bit."""

import pytest
import torch

from tests.distributed.ranks import on_ranks
from tests.e2e.runs import same


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_fsdp_trains_as_ddp_does_and_is_restored_bit_for_bit(world, tmp_path):
    """Four ranks are those of two hosts."""
    for states in on_ranks("fsdp_cases.trained", world, tmp_path / "ranks"):
        whole = states["whole"]
        assert len(whole) > 30
        assert same(whole, states["again"])
        torch.testing.assert_close(whole, states["ddp"], rtol=1e-4, atol=1e-6)
