"""Axes: does a value mix the positions (or the samples) of another, proven by static rules or measured by a probe.

Contract: nodes of a captured graph, or a function that runs them, in; a frozen verdict out. Nothing is changed: the
random state is put back after a probe. Unsure means coupled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from lbi_compile._torch import pytree
from lbi_compile.errors import BatchCouplingError, OptionError
from lbi_compile.passes.axis_calls import ABSENT, AxisState
from lbi_compile.passes.axis_rules import follow
from lbi_compile.passes.names import describe, operator_name

POSITION_WISE, CAUSAL, ANTICAUSAL, MIXED = "position-wise", "causal", "anticausal", "mixed"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How output positions along an axis depend on input positions.

    Attributes:
        kind: ``"position-wise"`` (output t reads input t only), ``"causal"`` (inputs up to t), ``"anticausal"`` (inputs
            from t on) or ``"mixed"``.
        how: ``"static"`` where rules decided, ``"probe"`` where gradients were measured.
        why: The reason in a sentence.
        node: The operator that mixes, or that no rule covers, where one is to blame.
    """

    kind: str
    how: str
    why: str
    node: fx.Node | None = None


def trace_axis(
    nodes: Iterable[fx.Node],
    *,
    source: fx.Node,
    axis: int,
    shapes: Mapping[fx.Node, tuple[int, ...] | None],
) -> Mapping[fx.Node, AxisState]:
    """Follow one axis of ``source`` through ``nodes``.

    Sound: a node is only said to carry the axis where every element at axis position t depends by value on nothing of
    ``source`` but its positions t. Reads of nodes outside ``nodes`` count as independent of ``source``.

    Args:
        nodes: Nodes in program order.
        source: The node whose axis is followed.
        axis: Which of its dims.
        shapes: Sizes of every node that gives one tensor (``Costs.shape``), taken where the sizes of different axes
            differ: a view that swaps two axes of equal size cannot be told from one that keeps them.

    Returns:
        A state for ``source`` and for every node.

    Example:
        >>> trace_axis(region, source=canvas, axis=1, shapes=record.shape)[end]
        AxisState(kind='at', dim=1, stride=1, ...)
    """
    shape = shapes[source]
    assert shape is not None
    states: dict[fx.Node, AxisState] = {}
    if shape[axis] < 2:
        states[source] = AxisState("mixed", node=source, why="an axis of size 1 cannot be followed")
    else:
        states[source] = AxisState("at", dim=axis % len(shape))
    spoilt: AxisState | None = None
    for node in nodes:
        if node is source:
            continue
        states[node] = spoilt or follow(node, states, shapes, size=shape[axis])
        spoilt = spoilt or _spoils(node, states)
    return states


def _spoils(node: fx.Node, states: Mapping[fx.Node, AxisState]) -> AxisState | None:
    """The state of all that follows a write which may leave the states of other views of its memory untrue."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return None
    values = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    written = [
        states.get(leaf, ABSENT)
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for leaf in pytree.tree_leaves(values.get(argument.name))
        if isinstance(leaf, fx.Node)
    ]
    result = states[node]
    if result.kind != "mixed" and all(state == result for state in written):
        return None
    return AxisState("mixed", node=node, why=f"{operator_name(node)} writes the axis into memory other nodes may read")


def probe_axis(
    fn: Callable[[Tensor], Tensor], inputs: Tensor, *, axis_in: int, axis_out: int, seeds: int = 3
) -> Verdict:
    """Measure how output positions of ``fn`` depend on input positions: vector-Jacobian products and exact zeros.

    Each seed probes another position t (middle, first, last, then random ones) with a random cotangent on t alone, then
    halves of the positions (over all seeds every pair of positions is asked about), or, once some position reads
    another, all positions up to a cut and all after it: the gradient must be exactly zero at the positions that the
    verdict excludes. The first seed uses ``inputs``, the others scale each element by about a tenth, so that no dead
    unit hides a path. Every run of ``fn`` sees the same random numbers. A gradient says nothing about values that flow
    through integers or detached tensors.

    Args:
        fn: Maps a float tensor to a float tensor.
        inputs: Its argument, with at least 2 positions; no gradient flows into it.
        axis_in: Dim of the argument.
        axis_out: Dim of the result.
        seeds: Positions probed, at least 3.

    Returns:
        The verdict, ``how="probe"``; ``"mixed"`` where a gradient is NaN or the two sizes differ.

    Raises:
        OptionError: Fewer than 3 seeds.

    Example:
        >>> probe_axis(lambda x: x.cumsum(1), torch.randn(2, 5, 3), axis_in=1, axis_out=1).kind
        'causal'
    """
    if seeds < 3:
        raise OptionError(f"seeds={seeds}", expected="at least 3", do="one probed position proves too little")
    size = inputs.shape[axis_in]
    if size < 2:
        return Verdict(MIXED, "probe", "an axis of size 1 has no other position to compare with")
    left = {POSITION_WISE, CAUSAL, ANTICAUSAL}
    reached = False
    with _same_random_numbers(inputs.device) as rewind:
        for seed, at in enumerate(_positions(size, seeds)):
            generator = torch.Generator().manual_seed(seed)
            x = inputs.detach().clone()
            if seed:
                x = x * (1 + 0.1 * torch.randn(x.shape, generator=generator)).to(x)
            rewind()
            with torch.enable_grad():
                y = fn(x.requires_grad_().clone())  # a copy, because fn may write to its argument
            if y.shape[axis_out] != size:
                return Verdict(MIXED, "probe", f"{size} input positions, but {y.shape[axis_out]} output positions")
            for kind, cotangent_at in _questions(left, seed, seeds, at, size, generator):
                if kind is not None and kind not in left:
                    continue
                reads = _reads(y, x, cotangent_at, axis_in, axis_out, generator)
                if reads is None:
                    return Verdict(MIXED, "probe", f"the gradient of position {at} is NaN")
                reached |= bool(reads.any())
                if bool((reads & ~cotangent_at).any()):
                    left.discard(kind or POSITION_WISE)
                if kind is None:
                    left -= {CAUSAL} if bool(reads[at + 1 :].any()) else set()
                    left -= {ANTICAUSAL} if bool(reads[:at].any()) else set()
            if not left:
                return Verdict(MIXED, "probe", "gradients reach positions before and after the probed ones")
    if not reached:
        return Verdict(POSITION_WISE, "probe", f"no gradient reaches the input ({seeds} cotangents)")
    if POSITION_WISE in left:
        return Verdict(POSITION_WISE, "probe", f"exactly zero gradient from all other positions ({seeds} positions)")
    if left == {CAUSAL}:
        return Verdict(CAUSAL, "probe", f"exactly zero gradient from all later positions ({seeds} positions)")
    if left == {ANTICAUSAL}:
        return Verdict(ANTICAUSAL, "probe", f"exactly zero gradient from all earlier positions ({seeds} positions)")
    return Verdict(MIXED, "probe", "some positions have gradient from others, seen too rarely to tell the direction")


def _positions(size: int, seeds: int) -> list[int]:
    """The positions to probe. The first and the last one show a dependence that wraps around."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    order = list(dict.fromkeys([size // 2, 0, size - 1, *order]))
    return [order[i % size] for i in range(seeds)]


def _questions(
    left: set[str], seed: int, seeds: int, at: int, size: int, generator: torch.Generator
) -> Iterator[tuple[str | None, Tensor]]:
    """Where to put cotangents, and which kind a gradient anywhere else refutes (``None``: look on which side)."""
    where = torch.arange(size)
    yield None, where == at
    # Two positions differ in a bit of their index: halves by each bit, over all seeds, ask about every pair.
    for bit in range(seed, (size - 1).bit_length(), seeds):
        for value in (0, 1):
            yield POSITION_WISE, (where >> bit) & 1 == value
    if POSITION_WISE not in left:
        for cut in {min(at, size - 2), int(torch.randint(size - 1, (), generator=generator))}:
            yield CAUSAL, where <= cut
            yield ANTICAUSAL, where > cut


def _reads(y: Tensor, x: Tensor, at: Tensor, axis_in: int, axis_out: int, generator: torch.Generator) -> Tensor | None:
    """Input positions with a gradient from the output positions ``at``; ``None`` where a gradient is NaN."""
    nothing = torch.zeros_like(at)
    if not y.requires_grad:
        return nothing
    shape = [1] * y.dim()
    shape[axis_out] = -1
    noise = torch.randn(y.shape, generator=generator, dtype=torch.float32)
    cotangent = torch.where(at.view(shape), noise, 0.0).to(y)
    (gradient,) = torch.autograd.grad(y, x, cotangent, retain_graph=True, allow_unused=True)
    if gradient is None:
        return nothing
    if bool(gradient.isnan().any()):
        return None
    return (gradient != 0).movedim(axis_in, 0).flatten(1).any(1).cpu()


def sees_later(fn: Callable[[Tensor], Tensor], inputs: Tensor, *, axis_in: int, axis_out: int) -> bool:
    """Whether changing later positions of the input changes an earlier position of the result, in any bit.

    Complements ``probe_axis``: a dependence through integers or detached tensors (a routing decision, a statistic) has
    no gradient. Every run sees the same random numbers.

    Args:
        fn: Maps a float tensor to a float tensor.
        inputs: Its argument.
        axis_in: Dim of the argument.
        axis_out: Dim of the result.

    Example:
        >>> sees_later(lambda x: x - x.detach().mean(1, keepdim=True), torch.randn(2, 5, 3), axis_in=1, axis_out=1)
        True
    """
    size = inputs.shape[axis_in]
    with _same_random_numbers(inputs.device) as rewind, torch.no_grad():
        rewind()
        expected = fn(inputs.detach().clone())
        for t in sorted({1, size // 2, size - 1} & set(range(1, size))):
            changed = inputs.detach().clone()
            late = changed.narrow(axis_in, t, size - t)
            late.copy_(late.flip(axis_in) * -1.5 + 0.5)
            rewind()
            got = fn(changed)
            if not torch.equal(got.narrow(axis_out, 0, t), expected.narrow(axis_out, 0, t)):
                return True
    return False


@contextlib.contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[Callable[[], None]]:
    """Gives a function that puts the random state back to what it is now, and calls it at the end."""
    on_cpu = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> None:
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)

    try:
        yield rewind
    finally:
        rewind()


def classify(
    nodes: Iterable[fx.Node],
    *,
    source: fx.Node,
    sink: fx.Node,
    axis_in: int,
    axis_out: int,
    shapes: Mapping[fx.Node, tuple[int, ...] | None],
    fn: Callable[[Tensor], Tensor] | None = None,
    example: Tensor | None = None,
) -> Verdict:
    """How ``sink`` depends on ``source`` along an axis: static rules first, a probe where they are unsure.

    Args:
        nodes: Nodes between them, in program order, ``sink`` included.
        source: The node that is read.
        sink: The node that reads.
        axis_in: Dim of ``source``.
        axis_out: Dim of ``sink``.
        shapes: Sizes of every node that gives one tensor (``Costs.shape``).
        fn: Runs ``nodes``: value of ``source`` to value of ``sink``.
        example: A value of ``source``.

    Returns:
        The verdict; ``"mixed"`` where the rules are unsure and no ``fn`` is given.
    """
    state = trace_axis(nodes, source=source, axis=axis_in, shapes=shapes)[sink]
    whole, part = shapes[source], shapes[sink]
    assert whole is not None
    if state.kind == "absent":
        return Verdict(POSITION_WISE, "static", "does not depend on the source")
    if state.kind == "at":
        assert part is not None
        if state.dim == axis_out % len(part) and part[axis_out] == whole[axis_in]:
            return Verdict(POSITION_WISE, "static", "every operator on the way keeps the positions apart")
        blame, reason = sink, f"the axis leaves {operator_name(sink)} as dim {state.dim} of {list(part)}"
    else:
        blame, reason = state.node, state.why
    if state.certain or fn is None or example is None:
        return Verdict(MIXED, "static", reason if state.certain else f"{reason}; unsure counts as mixed", blame)
    measured = probe_axis(fn, example, axis_in=axis_in, axis_out=axis_out)
    if measured.kind == POSITION_WISE:
        return measured
    return replace(measured, why=f"{measured.why}; {reason}", node=blame)


def batch_coupling(
    nodes: Iterable[fx.Node],
    *,
    source: fx.Node,
    sink: fx.Node,
    shapes: Mapping[fx.Node, tuple[int, ...] | None],
    fn: Callable[[Tensor], Tensor] | None = None,
    example: Tensor | None = None,
) -> Verdict:
    """Whether the samples (dim 0) of ``source`` are mixed on the way to ``sink``; arguments as for ``classify``.

    Returns:
        ``"position-wise"`` where they are not, else ``"mixed"`` with the node to blame.
    """
    found = classify(nodes, source=source, sink=sink, axis_in=0, axis_out=0, shapes=shapes, fn=fn, example=example)
    return found if found.kind == POSITION_WISE else replace(found, kind=MIXED)


def coupling_error(node: fx.Node) -> BatchCouplingError:
    """The error for an operator that mixes the samples of a batch; it names the module and the source line.

    Args:
        node: The node to blame (``Verdict.node``).

    Example:
        >>> raise coupling_error(verdict.node)
    """
    of_batch = "batch_norm" in operator_name(node)
    cure = "use LayerNorm, GroupNorm or model.eval()" if of_batch else "rewrite it so that every sample stands alone"
    return BatchCouplingError(
        f"{describe(node)} mixes the samples of a batch",
        expected="regions that treat every sample alone, so that each has interface Jacobians of its own",
        do=f'use backward="chain", which needs no independent samples, or {cure}',
    )
