"""Shapes, and that each network is the function it says."""

import pytest
import torch
from torch import nn
from torch.autograd import grad
from torch.nn import functional
from torch.testing import assert_close

from naign.model.networks import (
    Attention,
    ConvConfig,
    Doubling,
    PointConfig,
    SpatialConfig,
    build_network,
    code_shape,
)
from tests.refused import refused

both = pytest.mark.parametrize("kind", [ConvConfig, SpatialConfig])


@both
@pytest.mark.parametrize(
    "shape",
    [
        (1, 28, 28),
        (3, 48, 64),
        (3, 4, 36),
    ],
)
def test_images_keep_their_shape_and_range_through_a_code(shape, kind):
    network = build_network(kind(width=4, depth=1, code=8), shape)
    x = 3 * torch.randn(2, *shape)
    out = network(x)
    assert out.shape == x.shape
    assert out.abs().max() <= 1
    out.sum().backward()
    for value in network.parameters():
        assert value.grad is not None
    code = network.encode(x)
    assert code.shape == (2, *code_shape(network, "prior"))
    assert_close(network.decode(code), out)
    assert_close(network(x[1:]), out[1:])


def test_every_pixel_sees_every_pixel():
    network = build_network(ConvConfig(width=4, code=8), (1, 16, 16))
    x = torch.randn(1, 1, 16, 16).requires_grad_()
    network(x)[0, 0, 0, 0].backward()
    assert (x.grad != 0).all()


def test_attention_starts_as_the_identity_and_takes_positions_alike():
    layer = Attention(16)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(layer(x), x)
    nn.init.normal_(layer.outer.weight)
    out = layer(x)
    assert not torch.allclose(out, x)
    order = torch.randperm(16)
    moved = x.flatten(2)[:, :, order].view_as(x)
    assert_close(layer(moved), out.flatten(2)[:, :, order].view_as(x))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 28, 30),
        (1, 30, 28),
        (2,),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(shape):
    with refused("model.name=conv takes images .* whose sides are multiples of 4"):
        build_network(ConvConfig(), shape)


@pytest.mark.parametrize(
    "grid, positions",
    [
        (2, (2, 1)),
        (16, (16, 8)),
        (32, (32, 16)),
        (99, (32, 16)),
    ],
)
def test_the_grid_says_how_far_the_code_reduces(grid, positions):
    network = build_network(SpatialConfig(width=4, code=3, grid=grid), (3, 64, 32))
    x = torch.randn(2, 3, 64, 32)
    assert network.encode(x).shape == (2, 3, *positions)
    assert network(x).shape == x.shape
    assert has_attention(network) == (grid <= 16)


def has_attention(network):
    return any(isinstance(module, Attention) for module in network.modules())


def test_a_code_of_many_positions_has_no_attention():
    """Sides that are soon odd leave a large code, whatever the grid."""
    with torch.device("meta"):
        large = build_network(SpatialConfig(grid=8), (3, 500, 500))
    assert large.code[1:] == (125, 125)
    assert not has_attention(large)


def test_a_blend_is_x_where_the_mask_is_0_and_the_decoder_s_image_where_it_is_1():
    network = build_network(
        SpatialConfig(
            width=8,
            code=3,
            grid=16,
            blend=True,
        ),
        (3, 32, 32),
    )
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert network(3 * torch.randn(2, 3, 32, 32)).abs().max() <= 1
    last = [module for module in network.modules() if isinstance(module, nn.Conv2d)][-1]
    nn.init.zeros_(last.weight)
    for mask, expected in ((-100.0, x), (100.0, torch.full_like(x, 0.5).tanh())):
        last.bias.data = torch.tensor([0.5] * 12 + [mask] * 4)  # of four pixels each channel
        assert_close(network(x), expected)
    with refused("prior.name=flow: this network has no code.* without model.blend"):
        code_shape(network, "prior.name=flow")


def test_points_keep_their_shape_and_octaves_put_waves_beside_the_coordinates():
    network = build_network(PointConfig(width=16, depth=1, octaves=2), (2,))
    seen = []
    network.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = torch.randn(5, 2)
    assert network(x).shape == x.shape
    waves = [
        x.sin(),
        x.cos(),
        (2 * x).sin(),
        (2 * x).cos(),
    ]
    assert torch.equal(seen[0], torch.cat([x, *waves], dim=1))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_doubling_to_few_channels_is_the_transposed_convolution(channels):
    torch.manual_seed(0)
    layer = Doubling(5, channels)
    x = torch.randn(
        2,
        5,
        6,
        7,
        requires_grad=True,
    )
    wanted = functional.conv_transpose2d(
        x,
        layer.weight,
        layer.bias,
        2,
        1,
    )
    made = layer(x)
    assert_close(made, wanted)
    weights = torch.randn_like(made)
    inputs = (x, layer.weight, layer.bias)
    for ours, theirs in zip(grad(made, inputs, weights), grad(wanted, inputs, weights), strict=True):
        assert_close(ours, theirs)
