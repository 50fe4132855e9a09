"""ResNets for 32x32 images (He 2016, arXiv:1512.03385, section 4.2) with parameter-free shortcuts.

This is a user's own file: `model: {reference: models/cifar_resnet.py:resnet20}` runs it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the map shrinks, zeros pad the new channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """The paper's option A: every second pixel, and zero channels on both sides."""
        if self.stride == 1:
            return x
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding))


class CifarResNet(nn.Module):
    """3 x `num_blocks` blocks of 16, 32 and 64 channels. (N, 3, 32, 32) -> (N, num_classes)."""

    def __init__(self, num_blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stack(16, 16, num_blocks, stride=1)
        self.layer2 = _stack(16, 32, num_blocks, stride=2)
        self.layer3 = _stack(32, 64, num_blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stack(in_channels: int, out_channels: int, num_blocks: int, *, stride: int) -> nn.Sequential:
    blocks = [BasicBlock(in_channels, out_channels, stride)]
    blocks += [BasicBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)


def resnet20(num_classes: int = 10) -> CifarResNet:
    """0.27 M parameters, 41 M MACs."""
    return CifarResNet(3, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """0.85 M parameters, 127 M MACs."""
    return CifarResNet(9, num_classes)
