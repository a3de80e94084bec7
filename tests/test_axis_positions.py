"""Rows and columns of images, flattened pixels, audio and time-first values: how blocks of models depend on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbi_compile.passes.axes import Verdict, classify_positions
from lbi_compile.passes.layouts import Layout
from tests.programs import Apply, Program, program

APART = Verdict("position-wise", "static", "every operator on the way keeps the positions apart")
IMAGE, CHANNELS_LAST, ROWS = Layout(0, 1, 4), Layout(0, 3, 4), Layout(0, 2, 3)


def _found(function: Callable[[Tensor], Tensor] | nn.Module, *shape: int, training: bool = True) -> Program:
    module = function if isinstance(function, nn.Module) else Apply(function)
    torch.manual_seed(0)
    return program(module, torch.randn(shape), training=training)


class ConvNeXtBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.full((8,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))) * self.scale
        return x + y.permute(0, 3, 1, 2)


def test_the_end_of_a_convnext_block_is_position_wise():
    found = _found(ConvNeXtBlock(), 3, 8, 4, 6)
    whole = found.positions(IMAGE, measure=True)
    assert (whole.kind, whole.how) == ("mixed", "static")
    assert whole.node is not None
    assert whole.node.name == "conv2d"
    finish = Program(found.gm, found.x, whole.node)
    assert finish.positions(IMAGE) == APART


class Inverted(nn.Module):
    """A bottleneck of MobileNets after its depthwise convolution."""

    def __init__(self, squeeze: bool) -> None:
        super().__init__()
        self.norm, self.out, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid()) if squeeze else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.norm(x))
        return self.last(self.out(y if self.gate is None else y * self.gate(y)))


def test_batch_norms_keep_pixels_apart_in_evaluation_only():
    assert _found(Inverted(False), 3, 8, 4, 6, training=False).positions(IMAGE) == APART
    training = _found(Inverted(False), 3, 8, 4, 6).positions(IMAGE, measure=True)
    assert (training.kind, training.how) == ("mixed", "static")
    gated = _found(Inverted(True), 3, 8, 4, 6, training=False).positions(IMAGE, measure=True)
    assert (gated.kind, gated.how) == ("mixed", "probe")


class Swin(nn.Module):
    """Shifted windows of 2 x 2 pixels on `[B, H, W, C]`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.project = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.register_buffer("mask", torch.zeros(6, 4, 4).masked_fill(torch.rand(6, 4, 4) < 0.3, -100.0))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = self.norm(x).roll((-1, -1), (1, 2))
        windows = y.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(windows).view(-1, 4, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)).view(b, 6, 2, 4, 4) + self.mask[None, :, None]
        y = scores.view(-1, 2, 4, 4).softmax(-1) @ v
        y = self.project(y.transpose(1, 2).reshape(-1, 4, c))
        y = y.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + y.roll((1, 1), (1, 2))
        return x + self.mlp(x)


def test_windows_mix_pixels_but_not_images():
    found = _found(Swin(), 3, 4, 6, 4)
    assert found.positions(CHANNELS_LAST, measure=True).kind == "mixed"
    assert (found.ask(0).kind, found.ask(0).how) == ("position-wise", "static")
    assert found.ask(0, measure=True) == found.ask(0)
    after_attention = [node for node in found.nodes if node.name.startswith("add")][-2]
    assert Program(found.gm, found.x, after_attention).positions(CHANNELS_LAST) == APART


POSITION_WISE: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], Layout, Layout]] = {
    "flattened pixels": (lambda x: x.flatten(2).transpose(1, 2).tanh(), (2, 4, 3, 5), IMAGE, ROWS),
    "pixels of a list": (lambda x: x.transpose(1, 2).unflatten(2, (3, 5)) * 2, (2, 15, 4), ROWS, IMAGE),
    "another cut of a list": (lambda x: x.unflatten(1, (5, 3)) * 2, (2, 15, 4), ROWS, CHANNELS_LAST),
    "volumes as images": (lambda x: x.flatten(3).relu(), (2, 4, 3, 2, 5), Layout(0, 1, 5), IMAGE),
    "images as volumes": (lambda x: x.unflatten(3, (2, 5)).relu(), (2, 4, 3, 10), IMAGE, Layout(0, 1, 5)),
    "channels last": (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), [4]), (2, 4, 3, 5), IMAGE, CHANNELS_LAST),
    "audio": (lambda x: F.conv1d(x, torch.ones(6, 4, 1)), (2, 4, 7), Layout(0, 1, 3), Layout(0, 1, 3)),
    "time first": (lambda x: F.layer_norm(x, [4]), (7, 2, 4), Layout(1, 2, 3), Layout(1, 2, 3)),
    "one row": (lambda x: F.conv2d(x, torch.ones(4, 4, 1, 1)), (2, 4, 1, 5), IMAGE, IMAGE),
    "nothing read": (lambda x: torch.ones_like(x) * 2, (2, 4, 3, 5), IMAGE, IMAGE),
}


@pytest.mark.parametrize("name", POSITION_WISE)
def test_proofs_of_all_axes(name: str):
    function, shape, before, after = POSITION_WISE[name]
    found = _found(function, *shape)
    assert found.positions(before, after).kind == "position-wise"
    assert found.positions(before, after, measure=True).how == "static"


MIXED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], Layout, Layout]] = {
    "columns first": (lambda x: x.permute(0, 3, 2, 1).reshape(2, 15, 4), (2, 4, 3, 5), IMAGE, ROWS),
    "turned image": (lambda x: x.transpose(2, 3) * 2, (2, 4, 3, 3), IMAGE, IMAGE),
    "turned flat image": (lambda x: x.transpose(2, 3).flatten(2), (2, 4, 3, 5), IMAGE, Layout(0, 1, 3)),
    "rows alone": (lambda x: x + F.conv2d(x, torch.ones(4, 4, 1, 3), padding=(0, 1)), (2, 4, 3, 5), IMAGE, IMAGE),
    "columns alone": (lambda x: x - x.mean(2, keepdim=True), (2, 4, 3, 5), IMAGE, IMAGE),
    "half the size": (lambda x: F.avg_pool2d(x, 2), (2, 4, 4, 6), IMAGE, IMAGE),
    "half the size and back": (
        lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0), (2, 4, 4, 6), IMAGE, IMAGE,
    ),
    "frequencies": (lambda x: torch.fft.fft2(x).real, (2, 4, 3, 5), IMAGE, IMAGE),
    "mixed channels": (lambda x: x.permute(0, 2, 3, 1) @ torch.ones(4, 4), (2, 4, 4, 4), IMAGE, IMAGE),
    "widths that are positions": (lambda x: x * 2, (2, 4, 4, 4), IMAGE, CHANNELS_LAST),
    "no positions left": (lambda x: x.mean((2, 3)), (2, 4, 3, 5), IMAGE, Layout(0, 1, 2)),
    "statistics by value": (lambda x: x - x.detach().mean((2, 3), keepdim=True), (2, 4, 3, 5), IMAGE, IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_positions_that_are_mixed_or_moved(name: str):
    function, shape, before, after = MIXED[name]
    found = _found(function, *shape)
    assert found.positions(before, after).kind == "mixed"
    assert found.positions(before, after, measure=True).kind == "mixed"


def _masked(x: Tensor) -> Tensor:
    """A convolution of PixelCNN: pixels above and to the left."""
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0], [0, 0, 0]])
    return F.conv2d(x, torch.ones(4, 4, 3, 3) * mask, padding=1)


def test_rows_of_another_length_are_the_same_positions_but_take_a_measurement():
    found = _found(lambda x: x.flatten(2).unflatten(2, (5, 3)), 2, 4, 3, 5)
    assert found.positions(IMAGE).kind == "mixed"
    measured = found.positions(IMAGE, measure=True)
    assert (measured.kind, measured.how) == ("position-wise", "probe")


CAUSAL: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], Layout]] = {
    "masked convolution": (_masked, (2, 4, 3, 5), IMAGE),
    "padded before": (lambda x: F.conv1d(F.pad(x, (2, 0)), torch.ones(4, 4, 3)), (2, 4, 7), Layout(0, 1, 3)),
    "cut behind": (
        lambda x: F.conv1d(x, torch.ones(4, 1, 4), padding=3, groups=4)[..., :-3], (2, 4, 7), Layout(0, 1, 3),
    ),
    "raster sum": (lambda x: x.flatten(1, 2).cumsum(1).view_as(x), (2, 3, 5, 4), CHANNELS_LAST),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), (2, 6, 4), ROWS),
    "attention with a mask": (
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(6, 6).tril().bool()), (2, 6, 4), ROWS,
    ),
    "attention with numbers for a mask": (
        lambda x: (x @ x.mT + torch.full((6, 6), -torch.inf).triu(1)).softmax(-1) @ x, (2, 6, 4), ROWS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_positions_are_measured(name: str):
    function, shape, layout = CAUSAL[name]
    found = _found(function, *shape)
    verdict = found.positions(layout, measure=True)
    assert (verdict.kind, verdict.how) == ("causal", "probe")
    assert found.positions(layout).kind == "mixed"
    assert found.ask(0).kind == "position-wise"


def test_an_axis_that_may_be_longer_elsewhere_is_not_measured():
    """One row here, but a convolution over rows would mix more of them."""
    module, x = nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), torch.randn(2, 4, 1, 5)
    assert program(module, x, dims=1).positions(IMAGE, measure=True).kind == "position-wise"
    found = program(module, torch.randn(2, 4, 3, 5), dims=(0, 2, 3))
    sizes = {node: shape and (*shape[:2], 1, *shape[3:]) for node, shape in found.shapes.items()}
    ends = {"source": found.source, "sink": found.sink, "source_layout": IMAGE, "sink_layout": IMAGE}
    verdict = classify_positions(found.nodes, **ends, shapes=sizes, fn=found.run, example=x)
    assert (verdict.kind, verdict.why) == ("mixed", "an axis of size 1 cannot be followed; unsure counts as mixed")


def test_values_without_positions_are_mixed():
    found = _found(lambda x: x * 2, 2, 4)
    assert found.positions(Layout(0, 1, 2), measure=True).kind == "mixed"


@pytest.mark.parametrize("layout", [IMAGE, Layout(0, 2, 4), CHANNELS_LAST], ids=str)
def test_sources_are_measured_in_their_own_memory_order(layout: Layout):
    """The graph views its source, which an unfolded copy may not allow."""
    found = _found(lambda x: (x.view(2, 60) - x.view(2, 60).mean(1, keepdim=True)).view(2, 4, 3, 5), 2, 4, 3, 5)
    assert (found.positions(layout, measure=True).kind, found.positions(layout, measure=True).how) == ("mixed", "probe")
    apart = _found(lambda x: torch.stack([x, x.flip(0)])[0].view(2, 60).cumsum(0).view(2, 4, 3, 5), 2, 4, 3, 5)
    assert apart.positions(layout, measure=True).kind == "position-wise"
