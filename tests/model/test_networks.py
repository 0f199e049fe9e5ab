"""Shapes, and that each network is the function it says."""

import pytest
import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.model.networks import ConvConfig, PointConfig, build_network


@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (4, 12, 12), (1, 4, 4), (3, 36, 36), pytest.param((3, 256, 256))]
)
@pytest.mark.parametrize("depth", [0, 1])
def test_images_keep_their_shape_and_range(shape, depth):
    network = build_network(ConvConfig(width=4, depth=depth, code=8, max_width=16), shape)
    out = network(3 * torch.randn(2, *shape))
    assert out.shape == (2, *shape) and float(out.abs().max()) <= 1
    out.sum().backward()
    assert all(value.grad is not None for value in network.parameters())


def test_every_pixel_sees_every_pixel():
    network = build_network(ConvConfig(width=4, code=8), (1, 16, 16))
    x = torch.randn(1, 1, 16, 16, requires_grad=True)
    network(x)[0, 0, 0, 0].backward()
    assert x.grad is not None and (x.grad != 0).all()


def test_rows_do_not_touch_each_other():
    network = build_network(ConvConfig(width=8, code=8), (1, 16, 16)).eval()
    x = torch.randn(6, 1, 16, 16)
    torch.testing.assert_close(network(x)[2:3], network(x[2:3]))


def test_points_keep_their_shape():
    network = build_network(PointConfig(width=16, depth=3), (2,))
    assert network(torch.randn(7, 2)).shape == (7, 2)


@pytest.mark.parametrize("shape", [(1, 28, 20), (1, 30, 30), (2,)])
def test_a_shape_that_does_not_fit_is_refused(shape):
    with pytest.raises(InputError, match="model.name=conv takes square images"):
        build_network(ConvConfig(), shape)


def test_octaves_put_waves_beside_the_coordinates():
    network = build_network(PointConfig(width=16, depth=1, octaves=3), (2,))
    first = next(module for module in network.modules() if isinstance(module, nn.Linear))
    x, seen = torch.randn(5, 2), []
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert network(x).shape == x.shape
    waves = [wave(times * x) for times in (1, 2, 4) for wave in (torch.sin, torch.cos)]
    assert torch.equal(seen[0], torch.cat([x, *waves], dim=1))
