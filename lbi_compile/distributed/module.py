"""A bounded model spread over ranks, each with regions of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import engines
from ..bounded import BoundedModule
from ..calls import ShapeCheck, call_signature
from ..capture import Inputs, bind, describe_inputs
from ..credit.base import LocalCredit
from ..errors import DistributedError, OptionError, ShapeNotCapturedError
from ..interfaces import TokenChunkedInterface
from ..passes.insert import Program
from ..plan import Plan
from ..region import Region
from ..running import assemble
from . import local, outputs
from .call import Call
from .placement import INTERFACE, Placement, Tree
from .ranks import Ranks
from .schedules import both, in_turn, side_by_side
from .solving import Latents, Request

if TYPE_CHECKING:
    from ..interfaces import Interface


class RegionParallel(nn.Module):
    """One rank's part of a bounded model. Made by ``lbi_compile.distributed.parallelize``.

    It is called like the bounded model, on every rank with the same batch, and returns the same output on every rank.
    It holds the parameters of its own regions, and those that every rank holds (of the stem, the head, the cells of
    the token interface, and parameters that several ranks' regions share). Their names are those of the bounded model,
    and the gradients of those held everywhere are the same, and the whole ones, on every rank. With ``head="last"``
    the head and what only it reads are on the last rank; outputs come from there, or no more than the loss (``loss``).

    Attributes:
        plan: How the model is cut.
        engine: Which engine solves the adjoints, and why.
        own: The regions of this rank.
        placement: Which rank holds which regions and parameters.
        ranks: The region dimension of the mesh.
        mesh: The mesh.
        reduce: ``"canvas"``, ``"stem"`` or ``"auto"``: what ranks add up in the backward.
        latents: Solves for latents where ``forward="parallel"``; its ``record`` tells how it went in the last call.
        steps: Training steps begun.
    """

    def __init__(
        self,
        bounded: BoundedModule,
        mesh: Any,
        ranks: Ranks,
        placement: Placement,
        engine: engines.Engine,
        reduce: str,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        self.plan: Plan = bounded.plan
        self.mesh, self.ranks, self.placement, self.engine, self.reduce = mesh, ranks, placement, engine, reduce
        self.own = placement.regions(ranks.rank)
        self.training = bounded.training
        self._form = bounded._form
        tree = Tree(bounded, placement, ranks.rank)
        # the very dictionaries of the tree, from which the program reads: moves and wrappers change both
        self._parameters, self._buffers, self._modules = tree.root._parameters, tree.root._buffers, tree.root._modules
        self._non_persistent_buffers_set = tree.root._non_persistent_buffers_set
        self._tree, self._device = (tree,), device
        self.regions = tuple(Region(k, tree.interface) for k in range(len(self.plan.regions)))
        self._known: dict[Any, tuple[Program, ShapeCheck]] = {}
        for (key, _), (program, check) in bounded._known.items():
            self._known[key] = tree.rebind(program, device), check
        self.cheaper: dict[Any, str] = {}
        self.known_outputs: dict[Any, Any] = {}
        self.latents = Latents(Request(bounded.forward_method, bounded._options.tol, bounded._options.max_iters))
        self.steps = 0
        if self.credit is not None:
            for program, _ in self._known.values():
                self.credit.prepare(self, program)  # pyright: ignore[reportArgumentType]  it reads what both have

    # -- what others read

    @property
    def interface(self) -> Interface:
        """The interface, with the parameters of this rank."""
        return self._modules[INTERFACE]  # pyright: ignore[reportReturnType]

    @property
    def credit(self) -> LocalCredit | None:
        """The local credit rule; ``None`` for exact credit."""
        return self.interface if isinstance(self.interface, LocalCredit) else None

    @property
    def source(self) -> nn.Module:
        """Where parameters are found by the names they have in the model, whatever those are."""
        return self._tree[0].root

    def parameters_of(self, names: Iterable[str]) -> list[nn.Parameter]:
        """This rank's parameters of these names."""
        return [self.source.get_parameter(name) for name in names]

    def materialize(self) -> None:
        """Give memory, without numbers, to parameters on the meta device; ``load`` does it before it reads."""
        assert self._device is not None
        self._tree[0].materialize(self._device)

    @contextlib.contextmanager
    def standing_in(self, aliases: Mapping[int, Tensor]) -> Iterator[None]:
        """Inside, parameters are replaced by aliases, found by the identity of the parameter."""
        places = []
        if aliases:
            for module in self.source.modules():
                for name, value in module._parameters.items():
                    if id(value) in aliases:
                        places.append((module, name, value))
        try:
            for module, name, value in places:
                module._parameters[name] = aliases[id(value)]  # pyright: ignore[reportArgumentType]
            yield
        finally:
            for module, name, value in places:
                module._parameters[name] = value

    # -- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, the same on every rank; takes what the model takes."""
        inputs = bind(self._form, args, kwargs)
        program = self._program(inputs)
        if self.credit is not None:
            return assemble(program, local.forward(self, program, inputs.leaves), (), ())
        call = self._run(program, inputs.leaves)
        if call.head_on_last and self.ranks.size > 1:
            outputs.send(call, outputs.of_head(call))
        return assemble(program, outputs.flat(call), (), ())

    def loss(self, *args: Any, criterion: Callable[[Any, Any], Tensor], target: Any = None, **kwargs: Any) -> Tensor:
        """``criterion(model(...), target)``, computed where the head is: of a head on the last rank alone, no more than
        the loss is sent.

        It is not the forward that ``DistributedDataParallel`` watches: under it, and under FSDP2, call the
        wrapper and take the loss of its output.

        Args:
            args: What the model takes, like ``kwargs``.
            criterion: Takes the output and the target, gives a scalar. It is not called on ranks without a head.
            target: Its second argument.

        Returns:
            The same scalar on every rank, to be differentiated on every rank.

        Raises:
            DistributedError: The model has a local credit rule.
            OptionError: The criterion gives no scalar.

        Example:
            >>> parallel = lbi_compile.distributed.parallelize(bounded, mesh, head="last")
            >>> parallel.loss(x, criterion=torch.nn.functional.cross_entropy, target=y).backward()
        """
        if self.credit is not None:
            raise DistributedError(
                f"loss on a model with credit={self.credit.kind!r}, whose regions learn by objectives of their own",
                expected="a model with exact credit",
                do="use local_loss",
            )
        inputs = bind(self._form, args, kwargs)
        program = self._program(inputs)
        call = self._run(program, inputs.leaves)

        def make() -> Tensor:
            value = criterion(assemble(program, outputs.flat(call), (), ()), target)
            if not isinstance(value, Tensor) or value.numel() != 1:
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise OptionError(f"a criterion that gives {shape}", expected="a scalar", do="take the mean or the sum")
            return value.reshape(())

        return outputs.send_loss(call, make) if call.head_on_last and self.ranks.size > 1 else make()

    def local_loss(self, *args: Any, target: Any, **kwargs: Any) -> Tensor:
        """The sum of the local objectives of all regions of all ranks, for ``credit="sid"`` and ``"hbll"``.

        Args:
            args: What the model takes, like ``kwargs``.
            target: As for ``BoundedModule.local_loss``.

        Returns:
            The same scalar on every rank.

        Raises:
            DistributedError: The model has exact credit.
        """
        if self.credit is None:
            raise DistributedError(
                "local_loss on a model with exact credit",
                expected='a model that was transformed with credit="sid" or credit="hbll"',
                do="use criterion(parallel(x), y)",
            )
        inputs = bind(self._form, args, kwargs)
        program = self._program(inputs)
        self._count()
        return local.loss(self, program, inputs.leaves, target)

    def forward_regions(self, *args: Any, **kwargs: Any) -> Any:
        """Not to be had: outputs and latents of other ranks' regions are not here.

        Raises:
            DistributedError: Always.
        """
        raise DistributedError(
            "forward_regions on a model that is spread over ranks",
            expected="losses on the output: what regions of other ranks give is not on this rank",
            do="train with auxiliary losses in one process, or move them into the model's output",
        )

    def _run(self, program: Program, leaves: list[Any]) -> Call:
        """A forward up to the head, and the head where it is here."""
        self._count()
        call = Call(self, program, leaves)
        if isinstance(self.interface, TokenChunkedInterface):
            entry = both(call)
        else:
            entry = side_by_side(call) if self.interface.parallel else in_turn(call)
        if entry is not None:
            call.head(entry)
        return call

    def _count(self) -> None:
        self.steps += self.training and torch.is_grad_enabled()

    def _program(self, inputs: Inputs) -> Program:
        key = (self.training, call_signature(inputs.args), call_signature(inputs.kwargs))
        if key not in self._known:
            mode = "training" if self.training else "evaluation"
            raise ShapeNotCapturedError(
                f"inputs {describe_inputs(inputs)} in {mode} mode, for which there is no program",
                expected="inputs and modes that were known when the model was spread: other regions' code is not here",
                do="give parallelize(example_inputs=...) such inputs, or call the bounded model so before",
            )
        program, check = self._known[key]
        check(inputs)
        return program

    def extra_repr(self) -> str:
        return f"regions {self.own.start}..{self.own.stop - 1} of {len(self.plan.regions)}, rank {self.ranks.rank}"
