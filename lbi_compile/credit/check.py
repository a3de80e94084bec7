"""Measurements on the real graphs of one step under a local rule: what crosses, what is kept, what waits for what."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .._torch import pytree
from ..report import Check
from .base import LocalCredit, Pass
from .hbll import Hbll

if TYPE_CHECKING:
    from ..bounded import BoundedModule
    from ..capture import Inputs


class RegionCall(NamedTuple):
    """One call of a region.

    Attributes:
        k: The region.
        canvas: The canvas it was given.
        m: What entered it.
        values: Values by name when it had run.
        pieces: Its code.
        h: Its output.
    """

    k: int
    canvas: Tensor
    m: Tensor | None
    values: dict[str, Any]
    pieces: Any
    h: Tensor


@contextlib.contextmanager
def region_calls(bounded: BoundedModule) -> Iterator[list[RegionCall]]:
    """Records every call of a region inside."""
    calls: list[RegionCall] = []

    def note(module: Any, args: Any, out: Any) -> None:
        canvas, m, values, pieces = args
        calls.append(RegionCall(module.k, canvas, m, dict(values), pieces, out[1]))

    handles = [region.register_forward_hook(note) for region in bounded.regions]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def nodes_behind(tensor: Tensor, *, stop: Tensor | None = None) -> set[Any]:
    """All autograd nodes that a tensor's gradient reaches; ``stop`` and what lies behind it left out."""
    end = None if stop is None else stop.grad_fn
    found: set[Any] = set()
    pending: list[Any] = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in found or (end is not None and node is end):
            continue
        found.add(node)
        pending += [before for before, _ in node.next_functions]
    return found


def crossings(calls: Sequence[RegionCall]) -> list[tuple[int, int]]:
    """Pairs (k, j): the gradient of the output of region k reaches region j without passing the canvas."""
    found = []
    for call in calls:
        behind = nodes_behind(call.h, stop=call.canvas)
        found += [(call.k, other.k) for other in calls if other.h is not call.h and other.h.grad_fn in behind]
        if call.m is not None and call.m.requires_grad:
            found.append((call.k, call.k - 1))
    return found


class Saved:
    """Bytes that autograd keeps for the backward inside, parameters left out.

    Args:
        parameters: What does not count.

    Attributes:
        now: Bytes that are kept now.
        peak: The most at any time.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in parameters}
        self.now = self.peak = 0

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box.value)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def _pack(self, value: Tensor) -> Any:
        # detached: a result that an operator saves for itself would otherwise keep its own graph alive
        box = _Box(value.detach())
        if value.untyped_storage().data_ptr() not in self.own:
            size = value.numel() * value.element_size()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(box, self._free, size)
        return box

    def _free(self, size: int) -> None:
        self.now -= size


class _Box:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Depth(TorchDispatchMode):
    """Counts how many calls of given modules every value depends on, one after another, in the run inside.

    Every operator that runs is followed, with the memory it reads and writes: what really depends on what.

    Args:
        modules: A call of one of these is a step.

    Attributes:
        calls: Steps that were run, whether they wait for each other or not.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.depths: dict[int, int] = {}
        self.modules, self.calls = list(modules), 0

    def __enter__(self) -> Depth:
        self.handles = [module.register_forward_hook(self._step) for module in self.modules]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def of(self, value: Any) -> int:
        """Steps a value (or the deepest of several) depends on."""
        return max((self.depths.get(place, 0) for place in _places(value)), default=0)

    def _step(self, module: nn.Module, args: Any, out: Any) -> None:
        self.calls += 1
        # a region's third value is what it read
        for place in _places(out[:2] if isinstance(out, tuple) else out):
            self.depths[place] = self.depths.get(place, 0) + 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = _places((args, kwargs))
        deepest = max((self.depths.get(place, 0) for place in read), default=0)
        out = func(*args, **(kwargs or {}))
        for place in _places(out):
            # new memory may lie where something else was
            self.depths[place] = max(deepest, self.depths.get(place, 0)) if place in read else deepest
        return out


def _places(value: Any) -> list[int]:
    return [leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def steps(bounded: BoundedModule) -> list[nn.Module]:
    """The modules whose calls are steps of a training step: regions, and under HBLL encoder and hops too."""
    credit = bounded.credit
    found: list[nn.Module] = list(bounded.regions)
    if isinstance(credit, Hbll):
        found += [credit.encode_canvas, *credit.forward_maps.values(), *credit.feedback_maps.values()]
    return found


def random_targets(bounded: BoundedModule, inputs: Inputs) -> Tensor:
    """Classes drawn at random, in the shape that fits one call."""
    credit = bounded.credit
    assert credit is not None
    with torch.no_grad():
        at = Pass(bounded, bounded._program(inputs), inputs.leaves)
    shape = credit.logits_shape(at.canvas)
    del shape[credit.class_dim]
    return torch.randint(0, credit.classes, shape, device=at.canvas.device)


def local_checks(bounded: BoundedModule, inputs: Inputs) -> tuple[Check, ...]:
    """Run training steps on random targets and look at their graphs; gradients and statistics are left as they were.

    Args:
        bounded: A model with a local rule.
        inputs: Inputs of one call.

    Returns:
        Whether a gradient crosses a boundary other than through the canvas, whether what regions read and what the
        model returns depends on targets, and two measurements: bytes kept for the backward, steps that wait for each
        other.
    """
    credit = bounded.credit
    assert isinstance(credit, LocalCredit)
    held = [(buffer, buffer.clone()) for buffer in bounded.buffers()]
    parameters = [p for p in bounded.parameters() if p.requires_grad]
    target = random_targets(bounded, inputs)

    def step(target: Tensor) -> Tensor:
        torch.manual_seed(0)
        return bounded.local_loss(*inputs.args, target=target, **inputs.kwargs)

    with torch.random.fork_rng(), torch.enable_grad():
        with region_calls(bounded) as calls, Saved(parameters) as saved:
            torch.autograd.grad(step(target), parameters, allow_unused=True)
        learns = [call for call in calls if call.h.requires_grad]
        found = crossings(learns)
        fed = [call.m for call in calls]
        with region_calls(bounded) as calls:
            other = step(target.reshape(-1).flip(0).reshape(target.shape))
            del other
        same = len(fed) >= len(calls) and all(
            a is b or (a is not None and b is not None and torch.equal(a, b.detach()))
            for a, b in zip(fed, (call.m for call in calls), strict=False)
        )
        with Depth(steps(bounded)) as depth:
            longest = depth.of(step(target))
    with torch.no_grad():
        for buffer, value in held:
            buffer.copy_(value)
    pairs = ", ".join(f"{k} to {j}" for k, j in found[:4])
    return (
        Check(
            "local gradients",
            bool(learns) and not found,
            f"gradients reach other regions: {pairs}"
            if found
            else f"{len(learns)} regions, whose graphs meet in the canvas only",
        ),
        Check("no target in the forward", same, f"what {len(fed)} region calls read, under targets in another order"),
        Check("memory", None, f"at most {saved.peak} bytes kept for the backward at a time"),
        Check("dependency depth", None, f"{longest} of {depth.calls} steps wait for each other, and one backward"),
    )
