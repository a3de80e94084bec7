"""Plain torch models of images `[B, C, H, W]` (one of them `[B, H, W, C]`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import BATCH_NORM, Entry, Inputs, Made

BATCH, SIZE = 3, 16


class UNet(nn.Module):
    """Contracting and expanding path, joined by skip connections at each resolution."""

    def __init__(self, *, width: int = 8, depth: int = 3, classes: int = 4) -> None:
        super().__init__()
        widths = [width * (k + 1) for k in range(depth + 1)]
        self.down = nn.ModuleList(_two_convs(a, b) for a, b in zip([3, *widths], widths[:-1], strict=False))
        self.middle = _two_convs(widths[-2], widths[-1])
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, 2) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.join = nn.ModuleList(_two_convs(2 * a, a) for a in widths[-2::-1])
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), skips.pop()], 1))
        return self.out(x)


def _two_convs(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(2, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(2, outputs),
        nn.SiLU(),
    )


class ConditionedUNet(nn.Module):
    """The U-Net of a diffusion model: a time embedding is added in every block."""

    def __init__(self, *, width: int = 8) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(10, 20), nn.SiLU(), nn.Linear(20, 20))
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([_TimeBlock(width, width), _TimeBlock(width, 2 * width)])
        self.middle = nn.ModuleList([_TimeBlock(2 * width, 2 * width), _TimeBlock(2 * width, 2 * width)])
        self.up = nn.ModuleList([_TimeBlock(4 * width, width), _TimeBlock(2 * width, width)])
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.arange(1, 6, device=t.device)
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        x, skips = self.stem(x), []
        for block in self.down:
            x = block(x, time)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        for block in self.middle:
            x = block(x, time)
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1), time)
        return self.out(x)


class _TimeBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm, self.time = nn.GroupNorm(2, outputs), nn.Linear(20, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.silu(self.first(x)) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.second(F.silu(self.norm(h)))


class DenseNet(nn.Module):
    """Every layer of a block reads all layers before it."""

    def __init__(self, *, growth: int = 6, blocks: int = 3, layers: int = 4, classes: int = 10) -> None:
        super().__init__()
        width = 8
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for _ in range(blocks):
            block = nn.ModuleList()
            for _ in range(layers):
                block.append(nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, growth, 3, padding=1)))
                width += growth
            self.blocks.append(block)
            self.transitions.append(nn.Sequential(nn.Conv2d(width, width // 2, 1), nn.AvgPool2d(2)))
            width //= 2
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            features = [x]
            for layer in block:  # type: ignore[union-attr]
                features.append(layer(torch.cat(features, 1)))
            x = transition(torch.cat(features, 1))
        return self.out(x.mean((2, 3)))


class ResidualCNN(nn.Module):
    """Classifier of residual convolution blocks, with GroupNorm or BatchNorm."""

    def __init__(self, *, width: int = 16, depth: int = 8, batch_norm: bool = False, relu_after: bool = False) -> None:
        super().__init__()
        norm: Callable[[], nn.Module] = (
            (lambda: nn.BatchNorm2d(width)) if batch_norm else lambda: nn.GroupNorm(4, width)
        )
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), norm()
            )
            for _ in range(depth)
        )
        self.relu_after = relu_after
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
            if self.relu_after:
                x = F.relu(x)
        return self.out(x.mean((2, 3)))


class Denoiser(nn.Module):
    """Image to image: residual convolutions at full resolution, the input added at the end."""

    def __init__(self, *, width: int = 12, depth: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(depth)
        )
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        return x + self.out(h)


class ChannelsLast(nn.Module):
    """Axial MLPs over an image `[B, H, W, C]`: along rows, along columns, over channels."""

    def __init__(self, *, width: int = 20, depth: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.blocks = nn.ModuleList(_AxialBlock(width) for _ in range(depth))
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class _AxialBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.rows, self.columns = nn.Linear(SIZE, SIZE), nn.Linear(SIZE - 2, SIZE - 2)
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.rows(h.transpose(1, 3)).transpose(1, 3) + self.columns(h.transpose(2, 3)).transpose(2, 3)
        return x + self.channels(h)


class VGG(nn.Sequential):
    """No skip connection at all; width grows where the image shrinks."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        width = 3
        for outputs in (8, 8, 16, 16, 24, 24):
            layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.ReLU()]
            if width == outputs:
                layers.append(nn.MaxPool2d(2))
            width = outputs
        super().__init__(*layers, nn.Flatten(), nn.Linear(24 * 4, 20), nn.ReLU(), nn.Dropout(0.1), nn.Linear(20, 10))


class AutoEncoder(nn.Module):
    """Variational: draws its code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(256, 24)
        )
        self.decoder = nn.Sequential(
            nn.Linear(12, 256), nn.Unflatten(1, (16, 4, 4)), nn.ConvTranspose2d(16, 8, 2, 2), nn.SiLU(),
            nn.ConvTranspose2d(8, 3, 2, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, spread = self.encoder(x).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (spread / 2).exp()
        return self.decoder(code), mean, spread


def _images() -> tuple[Tensor]:
    return (torch.randn(BATCH, 3, SIZE, SIZE),)


def _of(model: Callable[[], nn.Module], inputs: Callable[[], Inputs] = _images) -> Callable[[], Made]:
    return lambda: (model(), inputs())


ENTRIES = (
    Entry("unet", "U-Net", _of(UNet), ci=True),
    Entry("unet-time", "U-Net", _of(ConditionedUNet, lambda: (*_images(), torch.rand(BATCH)))),
    Entry("densenet", "DenseNet", _of(DenseNet), expect="chain", why=BATCH_NORM, ci=True),
    Entry("cnn-groupnorm", "convolutional", _of(ResidualCNN), ci=True),
    Entry("resnet-batchnorm", "convolutional", _of(lambda: ResidualCNN(batch_norm=True, relu_after=True)),
          expect="chain", why=BATCH_NORM),
    Entry("denoiser", "image to image", _of(Denoiser)),
    Entry("channels-last", "image to image", _of(ChannelsLast, lambda: (torch.randn(BATCH, SIZE, SIZE - 2, 3),))),
    Entry("vgg", "convolutional", _of(VGG)),
    Entry("vae", "image to image", _of(AutoEncoder)),
)  # fmt: skip
