"""Shapes, and that each network is the function it says."""

import pytest
import torch
from torch import nn

from naign.errors import InputError
from naign.model.networks import (
    Attention,
    ConvConfig,
    PointConfig,
    ResidualBlock,
    SpatialConfig,
    build_network,
    code_shape,
)


@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (4, 12, 12), (1, 4, 4), (3, 36, 36), pytest.param((3, 256, 256))]
)
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("kind", [ConvConfig, SpatialConfig])
def test_images_keep_their_shape_and_range(shape, depth, kind):
    network = build_network(kind(width=4, depth=depth, code=8), shape)
    out = network(3 * torch.randn(2, *shape))
    assert out.shape == (2, *shape) and float(out.abs().max()) <= 1
    out.sum().backward()
    assert all(value.grad is not None for value in network.parameters())


def test_every_pixel_sees_every_pixel():
    network = build_network(ConvConfig(width=4, code=8), (1, 16, 16))
    x = torch.randn(1, 1, 16, 16, requires_grad=True)
    network(x)[0, 0, 0, 0].backward()
    assert x.grad is not None and (x.grad != 0).all()


@pytest.mark.parametrize("kind", [ConvConfig, SpatialConfig])
@pytest.mark.parametrize("size", [8, 28, 64])
def test_the_code_has_its_shape_and_decodes_to_f(kind, size):
    network = build_network(kind(width=4, code=3), (2, size, size))
    x = torch.randn(5, 2, size, size)
    code = network.encode(x)
    assert code.shape == (5, *code_shape(network, "prior")) and code[0].numel() <= 3 * 64
    torch.testing.assert_close(network.decode(code), network(x))


@pytest.mark.parametrize("kind", [ConvConfig, SpatialConfig])
def test_recomputed_activations_change_nothing(kind):
    config = kind(width=4, code=3, depth=1)
    plain, again = (build_network(config, (1, 16, 16), recompute=recompute) for recompute in (False, True))
    again.load_state_dict(plain.state_dict())
    x = torch.randn(5, 1, 16, 16)
    for network in (plain, again):
        network(x).square().sum().backward()
    for one, two in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_attention_starts_as_the_identity_and_takes_positions_alike():
    layer, x = Attention(16), torch.randn(2, 16, 4, 4)
    assert torch.equal(layer(x), x)
    nn.init.normal_(layer.outer.weight)
    out, order = layer(x), torch.randperm(16)
    assert not torch.allclose(out, x)
    moved = x.flatten(2)[:, :, order].view_as(x)
    torch.testing.assert_close(layer(moved), out.flatten(2)[:, :, order].view_as(x))


def test_a_residual_block_starts_as_the_identity_and_a_constant():
    added = ResidualBlock(8)(x := torch.randn(3, 8, 4, 4)) - x
    torch.testing.assert_close(added, added[:1, :, :1, :1].expand_as(added))


@pytest.mark.parametrize("kind", [ConvConfig, SpatialConfig])
def test_rows_do_not_touch_each_other(kind):
    network = build_network(kind(width=8, code=8), (1, 16, 16)).eval()
    x = torch.randn(6, 1, 16, 16)
    torch.testing.assert_close(network(x)[2:3], network(x[2:3]))


def test_points_keep_their_shape():
    network = build_network(PointConfig(width=16, depth=3), (2,))
    assert network(torch.randn(7, 2)).shape == (7, 2)


@pytest.mark.parametrize("shape", [(1, 28, 30), (1, 30, 28), (2,)])
@pytest.mark.parametrize("config", [ConvConfig(), SpatialConfig()])
def test_a_shape_that_does_not_fit_is_refused(shape, config):
    with pytest.raises(InputError, match=f"model.name={config.name} takes images .* whose sides are multiples of 4"):
        build_network(config, shape)


@pytest.mark.parametrize("shape", [(1, 28, 20), (3, 48, 64), (3, 4, 36), (1, 100, 8)])
@pytest.mark.parametrize("kind", [ConvConfig, SpatialConfig])
def test_images_need_not_be_square(shape, kind):
    network = build_network(kind(width=8, code=8), shape)
    x = torch.randn(2, *shape)
    code = network.encode(x)
    assert code.shape == (2, *network.code) and network.decode(code).shape == network(x).shape == x.shape
    if kind is SpatialConfig:  # positions are as the image's
        assert network.code[1] * shape[2] == network.code[2] * shape[1]


@pytest.mark.parametrize(
    ("grid", "positions"), [(2, (2, 1)), (8, (8, 4)), (16, (16, 8)), (32, (32, 16)), (99, (32, 16))]
)
def test_the_grid_says_how_far_the_code_reduces(grid, positions):
    network = build_network(SpatialConfig(width=4, code=3, grid=grid), (3, 64, 32))
    x = torch.randn(2, 3, 64, 32)
    assert network.encode(x).shape == (2, *network.code) == (2, 3, *positions)
    assert network(x).shape == x.shape
    attends = any(isinstance(module, Attention) for module in network.modules())
    assert attends == (grid <= 16)


def test_a_blend_is_x_where_the_mask_is_0_and_the_decoder_s_image_where_it_is_1():
    network = build_network(SpatialConfig(width=8, code=3, grid=16, blend=True), (3, 32, 32))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert float(network(3 * torch.randn(2, 3, 32, 32)).abs().max()) <= 1
    last = [module for module in network.modules() if isinstance(module, nn.Conv2d)][-1]
    nn.init.zeros_(last.weight)
    for mask, expected in ((-100.0, x), (100.0, torch.full_like(x, 0.5).tanh())):
        last.bias.data = torch.tensor([0.5] * 12 + [mask] * 4)  # of four pixels each channel
        torch.testing.assert_close(network(x), expected)
    with pytest.raises(InputError, match="prior.name=flow: this network has no code.* without model.blend"):
        code_shape(network, "prior.name=flow")


def test_octaves_put_waves_beside_the_coordinates():
    network = build_network(PointConfig(width=16, depth=1, octaves=3), (2,))
    first = next(module for module in network.modules() if isinstance(module, nn.Linear))
    x, seen = torch.randn(5, 2), []
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert network(x).shape == x.shape
    waves = [wave(times * x) for times in (1, 2, 4) for wave in (torch.sin, torch.cos)]
    assert torch.equal(seen[0], torch.cat([x, *waves], dim=1))


def test_a_code_of_many_positions_has_no_attention():
    """Sides that are soon odd leave a large code, whatever the grid."""
    with torch.device("meta"):
        large = build_network(SpatialConfig(grid=8), (3, 500, 500))
        small = build_network(SpatialConfig(grid=8), (3, 64, 64))
    assert large.code[1:] == (125, 125) and small.code[1:] == (8, 8)
    assert not any(isinstance(part, Attention) for part in large.modules())
    assert any(isinstance(part, Attention) for part in small.modules())
