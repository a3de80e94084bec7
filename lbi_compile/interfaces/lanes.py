"""Interfaces for boundaries of several lanes, or of lanes in another shape than the canvas.

The latent `m_k` `[B, R]` has S slots of w = R // S numbers. A lane is encoded into a slot where it first crosses; at
later boundaries the slot passes on unchanged (an identity block of `J_k`). A region that reads a lane gets a base in
the lane's shape, to which the decoded latent is added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LatentWidthError
from ..passes.layouts import Layout
from .base import Decoder, Draw, Encoder, Interface
from .chunked import Chunks, chunk_count, chunk_norm, keep

SOURCE, PROJECTED, TEMPLATE = "source", "projected", "template"


@dataclass(frozen=True, slots=True)
class AlongAxis:
    """The layout of a lane that looks back along one axis: that axis alone is its positions, all others its width."""

    batch: int
    position: int
    rank: int

    @property
    def positions(self) -> tuple[int, ...]:
        return (self.position,)

    @property
    def _order(self) -> tuple[int, ...]:
        # compared one by one: Dynamo may take the fields for symbols, and then finds none of them in a tuple
        first, second = ([dim for dim in range(self.rank) if dim == field] for field in (self.batch, self.position))
        rest = [dim for dim in range(self.rank) if dim != self.batch and dim != self.position]
        return (*first, *second, *rest)

    def fold(self, x: Tensor) -> Tensor:
        """The value as `[B, T, E]`."""
        return x.permute(self._order).flatten(2) if self.rank > 2 else x.permute(self._order)[..., None]

    def unfold(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of ``fold``."""
        order = self._order
        y = y.unflatten(2, [shape[dim] for dim in order[2:]]) if self.rank > 2 else y[..., 0]
        return y.permute([order.index(dim) for dim in range(self.rank)])


@dataclass(frozen=True, slots=True)
class LaneForm:
    """What an interface must know of a lane.

    Attributes:
        layout: Which of its dims are samples, features and positions.
        width: Its features E.
        positions: Sizes of its position axes; ``None`` for one that varies.
        base: ``"source"`` (a shared source of its shape), ``"projected"`` (the canvas, pooled and projected) or
            ``"template"`` (learned).
        source: Index of the shared source where ``base`` is ``"source"`` (0 is the canvas).
        causal: Its positions are those along which the model's outputs look back only.
        slot: The slot of the latent it is encoded into.
        first: The boundary it crosses first.
        last: The boundary it crosses last.
        readers: The regions that read it.
        scale: Root mean square of its values.
    """

    layout: Layout | AlongAxis
    width: int
    positions: tuple[int | None, ...]
    base: str
    source: int
    causal: bool
    slot: int
    first: int
    last: int
    readers: tuple[int, ...]
    scale: float


class LanesInterface(Interface):
    """Base of the interfaces between regions that read lanes.

    One region step, with lanes by index::

        read = interface.enter_lanes(k, m, shapes, sources)      # what region k reads in place of its lanes
        ... the region runs on them, and gives the lanes that first cross the boundary after it ...
        m = interface.leave_lanes(k, m, new, read)

    Args:
        kind: ``"pooled"``, ``"chunked"`` or ``"identity"``.
        lanes: Forms of the lanes, in the order in which they first cross.
    """

    readouts: tuple[str, ...] = ("last",)
    first_latent: ClassVar[int | None] = 1

    def __init__(self, kind: str, *, regions: int, r: int, lanes: Sequence[LaneForm]) -> None:
        super().__init__(regions=regions, r=r)
        self.kind = kind  # type: ignore[misc]  # of the instance: one class serves several kinds
        self.lanes = tuple(lanes)

    def crossing(self, k: int) -> list[int]:
        """Indices of the lanes that cross boundary ``k``."""
        return [i for i, form in enumerate(self.lanes) if form.first <= k <= form.last]

    def enter_lanes(
        self, k: int, m: Tensor, shapes: Mapping[int, Sequence[int]], sources: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        """What region ``k`` >= 1 reads in place of its lanes.

        Args:
            k: The region.
            m: Latent `m_k`.
            shapes: Sizes of every lane that crosses boundary ``k``.
            sources: The canvas and the other shared sources.
        """
        raise NotImplementedError

    def leave_lanes(
        self, k: int, m: Tensor | None, new: Mapping[int, Tensor], read: Mapping[int, Tensor]
    ) -> Tensor | None:
        """The latent `m_{k+1}`; ``None`` after the last region.

        Args:
            k: The region that ends.
            m: Latent `m_k`; ``None`` for region 0.
            new: Values of the lanes that first cross the boundary after region ``k``.
            read: What ``enter_lanes`` gave region ``k``.
        """
        raise NotImplementedError


class PooledLanes(LanesInterface):
    """Lanes in slots of one latent per sample; causal lanes by chunks that look back only.

    A slot holds `norm(D(pool v))` of the first lane v that uses it, `norm(slot + tanh(g) D(pool v))` of later ones, and
    is zero before. Region k reads lane v as `base_v + U_{k,v}(m_k)`. A lane whose positions the outputs look back along
    (``causal``) is pooled chunk by chunk, and each of its positions reads the chunks before its own. Other lanes read
    only the slots of such as them: what depends on all positions never hears of causal ones.

    Args:
        draw: Makes the layers.
        lanes: Forms of the lanes.
        canvas: Form of the canvas: layout, width, and its position sizes.
        chunk: Positions per chunk of causal lanes.
    """

    def __init__(
        self,
        draw: Draw,
        kind: str,
        *,
        regions: int,
        r: int,
        lanes: Sequence[LaneForm],
        canvas: LaneForm,
        chunk: int | None,
    ) -> None:
        super().__init__(kind, regions=regions, r=r, lanes=lanes)
        self.canvas = canvas
        self.slots = 1 + max(form.slot for form in lanes)
        self.slot_width = slot_width(r, lanes)
        self.looks_back = [any(f.causal for f in lanes if f.slot == s) for s in range(self.slots)]
        chunks = max(chunk_count(self.slot_width), 2) if any(self.looks_back) else 1
        self._groups = Chunks(chunks, chunk or 1)
        hidden, seen = 4 * self.slot_width, set()
        self.encoders, self.gates, self.norms = nn.ModuleDict(), nn.ParameterDict(), nn.ModuleDict()
        self.decoders, self.bases = nn.ModuleDict(), nn.ModuleDict()
        for index, form in enumerate(lanes):
            name = str(index)
            width = self.slot_width // chunks if form.causal else self.slot_width
            self.encoders[name] = Encoder(draw, width=form.width, hidden=hidden, r=width)
            if form.slot in seen:
                self.gates[name] = draw.parameter(math.atanh(1 / math.sqrt(2)))
            if not form.causal:
                self.norms[name] = draw.latent_norm(self.slot_width)
            seen.add(form.slot)
            here = _Scaled(draw, form.scale)
            for k in form.readers:
                self.decoders[f"{k}_{index}"] = Decoder(here, r=self._readable(form), hidden=4 * r, width=form.width)
            if form.base == PROJECTED:
                self.bases[name] = here.linear(canvas.width, form.width, gain=form.scale / draw.scale)
            elif form.base == TEMPLATE:
                self.bases[name] = _Template(here, form)

    def _readable(self, form: LaneForm) -> int:
        """How many numbers of the latent a lane of this form may read."""
        return self.slot_width * sum(form.causal or not back for back in self.looks_back)

    def enter_lanes(
        self, k: int, m: Tensor, shapes: Mapping[int, Sequence[int]], sources: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        return {i: self._read(k, i, shapes[i], sources, m) for i in self.crossing(k) if k in self.lanes[i].readers}

    def _read(self, k: int, lane: int, shape: Sequence[int], sources: Sequence[Tensor], m: Tensor) -> Tensor:
        form = self.lanes[lane]
        base = self._base(lane, form, shape, sources)
        decoder = self.decoders[f"{k}_{lane}"]
        slots = m.unflatten(1, (self.slots, self.slot_width)).unbind(1)
        free = [slot for slot, back in zip(slots, self.looks_back, strict=True) if not back]
        if not form.causal:
            decoded = decoder(torch.cat(free, 1)).to(base.dtype)
            positions = bool(form.layout.positions)
            return base + form.layout.unfold(
                decoded[:, None].expand(-1, _count(form, shape), -1) if positions else decoded, shape
            )
        groups = self._groups
        past = [
            F.pad(groups.readable(slot.unflatten(1, (groups.count, -1))), (0, 0, 1, 0))  # group 0 reads no chunk
            for slot, back in zip(slots, self.looks_back, strict=True)
            if back
        ]
        everywhere = [slot[:, None].expand(-1, groups.count + 1, -1) for slot in free]
        decoded = decoder(torch.cat([*everywhere, *past], 2)).to(base.dtype)  # [B, C + 1, E]
        return base + form.layout.unfold(groups.spread(decoded, shape[form.layout.positions[0]]), shape)

    def _base(self, lane: int, form: LaneForm, shape: Sequence[int], sources: Sequence[Tensor]) -> Tensor:
        if form.base == SOURCE:
            return sources[form.source]
        canvas = self.canvas.layout.fold(sources[0])
        batch = canvas.shape[0]
        if form.base == TEMPLATE:
            rows = self.bases[str(lane)](batch)
        else:
            rows = self.bases[str(lane)](_resize(canvas, self.canvas, form))
        if form.layout.positions and rows.dim() == 2:
            rows = rows[:, None]
        if rows.dim() == 3:
            rows = rows.expand(-1, _count(form, shape), -1)
        return form.layout.unfold(rows, shape)

    def leave_lanes(
        self, k: int, m: Tensor | None, new: Mapping[int, Tensor], read: Mapping[int, Tensor]
    ) -> Tensor | None:
        if k == self.regions - 1:
            return None
        before: Sequence[Tensor | None] = [None] * self.slots
        if m is not None:
            before = m.unflatten(1, (self.slots, self.slot_width)).unbind(1)
        parts = list(before)
        for index, value in new.items():
            slot = self.lanes[index].slot
            parts[slot] = self._encode(index, value, before[slot])
        known = next(part for part in parts if part is not None)
        return torch.cat([known.new_zeros(known.shape) if part is None else part for part in parts], 1)

    def _encode(self, index: int, value: Tensor, before: Tensor | None) -> Tensor:
        form, name = self.lanes[index], str(index)
        folded = form.layout.fold(value)
        gate = self.gates[name].tanh() if name in self.gates else None
        if form.causal:
            means, filled = self._groups.pool(folded)
            latent = self.encoders[name](means)  # [B, C, w / C]
            if gate is not None and before is not None:
                latent = before.unflatten(1, (self._groups.count, -1)) + gate * latent
            return keep(chunk_norm(latent), filled).flatten(1).to(latent.dtype)
        latent = self.encoders[name](folded.mean(1) if folded.dim() == 3 else folded)
        if gate is not None and before is not None:
            latent = before + gate * latent
        # CUDA's autocast lets a norm of bfloat16 return float32
        return self.norms[name](latent).to(latent.dtype)

    def latent_shape(self, canvas_shape: tuple[int, ...]) -> tuple[int, ...]:
        return canvas_shape[0], self.slots * self.slot_width

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lanes={len(self.lanes)}, slots={self.slots} of {self.slot_width}"


class IdentityLanes(LanesInterface):
    """The lanes themselves cross, flattened side by side, `[B, R_k]`: the model as it was, for checking.

    ``R_k`` differs from boundary to boundary, which the scan refuses: use the chain or autograd.
    """

    def enter_lanes(
        self, k: int, m: Tensor, shapes: Mapping[int, Sequence[int]], sources: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        lanes = self.crossing(k)
        native = {i: _samples_first(self.lanes[i].layout, shapes[i]) for i in lanes}
        parts = m.split([_product(native[i][1:]) for i in lanes], 1)
        return {
            i: part.reshape(native[i]).movedim(0, self.lanes[i].layout.batch)
            for i, part in zip(lanes, parts, strict=True)
        }

    def leave_lanes(
        self, k: int, m: Tensor | None, new: Mapping[int, Tensor], read: Mapping[int, Tensor]
    ) -> Tensor | None:
        if k == self.regions - 1:
            return None
        values = {**read, **new}
        # not folded: the order in memory stays as it is, and with it the kernels that are chosen
        return torch.cat([values[i].movedim(self.lanes[i].layout.batch, 0).flatten(1) for i in self.crossing(k + 1)], 1)


def _samples_first(layout: Layout | AlongAxis, shape: Sequence[int]) -> list[int]:
    """Sizes with the axis of samples in front."""
    return [shape[layout.batch], *(size for dim, size in enumerate(shape) if dim != layout.batch)]


class _Template(nn.Module):
    """A learned value in a lane's shape, the same for every sample: `[1, P, E]` at fixed sizes, else `[1, E]`."""

    def __init__(self, draw: Draw, form: LaneForm) -> None:
        super().__init__()
        fixed = [size for size in form.positions if size is not None]
        count = [math.prod(fixed)] if fixed and len(fixed) == len(form.positions) else []
        self.value = draw.parameter(draw.normal(*count, form.width) * form.scale)

    def forward(self, batch: int) -> Tensor:
        return self.value.expand(batch, *self.value.shape)


class _Scaled(Draw):
    """Draws from another one's generator, at another scale."""

    def __init__(self, draw: Draw, scale: float) -> None:
        self.generator, self.dtype, self.device, self.scale = draw.generator, draw.dtype, draw.device, scale


def slot_width(r: int, lanes: Sequence[LaneForm]) -> int:
    """Numbers per slot when ``r`` are shared out among the slots.

    Raises:
        LatentWidthError: A slot would get none, or too few for chunks that look back.
    """
    slots = 1 + max(form.slot for form in lanes)
    # what looks back only needs two chunks: one that is heard, and one that hears
    least = 2 if any(form.causal for form in lanes) else 1
    width = r // slots
    if least == 2 and chunk_count(width) == 1:
        width -= width % 2
    if width < least:
        raise LatentWidthError(
            f"r={r} for boundaries with up to {slots} lanes" + (", of which some look back only" if least > 1 else ""),
            expected=f"at least {least} for each lane",
            do=f"pass r={least * slots} or more, or fewer regions",
        )
    return width


def _product(sizes: Sequence[int]) -> int:
    """The product, in a form that Dynamo follows for symbolic sizes."""
    total = 1
    for size in sizes:
        total = total * size
    return total


def _count(form: LaneForm, shape: Sequence[int]) -> int:
    return _product([shape[dim] for dim in form.layout.positions])


def _resize(canvas: Tensor, have: LaneForm, want: LaneForm) -> Tensor:
    """The canvas `[B, P, D]` at the positions of a lane, by averages; `[B, D]` where they do not correspond."""
    if canvas.dim() == 2:
        return canvas
    if not want.positions:
        return canvas.mean(1)
    if have.positions == want.positions and None not in want.positions:
        return canvas
    sizes = [size for size in (*have.positions, *want.positions) if size is not None]
    fixed = len(sizes) == len(have.positions) + len(want.positions)
    if not fixed or len(have.positions) != len(want.positions) or len(want.positions) > 3:
        return canvas.mean(1)
    pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(want.positions) - 1]
    spatial = canvas.unflatten(1, [int(size) for size in have.positions if size is not None]).movedim(-1, 1)
    pooled = pool(spatial, [int(size) for size in want.positions if size is not None])
    return pooled.flatten(2).transpose(1, 2)
