"""Static axis rules of images and signals: convolutions, pools, resampling and padding.

Positions are the last dims, channels the one before them, samples the one before that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lbi_compile.passes.axis_calls import AxisState, Call, MixedError, Rule, agree

WINDOW_RULES: dict[str, Rule] = {}


def _rule(names: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        WINDOW_RULES.update({f"aten.{name}": rule for name in names.split()})
        return rule

    return add


@_rule("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d")
def _convolution(call: Call) -> AxisState:
    """Samples stay apart; positions do where the kernel covers one of them."""
    state, shape = call.one()
    kernel = call.shape(call.args["weight"])[2:]
    if len(shape) == len(kernel) + 2 and state.dim == 0:
        return state
    along = state.dim - (len(shape) - len(kernel))
    if along < 0:
        raise MixedError("it sums over the axis")
    stride, padding, dilation = (_for_dim(call.args[name], along) for name in ("stride", "padding", "dilation"))
    whole = call.args["weight"].op != "call_function"  # one that is computed may be masked to be causal
    return _window(call, state, kernel[along], stride, padding, dilation, whole=whole)


def _window(
    call: Call, state: AxisState, kernel: Any, stride: Any, padding: Any, dilation: Any, *, whole: bool = True
) -> AxisState:
    """A window that slides along the axis keeps it where it covers one position and makes no step over others."""
    if (kernel, stride) == (1, 1) and padding in (0, "valid", "same"):
        return state
    # a window with as much before as after its position reads both sides; one at an end may be causal
    sizes = all(isinstance(value, int) for value in (kernel, dilation))
    centred = sizes and stride == 1 and kernel % 2 == 1 and padding in ("same", dilation * (kernel - 1) // 2)
    certain = whole and centred and kernel > 1 and state.stride == 1 and dilation < call.size
    raise MixedError("its kernel covers several positions of the axis", certain=certain)


def _for_dim(value: Any, i: int) -> Any:
    return value[i if len(value) > 1 else 0] if isinstance(value, (list, tuple)) else value


def _of_last(names: str, count: int) -> None:
    """Rules of operators that mix positions of their last ``count`` dims and treat the others as a batch."""

    @_rule(names)
    def keep_the_others(call: Call) -> AxisState:
        state, shape = call.one()
        if state.dim >= len(shape) - count:
            raise MixedError("it mixes positions of the axis")
        return state


def _pools(rank: int) -> None:
    @_rule(f"avg_pool{rank}d max_pool{rank}d max_pool{rank}d_with_indices")
    def slide(call: Call) -> AxisState:
        state, shape = call.one()
        along = state.dim - (len(shape) - rank)
        if along < 0:
            return state
        kernel, padding = (_for_dim(call.args[name], along) for name in ("kernel_size", "padding"))
        stride = _for_dim(call.args["stride"] or call.args["kernel_size"], along)
        return _window(call, state, kernel, stride, padding, _for_dim(call.args.get("dilation", 1), along))

    @_rule(f"adaptive_avg_pool{rank}d _adaptive_avg_pool{rank}d adaptive_max_pool{rank}d")
    def adapt(call: Call) -> AxisState:
        """With as many windows as positions each covers one."""
        state, shape = call.one()
        along = state.dim - (len(shape) - rank)
        if along >= 0 and _for_dim(call.args["output_size"], along) != shape[state.dim]:
            raise MixedError("it averages over the axis")
        return state


for _rank in (1, 2, 3):
    _pools(_rank)
    _of_last(f"upsample_nearest{_rank}d _upsample_nearest_exact{_rank}d", _rank)
    _of_last(f"reflection_pad{_rank}d replication_pad{_rank}d", _rank)
_of_last("upsample_linear1d", 1)
_of_last("upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa col2im", 2)
_of_last("upsample_trilinear3d", 3)


@_rule("im2col")
def _patches(call: Call) -> AxisState:
    """Windows of an image `[B, C, H, W]` as columns `[B, C * window, L]`."""
    state, shape = call.one()
    if len(shape) != 4 or state.dim != 0:
        raise MixedError("its windows cover several positions of the axis")
    return state


@_rule("grid_sampler grid_sampler_2d grid_sampler_3d")
def _sampled(call: Call) -> AxisState:
    """Every sample is read at places of its own."""
    dim, stride = agree((call.state(x).dim, call.state(x).stride) for x in call.only("input", "grid"))
    if dim != 0:
        raise MixedError("it reads at several positions of the axis")
    return AxisState("at", dim, stride)


@_rule("pixel_shuffle")
def _pixels_from_channels(call: Call) -> AxisState:
    """A pixel becomes r x r pixels."""
    state, shape = call.one()
    factor = call.args["upscale_factor"]
    if state.dim == len(shape) - 3 or not isinstance(factor, int):
        raise MixedError("it makes pixels of channels")
    return AxisState("at", state.dim, state.stride * (factor if state.dim > len(shape) - 3 else 1))


@_rule("pixel_unshuffle")
def _channels_from_pixels(call: Call) -> AxisState:
    """r x r pixels become one, which keeps an axis that has r positions or more in a step."""
    state, shape = call.one()
    factor = call.args["downscale_factor"]
    if state.dim < len(shape) - 3:
        return state
    if state.dim == len(shape) - 3 or not isinstance(factor, int) or state.stride % factor:
        raise MixedError("it puts several pixels into one")
    return AxisState("at", state.dim, state.stride // factor)


@_rule("channel_shuffle native_channel_shuffle")
def _shuffled_channels(call: Call) -> AxisState:
    state, _ = call.one()
    if state.dim == 1:
        raise MixedError("it moves positions of the axis")
    return state


@_rule("pad constant_pad_nd")
def _pad(call: Call) -> AxisState:
    state, shape = call.one()
    amounts = list(call.args["pad"])
    start = 2 * (len(shape) - 1 - state.dim)  # pairs are given from the last dim on
    if any(not isinstance(amount, int) or amount for amount in amounts[start : start + 2]):
        raise MixedError("it shifts the axis")
    return state
