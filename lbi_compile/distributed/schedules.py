"""What the ranks do between stem and head: all regions side by side, or one rank after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..interfaces import Interface, TokenChunkedInterface
from ..interfaces.base import Latents
from ..kernels.pins import pinned
from . import links
from .adjoints import solve
from .call import Call

OUTPUT, LATENTS, ADJOINTS = "readout", "z", "b"


def read_out(call: Call, part: Tensor | None) -> Tensor | None:
    """What the head reads, from this rank's part: the sum of what its regions add, or the last region's output.

    ``None`` where this rank has no head.
    """
    model, ranks = call.model, call.ranks
    if call.head_on_last:
        return part
    if model.plan.readout == "sum":
        assert part is not None
        total = part if ranks.size == 1 else links.add_up(ranks, OUTPUT, call.thread, part)
        return call.values[call.program.canvas] + total
    if ranks.size == 1:
        assert part is not None
        return part
    value = torch.empty_like(call.canvas) if part is None else part
    return links.take(ranks, ranks.size - 1, OUTPUT, call.thread, value)


class Total:
    """Adds up what the regions of one rank give to the readout."""

    def __init__(self, call: Call) -> None:
        self.summed, self.last = call.model.plan.readout == "sum", len(call.model.plan.regions) - 1
        self.dtype, self.own_head = call.canvas.dtype, call.head_on_last
        self.part: Tensor | None = None

    def add(self, k: int, h: Tensor, x: Tensor) -> None:
        """Take in the output and the input of region ``k``."""
        if self.summed:
            # in a dtype that all ranks agree on, whatever autocast makes of a region
            step = (h - x).to(self.dtype)
            self.part = step if self.part is None else self.part + step
        elif k == self.last:
            self.part = h if self.own_head else h.to(self.dtype)


def side_by_side(call: Call) -> Tensor | None:
    """Bodies read the canvas only (zero, self, token): all ranks run theirs at the same time.

    Where latents cross: one all_gather of z, the cells on every rank, and in the backward one all_gather of b and the
    chain of the cells on every rank. One all_reduce for the readout.
    """
    model, program = call.model, call.program
    canvas = call.regional[program.canvas]
    opened, values = {}, {}
    for k in model.own:
        values[k] = dict(call.regional)
        with call.region(k):
            opened[k] = model.regions[k].open(canvas, None, values[k], program.regions[k])
    m = _latents(call, model.interface, {k: value.z for k, value in opened.items() if value.z is not None})
    total = Total(call)
    for k in model.own:
        with call.region(k):
            h = model.regions[k].close(opened[k], m.get(k), values[k], program.regions[k])
        total.add(k, h, opened[k].x)
    return read_out(call, total.part)


def both(call: Call) -> Tensor | None:
    """Chunk latents enter where a region starts, token latents where its finish begins (token+chunked).

    Up to there rank after rank, by messages of one chunk latent each, then all at once as ``side_by_side``. The
    backward comes back the same way: token latents by one all_gather, then one chunk adjoint from each rank to the one
    before.
    """
    model, program, ranks, interface = call.model, call.program, call.ranks, call.model.interface
    assert isinstance(interface, TokenChunkedInterface)
    canvas = call.regional[program.canvas]
    if ranks.first:
        chunk = interface.initial(interface.fold(canvas)).chunk
    else:
        like = _latent_like(interface.chunked, interface.fold(canvas))
        chunk = links.receive(ranks, call.thread, like.shape, like, reply=True)
    opened, values = {}, {}
    for k in model.own:
        values[k] = dict(call.regional)
        assert chunk is not None  # only what leaves the last region does not exist
        with call.region(k):
            opened[k] = model.regions[k].open(canvas, Latents(None, chunk), values[k], program.regions[k])
            chunk = interface.chunked.leave(k, m=chunk, h=opened[k].z.chunk, z=None)
    if not ranks.last:
        assert chunk is not None
        call.thread = links.send_on(ranks, call.thread, chunk)
    says = {k: value.z.token for k, value in opened.items() if value.z.token is not None}
    m = _latents(call, interface.token, says)
    total = Total(call)
    for k in model.own:
        with call.region(k):
            entered: Any = Latents(m.get(k), None)  # pyright: ignore[reportArgumentType]  the finish reads no chunks
            h = model.regions[k].close(opened[k], entered, values[k], program.regions[k])
        total.add(k, h, opened[k].x)
    return read_out(call, total.part)


def _latents(call: Call, interface: Interface, z: dict[int, Tensor]) -> dict[int, Tensor]:
    """The latents that enter this rank's regions, by region, from what its regions say."""
    model, ranks = call.model, call.ranks
    if interface.first_latent is None:
        return {}
    last = interface.regions - 1
    like = _latent_like(interface, model.interface.fold(call.regional[call.program.canvas]))
    says = links.Shares([sum(k < last for k in model.placement.regions(rank)) for rank in range(ranks.size)])
    hears = links.Shares([sum(k > 0 for k in model.placement.regions(rank)) for rank in range(ranks.size)])
    every = list(z.values())
    if ranks.size > 1:
        call.thread, every = links.collect(ranks, says, LATENTS, call.thread, every, like)
    latents: list[Tensor] = []
    m: Tensor | None = None
    for k, value in enumerate(every):
        m = interface.leave(k, m=m, h=value, z=value)
        assert m is not None
        latents.append(m)
    if ranks.size > 1:
        call.thread, latents = links.spread(ranks, hears, ADJOINTS, call.thread, latents)
    return dict(zip((k for k in model.own if k > 0), latents, strict=True))


def _latent_like(interface: Interface, folded: Tensor) -> Tensor:
    """A tensor of the shape and dtype of the latents between regions, for a canvas as the interface reads it."""
    shape = interface.latent_shape(tuple(folded.shape))
    assert shape is not None
    weight = next((p for p in interface.parameters() if p.is_floating_point()), folded)
    return folded.new_zeros((), dtype=weight.dtype).expand(shape)


def in_turn(call: Call) -> Tensor | None:
    """Regions read the latent of the region before them (pooled, chunked, identity): rank after rank, by messages of
    one latent each, or side by side at latents that were solved for. The backward is a chain of messages too, or a
    scan; see ``adjoints`` and ``solving``."""
    model, program, ranks = call.model, call.program, call.ranks
    interface, canvas = model.interface, call.regional[program.canvas]
    scans = model.engine.name == "scan" and torch.is_grad_enabled()
    like = _latent_like(interface, interface.fold(canvas))
    solved = model.latents(call, like)  # [K - 1, B, R]
    given = model.own.start
    if ranks.first:
        m = interface.initial(interface.fold(canvas))
    else:
        known = None if solved is None else solved[given - 1]
        m = links.receive(ranks, call.thread, like.shape, like, reply=not scans, known=known)
    assert m is not None
    entered, total = m, Total(call)
    for k in model.own:
        if solved is not None and k > given:
            assert m is not None
            m = pinned(m, solved[k - 1])
        with call.region(k):
            m, h, x = model.regions[k](canvas, m, dict(call.regional), program.regions[k])
        total.add(k, h, x)
    if scans and ranks.size > 1:
        return solve(call, entered, m, total.part, known=solved is not None)
    if not ranks.last:
        assert m is not None  # only what leaves the last region does not exist
        call.thread = links.send_on(ranks, call.thread, m, known=solved is not None)
    return read_out(call, total.part)
