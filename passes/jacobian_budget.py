"""How much memory the Jacobians of one scan take, and into how many parts they are cut to stay within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx

from lbi_compile._torch import example_size
from lbi_compile.errors import EngineError, OptionError
from lbi_compile.passes.alike import VIEWS

JACOBIAN_BYTES = 256 * 2**20
# Every part is traced: its nodes are part of the graph.
MOST_PARTS = 64


def check_budget(value: Any) -> int:
    """Return ``value`` if it is a number of bytes.

    Raises:
        OptionError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(
            f"jacobian_bytes={value!r}",
            expected="a positive whole number of bytes",
            do=f"pass for example jacobian_bytes={JACOBIAN_BYTES}",
        )
    return value


class Work(NamedTuple):
    """What it takes to compute the Jacobian of one region at all indices, in bytes.

    Attributes:
        result: The Jacobian.
        most: What lives at one time while it is computed, itself included.
        separable: It can be computed for some of the indices.
    """

    result: Any
    most: Any
    separable: bool


@dataclass(frozen=True, slots=True)
class Parts:
    """How the Jacobians of one scan are computed.

    Attributes:
        together: All regions at once, as one batched operator each where they are alike.
        indices: Number of parts the indices are cut into.
        rows: By region, how many rows of its Jacobian are computed at a time.
        bounds: Pairs of a size and the number it may not exceed where this is to stay within the budget.
        over: Why more than the budget is needed; empty where it is not.
    """

    together: bool
    indices: int
    rows: tuple[int, ...]
    bounds: tuple[tuple[Any, int], ...]
    over: str = ""


def parts(works: Sequence[Work], *, r: int, indices: Any, budget: int) -> Parts:
    """Fit the Jacobians of a scan into ``budget`` bytes: as they are, one region after another, or in parts.

    Besides the values on the way to a Jacobian, all Jacobians of a part are counted twice: each by itself, and in the
    one tensor that the scan reads.

    Args:
        works: By region, of Jacobians that differ from index to index; those that do not take next to nothing.
        r: Latent width.
        indices: Number N of indices, may be symbolic.
        budget: Most bytes.

    Raises:
        EngineError: More than :data:`MOST_PARTS` parts were needed.

    Example:
        >>> mib = 2**20
        >>> parts([Work(100 * mib, 300 * mib, True)] * 2, r=16, indices=65536, budget=256 * mib).indices
        2
    """
    everything = (r,) * len(works)
    if not works:
        return Parts(True, 1, (), ())
    stacked = 2 * sum(work.result for work in works)
    together = (stacked, sum(work.most for work in works))
    if all(example_size(size) <= budget for size in together):
        return Parts(True, 1, everything, tuple((size, budget) for size in together))
    kept = sum(work.result for work in works[1:])
    apart = (stacked, *(kept + work.most for work in works))
    if all(work.separable for work in works):
        # bytes of an index: every value grows with the number of indices
        count = example_size(indices)
        most = budget // -(-max(map(example_size, apart)) // count)
        number = 1
        while count > _capacity(number, most) and number < MOST_PARTS:
            number *= 2
        if count > _capacity(number, most):
            raise EngineError(
                f"interface Jacobians that take {max(map(example_size, apart))} bytes at {count} indices",
                expected=f"no more than {MOST_PARTS} parts of {budget} bytes",
                do="raise jacobian_bytes, or use backward='chain' (no Jacobians)",
            )
        return Parts(False, number, everything, ((indices, _capacity(number, most)),))
    rows, bounds = [], []
    for work in works:
        number = r
        while number > 1 and example_size(work.most) * number > budget * r:
            number = -(-number // 2)
        rows.append(number)
        if number > 1:
            bounds.append((work.most, budget * r // number))
    over = "" if example_size(stacked) <= budget else f"the Jacobians alone take {example_size(stacked)} bytes"
    slowest = max(example_size(work.most) * number for work, number in zip(works, rows, strict=True)) // r
    if not over and slowest > budget:
        over = f"one row of a Jacobian takes {slowest} bytes to compute"
    return Parts(False, 1, tuple(rows), tuple(bounds), over)


def _capacity(parts: int, most: int) -> int:
    """Indices that fit into ``parts`` parts of at most ``most``, all of one size but the last.

    Of N indices the last part has ``N - (parts - 1) (N // parts)``, which is less than ``N / parts + parts``.
    """
    return parts * most - (parts - 1) ** 2


def working_bytes(module: fx.GraphModule, r: int) -> Any:
    """Bytes of the values of an adjoint path that live at one time, run for R cotangents at once.

    Args:
        module: The path; its first input is the adjoint.
        r: Number of cotangents.

    Returns:
        Their sum where it is largest at the example's sizes, symbolic where sizes are.
    """
    nodes = list(module.graph.nodes)
    owner: dict[fx.Node, fx.Node] = {nodes[0]: nodes[0]}
    last: dict[fx.Node, int] = {}
    for at, node in enumerate(nodes):
        before = [owner[a] for a in node.all_input_nodes if a in owner]
        if before:
            view = node.target in VIEWS or not isinstance(node.meta.get("val"), Tensor)
            owner[node] = before[0] if view else node
            last.update(dict.fromkeys(before, at))
    alive: dict[fx.Node, Any] = {}
    most, largest = 0, 0
    for at, node in enumerate(nodes):
        if owner.get(node) is node and node.op == "call_function":
            value = node.meta["val"]
            alive[node] = math.prod(value.shape) * value.element_size() * r
        total = sum(map(example_size, alive.values()))
        if total > largest:
            most, largest = sum(alive.values()), total
        alive = {one: size for one, size in alive.items() if last.get(one, at) > at}
    return most
