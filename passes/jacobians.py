"""Interface Jacobians of the regions of one chain, spliced into a joint graph whole, by rows, or for some indices."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lbi_compile.passes.alike import PART
from lbi_compile.passes.batch_cotangents import Batched, BatchInterpreter
from lbi_compile.passes.index_chunks import Inseparable, Narrowed, Operand, narrowed
from lbi_compile.passes.jacobian_budget import Work, working_bytes
from lbi_compile.passes.jacobian_slices import Slice, cut, downstream, simplify
from lbi_compile.passes.linearity import require_no_constant
from lbi_compile.passes.splicing import BACKWARD, Splicer


@dataclass(frozen=True, slots=True)
class AdjointPath:
    """Adjoint path of one region.

    Attributes:
        k: Number of the region.
        source: Adjoint of its latent out, where the path begins.
        end: Adjoint of its latent in, where it ends.
        path: The nodes between, ``end`` included.
        extra: Adjoints that join the path from elsewhere.
        label: Of nodes that are inserted for the region.
    """

    k: int
    source: fx.Node
    end: fx.Node
    path: tuple[fx.Node, ...]
    extra: tuple[fx.Node, ...]
    label: dict[str, int]


@dataclass(frozen=True, slots=True)
class Jacobian:
    """One region's ``J`` ``[*lead, R, R]``, whose rows are the adjoint path run on unit cotangents.

    Attributes:
        region: The region.
        piece: Its path; ``None`` where nothing flows from the latent in to the latent out.
        module: The path in operators that have batching rules.
        like: Equal for regions whose paths are alike; ``None`` where that is not known.
        node: The Jacobian, spliced whole.
    """

    region: AdjointPath
    piece: Slice | None
    module: fx.GraphModule | None
    like: Hashable | None
    node: fx.Node

    @property
    def shared(self) -> bool:
        """It is the same for every index: all axes of lead are 1."""
        return all(isinstance(size, int) and size == 1 for size in self.node.meta["val"].shape[:-2])


class Jacobians:
    """Splices the Jacobians of one chain.

    Args:
        gm: The joint graph.
        splicer: Of the chain.
        r: Latent width.
        tag: AOTAutograd's tag of Jacobians: where they run.

    Attributes:
        unrolled: Operator to the reason why it runs once per cotangent.
        attention: How fused attention was batched over R.
        inseparable: Region to the reason why its Jacobian cannot be computed for some of the indices.
    """

    def __init__(self, gm: fx.GraphModule, splicer: Splicer, r: int, *, tag: str = BACKWARD) -> None:
        self.gm, self.splicer, self.r, self.tag = gm, splicer, r, tag
        self.unrolled: dict[str, str] = {}
        self.attention: set[str] = set()
        self.inseparable: dict[int, str] = {}
        self._modules: dict[Hashable, fx.GraphModule] = {}
        self._narrowed: dict[Hashable, Narrowed | Inseparable] = {}

    def of(self, region: AdjointPath) -> Jacobian:
        """The Jacobian of ``region``, spliced whole."""
        value, r = region.source.meta["val"], self.r
        if region.end not in region.path and region.end is not region.source:
            # Nothing flows from this latent to the next one (a detached region).
            lead = [1] * (value.dim() - 1)
            node = self.splicer(
                lambda: torch.zeros(*lead, r, r, dtype=value.dtype, device=value.device), [], tag=self.tag
            )
            return Jacobian(region, None, None, None, node)
        live = {region.source, *downstream([region.source])}
        require_no_constant(self.gm, region.path, live=live, dead=region.extra)
        piece = cut(self.gm, region.path, live=[region.source], dead=region.extra, end=region.end)
        like = piece.signature()
        if like not in self._modules:
            with self.splicer.tracing():
                zero = torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape)
                self._modules[like] = simplify(piece, [zero])
        module = self._modules[like] if like is not None else self._modules.pop(like)
        return Jacobian(region, piece, module, like, self._whole(region, piece, module, like, r, labelled=True))

    def by_rows(self, jacobian: Jacobian, rows: int) -> fx.Node:
        """The Jacobian ``[*lead, R, R]``, ``rows`` rows of it at a time."""
        assert jacobian.piece is not None
        assert jacobian.module is not None
        like = None if jacobian.like is None else (jacobian.like, rows)
        return self._whole(jacobian.region, jacobian.piece, jacobian.module, like, rows, labelled=False)

    def work(self, jacobian: Jacobian) -> Work:
        """What it takes to compute the Jacobian at all indices."""
        assert jacobian.module is not None
        value = jacobian.node.meta["val"]
        lead = jacobian.region.source.meta["val"].shape[:-1]
        result = math.prod(lead) * self.r**2 * value.element_size()
        most = working_bytes(jacobian.module, self.r)
        found = self._narrow(jacobian)
        if isinstance(found, Inseparable):
            self.inseparable[jacobian.region.k] = str(found)
        return Work(result, most, isinstance(found, Narrowed))

    def reads(self, jacobian: Jacobian) -> list[tuple[Operand, fx.Node]]:
        """What computing the Jacobian for some of the indices reads, and as which nodes of the joint graph."""
        narrow = self._narrow(jacobian)
        assert isinstance(narrow, Narrowed)
        assert jacobian.piece is not None
        constants = list(jacobian.piece.constants)
        computed = iter(())
        if narrow.head is not None:
            zeros, head = jacobian.piece.zero_values, narrow.head
            like = None if jacobian.like is None else (jacobian.like, "head")
            computed = iter(self.splicer(lambda *values: head(*values, *zeros()), constants, like=like))
        nodes: dict[fx.Node, fx.Node] = {}
        for operand in narrow.operands:
            if operand.source not in nodes:
                place = narrow.inputs.get(operand.source)
                nodes[operand.source] = next(computed) if place is None else constants[place]
        return [(operand, nodes[operand.source]) for operand in narrow.operands]

    def flat(self, jacobian: Jacobian, operand: Operand, value: Tensor, count: Any) -> Tensor:
        """The whole value of something the Jacobian reads, as ``[N, *tail]``."""
        narrow = self._narrow(jacobian)
        assert isinstance(narrow, Narrowed)
        return narrow.flat(operand, value, count)

    def part(self, jacobian: Jacobian, read: Sequence[fx.Node], number: fx.Node | int, which: Hashable) -> fx.Node:
        """The Jacobian at some of the indices: ``[n, R, R]``.

        Args:
            jacobian: Which.
            read: For each of its ``reads`` the part ``[n, *tail]``, or the whole where it holds no indices.
            number: How many indices.
            which: Equal for parts of one size.
        """
        narrow, r = self._narrow(jacobian), self.r
        assert isinstance(narrow, Narrowed)
        like = None if jacobian.like is None else (jacobian.like, which)
        live = jacobian.region.source.meta["val"]
        sizes = [number] if isinstance(number, fx.Node) else []
        if not self.splicer.knows(like):
            with self.splicer.tracing():
                n = number.meta["val"] if isinstance(number, fx.Node) else number
                pairs = zip(narrow.operands, read, strict=True)
                values = [narrow.shaped(operand, node.meta["val"], n) for operand, node in pairs]
                narrow.settle(live.new_empty(narrow.shape(n, r)), values, n)

        def rows(eye: Tensor, *values: Any) -> Tensor:
            n: Any = values[0] if sizes else number
            pairs = zip(narrow.operands, values[len(sizes) :], strict=True)
            cut = [narrow.shaped(operand, value, n) for operand, value in pairs]
            shape = narrow.shape(n, r)
            J = self._run(narrow.module, eye, shape, *cut, *narrow.zero_cotangents(r, n), n)
            return J.expand(*shape[:-1], r, r).reshape(n, r, r)

        # without a label: batched over regions, they would take the memory of all regions at a time
        return self.splicer(rows, [self._eye(live), *sizes, *read], like=like)

    def _narrow(self, jacobian: Jacobian) -> Narrowed | Inseparable:
        key = id(jacobian) if jacobian.like is None else jacobian.like
        if key not in self._narrowed:
            assert jacobian.piece is not None
            assert jacobian.module is not None
            try:
                self._narrowed[key] = narrowed(jacobian.piece, jacobian.module)
            except Inseparable as error:
                self._narrowed[key] = error
        return self._narrowed[key]

    def _whole(
        self,
        region: AdjointPath,
        piece: Slice,
        module: fx.GraphModule,
        like: Hashable | None,
        number: int,
        *,
        labelled: bool,
    ) -> fx.Node:
        value, r = region.source.meta["val"], self.r
        shape = tuple(value.shape)

        def rows(eye: Tensor, *constants: Any) -> Tensor:
            found = [
                self._run(module, part, shape, *constants, *piece.zero_cotangents(part.shape[0]))
                for part in (eye.split(number) if number < r else [eye])
            ]
            return found[0] if len(found) == 1 else torch.cat(found, -2)

        label = {**region.label, PART: "jacobian"} if labelled else None
        return self.splicer(rows, [self._eye(value), *piece.constants], like=like, tag=self.tag, label=label)

    def _eye(self, like: Tensor) -> fx.Node:
        r, dtype, device = self.r, like.dtype, like.device
        return self.splicer.once(lambda: torch.eye(r, dtype=dtype, device=device), like=(r, dtype), tag=self.tag)

    def _run(self, module: fx.GraphModule, eye: Tensor, shape: tuple[Any, ...], *values: Any) -> Tensor:
        """The path run on ``eye`` ``[rows, R]``: ``[*lead or 1s, rows, R]``."""
        rows, r = eye.shape
        run = BatchInterpreter(module, rows)
        result = run.run(Batched(eye.view(rows, *[1] * (len(shape) - 1), r), shape), *values)
        self.unrolled.update(run.unrolled)
        self.attention |= run.attention
        data = result.data if isinstance(result, Batched) else result.new_zeros(()).expand(rows, *result.shape)
        if not (isinstance(data.shape[-1], int) and data.shape[-1] == r):
            data = data.expand(*data.shape[:-1], r)
        return data.movedim(0, -2)


def bias(gm: fx.GraphModule, region: AdjointPath, splicer: Splicer) -> fx.Node:
    """Splice ``b`` ``[*lead, R]``: the adjoint path run on ``lam = 0``."""
    if not region.path:
        return region.end
    live = downstream(region.extra) & set(region.path)
    if region.end not in live:
        return splicer(lambda end: torch.zeros_like(end), [region.end], label={**region.label, PART: "bias"})
    path = [node for node in region.path if node in live]
    dead = {*region.path, region.source} - live
    piece = cut(gm, path, live=region.extra, dead=dead, end=region.end)

    def run(*values: Tensor) -> Tensor:
        return piece.module(*values, *piece.zero_values())

    return splicer(run, [*region.extra, *piece.constants], label={**region.label, PART: "bias"})
