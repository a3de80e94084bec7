"""Blocks: the children of a list that pass one hidden state on, found by running the model instead of reading it.

A model that cannot be captured is cut between such children. What lies inside them, and what the model's own forward
does around them, is not known; that nothing but the hidden state gets from one child to the next is measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..capture import Inputs
from .state import Places, checkpointed, hidden_of, probing, recomputed_later, with_hidden

Spec = tuple[tuple[int, ...], torch.dtype]


class NoBlocks(Exception):
    """The model has no list of blocks; the text says what is missing, as half a sentence."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a model in the order they run.

    Attributes:
        children: Module path of each.
        canvas: Shape and dtype of the hidden state.
        flops: FLOPs of each block; calls out of order count where the order had got to.
        stem: FLOPs before the first of them.
        total: FLOPs of the model.
        weights: Work of each block, for balance: its FLOPs, estimated for those that the example inputs skip.
        cuts: Indices of the blocks before which the hidden state is all that passes.
        idle: Paths of the blocks that the example inputs skip.
        handed: Every block is given the very tensor that the block before gave.
        modules: Paths of the other modules, by whether they first ran before the blocks (``"stem"``) or after.
    """

    children: tuple[str, ...]
    canvas: Spec
    flops: tuple[int, ...]
    stem: int
    total: int
    weights: tuple[int, ...]
    cuts: tuple[int, ...]
    idle: tuple[str, ...]
    handed: bool
    modules: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class _Call:
    child: int  # index in the list
    given: Spec | None
    gave: Spec | None
    begin: int  # FLOPs of the model so far
    end: int
    handed: bool


def find_blocks(model: nn.Module, inputs: Inputs, named: Sequence[str] = ()) -> Blocks:
    """Find the list whose children carry most of the work, by running the model a few times.

    Contract: the model, its buffers and all random states are afterwards as before.

    Args:
        model: The model, in the mode to look at.
        inputs: One call's inputs.
        named: Paths of children that must be among the blocks.

    Raises:
        NoBlocks: There is no such list.
        CaptureError: The model recomputes its blocks in the backward.
    """
    lists = {
        path: {name: child for name, child in module._modules.items() if child is not None}
        for path, module in model.named_modules()
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module) > 1
    }
    lists = {path: kids for path, kids in lists.items() if all(_name(name, path) in kids for name in named)}
    if not lists:
        what = f"has {', '.join(named)} as children of it" if named else "has two children"
        raise NoBlocks(f"no nn.Sequential or nn.ModuleList of it {what}")
    survey = _survey(model, inputs, lists)
    pieces = [(path, piece) for path in lists for piece in _alike(survey.calls[path])]
    pieces.sort(key=lambda item: (-sum(call.end - call.begin for call in item[1]), item[0].count("."), item[0]))
    why = "no two children of one list are given and give a hidden state of one shape"
    for path, piece in pieces:
        found = _linked(model, inputs, path, lists[path], survey, piece)
        if isinstance(found, Blocks):
            missing = [name for name in named if name not in found.children]
            if not missing:
                return found
            found = f"{missing[0]} is not among the children that do"
        why = found
    raise NoBlocks(why)


def _name(child: str, path: str) -> str:
    parent, _, name = child.rpartition(".")
    return name if parent == path else ""


def _path(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _spec(value: Any) -> Spec | None:
    hidden = hidden_of(value)
    return None if hidden is None else (tuple(hidden.shape), hidden.dtype)


@dataclass(frozen=True, slots=True)
class _Survey:
    calls: Mapping[str, list[_Call]]  # of each list, in order
    ran: tuple[str, ...]  # modules in the order of their first call
    total: int  # FLOPs of the model


def _survey(model: nn.Module, inputs: Inputs, lists: Mapping[str, Mapping[str, nn.Module]]) -> _Survey:
    made: dict[str, list[_Call]] = {path: [] for path in lists}
    ran: dict[str, None] = {}
    counter = FlopCounterMode(display=False)

    def follow(path: str, kids: Mapping[str, nn.Module], stack: ExitStack) -> None:
        places = Places(list(kids.values()))
        open_calls: list[tuple[int, Spec | None, int, bool]] = []
        last: list[Tensor | None] = [None]

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = hidden_of((args, kwargs))
            handed = given is last[0] or not made[path]
            open_calls.append((places.next(module), _spec(given), counter.get_total_flops(), handed))

        def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            place, given, begin, handed = open_calls.pop()
            last[0] = hidden_of(out)
            made[path].append(_Call(place, given, _spec(out), begin, counter.get_total_flops(), handed))

        for kid in {id(kid): kid for kid in kids.values()}.values():
            stack.callback(kid.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            stack.callback(kid.register_forward_hook(after, with_kwargs=True).remove)

    def begins(path: str, *_: Any) -> None:
        ran.setdefault(path)

    with probing(model), warnings.catch_warnings(), ExitStack() as stack:
        for path, kids in lists.items():
            follow(path, kids, stack)
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(begins, path)).remove)
        # the counter hooks every module, of which modules made by torch.compile warn
        warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks", UserWarning)
        with counter:
            model(*inputs.args, **inputs.kwargs)
    return _Survey(made, tuple(ran), counter.get_total_flops())


def _alike(calls: Sequence[_Call]) -> list[list[_Call]]:
    """The longest stretches of calls that are given and give hidden states of one shape and dtype."""
    stretches: list[list[_Call]] = [[]]
    for call in calls:
        if call.given is None or call.given != call.gave:
            stretches.append([])
            continue
        if stretches[-1] and stretches[-1][0].given != call.given:
            stretches.append([])
        stretches[-1].append(call)
    return [stretch for stretch in stretches if len({call.child for call in stretch}) > 1]


def _linked(
    model: nn.Module,
    inputs: Inputs,
    path: str,
    kids: Mapping[str, nn.Module],
    survey: _Survey,
    piece: Sequence[_Call],
) -> Blocks | str:
    """The longest chain in a stretch of calls, as blocks; a string that says why there is none."""
    names, modules, calls = list(kids), list(kids.values()), survey.calls[path]
    start = next(i for i, call in enumerate(calls) if call is piece[0])
    depend = dependence(model, inputs, modules, range(start, start + len(piece)))
    if list(depend.places) != [call.child for call in piece]:
        return f"two runs on the same inputs call other children of {path or 'the model'}"
    chains: list[list[int]] = [[0]]
    for t in range(1, len(piece)):
        if t - 1 in depend.reads[t]:
            chains[-1].append(t)
        else:
            chains.append([t])
    chain = max(chains, key=lambda ts: sum(piece[t].end - piece[t].begin for t in ts))
    ours = [piece[t] for t in chain]
    used = {call.child for call in ours}
    if len(used) < 2:
        return f"the children of {path or 'the model'} do not pass a hidden state on to each other"
    again = [call for call in calls if call.child in used and not any(call is own for own in ours)]
    if again:
        return f"{_path(path, names[again[0].child])} runs a second time, on a value that no block gave"
    if len(chain) < len(piece):
        depend = dependence(model, inputs, modules, range(start + chain[0], start + chain[-1] + 1))
    order = _order([call.child for call in ours], {call.child for call in calls}, len(names))
    at = {child: i for i, child in enumerate(order)}
    reached = list(accumulate((at[call.child] for call in ours), max))
    flops = [0] * len(order)
    for call, place in zip(ours, reached, strict=True):
        flops[place] += call.end - call.begin
    spec = ours[0].given
    assert spec is not None
    inside = [_path(path, names[child]) for child in order]
    return Blocks(
        children=tuple(inside),
        canvas=spec,
        flops=tuple(flops),
        stem=ours[0].begin,
        total=survey.total,
        weights=_weights([modules[child] for child in order], flops, [child in used for child in order]),
        cuts=free_cuts(len(order), reached, depend.reads),
        idle=tuple(_path(path, names[child]) for child in order if child not in used),
        handed=all(call.handed for call in ours[1:]),
        modules=_others(inside, path, survey.ran),
    )


def _order(calls: Sequence[int], called: set[int], size: int) -> list[int]:
    """Children in the order they run; those that were skipped take the place that the list gives them."""
    seen = list(dict.fromkeys(calls))
    low, high = min(seen), max(seen)
    while low - 1 >= 0 and low - 1 not in called:
        low -= 1
    while high + 1 < size and high + 1 not in called:
        high += 1
    inside = [child for child in range(low, high + 1) if child in seen or child not in called]
    if seen == sorted(seen):
        return inside
    if seen == sorted(seen, reverse=True):
        return inside[::-1]
    order = list(seen)
    for child in inside:
        if child not in seen:
            order.insert(order.index(child - 1) + 1 if child - 1 in order else 0, child)
    return order


def _weights(modules: Sequence[nn.Module], flops: Sequence[int], ran: Sequence[bool]) -> tuple[int, ...]:
    if not any(flops):  # nothing but elementwise work
        return tuple(sum(p.numel() for p in module.parameters()) or 1 for module in modules)
    usual = int(median([flop for flop in flops if flop]))
    return tuple(flop if has_run else usual for flop, has_run in zip(flops, ran, strict=True))


def free_cuts(size: int, reached: Sequence[int], reads: Sequence[frozenset[int]]) -> tuple[int, ...]:
    """Blocks before which nothing passes but the hidden state: no later value reads an earlier one past it.

    Args:
        size: Number of blocks.
        reached: For each call the furthest block so far.
        reads: What ``dependence`` found.

    Example:
        >>> free_cuts(3, [0, 1, 2], [frozenset(), frozenset({0}), frozenset({0, 1}), frozenset({2})])
        (2,)
    """
    cuts = []
    for place in range(1, size):
        crossing = next((t for t, at in enumerate(reached) if at >= place), None)
        past = crossing is not None and any(s < crossing for read in reads[crossing + 1 :] for s in read)
        if not past:
            cuts.append(place)
    return tuple(cuts)


def _others(children: Sequence[str], path: str, ran: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Outermost modules that ran outside of the blocks and do not hold them."""
    blocks = set(children)
    homes: dict[str, list[str]] = {"stem": [], "head": []}
    start = next((i for i, name in enumerate(ran) if name in blocks), len(ran))  # it may run under another name
    for i, name in enumerate(ran):
        parents = [name[:at] for at, letter in enumerate(name) if letter == "."]
        holds = not name or name == path or any(child.startswith(name + ".") for child in children)
        if holds or name in blocks or any(parent in blocks for parent in parents):
            continue
        if not any(parent in home for home in homes.values() for parent in parents):
            homes["stem" if i < start else "head"].append(name)
    return {home: tuple(names) for home, names in homes.items()}


@dataclass(frozen=True, slots=True)
class Dependence:
    """On what each call of a block depends.

    Attributes:
        places: Which block each call is.
        reads: For each call the calls whose input it reads other than through that of a later one; and one entry more,
            for the output of the last call.
    """

    places: tuple[int, ...]
    reads: tuple[frozenset[int], ...]


def dependence(
    model: nn.Module, inputs: Inputs, modules: Sequence[nn.Module], calls: range | None = None
) -> Dependence:
    """Measure how blocks hang together.

    Every input of a block is made a leaf of autograd, and so cut from what came before. A value that still has a path
    to the input of an earlier block than the one before reached it past the hidden state. Values that carry no
    gradient are not seen.

    Args:
        model: The model.
        inputs: One call's inputs.
        modules: The blocks.
        calls: Which of all calls of ``modules`` to look at; all by default.

    Raises:
        CaptureError: A block runs inside ``torch.utils.checkpoint``.
    """
    order = Places(modules)
    leaves: list[Tensor] = []
    places: list[int] = []
    found: list[frozenset[int]] = []
    count, last = [0], [torch.empty(0)]
    paths = {id(module): path for path, module in model.named_modules()}

    def reads(value: Tensor) -> frozenset[int]:
        if not value.requires_grad or not leaves:
            return frozenset()
        gradients = torch.autograd.grad(value, leaves, torch.ones_like(value), retain_graph=True, allow_unused=True)
        return frozenset(i for i, gradient in enumerate(gradients) if gradient is not None)

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        count[0] += 1
        place, given = order.next(module), hidden_of((args, kwargs))
        if given is None or (calls is not None and count[0] - 1 not in calls):
            return None
        if recomputed_later(dependence.__code__):
            raise checkpointed(paths.get(id(module), "a block"))
        places.append(place)
        found.append(reads(given))
        leaves.append(given.detach().clone().requires_grad_())
        # a block may write over its input in place, which a leaf forbids
        return with_hidden((args, kwargs), leaves[-1].clone())

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        given = hidden_of(out)
        if given is not None and (calls is None or count[0] - 1 in calls):
            last[0] = given

    with probing(model), ExitStack() as stack:
        for module in {id(module): module for module in modules}.values():
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        model(*inputs.args, **inputs.kwargs)
        found.append(reads(last[0]))
    return Dependence(tuple(places), tuple(found))


def cut(weights: Sequence[int], cuts: Sequence[int], regions: int) -> list[int]:
    """Where to cut so that the largest region is as small as possible, and of those the most even.

    Args:
        weights: Work of each block.
        cuts: Blocks that may start a region, increasing.
        regions: Number of regions K, at most ``len(cuts) + 1``.

    Returns:
        The ``K - 1`` blocks that start regions.

    Example:
        >>> cut([1, 1, 1, 3], [1, 2, 3], 2)
        [3]
    """
    stops = [0, *cuts, len(weights)]
    total = list(accumulate(weights, initial=0))
    at = [total[stop] for stop in stops]
    (*_, (limit, _)) = _best(at, regions, max)
    chosen = _best(at, regions, lambda done, size: done + size**2 if size <= limit else float("inf"))
    place, ends = len(stops) - 1, []
    for level in reversed(range(regions)):
        place = chosen[level * len(stops) + place][1]
        ends.append(stops[place])
    return ends[-2::-1]


def _best(at: Sequence[int], regions: int, join: Callable[[float, int], float]) -> list[tuple[float, int]]:
    """Least cost of ending each number of regions at each stop, and where the last of them begins."""
    before = [0.0] + [float("inf")] * (len(at) - 1)
    rows: list[tuple[float, int]] = []
    for _ in range(regions):
        row = [(float("inf"), -1)]
        for j in range(1, len(at)):
            row.append(min((join(before[i], at[j] - at[i]), i) for i in range(j)))
        before = [cost for cost, _ in row]
        rows += row
    return rows
