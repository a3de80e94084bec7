"""Axis rules of images: what each says of a single call, and every proof on random graphs against real dependence."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import fx

from lbi_compile.passes.axes import classify_positions
from lbi_compile.passes.axis_probes import probe_axis
from lbi_compile.passes.layouts import Layout
from tests.axis_checks import brief, calls, check, function, module, shapes_of, trace
from tests.layer_graphs import grow_layers
from tests.random_graphs import Builder

aten = torch.ops.aten

# One call on an image x [2, 4, 3, 6]. Where the result holds each axis of x: see ``brief``.
CALLS: dict[str, tuple[str, Callable[[Builder, fx.Node], fx.Node | None]]] = {
    "conv2d, one pixel": ("0 - 2 3", lambda b, x: b.call(aten.conv2d.default, x, b.constant(5, 4, 1, 1))),
    "conv2d, centred": (
        "0 - ! !",
        lambda b, x: b.call(aten.conv2d.default, x, b.constant(5, 4, 3, 3), None, [1], [1]),
    ),
    "conv2d, dilated": (
        "0 - ! -",
        lambda b, x: b.call(aten.conv2d.default, x, b.constant(5, 4, 3, 3), None, [1, 1], [2, 7], [2, 7]),
    ),
    "conv2d, rows": ("0 - 2 -", lambda b, x: b.call(aten.conv2d.default, x, b.constant(5, 4, 1, 3))),
    "conv2d, depthwise": (
        "0 - ! !",
        lambda b, x: b.call(aten.conv2d.default, x, b.constant(4, 1, 3, 3), None, [1], [1], [1], 4),
    ),
    "conv2d, one pixel of two": (
        "0 - - 3",
        lambda b, x: b.call(aten.conv2d.default, x, b.constant(5, 4, 1, 1), None, [2, 1]),
    ),
    "conv2d, one pixel of two, of an image twice": (
        "0 - - 3",
        lambda b, x: b.call(
            aten.conv2d.default, b.call(aten.repeat.default, x, [1, 1, 2, 1]), b.constant(5, 4, 1, 1), None, [2, 1]
        ),
    ),
    "max_pool2d, one of two, of an image twice": (
        "0 1 2 -",
        lambda b, x: b.call(aten.max_pool2d.default, b.call(aten.repeat.default, x, [1, 1, 1, 2]), [1, 1], [1, 2]),
    ),
    "conv2d, one pixel and a rim": (
        "0 - 2 -",
        lambda b, x: b.call(aten.conv2d.default, x, b.constant(5, 4, 1, 1), None, [1, 1], [0, 1]),
    ),
    "conv2d, one pixel and a rim as wide as the image": (
        "0 - 2 -",
        lambda b, x: b.call(aten.conv2d.default, x, b.constant(5, 4, 1, 1), None, [1, 1], [0, 3]),
    ),
    "convolution": (
        "0 - 2 !",
        lambda b, x: b.call(
            aten.convolution.default, x, b.constant(5, 4, 1, 3), None, [1, 1], [0, 1], [1, 1], False, [0, 0], 1
        ),
    ),
    "conv_transpose2d, one pixel": (
        "0 - 2 -",
        lambda b, x: b.call(aten.conv_transpose2d.input, x, b.constant(4, 5, 1, 1), None, [1, 2]),
    ),
    "conv_transpose2d, padded behind": (
        "0 - - -",
        lambda b, x: b.call(
            aten.conv_transpose2d.input, x, b.constant(4, 5, 1, 1), None, [1, 1], [0, 0], [1, 1], 1, [2, 2]
        ),
    ),
    "batch_norm, training": (
        "! 1 ! !",
        lambda b, x: b.call(aten.batch_norm.default, x, None, None, None, None, True, 0.1, 1e-5, False),
    ),
    "batch_norm, evaluation": (
        "0 1 2 3",
        lambda b, x: b.call(
            aten.batch_norm.default, x, None, None, b.constant(4), b.constant(4), False, 0.1, 1e-5, False
        ),
    ),
    "group_norm": ("0 - ! !", lambda b, x: b.call(aten.group_norm.default, x, 2)),
    "instance_norm": (
        "0 1 ! !",
        lambda b, x: b.call(aten.instance_norm.default, x, None, None, None, None, True, 0.1, 1e-5, False),
    ),
    "layer_norm of images": ("0 ! ! !", lambda b, x: b.call(aten.layer_norm.default, x, [4, 3, 6])),
    "dropout2d": ("0 1 2 3", lambda b, x: b.call(aten.feature_dropout.default, x, 0.5, True)),
    "avg_pool2d": ("0 1 - -", lambda b, x: b.call(aten.avg_pool2d.default, x, [3, 3])),
    "avg_pool2d, centred": ("0 1 ! !", lambda b, x: b.call(aten.avg_pool2d.default, x, [3], [1], [1])),
    "avg_pool2d, padded": ("0 1 - -", lambda b, x: b.call(aten.avg_pool2d.default, x, [3], [], [1])),
    "avg_pool2d of rows": ("0 1 2 -", lambda b, x: b.call(aten.avg_pool2d.default, x, [1, 2])),
    "max_pool2d": ("0 1 - 3", lambda b, x: b.call(aten.max_pool2d.default, x, [2, 1], [1, 1])),
    "max_pool2d, one of two": ("0 1 2 -", lambda b, x: b.call(aten.max_pool2d.default, x, [1, 1], [1, 2])),
    "adaptive_avg_pool2d": ("0 1 - -", lambda b, x: b.call(aten.adaptive_avg_pool2d.default, x, [1, 1])),
    "adaptive_avg_pool2d of rows": ("0 1 2 -", lambda b, x: b.call(aten.adaptive_avg_pool2d.default, x, [3, 1])),
    "adaptive_avg_pool2d to twice the rows": (
        "0 1 - 3",
        lambda b, x: b.call(aten.adaptive_avg_pool2d.default, x, [6, 6]),
    ),
    "adaptive_max_pool2d": ("0 1 - -", lambda b, x: b.item(b.call(aten.adaptive_max_pool2d.default, x, [1, 1]), 0)),
    "interpolate, nearest": ("0 1 - -", lambda b, x: b.call(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0])),
    "interpolate, bilinear": ("0 1 - -", lambda b, x: b.call(aten.upsample_bilinear2d.vec, x, [6, 6], False, None)),
    "pixel_shuffle": ("0 - 2/2 3/2", lambda b, x: b.call(aten.pixel_shuffle.default, x, 2)),
    "pixel_unshuffle": ("0 - - -", lambda b, x: b.call(aten.pixel_unshuffle.default, x, 3)),
    "pixel_shuffle and back": (
        "0 - 2 3",
        lambda b, x: b.call(aten.pixel_unshuffle.default, b.call(aten.pixel_shuffle.default, x, 2), 2),
    ),
    "channel_shuffle": ("0 - 2 3", lambda b, x: b.call(aten.channel_shuffle.default, x, 2)),
    "im2col": ("0 - - -", lambda b, x: b.call(aten.im2col.default, x, [2, 2], [1, 1], [0, 0], [1, 1])),
    "im2col of one image": (
        "- - -",
        lambda b, x: b.call(aten.im2col.default, b.call(aten.select.int, x, 3, 0), [2, 2], [1, 1], [0, 0], [1, 1]),
    ),
    "grid_sampler": (
        "0 - - -",
        lambda b, x: b.call(aten.grid_sampler.default, x, b.constant(2, 5, 5, 2), 0, 0, False),
    ),
    "pad, reflect": ("0 1 2 -", lambda b, x: b.call(aten.pad.default, x, [1, 1, 0, 0], "reflect")),
    "reflection_pad2d": ("0 1 - -", lambda b, x: b.call(aten.reflection_pad2d.default, x, [1, 1, 0, 0])),
    "roll": ("0 1 - -", lambda b, x: b.call(aten.roll.default, x, [1, 1], [2, 3])),
    "flattened pixels": (
        "0 2 1/6 1",
        lambda b, x: b.call(aten.transpose.int, b.call(aten.flatten.using_ints, x, 2), 1, 2),
    ),
    "pixels and a token": (
        "0 1 - -",
        lambda b, x: b.call(aten.cat.default, [b.constant(2, 4, 1), b.call(aten.flatten.using_ints, x, 2)], 2),
    ),
    "windows": (
        "0/2 2 1/3 -",
        lambda b, x: b.call(
            aten.reshape.default,
            b.call(aten.permute.default, b.call(aten.view.default, x, [2, 4, 1, 3, 2, 3]), [0, 2, 4, 3, 5, 1]),
            [4, 9, 4],
        ),
    ),
    "fft of an image": ("0 1 - -", lambda b, x: b.call(aten.real.default, b.call(aten.fft_fft2.default, x))),
}


@pytest.mark.parametrize("name", CALLS)
def test_rules_of_single_calls(name: str):
    expected, call = CALLS[name]
    build = Builder((2, 4, 3, 6))
    node = call(build, build.source)
    assert node is not None, "the call does not run"
    found = [brief(trace(build, axis)[node]) for axis in range(4)]
    gm = module(build, node)
    assert found[: len(expected.split())] == expected.split()
    check(gm, build)


def test_a_dilated_kernel_that_reaches_past_the_image_is_not_sure_to_mix():
    build = Builder((2, 4, 3, 6))
    node = build.call(aten.conv2d.default, build.source, build.constant(4, 4, 3, 3), None, [1, 1], [3, 3], [3, 3])
    assert node is not None
    assert [brief(trace(build, axis)[node]) for axis in (2, 3)] == ["-", "!"]


# --- random graphs ------------------------------------------------------------------------------------------------

SIZES = [(2, 4, 3, 6), (3, 4, 2, 4), (2, 8, 4, 3), (2, 3, 6, 2), (3, 2, 4, 4)]


def _random_image(seed: int) -> Builder:
    draw = random.Random(seed)
    return grow_layers(draw.choice(SIZES), draw.randint(1, 6), lambda options: draw.choice(list(options)))


def _check_states(seeds: range) -> None:
    for seed in seeds:
        build = _random_image(seed)
        check(module(build, build.tensors()[-1]), build)


def test_static_proofs_hold_on_random_image_graphs():
    _check_states(range(100))


@pytest.mark.slow
def test_static_proofs_hold_on_many_random_image_graphs():
    _check_states(range(100, 1500))


def _layouts(shape: tuple[int, ...]) -> list[Layout]:
    return [Layout(0, width, len(shape)) for width in range(1, len(shape))]


def _changes_apart(gm: fx.GraphModule, build: Builder, before: Layout, after: Layout) -> bool:
    """No position of the folded result changes when another one of the folded source does."""
    run, x = function(gm, build), before.fold(build.x)
    expected = after.fold(run(build.x))
    for position in range(x.shape[1]):
        other = x.clone()
        other[:, position] = 1.5 - x.flip(1)[:, position] * 2
        got = after.fold(run(before.unfold(other, build.x.shape).contiguous()))
        same = (got == expected) | (got.isnan() & expected.isnan())
        same[:, position] = True
        if not same.all():
            return False
    return True


def _check_positions(seeds: range) -> tuple[int, int]:
    """Counts proofs and measured claims, none of which is false."""
    proofs = claims = 0
    for seed in seeds:
        build = _random_image(seed)
        sink = [node for node in build.tensors() if build.values[node].dim() in (3, 4)][-1]
        gm, shapes = module(build, sink), shapes_of(build)
        before = random.Random(seed).choice(_layouts(tuple(build.x.shape)))
        for after in _layouts(tuple(build.values[sink].shape)):
            ends = {"source": build.source, "sink": sink, "source_layout": before, "sink_layout": after}
            static = classify_positions(calls(build), **ends, shapes=shapes)
            measured = classify_positions(calls(build), **ends, shapes=shapes, fn=function(gm, build), example=build.x)
            if static.kind == "position-wise":
                assert measured == static
                proofs += 1
                found = probe_axis(
                    lambda y, b=build, a=after, g=gm, f=before: a.fold(function(g, b)(f.unfold(y, b.x.shape))),
                    before.fold(build.x),
                    axis_in=1,
                    axis_out=1,
                )
                assert found.kind == "position-wise" or "NaN" in found.why, f"{seed}: {found}\n{gm.graph}"
            if measured.kind == "position-wise":
                claims += 1
                assert _changes_apart(gm, build, before, after), f"{seed}: {measured}\n{gm.graph}"
    return proofs, claims


def test_claims_about_positions_hold_on_random_image_graphs():
    proofs, claims = _check_positions(range(400))
    assert claims >= proofs > 60


@pytest.mark.slow
def test_claims_about_positions_hold_on_many_random_image_graphs():
    proofs, claims = _check_positions(range(300, 3000))
    assert claims >= proofs > 400
