"""What local credit rules share: one step of a region, the readouts, and the plain forward.

A local rule teaches every region by an objective of its own. What crosses a boundary crosses without its gradient; only
the canvas, which every region reads, collects the gradients of all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..interfaces import Interface
from ..passes.insert import OutputName, Piece, Program, RegionPieces
from .site import Site, attribute_names, leaving, readout_piece, written
from .targets import TargetReader, Targets

if TYPE_CHECKING:
    from ..bounded import BoundedModule

# From this many classes on regions share one readout and a belief enters as an expected embedding.
MANY_CLASSES = 256


@dataclass(frozen=True, eq=False)
class Credit:
    """Options of a local credit rule, as ``transform(credit=...)`` takes them."""

    name: ClassVar[str] = ""

    def build(self, site: Site) -> LocalCredit:
        """Make the modules of the rule for one model."""
        raise NotImplementedError


class Pass:
    """One call of a bounded model under a local rule: what stem and prologue left.

    Args:
        bounded: The bounded model.
        program: Its program for this call.
        leaves: The call's inputs.
        canvas: What to put in place of the canvas.

    Attributes:
        values: Values by name.
        canvas: The canvas.
    """

    def __init__(
        self, bounded: BoundedModule, program: Program, leaves: Sequence[Any], canvas: Tensor | None = None
    ) -> None:
        self.bounded, self.program = bounded, program
        self.values: dict[str, Any] = dict(zip(program.inputs, leaves, strict=True))
        program.prologue.run(self.values)
        program.stem.run(self.values)
        if canvas is not None:
            self.values[program.canvas] = canvas

    @classmethod
    def over(cls, bounded: BoundedModule, program: Program, values: dict[str, Any]) -> Pass:
        """A call whose stem has run already."""
        made = object.__new__(cls)
        made.bounded, made.program, made.values = bounded, program, values
        return made

    def with_values(self, values: dict[str, Any]) -> Pass:
        """The same call over other values."""
        return self.over(self.bounded, self.program, values)

    @property
    def canvas(self) -> Tensor:
        return self.values[self.program.canvas]

    def region(self, k: int, m: Tensor | None, values: dict[str, Any] | None = None) -> tuple[Tensor | None, Tensor]:
        """Run region ``k`` as a module.

        Args:
            k: The region.
            m: What enters it.
            values: Where it reads and leaves values; by default a copy, so that runs do not meet.

        Returns:
            `m_{k+1}` where the rule has one, and `h_k`.
        """
        values = dict(self.values) if values is None else values
        after, h, _ = self.bounded.regions[k](values[self.program.canvas], m, values, self.program.regions[k])
        return after, h


class LocalCredit(Interface):
    """Base of the local credit rules: what crosses boundaries, read out and taught region by region.

    Args:
        site: Where it is built.
        rule: Its options.
        readout: ``"shared"`` (the model's own head reads every region) or ``"private"`` (every region but the last has
            a copy of the head with parameters of its own).
        refresh: With the shared readout: regions but the last read a snapshot of the head that they do not teach, taken
            anew every so many calls of ``local_loss``.
        targets: Reads targets.

    Attributes:
        rule: The options.
        classes: Number of classes C.
    """

    readouts: tuple[str, ...] = ("last",)
    targets: TargetReader

    def __init__(self, site: Site, rule: Credit, *, readout: str, refresh: int | None, targets: TargetReader) -> None:
        super().__init__(regions=site.regions, r=site.r)
        self.kind = rule.name  # type: ignore[misc]  # of the instance, like the rule
        self.rule, self.readout, self.refresh, self.targets = rule, readout, refresh, targets
        self.layout = site.layout
        self.classes, self.class_dim, self.positions = site.classes, site.class_dim, site.positions
        self.logits_at, self.lane = site.logits, site.lane
        self.embedding = site.embedding
        self._known: list[_Known] = []
        self.heads: Any = nn.ModuleList()
        copies = 0
        if site.regions > 1:
            copies = site.regions - 1 if readout == "private" else 1 if refresh is not None else 0
        for _ in range(copies):
            self.heads.append(_HeadCopy(site, trained=readout == "private"))
        self._calls = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": []}

    # -- one region

    def read(self, k: int, canvas: Tensor, m: Tensor | None, values: Mapping[str, Any]) -> Tensor:
        """What region ``k`` reads in place of its separator: the canvas, and what the rule makes of ``m``.

        Args:
            k: The region.
            canvas: Folded canvas, `[B, D]` or `[B, P, D]`.
            m: What enters the region, or ``None``.
            values: Values by name.

        Returns:
            A folded value in the canvas's shape, or `[B, E]` where the boundary's lane has that shape.
        """
        raise NotImplementedError

    def after(self, k: int, m: Tensor | None, h: Tensor) -> Tensor | None:
        """`m_{k+1}` where it is made of what entered the region and of its folded output alone."""
        return None

    def run_region(
        self, k: int, canvas: Tensor, m: Tensor | None, values: dict[str, Any], pieces: RegionPieces
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Run region ``k``: ``(canvas, m_k) -> (m_{k+1}, h_k)``, and what the region read; see ``Region.forward``."""
        if k == 0:
            x = canvas
        else:
            x = self.read(k, self.fold(canvas), m, values)
            x = self.unfold(x, canvas.shape) if self.lane is None else x
        for name in (pieces.entry, *(gap.entry for gap in pieces.gaps)):
            values[name] = x
        pieces.body.run(values)
        h = values[leaving(pieces)]
        return self.after(k, m, self.fold(h) if self.lane is None else h), h, x

    # -- readouts

    def logits(self, k: int, h: Tensor, at: Pass) -> Tensor:
        """Logits of region ``k`` from its output, folded to `[B, C]` or `[B, P, C]`."""
        piece, names = self._readout(at)
        given = [getattr(owner, name) for owner, name in piece.attributes]
        if k < self.regions - 1 and self.heads:
            given = self.heads[k if self.readout == "private" else 0].instead(names, given)
        values = {**at.values, at.program.head_entry: h}
        (logits,) = piece.code(*given, *[values[name] for name in piece.inputs])
        return self.fold_logits(logits)

    def fold_logits(self, logits: Tensor) -> Tensor:
        """Logits (or targets with a dim for classes) as `[B, C]` or `[B, P, C]`."""
        return self.fold(logits) if self.positions else logits

    def prepare(self, bounded: BoundedModule, program: Program) -> None:
        """Take the readout out of a new program's head, and note what its regions write over."""
        kept = {id(known) for known, _ in bounded._known.values()}
        self._known = [known for known in self._known if id(known.program) in kept]
        piece = readout_piece(program, self.logits_at)
        pieces = [region.body for region in program.regions]
        buffers = [own for body in pieces for own in written(body)]
        self._known.append(_Known(program, piece, attribute_names(piece, bounded.source), buffers))

    def _readout(self, at: Pass) -> tuple[Piece, tuple[str | None, ...]]:
        known = self._of(at.program)
        return known.readout, known.names

    def _of(self, program: Program) -> _Known:
        # not by a dict of identities, which Dynamo cannot look into
        return next(known for known in self._known if known.program is program)

    def refresh_readout(self, at: Pass) -> None:
        """Take a new snapshot of the head where it is due; counts the call."""
        if self.refresh is not None and self.heads:
            if self._calls % self.refresh == 0:
                piece, names = self._readout(at)
                self.heads[0].copy(names, [getattr(owner, name) for owner, name in piece.attributes])
            self._calls += 1

    # -- the plain forward

    def first(self, at: Pass) -> Tensor | None:
        """What enters region 0 in the plain forward."""
        return None

    def pass_on(self, k: int, m: Tensor | None, after: Tensor | None, h: Tensor, at: Pass) -> Tensor | None:
        """What enters region ``k + 1`` in the plain forward, from what entered region ``k`` and what that gave."""
        return after

    def crossing(self, at: Pass) -> Tensor:
        """A tensor of the shape and dtype of what enters regions, without numbers of its own."""
        raise NotImplementedError

    @property
    def read_out(self) -> range:
        """The regions that the model's own head reads."""
        return range(self.regions - 1, self.regions)

    def chain(self, at: Pass, values: dict[str, Any]) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Run all regions one after another, each fed by the one before; yields `m_k` and `h_k`."""
        self.context(at)
        m = self.first(at)
        for k in range(self.regions):
            after, h = at.region(k, m, values)
            yield m, h
            if k < self.regions - 1:
                m = self.pass_on(k, m, after, h, at)

    def run(
        self,
        bounded: BoundedModule,
        program: Program,
        leaves: Sequence[Any],
        *,
        taps: bool = False,
        canvas: Tensor | None = None,
    ) -> tuple[list[Any], tuple[Any, ...], tuple[Any, ...]]:
        """The plain forward: the model's flat outputs as its head makes them of the last region.

        Nothing is cut out of its graph: a loss on it is differentiated end to end, through everything that crosses.
        """
        at = Pass(bounded, program, leaves, canvas)
        ms, hs = zip(*self.chain(at, at.values), strict=True)
        at.values[program.head_entry] = hs[-1]
        program.head.run(at.values)
        self.conclude(at, ms[-1])
        flat = [at.values[leaf.name] if isinstance(leaf, OutputName) else leaf for leaf in program.outputs]
        return flat, tuple(hs) if taps else (), tuple(ms) if taps else ()

    def conclude(self, at: Pass, m: Tensor | None) -> None:
        """Make the model's logits those of the last region, where the head alone does not: ``m`` entered it."""

    # -- learning

    def read_targets(self, target: Any, at: Pass) -> Targets:
        """The targets of a call, one row per prediction."""
        shape = self.logits_shape(at.canvas)
        return self.targets(target, shape=shape, class_dim=self.class_dim, fold=self.fold_logits, like=at.canvas)

    def logits_shape(self, canvas: Tensor) -> list[int]:
        """Shape of the logits of a call, which follows from its canvas."""
        if self.positions:
            return [self.classes if dim == self.class_dim else size for dim, size in enumerate(canvas.shape)]
        return [self.fold(canvas).shape[0], self.classes]

    def attributes(self, at: Pass) -> list[tuple[Any, str]]:
        """Owner and name of every parameter, buffer and constant that regions and readouts read."""
        pieces = [region.body for region in at.program.regions] + [self._readout(at)[0]]
        return list(dict.fromkeys(owned for piece in pieces for owned in piece.attributes))

    @contextlib.contextmanager
    def kept_buffers(self, at: Pass) -> Iterator[None]:
        """Inside, regions may be run once more: the statistics they write over (of a BatchNorm) are put back."""
        known = self._of(at.program)
        # of the readout the copies too, whatever they are
        held = [getattr(owner, name) for owner, name in (*known.buffers, *written(known.readout))]
        held += [buffer for head in self.heads for buffer in head.buffers()]
        before = [(value, value.clone()) for value in held if not isinstance(value, nn.Parameter)]
        try:
            yield
        finally:
            with torch.no_grad():
                for value, saved in before:
                    value.copy_(saved)

    def loss(self, bounded: BoundedModule, program: Program, leaves: Sequence[Any], target: Any) -> Tensor:
        """The sum of all local objectives."""
        raise NotImplementedError

    def path(
        self, bounded: BoundedModule, program: Program, leaves: Sequence[Any], hops: int | None, spans: Any
    ) -> list[Any]:
        """The model's flat outputs by a shorter path."""
        raise OptionError(
            f"forward_path under credit={self.kind!r}",
            expected='credit="hbll", whose tree of spans has shorter paths',
            do="call bounded(x)",
        )

    def context(self, at: Pass) -> None:
        """Put what ``read`` looks up by name into the values of a pass."""


@dataclass(frozen=True, eq=False)
class _Known:
    """What a rule keeps of a program, whose identity it is known by."""

    program: Program
    readout: Piece
    names: tuple[str | None, ...]
    buffers: list[tuple[Any, str]]


class _HeadCopy(nn.Module):
    """The parameters and buffers of the model's head, copied for one region or as a snapshot."""

    def __init__(self, site: Site, *, trained: bool) -> None:
        super().__init__()
        for name, (owner, attribute) in zip(site.names, site.readout.attributes, strict=True):
            if name is None:
                continue
            value = getattr(owner, attribute)
            copy = value.detach().clone()
            if trained and isinstance(value, nn.Parameter):
                self.register_parameter(_flat(name), nn.Parameter(copy, requires_grad=value.requires_grad))
            else:
                self.register_buffer(_flat(name), copy)

    def instead(self, names: Sequence[str | None], given: Sequence[Any]) -> list[Any]:
        """The copies in the order of ``names``; ``given`` where there is none."""
        return [own if name is None else getattr(self, _flat(name)) for name, own in zip(names, given, strict=True)]

    def copy(self, names: Sequence[str | None], given: Sequence[Any]) -> None:
        """Take over the present values."""
        with torch.no_grad():
            for name, value in zip(names, given, strict=True):
                if name is not None:
                    getattr(self, _flat(name)).copy_(value)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def one_of(what: str, value: Any, *allowed: str) -> None:
    """Refuse an option that has another value.

    Raises:
        OptionError: It has.
    """
    if value not in allowed:
        raise OptionError(f"{what}={value!r}", expected=f"one of {', '.join(allowed)}", do="pass one of these")


def no_local_credit(what: str, credit: str) -> OptionError:
    """The error of a call that needs a local credit rule."""
    return OptionError(
        f"{what} on a model with credit={credit!r}",
        expected='a model that was transformed with credit="sid" or credit="hbll"',
        do='use criterion(bounded(x), y), or transform with credit="sid"',
    )
