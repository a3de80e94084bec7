"""The plan: a frozen, printable record of how a model was cut, with a reason for every decision."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from .errors import PlanError

PLAN_VERSION = 3

# Credit of plans whose bounded model is taught by its true gradient.
EXACT = "exact"


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision of the compiler.

    Attributes:
        about: What was decided, for example ``"interface"`` or ``"region 3 finish"``.
        choice: What was chosen.
        why: The reason, one sentence.
    """

    about: str
    choice: str
    why: str


@dataclass(frozen=True, slots=True)
class Point:
    """A value of the captured graph, named so that another capture of the same model finds it again.

    Attributes:
        module: Path of the module whose forward computed it; ``""`` for the model itself.
        op: Operator that computed it, for example ``"aten.add.Tensor"``; ``"input"`` for a model input.
        index: Position among the values with this module and operator, in program order.
        shape: Sizes; a name (``"B"``, ``"T"``) stands for a dynamic one.
        dtype: Data type, for example ``"float32"``.
    """

    module: str
    op: str
    index: int
    shape: tuple[int | str, ...]
    dtype: str

    @property
    def name(self) -> str:
        """Readable name, for example ``blocks.3:add[1]``."""
        op = self.op.removeprefix("aten.").split(".")[0]
        return f"{self.module or '<model>'}:{op}[{self.index}]"


@dataclass(frozen=True, slots=True)
class Part:
    """Counts of one part of the program (prologue, stem, a region, head).

    Attributes:
        modules: Paths of the layers that make it up, outermost that lie wholly inside.
        nodes: Graph nodes.
        parameters: Trainable numbers it reads; a tied one counts in each part that reads it.
        flops: Forward FLOPs at the example shapes.
        share: ``flops`` over the FLOPs of the whole model.
    """

    modules: tuple[str, ...]
    nodes: int
    parameters: int
    flops: int
    share: float


@dataclass(frozen=True, slots=True)
class RegionPlan:
    """One region of the model.

    Attributes:
        index: Position ``k``.
        part: Its counts.
        start: The separator that enters it in the model (the canvas for ``k = 0``).
        end: The separator that leaves it, ``h_k``.
        finish: Where its finish begins (``a_k``); ``None`` where the interface has no use for it.
        own_finish: The finish is a small MLP of the interface: the region ends in an op that mixes positions, or that
            was asked for.
        forward_bytes: Bytes of the latent that leaves it forward, at the example shapes.
        backward_bytes: Bytes of the adjoint that enters it backward.
        residual: An identity path from ``start`` to ``end`` is proven.
        batch_independent: Samples are proven or measured not to mix inside it; ``None`` where nobody asked.
        why: Decisions about this region.
    """

    index: int
    part: Part
    start: Point
    end: Point
    finish: Point | None
    own_finish: bool
    forward_bytes: int
    backward_bytes: int
    residual: bool
    batch_independent: bool | None
    why: tuple[Decision, ...] = ()


@dataclass(frozen=True, slots=True)
class Lane:
    """One value that crosses boundaries where boundaries have several lanes, or lanes in another shape than the canvas.

    Attributes:
        point: The value.
        first: The boundary (1 .. K-1) it crosses first: there it is encoded.
        last: The boundary it crosses last.
        slot: The slot of the latent that holds it from ``first`` to ``last``.
        readers: The regions that read it.
        base: What a region reads in its place beside the decoded latent: ``"source"``, ``"projected"``, ``"template"``.
        source: Where ``base`` is ``"source"``: 0 for the canvas, ``i + 1`` for ``Plan.shared[i]``.
        causal: Its positions are those along which the outputs look back only.
    """

    point: Point
    first: int
    last: int
    slot: int
    readers: tuple[int, ...]
    base: str
    source: int
    causal: bool


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One pass that ran: its name, how long it took (seconds), and what it left."""

    name: str
    seconds: float
    result: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is cut into regions and what crosses between them.

    Attributes:
        model: Qualified class name of the model.
        regions: The regions in order; ``K`` is their number.
        prologue: Nodes with no trainable input, run once without grad.
        stem: Input to canvas.
        head: What follows the last region.
        canvas: The float tensor every region may read.
        interface: What crosses a boundary: ``"pooled"``, ``"chunked"``, ``"token"``,
            ``"token+chunked"``, ``"identity"``, ``"zero"`` or ``"self"``; ``"none"`` for one region.
        cell: ``"gru"`` or ``"linear"`` where a latent per position crosses, else ``None``.
        readout: ``"last"`` or ``"sum"``.
        r: Latent width R.
        chunk: Tokens per chunk where a latent of chunks crosses, else ``None``.
        causal: No output position of the model depends on later positions; ``None`` without a position axis.
        dynamic: Names of the axes that may change from call to call (``"batch"``, ``"sequence"``).
        inputs: Shape of each example input tensor, by name.
        why: Decisions about the whole model.
        passes: What ran to make the plan. Not part of ``hash``.
        lanes: The values that cross, where boundaries have several lanes or lanes in another shape than the canvas;
            empty where every boundary is one lane of the canvas's shape, which is then the region's ``end``.
        shared: Values beside the canvas that every region may read, because next to no work leads to them.
        gather: Where a final stack or concatenation of the regions' outputs ends; it belongs to the head.
        credit: How regions are taught: ``"exact"``, or the name of a local rule, which then says itself what crosses.
        forward: ``"sequential"``; or how latents are solved for, ``"parallel"``, ``"quasi-newton"`` or ``"jacobi"``.
        tol: Residual at which a parallel forward has converged; ``None`` for that of the dtype.
        max_iters: Most iterations of a parallel forward; ``None`` for as many as it may need.
    """

    model: str
    regions: tuple[RegionPlan, ...]
    prologue: Part
    stem: Part
    head: Part
    canvas: Point
    interface: str
    cell: str | None
    readout: str
    r: int
    chunk: int | None
    causal: bool | None
    dynamic: tuple[str, ...]
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    why: tuple[Decision, ...] = ()
    passes: tuple[PassRecord, ...] = field(default=(), compare=False)
    lanes: tuple[Lane, ...] = ()
    shared: tuple[Point, ...] = ()
    gather: Point | None = None
    credit: str = EXACT
    forward: str = "sequential"
    tol: float | None = None
    max_iters: int | None = None

    @property
    def boundaries(self) -> tuple[Point, ...]:
        """The ``K - 1`` main values between regions; ``crossings`` has all lanes."""
        return tuple(region.end for region in self.regions[:-1])

    @property
    def crossings(self) -> tuple[tuple[Point, ...], ...]:
        """The lanes of each boundary ``1 .. K-1``."""
        if not self.lanes:
            return tuple((point,) for point in self.boundaries)
        return tuple(
            tuple(lane.point for lane in self.lanes if lane.first <= k <= lane.last)
            for k in range(1, len(self.regions))
        )

    @property
    def slots(self) -> int:
        """How many slots the latent has: the most lanes that cross one boundary, give or take kinds."""
        return 1 + max((lane.slot for lane in self.lanes), default=0)

    @property
    def hash(self) -> str:
        """Sixteen hex digits that are equal exactly where two plans cut and bound alike."""
        record = dataclasses.asdict(self)
        record.pop("passes")
        record.pop("inputs")
        if self.forward == "sequential":
            # plans from before there was another forward keep their hash
            for name in ("forward", "tol", "max_iters"):
                record.pop(name)
        return hashlib.sha256(json.dumps(_without_reasons(record), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        """The partition as a tree."""
        from .render.tree import page  # rendering is rich's, which a program that only reads the record need not import

        return page(self)

    def to_json(self, *, indent: int | None = 2) -> str:
        """The plan as JSON text; ``Plan.from_json`` reads it back."""
        record = {"version": PLAN_VERSION, "hash": self.hash, **dataclasses.asdict(self)}
        return json.dumps(record, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan that ``to_json`` wrote.

        Raises:
            PlanError: The text is no plan, is of another version, or was changed by hand without its hash.
        """
        try:
            record = json.loads(text)
            version, stated = record.pop("version"), record.pop("hash")
            if version != PLAN_VERSION:
                raise PlanError(
                    f"a plan of version {version}", expected=f"version {PLAN_VERSION}", do="make the plan anew"
                )
            plan = cls(
                **{
                    **record,
                    "regions": tuple(_region(item) for item in record["regions"]),
                    "prologue": _part(record["prologue"]),
                    "stem": _part(record["stem"]),
                    "head": _part(record["head"]),
                    "canvas": _point(record["canvas"]),
                    "dynamic": tuple(record["dynamic"]),
                    "inputs": tuple((name, tuple(shape)) for name, shape in record["inputs"]),
                    "why": _decisions(record["why"]),
                    "passes": tuple(PassRecord(**item) for item in record["passes"]),
                    "lanes": tuple(_lane(item) for item in record["lanes"]),
                    "shared": tuple(_point(item) for item in record["shared"]),
                    "gather": None if record["gather"] is None else _point(record["gather"]),
                }
            )
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise PlanError(
                f"text that is no plan ({type(error).__name__}: {error})",
                expected="the JSON that Plan.to_json wrote",
                do="write it again with plan.to_json() or `lbi-compile plan --json`",
            ) from error
        if plan.hash != stated:
            raise PlanError(
                f"hash {stated} on a plan whose content hashes to {plan.hash}",
                expected="an unchanged plan",
                do="cut by hand with regions=[module paths] instead of editing the JSON",
            )
        return plan


def _without_reasons(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_reasons(item) for key, item in value.items() if key != "why"}
    return [_without_reasons(item) for item in value] if isinstance(value, (list, tuple)) else value


def _point(record: dict[str, Any]) -> Point:
    return Point(**{**record, "shape": tuple(record["shape"])})


def _lane(record: dict[str, Any]) -> Lane:
    return Lane(**{**record, "point": _point(record["point"]), "readers": tuple(record["readers"])})


def _part(record: dict[str, Any]) -> Part:
    return Part(**{**record, "modules": tuple(record["modules"])})


def _decisions(records: list[dict[str, str]]) -> tuple[Decision, ...]:
    return tuple(Decision(**item) for item in records)


def _region(record: dict[str, Any]) -> RegionPlan:
    return RegionPlan(
        **{
            **record,
            "part": _part(record["part"]),
            "start": _point(record["start"]),
            "end": _point(record["end"]),
            "finish": None if record["finish"] is None else _point(record["finish"]),
            "why": _decisions(record["why"]),
        }
    )
