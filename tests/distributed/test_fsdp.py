"""FSDP2 on gloo ranks trains as DDP does, and goes on bit for bit."""

import pytest
import torch

from tests.distributed.ranks import on_ranks


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_fsdp_trains_as_ddp_does_and_is_restored_bit_for_bit(world, tmp_path):
    for states in on_ranks("fsdp_cases.trained", world, tmp_path / "ranks"):
        ddp, whole, again = states["ddp"], states["whole"], states["again"]
        assert ddp.keys() == whole.keys() == again.keys() and len(ddp) > 30
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        for name, value in ddp.items():
            torch.testing.assert_close(whole[name], value, rtol=1e-4, atol=1e-6)
