"""``parallelize``: from a bounded model and a device mesh to one rank's part of it."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from .. import engines
from ..bounded import BoundedModule
from ..capture import as_inputs, bind
from ..credit.base import LocalCredit
from ..errors import DistributedError, MeshError, NotBuiltError, OptionError, PlanError
from ..hooked.plan import is_hooked
from ..interfaces import LanesInterface, TokenChunkedInterface
from ..newton import SEQUENTIAL
from ..passes.insert import Program
from ..staleness import raise_if_stale
from . import local
from .call import AUTO, CANVAS, STEM
from .module import RegionParallel
from .placement import balanced, place
from .ranks import Ranks

REGION, DP = "region", "dp"
REDUCTIONS = (AUTO, CANVAS, STEM)
ENGINES = (engines.AUTO, engines.CHAIN, engines.SCAN)
ALL, LAST = "all", "last"
HEADS = (ALL, LAST)


def parallelize(
    bounded: BoundedModule,
    mesh: DeviceMesh,
    *,
    example_inputs: Any = None,
    engine: str = "auto",
    reduce: str = "auto",
    head: str = "all",
    device: torch.device | str | None = None,
) -> RegionParallel:
    """Spread the regions of a bounded model over the ranks of a device mesh.

    Every rank of the dimension ``region`` calls the result with the same batch, gets the whole output and computes the
    same loss; ``loss.backward()`` gives every parameter the gradient that one process would give it. A dimension ``dp``
    is for copies with other batches: wrap the result in ``DistributedDataParallel(parallel,
    process_group=mesh.get_group("dp"))`` or ``fully_shard(parallel, mesh=mesh["dp"])``.

    The result shares its parameters with the bounded model and holds nothing else of it, so that dropping the bounded
    model frees what belongs to other ranks. So that no rank ever holds more than its part, build the model on the meta
    device, transform it with the plan of the real one, give ``device``, and ``load`` a checkpoint.

    Args:
        bounded: A bounded model that has seen inputs, the same on every rank.
        mesh: With the dimensions ``region`` and, optionally, ``dp``; no more ranks of ``region`` than regions.
        example_inputs: As for ``transform``; then programs for training and for evaluation are made. Otherwise the
            result runs in those modes and with those kinds of inputs in which the bounded model has been called.
        engine: How adjoints are solved where one rank waits for the latent of another (pooled, chunked): ``"chain"``
            (messages back from rank to rank), ``"scan"`` (Jacobians, one all_gather, a scan on every rank) or
            ``"auto"``. Same gradients.
        reduce: What ranks add up in the backward: ``"canvas"`` cotangents, the ``"stem"``'s gradients, or ``"auto"``:
            whichever is smaller.
        head: Where the head is, for a model whose last region alone is read out (``readout="last"``). ``"all"``: every
            rank has it, and gets the last region's output. ``"last"``: the last rank alone has it and sends the
            model's outputs to the others, which is less where outputs are smaller than the canvas (a classifier);
            or, by ``RegionParallel.loss``, no more than the loss. Every rank still returns and differentiates the same.
        device: For a model on the meta device: where it is to run.

    Returns:
        This rank's part, a module.

    Raises:
        MeshError: The mesh has other dimensions, or more ranks than there are regions.
        NotBuiltError: The bounded model has no program yet.
        PlanError: Ranks have different plans; raised on every rank.
        DistributedError: The model cannot be spread.
        BatchCouplingError: ``engine="scan"``, and a region mixes samples.

    Example:
        >>> mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("region",))
        >>> parallel = lbi_compile.distributed.parallelize(bounded, mesh)
        >>> criterion(parallel(x), y).backward()
    """
    for name, value, known in (("engine", engine, ENGINES), ("reduce", reduce, REDUCTIONS), ("head", head, HEADS)):
        if value not in known:
            raise OptionError(f"{name}={value!r}", expected=f"one of {', '.join(known)}", do="pass one of these")
    names = mesh.mesh_dim_names or ()
    if REGION not in names or set(names) - {REGION, DP}:
        raise MeshError(
            f"a mesh with the dimensions {', '.join(names) or '(without names)'}",
            expected=f"{REGION!r} and, optionally, {DP!r}",
            do='make it by init_device_mesh("cpu", (2,), mesh_dim_names=("region",))',
        )
    ranks = Ranks(mesh.get_group(REGION))
    if example_inputs is not None:
        _know(bounded, example_inputs)
    plan = bounded.plan
    if not bounded._known:
        raise NotBuiltError(
            "a bounded model without a program: it was copied, moved or loaded, and not called since",
            expected="a program for each mode and kind of input",
            do="pass example_inputs, or call the bounded model once in each mode",
        )
    _compare(ranks, plan.hash)
    if DP in names:
        _compare(Ranks(mesh.get_group(DP)), plan.hash)
    if ranks.size > len(plan.regions):
        raise MeshError(
            f"{ranks.size} ranks for {len(plan.regions)} regions",
            expected="at least one region for each rank",
            do=f"make a mesh with {len(plan.regions)} ranks or fewer, or transform with more regions",
        )
    programs = [program for program, _ in bounded._known.values()]
    _refuse(bounded, programs, head)
    raise_if_stale(bounded)
    counts = balanced([region.part.flops for region in plan.regions], ranks.size)
    placement = place(bounded, programs, counts, head_on_last=head == LAST)
    chosen = _choose(bounded, ranks, engine)
    parallel = RegionParallel(bounded, mesh, ranks, placement, chosen, reduce, _device(bounded, programs, device))
    _agree(parallel)
    return parallel


def _device(bounded: BoundedModule, programs: list[Program], device: torch.device | str | None) -> torch.device | None:
    """Where a model on the meta device is to run; ``None`` for a model with numbers."""
    if not any(p.is_meta for p in bounded.parameters()):
        return None
    if device is None:
        raise OptionError(
            "device=None for a model on the meta device",
            expected="the device it is to run on",
            do='pass for example device="cpu"',
        )
    kept = set(bounded.state_dict())
    lost = [name for name, buffer in bounded.named_buffers() if buffer.is_meta and name not in kept]
    known = {id(value) for value in (*bounded.parameters(), *bounded.buffers())}
    for program in programs:
        regions = [piece for region in program.regions for piece in (region.body, region.finish) if piece is not None]
        for piece in (program.prologue, program.stem, *regions, program.head):
            constants = [(name, getattr(owner, name)) for owner, name in piece.attributes]
            lost += [name for name, value in constants if value.is_meta and id(value) not in known]
    if lost:
        raise DistributedError(
            f"values on the meta device that no checkpoint holds: {', '.join(lost[:4])}",
            expected="parameters and persistent buffers only",
            do="register these buffers as persistent, or build the model on a device with memory",
        )
    return torch.device(device)


def _know(bounded: BoundedModule, example_inputs: Any) -> None:
    """Capture training and evaluation mode, and leave the modes as they are."""
    inputs = as_inputs(bounded.source, example_inputs)
    inputs = bind(bounded._form, inputs.args, inputs.kwargs)
    bounded._program(inputs)
    modules = [(module, module.training) for module in (bounded, *bounded.source.modules())]
    try:
        bounded.train(not bounded.training)
        bounded._program(inputs)
    finally:
        for module, mode in modules:
            module.training = mode


def _compare(ranks: Ranks, digest: str) -> None:
    found = ranks.objects(digest)
    if len(set(found)) > 1:
        told = ", ".join(f"{one} on rank {rank}" for rank, one in zip(ranks.members, found, strict=True))
        raise PlanError(
            f"plans that differ between ranks: {told}",
            expected="one plan on every rank",
            do="send rank 0's plan.to_json() to the others, and transform there with regions=Plan.from_json(text)",
        )


def _refuse(bounded: BoundedModule, programs: list[Program], head: str) -> None:
    plan = bounded.plan
    if head == LAST and (bounded.credit is not None or plan.readout != "last"):
        found = f"readout={plan.readout!r}" if bounded.credit is None else f"credit={plan.credit!r}"
        raise OptionError(
            f'head="last" with {found}',
            expected="a model whose head reads the last region: a sum has a cotangent for the regions of every rank",
            do='leave head out, or transform with readout="last"',
        )

    def refuse(found: str, expected: str, do: str) -> DistributedError:
        return DistributedError(found, expected=expected, do=do)

    if is_hooked(plan):
        raise refuse(
            "a model that torch.export cannot capture",
            "a captured model, whose regions are pieces of a graph",
            "train it in one process, or mend what the capture refuses",
        )
    if isinstance(bounded.interface, LanesInterface):
        raise refuse(
            "boundaries of several lanes, or of lanes in another shape than the canvas",
            "boundaries of one lane in the canvas's shape",
            "name boundaries where one value crosses, or use another interface",
        )
    if bounded.forward_method != SEQUENTIAL:
        if bounded.interface.kind not in ("pooled", "chunked"):
            raise refuse(
                f"forward={bounded.forward_method!r} with the {bounded.interface.kind} interface",
                "pooled or chunked latents",
                'transform with forward="sequential"',
            )
        for _, check in bounded._known.values():
            check.raise_if_coupled(engines.AUTO, forward=bounded.forward_method)
    last, canvas = plan.regions[-1].end, plan.canvas
    sent = bounded.credit is None and plan.readout == "last" and head == ALL
    if sent and (last.shape, last.dtype) != (canvas.shape, canvas.dtype):
        raise refuse(
            f"a last region that gives {last.dtype} {list(last.shape)} beside a canvas {list(canvas.shape)}",
            "an output in the canvas's shape, which ranks know beforehand",
            'name boundaries so that pooling and the classifier belong to the head, or pass head="last"',
        )
    for program in programs:
        inside = {name for region in program.regions for piece in (region.body, region.finish) if piece is not None
                  for name in piece.outputs}  # fmt: skip
        outputs = {leaf.name for leaf in program.outputs if hasattr(leaf, "name")}
        stray = sorted(inside & ({*program.head.inputs} | outputs) - {program.head_entry})
        if stray:
            raise refuse(
                f"a head or outputs that read {', '.join(stray)} from inside the regions",
                "outputs made of what the readout gives: regions of other ranks are not there",
                "leave side outputs and auxiliary losses out, or train in one process",
            )
    if isinstance(bounded.credit, LocalCredit):
        local.refuse(bounded.credit)


def _choose(bounded: BoundedModule, ranks: Ranks, engine: str) -> engines.Engine:
    """Settle the engine, the same on every rank."""
    interface = bounded.interface
    if bounded.credit is not None:
        return engines.Engine(engines.AUTOGRAD, "local credit: every region by itself")
    if interface.parallel:
        name = engines.CHAIN if interface.latents else engines.AUTOGRAD
        why = "the cells' chain, on every rank" if interface.latents else "nothing crosses between regions"
        if engine == engines.SCAN:
            raise OptionError(
                f"engine='scan' with the {interface.kind} interface",
                expected="an interface whose latents make ranks wait for each other",
                do="leave engine out: cells are cheap, and every rank runs them all",
            )
        return engines.Engine(name, why)
    if isinstance(interface, TokenChunkedInterface):
        if engine == engines.SCAN:
            raise OptionError(
                "engine='scan' with the token+chunked interface",
                expected="one kind of latents at a boundary: b of the chunk latents is there only when every rank has"
                " pulled back its token latents",
                do="leave engine out",
            )
        return engines.Engine(engines.CHAIN, "two kinds of latents cross: chunk latents from rank to rank")
    coupled = next((check.coupled for _, check in bounded._known.values() if check.coupled is not None), None)
    if engine == engines.SCAN:
        for _, check in bounded._known.values():
            check.raise_if_coupled(engines.SCAN)
    if engine != engines.AUTO:
        return engines.Engine(engine, "asked for")
    if coupled is not None:
        return engines.Engine(engines.CHAIN, "auto: regions mix samples, so there are no Jacobians for each of them")
    # in units of a region's pull-back: a chain waits for two of them per rank (activations and weights); the scan for
    # R of a Jacobian, one for b, and then two
    r = interface.r
    if 2 * ranks.size > r + 3:
        return engines.Engine(engines.SCAN, f"auto: {ranks.size} ranks in turn cost more than Jacobians of r = {r}")
    return engines.Engine(engines.CHAIN, f"auto: Jacobians of r = {r} cost more than {ranks.size} ranks in turn")


def _agree(parallel: RegionParallel) -> None:
    """Give every rank the first one's values of what every rank holds, as DistributedDataParallel does."""
    ranks = parallel.ranks
    flags = [
        (name, p.requires_grad) for name, p in parallel.named_parameters() if parallel.placement.home[name] is None
    ]
    found = ranks.objects(flags)
    differ = sorted({name for other in found for name, _ in set(other) ^ set(flags)})
    if differ:
        raise DistributedError(
            f"parameters that ranks hold or freeze differently: {', '.join(differ[:4])}",
            expected="one model, with the same parameters frozen, on every rank",
            do="build the model alike on all ranks, and freeze before parallelize",
        )
    with torch.no_grad():
        for name, value in [*parallel.named_parameters(), *parallel.named_buffers()]:
            if parallel.placement.home.get(name) is None and not value.is_meta and ranks.size > 1:
                value.copy_(ranks.broadcast(value.detach(), 0, "parameters"))
