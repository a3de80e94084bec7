"""Splice the suffix scan of one chain into a joint graph: over all indices at once, or over one part after another."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lbi_compile._torch import same_shape
from lbi_compile.passes.jacobians import Jacobian, Jacobians
from lbi_compile.passes.splicing import Splicer


class AdjointScan:
    """The scan of one chain of K Jacobians.

    Args:
        splicer: Of the chain.
        last: Adjoint of the last latent, ``[*lead, R]``.
        biases: By place in the chain ``b`` ``[*lead, R]``, where anything joins there.
        dtypes: Dtype of every latent, K + 1 of them.
    """

    def __init__(
        self, splicer: Splicer, last: fx.Node, biases: dict[int, fx.Node], dtypes: Sequence[torch.dtype]
    ) -> None:
        self.splicer, self.last, self.biases, self.dtypes = splicer, last, biases, dtypes
        self.dtype = functools.reduce(torch.promote_types, dtypes)
        shape = last.meta["val"].shape
        self.lead, self.r = tuple(shape[:-1]), int(shape[-1])

    def whole(self, jacobians: Sequence[fx.Node]) -> list[fx.Node]:
        """The adjoints, ``[*lead, R]`` each, from Jacobians ``[*lead or 1s, R, R]``."""
        count, lead, r = len(jacobians), self.lead, self.r

        def scan(*values: Tensor) -> list[Tensor]:
            last, *pieces = [value.to(self.dtype) for value in values]
            J = _stacked(pieces[:count], lead, r)
            b = self._bias(pieces[count:], count, lead)
            lam = torch.ops.lbi.suffix_scan.default(J, last.reshape(math.prod(lead), r), b)
            lam = lam.reshape(count + 1, *lead, r)
            return [self._cast(lam[at], at) for at in range(count)]

        return self.splicer(scan, [self.last, *jacobians, *self.biases.values()])

    def by_parts(self, jacobians: Jacobians, found: Sequence[Jacobian], parts: int) -> list[fx.Node]:
        """The same, with the Jacobians of one part of the indices at a time."""
        count, lead, r = len(found), self.lead, self.r
        # the end of the graph: before that, parts whose scan waits for other gradients would pile up
        self.splicer.before = self.splicer.gm.graph.output_node()
        reads = [[] if one.shared else jacobians.reads(one) for one in found]
        cut = [[node for operand, node in pairs if operand.lead] for pairs in reads]

        def take(*values: Tensor) -> list[Any]:
            indices = 1
            for size in values[0].shape[:-1]:
                indices = indices * size
            number = indices // parts
            rest = indices - number * (parts - 1)
            given = iter(values)
            flat = [next(given).reshape(indices, r) for _ in range(1 + len(self.biases))]
            for one, pairs in zip(found, reads, strict=True):
                flat += [jacobians.flat(one, operand, next(given), indices) for operand, _ in pairs if operand.lead]
            return [number, rest, *(x.split_with_sizes([number] * (parts - 1) + [rest]) for x in flat)]

        number, rest, *pieces = self.splicer(take, [self.last, *self.biases.values(), *itertools.chain(*cut)])
        made: list[list[fx.Node]] = []
        for at in range(parts):
            size, which = (rest, "rest") if at == parts - 1 else (number, "number")
            mine = iter([piece[at] for piece in pieces])
            ends = [next(mine) for _ in range(1 + len(self.biases))]
            nodes = []
            for one, pairs in zip(found, reads, strict=True):
                read = [next(mine) if operand.lead else node for operand, node in pairs]
                nodes.append(one.node if one.shared else jacobians.part(one, read, size, which))
            sizes = [size] if isinstance(size, fx.Node) else []

            def scan(*values: Any, size: Any = size, sizes: list[fx.Node] = sizes) -> list[Tensor]:
                n = values[0] if sizes else size
                last, *pieces = [value.to(self.dtype) for value in values[len(sizes) :]]
                b = self._bias(pieces[: len(self.biases)], count, (n,))
                J = _stacked([x.reshape(-1, r, r) for x in pieces[len(self.biases) :]], (n,), r)
                lam = torch.ops.lbi.suffix_scan.default(J, last, b)
                return [self._cast(lam[at], at) for at in range(count)]

            made.append(self.splicer(scan, [*sizes, *ends, *nodes], like=("scan", which)))

        def join(*values: Tensor) -> list[Tensor]:
            return [torch.cat(values[at::count]).reshape(*lead, r) for at in range(count)]

        return self.splicer(join, [adjoint for adjoints in made for adjoint in adjoints])

    def _bias(self, given: Sequence[Tensor], count: int, lead: Sequence[Any]) -> Tensor | None:
        if not given:
            return None
        places = dict(zip(self.biases, given, strict=True))
        nothing = torch.zeros((), dtype=given[0].dtype, device=given[0].device).expand(*lead, self.r)
        b = torch.stack([places.get(at, nothing) for at in range(count)])
        return b.reshape(count, math.prod(lead), self.r)

    def _cast(self, adjoint: Tensor, at: int) -> Tensor:
        return adjoint if self.dtypes[at] == self.dtype else adjoint.to(self.dtypes[at])


def _stacked(rows: Sequence[Tensor], lead: tuple[Any, ...], r: int) -> Tensor:
    """Jacobians ``[*lead or 1s, R, R]`` as ``[K, N, R, R]``; one that all indices share is not copied for each."""
    count, n = len(rows), math.prod(lead)
    if all(isinstance(size, int) and size == 1 for row in rows for size in row.shape[:-2]):
        return torch.stack(list(rows)).reshape(count, 1, r, r).expand(count, n, r, r)
    whole = (*lead, r, r)
    J = torch.stack([row if same_shape(row.shape, whole) else row.expand(whole) for row in rows])
    return J.reshape(count, n, r, r)
