"""Running a captured program: region after region, or all regions side by side at given latents."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._torch import annotated, pytree
from .interfaces import Latents
from .kernels import ops
from .kernels.pins import jacobian, pinned
from .passes.alike import CHAIN, REGION
from .passes.insert import OutputName, Program
from .region import SOURCES, Taps, Values

if TYPE_CHECKING:
    from .bounded import BoundedModule

_UNLABELLED = contextlib.nullcontext()


def run(
    bounded: BoundedModule,
    program: Program,
    leaves: list[Any],
    *,
    marked: bool,
    taps: bool,
    canvas: Tensor | None = None,
    pins: Tensor | None = None,
    alter: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[list[Any], tuple[Any, ...], tuple[Any, ...]]:
    """Run the bounded model.

    Args:
        bounded: The bounded model.
        program: What to run.
        leaves: The call's inputs.
        marked: Leave a marker on every latent.
        taps: Give outputs and latents of the regions too.
        canvas: What to put in place of the canvas.
        pins: `[K - 1, ..., R]`, values of the latents `m_1 .. m_{K-1}` that regions read in place of those that the
            region before them gives; they were solved for beforehand.
        alter: Gives what region ``k`` reads in place of a latent `m_k` that another region made.

    Returns:
        The model's output leaves, ``h`` and ``m``.
    """
    values, m = _begin(bounded, program, leaves, canvas)
    canvas = total = values[program.canvas]
    assert canvas is not None
    summed = bounded.plan.readout == "sum"
    hs, ms = [], []
    h, compiling = canvas, torch.compiler.is_compiling()
    given = None if pins is None else pins.unbind()
    for region, pieces in zip(bounded.regions, program.regions, strict=True):
        if given is not None and m is not None and region.k > 0:
            m = pinned(m, given[region.k - 1])
        if alter is not None and m is not None and region.k > 0:
            m = each(functools.partial(alter, region.k), m)
        if marked and m is not None:
            m = _marked(m, region.k, bounded._chain)
        ms.append(m)
        values[SOURCES] = [canvas, *(values.get(name) for name in program.shared)]
        # tells the passes of a compiler whose a node of its graph is; run eagerly, nobody reads it
        with annotated({CHAIN: bounded._chain, REGION: region.k}) if marked and compiling else _UNLABELLED:
            m, h, x = region(canvas, m, values, pieces)
            step = h - x if summed else h
        hs.append(h)
        if summed:
            total = total + step
    values[program.head_entry] = total if summed else h
    program.head.run(values)
    flat = [values[leaf.name] if isinstance(leaf, OutputName) else leaf for leaf in program.outputs]
    return flat, tuple(hs) if taps else (), tuple(ms) if taps else ()


def each(function: Callable[[Any], Any], m: Any) -> Any:
    """``function`` of a latent that enters a region; of both where two do."""
    if isinstance(m, Latents):
        return Latents(None if m.token is None else function(m.token), function(m.chunk))
    return function(m)


def _marked(m: Any, k: int, chain: int) -> Any:
    """A latent with its marker; two that cross a boundary belong to two chains, solved one after the other."""
    if not isinstance(m, Latents):
        return ops.boundary(m, k, chain)
    token = None if m.token is None else ops.boundary(m.token, k, chain + 1)
    return Latents(token, ops.boundary(m.chunk, k, chain))


def assemble(program: Program, flat: list[Any], hs: tuple[Any, ...], ms: tuple[Any, ...]) -> Any:
    """The model's output in its own structure, with the taps beside it where there are any."""
    out = pytree.tree_unflatten(flat, program.out_spec)
    return (out, Taps(hs, ms)) if hs else out


def _begin(
    bounded: BoundedModule, program: Program, leaves: list[Any], canvas: Tensor | None = None
) -> tuple[dict[str, Any], Tensor | None]:
    """Run what comes before region 0; all values by name, and `m_0`."""
    values = Values(zip(program.inputs, leaves, strict=True))
    program.prologue.run(values)
    program.stem.run(values)
    if canvas is not None:
        values[program.canvas] = canvas
    interface = bounded.interface
    return values, interface.initial(interface.fold(values[program.canvas]))


def first_latent(bounded: BoundedModule, program: Program, leaves: list[Any]) -> tuple[Tensor, Tensor]:
    """The latent `m_1`, by region 0 alone, and the canvas as the interface reads it."""
    values, m = _begin(bounded, program, leaves)
    values[SOURCES] = [values[program.canvas], *(values.get(name) for name in program.shared)]
    m, _, _ = bounded.regions[0](values[program.canvas], m, values, program.regions[0])
    assert m is not None
    return m, bounded.interface.fold(values[program.canvas])


def evaluate(bounded: BoundedModule, program: Program, leaves: list[Any], guess: Tensor) -> Tensor:
    """Run every region but the last at a guess of the latents; none waits for another.

    Args:
        bounded: The bounded model.
        program: What to run.
        leaves: The call's inputs.
        guess: `[K - 1, ..., R]` of the latents `m_1 .. m_{K-1}`.

    Returns:
        `[K - 1, ..., R]`, what the regions before them give for these latents.
    """
    return torch.stack([after.to(guess.dtype) for after, _ in _side_by_side(bounded, program, leaves, guess, None)])


def evaluate_traced(
    bounded: BoundedModule, program: Program, leaves: list[Any], guess: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``evaluate``, inside a graph that ``forward_jacobians`` rewrites.

    Returns:
        What ``evaluate`` gives, and the Jacobians of regions 1 .. K - 2, `[K - 2, ..., R, R]`.
    """
    pairs = _side_by_side(bounded, program, leaves, guess, -1 - bounded._chain)
    slots = [jacobian(after, before, k, -1 - bounded._chain) for k, (after, before) in enumerate(pairs) if k]
    return torch.stack([after.to(guess.dtype) for after, _ in pairs]), torch.stack(slots)


def _side_by_side(
    bounded: BoundedModule, program: Program, leaves: list[Any], guess: Tensor, chain: int | None
) -> list[tuple[Tensor, Tensor]]:
    """What comes out of each region but the last, and the latent it was given; marked where ``chain`` is a number."""
    values, m = _begin(bounded, program, leaves)
    canvas, pairs = values[program.canvas], []
    for k, (known, region, pieces) in enumerate(
        zip([m, *guess.unbind()[:-1]], bounded.regions, program.regions, strict=False)
    ):
        if k and chain is not None:
            assert known is not None  # only the first may have none
            known = ops.boundary(known, 2 * k, chain)
        values[SOURCES] = [canvas, *(values.get(name) for name in program.shared)]
        with annotated({CHAIN: bounded._chain, REGION: k}) if chain is not None else _UNLABELLED:
            after, _, _ = region(canvas, known, values, pieces)
        if k and chain is not None:
            after = ops.boundary(after, 2 * k + 1, chain)
        pairs.append((after, known))
    return pairs
