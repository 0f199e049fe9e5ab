"""The networks f : R^D -> R^D. Input and output have one shape; images are NCHW in [-1, 1].

A network is one line in NETWORKS, or an entry point of the group `naign.networks` in another package: the class of its
settings and the function that builds it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from naign.errors import InputError
from naign.settings.constraints import between
from naign.settings.registry import lookup

MOST_CHANNELS = 512  # the channels stop doubling here
ATTENDED = 16  # positions a side, at most, of a square code with self-attention


@dataclass(kw_only=True, slots=True)
class NetworkConfig:
    """Base of every network's settings."""

    name: str = ""
    """`conv` and `spatial` for images (C, H, W), `mlp` for points (D,), or one that another package registers."""
    init: str = ""
    """Start from the weights of this model: a run (a folder or s3://), a checkpoint, an exported folder or its file, or
    hf://user/model. Weights whose name and shape agree are used. Empty: random weights."""

    only_with = ""
    """The one objective.name that trains it; empty: any that does not name another network."""

    def check(self) -> None:
        """Raise InputError for settings that contradict each other."""


@dataclass(kw_only=True, slots=True)
class ConvConfig(NetworkConfig):
    name: str = "conv"
    width: int = field(default=32, metadata=between(1, 2**14))
    """Channels at half resolution; doubled at each further halving, up to 512."""
    depth: int = field(default=0, metadata=between(0, 256))
    """Residual blocks a resolution."""
    code: int = field(default=256, metadata=between(1, 2**16))
    """Dimensions of the bottleneck between encoder and decoder."""


@dataclass(kw_only=True, slots=True)
class SpatialConfig(NetworkConfig):
    name: str = "spatial"
    width: int = field(default=64, metadata=between(1, 2**14))
    """Channels at half resolution; doubled at each further halving, up to 512."""
    depth: int = field(default=1, metadata=between(0, 256))
    """Residual blocks per resolution, in the encoder and in the decoder."""
    code: int = field(default=8, metadata=between(1, 2**14))
    """Channels of the code at each of its positions."""
    grid: int = field(default=8, metadata=between(1, 2**12))
    """Positions a side of the code, at most: f halves images until they are that small, or odd. For repair of detail, a
    half or a quarter of data.crop. Above 16 x 16 positions there is no self-attention."""
    blend: bool = False
    """For repair: f(x) is x where it is not damaged, and elsewhere what the decoder makes, by a mask that it makes
    besides. Such an f has no code to draw by a flow or a mixture."""


@dataclass(kw_only=True, slots=True)
class PointConfig(NetworkConfig):
    name: str = "mlp"
    width: int = field(default=32, metadata=between(1, 2**14))
    """Hidden units."""
    depth: int = field(default=0, metadata=between(0, 256))
    """Further hidden layers."""
    octaves: int = field(default=0, metadata=between(0, 16))
    """Give the network sines and cosines of 1, 2, 4, ... times each coordinate, so many octaves, for fine structure."""


Build = Callable[..., nn.Module]
"""Takes (settings, shape, *, recompute) and returns the untrained network for samples of `shape`; with `recompute` it
checkpoints activations, which takes less memory and a third more arithmetic. Also called under torch.device("meta")."""


def build_network(config: NetworkConfig, shape: tuple[int, ...], *, recompute: bool = False) -> nn.Module:
    """The untrained network for samples of `shape`; InputError where the two do not fit."""
    return find_network(config.name)[1](config, shape, recompute=recompute)


def code_shape(network: nn.Module, setting: str) -> tuple[int, ...]:
    """Shape of an image's code, (c,) dense or (c, h, w) spatial; InputError where there is none, as `setting` needs."""
    if not (hasattr(network, "code") and hasattr(network, "encode") and hasattr(network, "decode")):
        without = "choose model.name conv or spatial, without model.blend, or prior.name=none"
        raise InputError(f"{setting}: this network has no code, encode and decode: {without}")
    return network.code  # type: ignore[return-value]


def find_network(name: str) -> tuple[type[NetworkConfig], Build]:
    """The settings and the build function of that name; InputError for an unknown one."""
    return lookup("model.name", name, NETWORKS, "naign.networks")


class PointNetwork(nn.Module):
    """A multilayer perceptron on (n, D) float32; any further dimensions are flattened.

    With octaves it is also given sines and cosines of the coordinates (Fourier features, arXiv 2006.10739): a smooth
    network is slow to learn structure that is much finer than the data's extent.
    """

    def __init__(self, config: PointConfig, shape: tuple[int, ...], *, recompute: bool = False) -> None:
        super().__init__()
        self.octaves = config.octaves
        dims = math.prod(shape)
        width = config.width
        self.layers = nn.Sequential(nn.Linear((1 + 2 * config.octaves) * dims, width), nn.SiLU())
        for _ in range(config.depth):
            self.layers.append(nn.Linear(width, width))
            self.layers.append(nn.SiLU())
        self.layers.append(nn.Linear(width, dims))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        parts = [flat]
        for octave in range(self.octaves):
            finer = 2**octave * flat
            parts.append(finer.sin())
            parts.append(finer.cos())
        return self.layers(torch.cat(parts, dim=1)).view_as(x)


class ResidualBlock(nn.Module):
    """x + conv(act(Norm(conv(act(Norm(x)))))), pre-activation (arXiv 1603.05027) with GroupNorm (1803.08494)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first = norm_act_conv(channels, channels, bias=False)
        second = norm_act_conv(channels, channels)
        nn.init.zeros_(second[-1].weight)  # type: ignore[arg-type]  # each block starts as the identity
        self.body = nn.Sequential(*first, *second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


FEW = 64  # positions up to which PyTorch's attention learns 3 to 9 times as slowly on a CPU in bfloat16 as products do


class Attention(nn.Module):
    """x + self-attention of the positions of x (n, C, H, W), with heads of at most 32 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // 32))
        self.norm = Norm(channels)
        self.inner = nn.Conv2d(channels, 3 * channels, 1)
        self.outer = zeroed(nn.Conv2d(channels, channels, 1))  # it starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        parts = self.inner(self.norm(x)).view(
            n,
            3,
            self.heads,
            channels // self.heads,
            height * width,
        )
        query, key, value = parts.transpose(-1, -2).unbind(1)
        if query.device.type == "cpu" and query.dtype == torch.bfloat16 and height * width <= FEW:
            shares = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
            mixed = shares.to(value.dtype) @ value  # autocast's softmax is float32
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.outer(mixed.transpose(-1, -2).reshape(n, channels, height, width))


class ImageNetwork(nn.Module):
    """A convolutional autoencoder, with a code but no skip connections, through which noise could pass unchanged."""

    def __init__(
        self,
        encoder: Sequence[nn.Module],
        decoder: Sequence[nn.Module],
        code: tuple[int, ...],  # shape
        recompute: bool,
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder)
        self.code = code
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return self.decode(self.encode(x))
        for layer in (*self.encoder, *self.decoder):
            if isinstance(layer, ResidualBlock):
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, code: Tensor) -> Tensor:
        return self.decoder(code)


class BlendedNetwork(nn.Module):
    """x + m (y - x), where `network` makes an image y and a mask m of x: undamaged detail passes, unlike noise."""

    def __init__(self, network: ImageNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        made, mask = self.network(x).split([x.shape[1], 1], dim=1)
        x = x.clamp(-1, 1)
        return x + mask.sigmoid() * (made.tanh() - x)


def _build_dense(config: ConvConfig, shape: tuple[int, ...], *, recompute: bool) -> ImageNetwork:
    """Halve the image to at most 8 x 8 (or odd), one dense code, and back: each output pixel depends on all inputs."""
    (height, width), widths = _levels(config, shape)
    inner = (widths[-1], height, width)
    halvings = list(pairwise([shape[0], *widths]))
    down = list[nn.Module]()
    for before, after in halvings:
        if down:
            down.append(nn.SiLU())
        down.append(halving(before, after))
        down += _blocks(after, config.depth)
    down += [
        Norm(widths[-1]),
        nn.SiLU(),
        nn.Flatten(),
    ]
    up = list[nn.Module]()
    for after, before in reversed(halvings):
        up += _blocks(before, config.depth)
        up += [
            Norm(before),
            nn.SiLU(),
            Doubling(before, after),
        ]
    down.append(nn.Linear(math.prod(inner), config.code))
    from_code = [
        nn.SiLU(),
        nn.Linear(config.code, math.prod(inner)),
        nn.Unflatten(1, inner),
    ]
    return ImageNetwork(
        down,
        [*from_code, *up, nn.Tanh()],
        (config.code,),
        recompute,
    )


def _build_spatial(config: SpatialConfig, shape: tuple[int, ...], *, recompute: bool) -> nn.Module:
    """An autoencoder whose code keeps positions, for images with more detail than a dense code can hold.

    Transposed convolutions would leave checkerboards, so pixels are moved into channels and back. Self-attention on
    both sides of the code lets each output pixel depend on the whole image.
    """
    (height, width), widths = _levels(config, shape, config.grid)
    attend: type[nn.Module] = nn.Identity
    if height * width <= ATTENDED**2:  # the cost of attention grows with the square of this
        attend = Attention
    down = list[nn.Module]()
    for before, after in pairwise([shape[0], *widths]):
        down.append(nn.PixelUnshuffle(2))
        down.append(nn.Conv2d(4 * before, after, 3, padding=1))
        down += _blocks(after, config.depth)
    up: list[nn.Module] = [
        nn.Conv2d(config.code, widths[-1], 3, padding=1),
        attend(widths[-1]),
    ]
    for after, before in reversed(list(pairwise([shape[0] + config.blend, *widths]))):
        up += _blocks(before, config.depth)
        up += norm_act_conv(before, 4 * after)
        up.append(nn.PixelShuffle(2))
    down += [
        attend(widths[-1]),
        Norm(widths[-1]),
        nn.SiLU(),
        nn.Conv2d(widths[-1], config.code, 1),
    ]
    network = ImageNetwork(
        down,
        up,
        (config.code, height, width),
        recompute,
    )
    if config.blend:
        return BlendedNetwork(network)
    network.decoder.append(nn.Tanh())
    return network


def _blocks(channels: int, depth: int) -> list[ResidualBlock]:
    return [ResidualBlock(channels) for _ in range(depth)]


def _levels(
    config: ConvConfig | SpatialConfig,
    shape: tuple[int, ...],
    grid: int = 8,
) -> tuple[tuple[int, int], list[int]]:
    """Height and width of the smallest resolution, where the longer side is at most `grid` or either is odd, and the
    number of channels of each from half the image's down to it. InputError for a shape that cannot be halved.
    """
    fits = len(shape) == 3 and shape[1] % 4 == 0 and shape[2] % 4 == 0
    if not fits:
        unfit = f"model.name={config.name} takes images (C, H, W) whose sides are multiples of 4, not {tuple(shape)}"
        points = "for points model.name=mlp, latents.name=gaussian and prior.name=none"
        raise InputError(f"{unfit}: give another --data.size, or {points}")
    height = shape[1] // 2
    width = shape[2] // 2
    widths = [config.width]
    while max(height, width) > grid and height % 2 == 0 and width % 2 == 0:
        height //= 2
        width //= 2
        widths.append(min(2 * widths[-1], max(MOST_CHANNELS, config.width)))
    return (height, width), widths


class Norm(nn.GroupNorm):
    """GroupNorm in bfloat16 with float32 sums: CUDA's autocast would keep it in float32, with twice the memory."""

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(channels, 8), channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or x.device.type == "cpu":
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(
                x,
                self.num_groups,
                self.weight.to(x.dtype),
                self.bias.to(x.dtype),
                self.eps,
            )


def halving(before: int, after: int) -> nn.Conv2d:
    """A convolution by 4x4 kernels, to half the height and width."""
    return nn.Conv2d(
        before,
        after,
        4,
        stride=2,
        padding=1,
    )


class Doubling(nn.ConvTranspose2d):
    """A transposed convolution by 4x4 kernels, to twice the height and width.

    To the few channels of an image it is computed on a CPU as a 3x3 convolution to four times as many, each of which
    has the values of one in four pixels: a forward then takes less than half the time.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            before,
            after,
            4,
            stride=2,
            padding=1,
        )

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.out_channels > 4 or x.device.type != "cpu":
            return super().forward(x, output_size)
        assert self.bias is not None
        padded = F.pad(self.weight, (1, 1, 1, 1))  # 6x6: every second number of a side is one kernel's
        kernels = padded.view(*self.weight.shape[:2], 3, 2, 3, 2).flip(2, 4)
        kernels = kernels.permute(1, 3, 5, 0, 2, 4).flatten(0, 2)
        made = F.conv2d(
            x,
            kernels,
            self.bias.repeat_interleave(4),
            padding=1,
        )
        return F.pixel_shuffle(made, 2)


def norm_act_conv(before: int, after: int, *, bias: bool = True) -> list[nn.Module]:
    return [
        Norm(before),
        nn.SiLU(),
        nn.Conv2d(
            before,
            after,
            3,
            padding=1,
            bias=bias,
        ),
    ]


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer, whose parameters are now zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


NETWORKS: dict[str, tuple[type[NetworkConfig], Build]] = {
    "conv": (ConvConfig, _build_dense),
    "spatial": (SpatialConfig, _build_spatial),
    "mlp": (PointConfig, PointNetwork),
}
