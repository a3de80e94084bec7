"""Interfaces: what crosses a boundary, how a region is encoded into it and how it enters a region.

``build_interface`` makes one ``Interface`` per bounded model; the model owns it as ``lbi``. ``Interface`` shows how one
region step is written with it. Parameters stand under the index of their region, for example ``lbi.decoders.3.weight``.

At the start a latent has about unit variance and, decoded, a fifth of the canvas' root mean square: the model begins
near the one in which nothing crosses, and every parameter gets a gradient from the first step on. Latents keep the
dtype of the parameters, also under autocast, so that all boundaries agree; what is added to the model takes the model's
dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..errors import InterfaceError, LatentWidthError, RegionsError
from .base import Draw, Interface, Latents
from .both import TokenChunkedInterface
from .chunked import ChunkedInterface, chunk_count, tokens_per_chunk
from .lanes import IdentityLanes, LaneForm, LanesInterface, PooledLanes
from .plain import IdentityInterface, ZeroInterface
from .pooled import PooledInterface, SelfPooledInterface
from .token import CELLS, SelfTokenInterface, TokenInterface

__all__ = [
    "CELLS",
    "KINDS",
    "ChunkedInterface",
    "IdentityInterface",
    "Interface",
    "LaneForm",
    "LanesInterface",
    "Latents",
    "PooledInterface",
    "SelfPooledInterface",
    "SelfTokenInterface",
    "TokenChunkedInterface",
    "TokenInterface",
    "ZeroInterface",
    "build_interface",
    "build_lanes",
    "canvas_scale",
    "chunk_count",
    "interface_class",
    "tokens_per_chunk",
]

_V = TypeVar("_V")

KINDS = ("pooled", "chunked", "token", "token+chunked", "identity", "zero", "self")
# Canvases each kind can read; identity and zero take any with a batch axis.
_RANKS = {"pooled": (2, 3), "chunked": (3,), "token": (3,), "token+chunked": (3,), "self": (2, 3)}
_SHAPES = {2: "[B, D]", 3: "[B, T, D]"}


def build_interface(
    kind: str,
    *,
    regions: int,
    width: int,
    r: int,
    canvas: Tensor,
    cell: str | None = None,
    chunk: int | None = None,
    chunks: int | None = None,
    own_finish: Sequence[bool] | None = None,
    widths: Sequence[int] | None = None,
    scale: float | None = None,
    seed: int = 0,
) -> Interface:
    """Make the interface of a bounded model; the same arguments give the same numbers on every device.

    Args:
        kind: One of ``KINDS``. One region has no boundary: ``regions=1`` gives the zero interface for every kind.
        regions: Number of regions K.
        width: Width D of the canvas.
        r: Latent width R, of either latent where two cross; of no effect for ``"identity"`` and ``"zero"``.
        canvas: Example of the canvas, `[B, D]` or `[B, T, D]` (any shape for ``"identity"`` and ``"zero"``). Parameters
            get its dtype and device.
        cell: ``"gru"`` or ``"linear"`` for ``"token"`` and ``"token+chunked"``. For ``"self"`` the cell of the token
            interface it stands beside, or ``None`` to stand beside the pooled one, the only form for a canvas without
            positions.
        chunk: Positions per chunk of ``"chunked"``; by default ``tokens_per_chunk`` of the example's length.
        chunks: Number of chunks of ``"chunked"``; by default ``chunk_count(r)``.
        own_finish: By region, whether its finish is empty, so that the token interface brings an MLP of its own.
        widths: By region, the width of `a_k`; by default ``width`` for all.
        scale: Root mean square of the canvas; by default ``canvas_scale(canvas)``.
        seed: Seed of the private generator that draws the parameters.

    Returns:
        The interface, its parameters drawn and trainable.

    Raises:
        InterfaceError: The kind or cell does not exist or does not suit the canvas.
        LatentWidthError: ``r`` is below 1 or not divisible into ``chunks``.
        RegionsError: ``regions`` is below 1.

    Example:
        >>> canvas = torch.randn(8, 128, 64)
        >>> lbi = build_interface("token", regions=4, width=64, r=16, cell="gru", canvas=canvas)
        >>> lbi.latent_shape(canvas.shape)
        (8, 128, 16)
    """
    _check(kind, regions=regions, width=width, r=r, canvas=canvas, cell=cell)
    if kind == "zero" or regions == 1:
        return ZeroInterface(regions=regions, r=r)
    if kind == "identity":
        return IdentityInterface(regions=regions, r=math.prod(canvas.shape[1:]))

    draw = Draw(seed, like=canvas, scale=canvas_scale(canvas) if scale is None else scale)
    if kind == "pooled":
        return PooledInterface(draw, regions=regions, width=width, r=r)
    chunking: dict[str, Any] = {}
    if kind in ("chunked", "token+chunked"):
        count = chunk_count(r, chunks)
        length = tokens_per_chunk(canvas.shape[1], r, count) if chunk is None else chunk
        if length < 1:
            raise InterfaceError(
                f"chunks of {length} positions",
                expected="at least one position in a chunk",
                do="give chunk=1 or more, or an example input with positions",
            )
        chunking = {"width": width, "chunks": count, "chunk": length}
    if kind == "chunked":
        return ChunkedInterface(draw, regions=regions, r=r, **chunking)
    if cell is None:
        return SelfPooledInterface(draw, regions=regions, width=width, r=r)
    make = {"token": TokenInterface, "self": SelfTokenInterface, "token+chunked": TokenChunkedInterface}[kind]
    return make(
        draw,
        regions=regions,
        r=r,
        widths=_per_region("widths", widths, default=width, regions=regions),
        own_finish=_per_region("own_finish", own_finish, default=False, regions=regions),
        cell=cell,
        **chunking,
    )


def build_lanes(
    kind: str,
    *,
    regions: int,
    r: int,
    lanes: Sequence[LaneForm],
    canvas: LaneForm,
    like: Tensor,
    chunk: int | None = None,
    seed: int = 0,
) -> LanesInterface:
    """Make the interface of boundaries with several lanes, or with lanes in another shape than the canvas.

    Args:
        kind: ``"pooled"``, ``"chunked"`` (for lanes that look back only) or ``"identity"``.
        regions: Number of regions K.
        r: Latent width R, shared out among the slots.
        lanes: Forms of the lanes, in the order in which they first cross.
        canvas: Form of the canvas.
        like: Example of the canvas, whose dtype and device the parameters get.
        chunk: Positions per chunk of lanes that look back only.
        seed: Seed of the private generator that draws the parameters.

    Raises:
        InterfaceError: A lane has too few axes.
        LatentWidthError: ``r`` is too small for the slots.
    """
    for index, form in enumerate(lanes):
        if form.layout.rank < 2:
            raise InterfaceError(
                f"lane {index} with {form.layout.rank} axes",
                expected="lanes with an axis of samples and one of features",
                do="ask for another number of regions, or name boundaries where no such value crosses",
            )
    if kind == "identity":
        return IdentityLanes(kind, regions=regions, r=r, lanes=lanes)
    draw = Draw(seed, like=like, scale=canvas_scale(like))
    return PooledLanes(draw, kind, regions=regions, r=r, lanes=lanes, canvas=canvas, chunk=chunk)


def interface_class(kind: str, cell: str | None = None) -> type[Interface]:
    """The class behind a kind; ``cell`` tells the two forms of ``"self"`` apart, ``"none"`` is one region's.

    Example:
        >>> interface_class("token").readouts
        ('sum',)
    """
    if kind == "self":
        return SelfPooledInterface if cell is None else SelfTokenInterface
    return {
        "pooled": PooledInterface,
        "chunked": ChunkedInterface,
        "token": TokenInterface,
        "token+chunked": TokenChunkedInterface,
        "identity": IdentityInterface,
        "zero": ZeroInterface,
        "none": ZeroInterface,
    }[kind]


def canvas_scale(canvas: Tensor) -> float:
    """Root mean square of a canvas to the nearest power of two, so that another example seldom gives another number.

    A canvas of zeros, or with a value that is not finite, tells nothing: its scale counts as 1.

    Raises:
        InterfaceError: The tensor holds no numbers (fake or meta).

    Example:
        >>> canvas_scale(torch.full((2, 8), 0.02))
        0.015625
    """
    try:
        rms = float(canvas.detach().double().square().mean().sqrt())
    except RuntimeError as error:
        raise InterfaceError(
            f"an example canvas without numbers ({type(canvas).__name__} on {canvas.device})",
            expected="a tensor to measure the scale of",
            do="give build_interface(scale=...)",
        ) from error
    return 2.0 ** round(math.log2(rms)) if rms > 0 and math.isfinite(rms) else 1.0


def _check(kind: str, *, regions: int, width: int, r: int, canvas: Tensor, cell: str | None) -> None:
    """Raise where the options do not exist or do not suit the canvas."""
    shape = tuple(canvas.shape)
    if kind not in KINDS:
        raise InterfaceError(f"interface={kind!r}", expected=f"one of {', '.join(KINDS)}", do="name one of these")
    if regions < 1:
        raise RegionsError(f"regions={regions}", expected="a positive number", do="give regions=1 or more")
    if r < 1:
        raise LatentWidthError(f"r={r}", expected="a positive number", do="give r=1 or more")
    if not canvas.is_floating_point():
        raise InterfaceError(
            f"a canvas of {canvas.dtype}", expected="a real floating point canvas", do="cut behind the embedding"
        )
    if kind not in _RANKS:
        return
    if canvas.dim() not in _RANKS[kind]:
        shapes = " or ".join(_SHAPES[rank] for rank in _RANKS[kind])
        other = "'pooled'" if canvas.dim() == 2 else "'identity' or 'zero'"
        raise InterfaceError(
            f"a canvas of shape {shape} for interface={kind!r}",
            expected=f"{shapes} (batch first, width last)",
            do=f"take interface={other}, which suits this shape, or a model whose canvas is {shapes}",
        )
    if shape[-1] != width:
        raise InterfaceError(
            f"width={width} for a canvas of shape {shape}", expected=f"width={shape[-1]}", do="give its last size"
        )
    if kind not in ("token", "token+chunked", "self"):
        return
    if cell not in CELLS and not (kind == "self" and cell is None):
        raise InterfaceError(
            f"cell={cell!r} for interface={kind!r}",
            expected=f"one of {', '.join(CELLS)}" + (", or None" if kind == "self" else ""),
            do="name one of these",
        )
    if cell is not None and canvas.dim() == 2:
        raise InterfaceError(
            f"cell={cell!r} for a canvas of shape {shape}, which has no positions",
            expected="cell=None there, the form of the pooled interface",
            do="give cell=None",
        )


def _per_region(name: str, values: Sequence[_V] | None, *, default: _V, regions: int) -> tuple[_V, ...]:
    given = (default,) * regions if values is None else tuple(values)
    if len(given) != regions:
        raise InterfaceError(f"{len(given)} {name} for {regions} regions", expected="one for each", do="give as many")
    return given
