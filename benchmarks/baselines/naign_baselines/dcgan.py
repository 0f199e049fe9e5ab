"""The network of IGN's paper (arXiv 2311.01462): DCGAN's discriminator (arXiv 1511.06434) without its last layer as the
encoder, and its generator as the decoder.

    accelerate launch pipeline/train.py --config configs/mnist_ign_dcgan.yaml

Batches hold images and noise in changing proportions, and ranks do not share statistics, so GroupNorm stands where the
paper has BatchNorm.
"""

import math
from dataclasses import dataclass, field

from torch import nn

from naign.errors import InputError
from naign.model.networks import Doubling, ImageNetwork, NetworkConfig, Norm, halving
from naign.settings.constraints import between

SLOPE = 0.2
SIDE = 32  # of the padded image
PADDED = -1.0  # black


@dataclass(kw_only=True, slots=True)
class DcganConfig(NetworkConfig):
    name: str = "dcgan"
    width: int = field(default=64, metadata=between(1, 2**12))
    """Channels at 16x16; twice that at 8x8, four times at 4x4."""
    code: int = field(default=512, metadata=between(1, 2**16))
    """Dimensions of the bottleneck between encoder and decoder."""


def _build(config: DcganConfig, shape: tuple[int, ...], *, recompute: bool) -> nn.Module:
    if recompute:
        raise InputError("model.name=dcgan keeps all activations: leave out train.recompute")
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] not in (28, 32):
        raise InputError(f"model.name=dcgan takes images of 28x28 or 32x32, not {tuple(shape)}")
    margin = (SIDE - shape[1]) // 2
    widths = [config.width, 2 * config.width, 4 * config.width]
    down: list[nn.Module] = [nn.ConstantPad2d(margin, PADDED)]
    before = shape[0]
    for after in widths:
        down.append(halving(before, after))
        if before != shape[0]:
            down.append(Norm(after))
        down.append(nn.LeakyReLU(SLOPE))
        before = after
    # A convolution of all 4x4 positions at once, and its transpose: as products of matrices in a third of the time.
    inner = (before, 4, 4)
    down.append(nn.Flatten())
    down.append(nn.Linear(math.prod(inner), config.code))
    up: list[nn.Module] = [nn.Linear(config.code, math.prod(inner)), nn.Unflatten(1, inner)]
    for after in (*reversed(widths[:-1]), shape[0]):
        up.append(Norm(before))
        up.append(nn.ReLU())
        up.append(Doubling(before, after))
        before = after
    up.append(nn.ConstantPad2d(-margin, PADDED))
    up.append(nn.Tanh())
    return ImageNetwork(down, up, (config.code,), recompute)


NETWORK = (DcganConfig, _build)
