"""Running a model whose regions are opaque: its own forward, with a word in every call of its blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._torch import pytree, times_written
from ..errors import CaptureError, ReadoutError, ShapeNotCapturedError
from ..interfaces import Interface
from ..kernels import ops
from ..plan import Plan
from .lend import lent
from .state import Places, checkpointed, hidden_of, recomputed_later, with_hidden

if TYPE_CHECKING:
    from ..bounded import BoundedModule

# The runs this thread is inside of, innermost last. A block asks them only: in another thread, or where the model
# itself is called beside the bounded one, it runs as ever.
_running: ContextVar[tuple[_Run, ...]] = ContextVar("running", default=())


class HookedProgram:
    """Stands where a captured program would: runs the model with its blocks cut into regions.

    For the length of a call every block has a ``forward`` of its own that asks the run first (``hooked.lend``). The
    user's hooks on a block run around it, and so outside of a region that starts or ends there. Several threads may run
    the model at once; blocks that its forward calls from threads of its own are not followed.

    Args:
        children: Module path of each block, in order.
        regions: The region of each block, from 0 on without gaps.
        canvas: Shape of the input of the first block, where a name stands for any size; ``None`` for any shape.
        summed: The head reads the sum of what regions add, not the last one.
        spec: How ``(arguments, keywords)`` are rebuilt from their leaves.

    Attributes:
        out_spec: A call gives one leaf, whatever the model returns: the structure may differ from call to call.
    """

    def __init__(
        self,
        children: Sequence[str],
        regions: Sequence[int],
        canvas: Sequence[int | str] | None,
        *,
        summed: bool,
        spec: Any,
    ) -> None:
        self.children, self.regions, self.canvas = tuple(children), tuple(regions), canvas
        self.summed, self.spec = summed, spec
        self.last = self.regions[-1]
        self.out_spec = pytree.tree_structure(None)
        self.call: Any = torch.compiler.disable(self._call)

    def __str__(self) -> str:
        lines = [f"    {path}: region {k}" for path, k in zip(self.children, self.regions, strict=True)]
        return "\n".join(["the model's own forward, cut at its blocks", *lines])

    @classmethod
    def of(cls, plan: Plan, spec: Any) -> HookedProgram:
        """The program of a plan that is cut between child modules."""
        homes = [(path, region.index) for region in plan.regions for path in region.part.modules]
        children, regions = zip(*homes, strict=True)
        return cls(children, regions, plan.canvas.shape, summed=plan.readout == "sum", spec=spec)

    def run(
        self, bounded: BoundedModule, leaves: list[Any], *, marked: bool, taps: bool, canvas: Tensor | None = None
    ) -> tuple[list[Any], tuple[Any, ...], tuple[Any, ...]]:
        """Run the bounded model.

        Args:
            bounded: The bounded model.
            leaves: The call's inputs.
            marked: Leave a marker on every latent.
            taps: Give outputs and latents of the regions too.
            canvas: What to put in place of the canvas.

        Returns:
            The model's output as the only entry of a list, ``h`` and ``m``.
        """
        out, run = self.call(
            bounded.source,
            bounded.interface,
            leaves,
            training=bounded.training,
            chain=bounded._chain if marked else None,
            taps=taps,
            canvas=canvas,
        )
        return [out], tuple(run.hs), tuple(run.ms)

    def _call(
        self,
        model: nn.Module,
        interface: Interface,
        leaves: list[Any],
        *,
        training: bool,
        chain: int | None = None,
        taps: bool = False,
        canvas: Tensor | None = None,
    ) -> tuple[Any, _Run]:
        """Run the model with ``interface`` between its regions.

        Args:
            model: The model.
            interface: What crosses.
            leaves: The call's inputs.
            training: Mode of the model itself; its children have theirs.
            chain: Number to mark latents with; ``None`` for no markers.
            taps: Keep outputs and latents of all regions.
            canvas: What to put in place of the canvas.

        Returns:
            The output, and the run.
        """
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        run = _Run(self, interface, chain, taps, canvas)
        modules = [model.get_submodule(path) for path in self.children]
        run.places = Places(modules)
        with contextlib.ExitStack() as stack:
            stack.enter_context(lent(model, "training", training))
            for module in {id(module): module for module in modules}.values():
                stack.enter_context(lent(module, "forward", _asking(module)))
            token = _running.set((*_running.get(), run))
            stack.callback(_running.reset, token)
            out = model(*args, **kwargs)
        run.finish()
        return out, run


def _asking(module: nn.Module) -> Callable[..., Any]:
    """The forward of a block that asks the innermost run that knows it, if any."""
    own, (before, after) = module.forward, _questions()

    def forward(*args: Any, **kwargs: Any) -> Any:
        run, (args, kwargs) = before(module, args, kwargs)
        out = own(*args, **kwargs)
        return out if run is None else after(run, out)

    return forward


@cache
def _questions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What is asked before and after a block; not for Dynamo to trace, though blocks may be compiled by themselves."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> tuple[_Run | None, Any]:
        run = next((run for run in reversed(_running.get()) if module in run.places), None)
        given = None if run is None else run.before(module, (args, kwargs))
        return run, (args, kwargs) if given is None else given

    def after(run: _Run, out: Any) -> Any:
        given = run.after(out)
        return out if given is None else given

    return torch.compiler.disable(before), torch.compiler.disable(after)


class _Run:
    """One call: which region it is in, and what the interface has carried so far.

    The hidden state that arrives at the first block of a region is ``h`` of the region before; the block is given what
    the interface makes of the latent instead. A region none of whose blocks run is the identity: what it is given is
    its ``h``, so that every latent exists in every call. A block of an earlier region that runs again belongs to the
    region the run has got to. After the last block that runs nothing is replaced, so that a forward that ends early
    reads what that block gave, and no later region takes part.

    With the readout ``sum`` every block gives the canvas plus what the regions added so far, and the next one is given
    its own hidden state again: whichever block is the last, the head reads the sum.
    """

    places: Places

    def __init__(
        self, program: HookedProgram, interface: Interface, chain: int | None, taps: bool, canvas: Tensor | None
    ) -> None:
        self.program, self.interface, self.chain, self.taps = program, interface, chain, taps
        self.summed, self.cut = program.summed, program.last > 0
        self.records = torch.is_grad_enabled()
        self.given = canvas
        self.region = -1
        self.canvas: Tensor | None = None
        self.version: int | None = None  # of the canvas, to notice what writes over it
        self.total: Tensor | None = None
        self.m: Tensor | None = None
        self.x: Tensor | None = None
        self.h: Tensor | None = None
        self.stands_for: tuple[Tensor, int | None] | None = None  # the sum a block gave in place of h, unless changed
        self.hs: list[Tensor] = []
        self.ms: list[Tensor | None] = []
        self.trace: list[int] = []

    def before(self, module: nn.Module, call: tuple[Any, Any]) -> Any:
        """What a block is given, or ``None`` for what the model gives it."""
        place = self.places.next(module)
        self.trace.append(place)
        k, path = self.program.regions[place], self.program.children[place]
        arrived = hidden_of(call)
        if arrived is None:
            raise CaptureError(
                f"{path} is called without a float tensor",
                expected="blocks that are all given the hidden state",
                do="name the blocks to cut at, or take those out of the list that are called otherwise",
            )
        if self.canvas is None:
            return self._first(call, arrived, k, path)
        if k <= self.region:
            return None if self.stands_for is None else with_hidden(call, self._own(arrived, path))
        self._end(self._own(arrived, path))
        return with_hidden(call, self._advance(k, path))

    def after(self, out: Any) -> Any:
        """What a block gives, or ``None`` for its own output."""
        self.h = hidden_of(out)
        if not self.summed or self.h is None:
            return None
        assert self.total is not None
        assert self.x is not None
        total = (self.total + (self.h - self.x)).to(self.h.dtype)
        self.stands_for = total, times_written(total)
        return with_hidden(out, total)

    def finish(self) -> None:
        """Complete what taps hold: regions that did not run are the identity there too."""
        if not self.taps:
            return
        if self.canvas is None or self.h is None:
            raise CaptureError(
                "a call in which no block runs",
                expected="at least one, for there are no regions to look into",
                do="call the bounded model itself there, or change the condition under which blocks are skipped",
            )
        self._end(self.h)
        while self.region < self.program.last:
            self._start(self.region + 1, "the head")
            assert self.x is not None
            self._end(self.x)

    def _first(self, call: Any, arrived: Tensor, k: int, path: str) -> Any:
        self.canvas = self.total = arrived if self.given is None else self.given
        self._raise_if_reshaped(arrived, path)
        self.version = times_written(self.canvas)
        self.m = self.interface.initial(self.interface.fold(self.canvas))
        replaced = self._advance(k, path)
        # one region is the model itself, to the bit and in what it shares memory with
        return with_hidden(call, replaced) if self.cut or self.given is not None else None

    def _advance(self, k: int, path: str) -> Tensor:
        """Go on to region ``k``, through those that are skipped; what its first block is given."""
        self._start(self.region + 1, path)
        while self.region < k:
            assert self.x is not None
            self._end(self.x)
            self._start(self.region + 1, path)
        assert self.x is not None
        x = self.x
        # a block may write over what it is given; the canvas, the latent and, for the sum, x itself are read again
        return x.clone() if self.summed or any(_share(x, kept) for kept in (self.canvas, self.m)) else x

    def _start(self, k: int, path: str) -> None:
        canvas = self.canvas
        assert canvas is not None
        if self.cut and self.records and recomputed_later(HookedProgram._call.__code__):
            raise checkpointed(path)
        if times_written(canvas) != self.version:
            raise CaptureError(
                f"the canvas, which is the input of {self.program.children[0]}, is written over before {path} runs",
                expected="a canvas that every region can read",
                do="replace the operation that writes over it in place",
            )
        m = self.m
        if self.chain is not None and m is not None:
            m = self.m = ops.boundary(m, k, self.chain)
        self.ms.append(m)
        folded = self.interface.enter(k, self.interface.fold(canvas), m)
        self.region, self.x = k, self.interface.unfold(folded, canvas.shape)

    def _end(self, h: Tensor) -> None:
        if self.taps:
            self.hs.append(h)
        assert self.total is not None
        assert self.x is not None
        if self.summed and h is not self.x:
            self.total = self.total + (h - self.x)
        self.m = self.interface.leave(self.region, m=self.m, h=self.interface.fold(h), z=None)

    def _own(self, arrived: Tensor, path: str) -> Tensor:
        """The hidden state that arrives at a block: where the block before gave a sum, its own output."""
        if self.stands_for is None:
            self._raise_if_reshaped(arrived, path)
            return arrived
        total, version = self.stands_for
        if arrived is not total or times_written(arrived) != version:
            raise ReadoutError(
                f"readout='sum', and the model's forward changes the hidden state before {path}",
                expected="blocks that are given the very tensor the block before gave",
                do='take readout="last", with an interface that has it',
            )
        assert self.h is not None
        self._raise_if_reshaped(self.h, path)
        return self.h

    def _raise_if_reshaped(self, hidden: Tensor, path: str) -> None:
        assert self.canvas is not None
        wanted = hidden.shape if self.program.canvas is None else self.program.canvas
        fits = len(wanted) == hidden.dim() and all(
            want == size for want, size in zip(wanted, hidden.shape, strict=True) if isinstance(want, int)
        )
        if not fits or hidden.shape != self.canvas.shape:
            raise ShapeNotCapturedError(
                f"a hidden state of shape {list(hidden.shape)} at {path}",
                expected=f"[{', '.join(map(str, wanted))}], the same at all blocks",
                do="give inputs of the captured sizes, or transform again with example inputs of this shape",
            )


def _share(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
