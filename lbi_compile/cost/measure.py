"""Numbers for the closed forms, off a plan and a short measurement of the model's own parts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lbi_compile._torch import pytree
from lbi_compile.auto import CELL_OPS, RATES
from lbi_compile.credit.base import MANY_CLASSES
from lbi_compile.plan import Plan

from .symbols import Workload, bits, pooled_flops, token_flops

if TYPE_CHECKING:
    from lbi_compile.bounded import BoundedModule
    from lbi_compile.passes.insert import Piece, Program

ROUNDS = 5
_GATES = {None: 1.0, "linear": 1.0, "gru": 6.0}


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one part on one batch.

    Attributes:
        forward: Median over rounds.
        backward: Likewise.
        kept: Bytes that its forward keeps for its backward, parameters not counted.
        activations: Seconds of a backward that stops at what the part read; parameters get no gradient.
    """

    forward: float
    backward: float
    kept: int
    activations: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """The parts of a model on one batch, as one device runs them.

    Attributes:
        samples: Of the batch.
        stem: From inputs to canvas.
        regions: One entry for each, without interfaces.
        head: From the last region to a loss.
        whole: The whole bounded model.
        between: What combines latents between regions, on every device: the token interface's cells, or a scan.
    """

    samples: int
    stem: Timing
    regions: tuple[Timing, ...]
    head: Timing
    whole: Timing
    between: Timing | None = None

    @property
    def dense(self) -> float:
        """Seconds of a step of the model as it is."""
        return sum(part.forward + part.backward for part in (self.stem, *self.regions, self.head))

    @property
    def forward(self) -> float:
        """Seconds of its forward."""
        return sum(part.forward for part in (self.stem, *self.regions, self.head))


def measure(bounded: BoundedModule, program: Program, leaves: Sequence[Any], *, rounds: int = ROUNDS) -> Measured:
    """Time stem, regions and head of a model one by one, and the bounded model as a whole.

    Gradients are asked for and dropped: no parameter's ``.grad`` is touched. The loss is a logarithm of a sum of
    exponentials, which is what a cross entropy costs.

    Args:
        bounded: The model.
        program: Of such inputs.
        leaves: The inputs.
        rounds: How often; medians are taken. One more round comes first and is not counted.
    """
    readings: list[list[Timing]] = []
    with torch.enable_grad():
        for _ in range(rounds + 1):
            readings.append(_parts(program, leaves))
            readings[-1].append(_whole(bounded, leaves))
            readings[-1].append(_between(bounded, program, leaves))
    stem, *regions, head, whole, between = (_median(one) for one in zip(*readings[1:], strict=True))
    samples = next((int(leaf.shape[0]) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)
    return Measured(samples, stem, tuple(regions), head, whole, between)


def _median(one: Sequence[Timing]) -> Timing:
    seconds = (statistics.median(getattr(r, name) for r in one) for name in ("forward", "backward", "activations"))
    forward, backward, activations = seconds
    return Timing(forward, backward, one[-1].kept, activations)


def _parts(program: Program, leaves: Sequence[Any]) -> list[Timing]:
    values: dict[str, Any] = dict(zip(program.inputs, leaves, strict=True))
    program.prologue.run(values)
    found = [_timed(lambda: program.stem.run(values), lambda: [values[program.canvas]], _trained(program.stem), ())]
    _cut(values)
    lane = program.canvas
    for region in program.regions:
        values.update({gap.entry: values[gap.lane] for gap in region.gaps})
        values[region.entry] = entry = _leaf(values[lane])

        def run(region: Any = region) -> None:
            region.body.run(values)
            if region.finish is not None:
                values[region.joint] = values[region.anchor]
                region.finish.run(values)

        weights = [*_trained(region.body), *(_trained(region.finish) if region.finish is not None else ())]
        found.append(_timed(run, lambda end=region.end: [values[end]], weights, [entry]))
        _cut(values)
        lane = region.end
    values[program.head_entry] = entry = _leaf(values[lane])
    names = [leaf.name for leaf in program.outputs if hasattr(leaf, "name")]

    def head() -> None:
        program.head.run(values)
        values["<loss>"] = _loss([values[name] for name in names])

    found.append(_timed(head, lambda: [values["<loss>"]], _trained(program.head), [entry]))
    return found


def _whole(bounded: BoundedModule, leaves: Sequence[Any]) -> Timing:
    weights = [p for p in bounded.parameters() if p.requires_grad]
    held: list[Tensor] = []

    def run() -> None:
        with bounded.with_engine("autograd"):
            held[:] = [_loss([x for x in pytree.tree_leaves(bounded(*leaves)) if isinstance(x, Tensor)])]

    return _timed(run, lambda: held, weights, ())


def _between(bounded: BoundedModule, program: Program, leaves: Sequence[Any]) -> Timing:
    """The chain of the token interface's cells; nothing where latents are no regions' words."""
    interface = bounded.interface
    with torch.no_grad():
        values: dict[str, Any] = dict(zip(program.inputs, leaves, strict=True))
        program.prologue.run(values)
        program.stem.run(values)
        canvas = interface.fold(values[program.canvas])
    shape = interface.latent_shape(tuple(canvas.shape)) if interface.splits and interface.latents else None
    if shape is None or not all(isinstance(size, int) for size in shape):
        return Timing(0.0, 0.0, 0)
    dtype = next((p.dtype for p in interface.parameters()), canvas.dtype)
    says = [
        torch.randn(shape, dtype=dtype, device=canvas.device).requires_grad_() for _ in range(interface.regions - 1)
    ]
    found: list[Tensor] = []

    def run() -> None:
        found.clear()
        for k, z in enumerate(says):
            found.append(interface.leave(k, m=found[-1] if found else None, h=z, z=z))

    named = interface.named_parameters()
    cells = [p for name, p in named if p.requires_grad and interface.combines(name)]
    return _timed(run, lambda: found, cells, says)


def _timed(
    run: Callable[[], None], ends: Callable[[], list[Tensor]], weights: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Timing:
    """Time a forward and the backward of what it leaves."""
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        run()
    middle = time.perf_counter()
    found = [end for end in ends() if end.requires_grad]
    asked = [value for value in (*weights, *inputs) if value.requires_grad]
    cotangents = [torch.ones_like(end) for end in found]
    activations = 0.0
    if found and inputs and weights:
        begin = time.perf_counter()
        torch.autograd.grad(found, inputs, cotangents, allow_unused=True, retain_graph=True)
        activations = time.perf_counter() - begin
    begin = time.perf_counter()
    if found and asked:
        torch.autograd.grad(found, asked, cotangents, allow_unused=True)
    backward = time.perf_counter() - begin if found and asked else 0.0
    return Timing(middle - start, backward, sum(kept.values()), activations)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.is_floating_point())


def _cut(values: dict[str, Any]) -> None:
    """Make every value a leaf, so that no backward runs on into another part."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter):
            values[name] = _leaf(value)


def _trained(piece: Piece) -> list[Tensor]:
    found = (getattr(owner, name) for owner, name in piece.attributes)
    return list({id(x): x for x in found if isinstance(x, Tensor) and x.requires_grad}.values())


def _loss(outputs: Sequence[Tensor]) -> Tensor:
    floats = [x for x in outputs if x.is_floating_point() and x.requires_grad]
    return torch.stack([(x.logsumexp(-1) if x.dim() else x).float().sum() for x in floats]).sum()


def sizes(bounded: BoundedModule, program: Program, leaves: Sequence[Any]) -> dict[str, int]:
    """The letters B, T, D, C and tau of a call."""
    with torch.no_grad():
        values: dict[str, Any] = dict(zip(program.inputs, leaves, strict=True))
        program.prologue.run(values)
        program.stem.run(values)
        canvas = values[program.canvas]
        outputs = [x for x in pytree.tree_leaves(bounded(*leaves)) if isinstance(x, Tensor) and x.dim()]
    folded = bounded.interface.fold(canvas)
    B, D = int(folded.shape[0]), int(folded.shape[-1])
    logits = outputs[0]
    C = int(logits.shape[-1])
    return {"B": B, "T": canvas.numel() // (B * D), "D": D, "C": C, "tau": max(1, logits.numel() // (B * C))}


def workload(
    plan: Plan,
    sizes: dict[str, int],
    *,
    devices: int,
    parameters: int,
    timings: Sequence[Measured] = (),
    **given: float,
) -> Workload:
    """The numbers of a training step.

    A forward takes `o + w b / s` for b samples: o and s are fitted to two batches where there are two, else o is 0.
    FLOPs of layers are counted by the plan; those of stem and head are what takes their time at the rate of layers.

    Args:
        plan: Of the bounded model.
        sizes: As :func:`sizes` gives them.
        devices: n.
        parameters: Of the whole model.
        timings: Of batches of growing size, the last one of about B samples; none where ``given`` has ``s``.
        given: Letters with another number than the one found, such as ``s``.
    """
    K = len(plan.regions)
    L = max(K, sum(len(region.part.modules) for region in plan.regions))
    flops = sum(region.part.flops for region in plan.regions)
    samples = next((shape[0] for _, shape in plan.inputs if shape), 1)
    in_regions = sum(region.part.parameters for region in plan.regions)
    largest = max(region.part.flops for region in plan.regions) * K / flops if flops else 1.0
    head = max(0, parameters - in_regions - plan.stem.parameters)
    many = sizes["C"] >= MANY_CLASSES  # then SID's regions share a readout
    found: dict[str, float] = {
        **sizes,
        "K": K,
        "r": plan.r,
        "L": L,
        "n": devices,
        "w": flops / samples / L,
        "w_s": plan.stem.flops / samples,
        "w_h": plan.head.flops / samples,
        "p": in_regions / L,
        "p_s": plan.stem.parameters,
        "p_h": head,
        "p_c": plan.head.parameters if many else 0,
        "p_v": sizes["C"] * sizes["D"] if many else 0,
        "u": max(1.0, largest),
        "gamma": _GATES[plan.cell],
        "rho": 1.0 if plan.readout == "sum" else 0.0,
        "J": bits(K) / 2,
    }
    if timings:
        found |= _fitted(plan, found, timings)
    return Workload(**{**found, **given})  # pyright: ignore[reportArgumentType]  counts are whole


def _fitted(plan: Plan, found: dict[str, float], timings: Sequence[Measured]) -> dict[str, float]:
    last, L = timings[-1], int(found["L"])
    layers = [sum(region.forward for region in one.regions) for one in timings]
    fixed, slope = _line([one.samples for one in timings], layers)
    w = found["w"] or 1.0
    s = w * L / slope
    g = (last.dense - last.forward) / last.forward
    made: dict[str, float] = {"w": w, "s": s, "o": fixed / L, "g": g}
    for name, parts in (("s", [one.stem for one in timings]), ("h", [one.head for one in timings])):
        # whole steps, as parts differ in what their backward costs beside their forward
        steps = [(part.forward + part.backward) / (1 + g) for part in parts]
        fixed, slope = _line([one.samples for one in timings], steps)
        made |= {f"o_{name}": fixed, f"w_{name}": slope * s}
    each = [region.forward + region.backward for region in last.regions]
    made["u"] = max(each) * len(each) / sum(each)
    made["a"] = sum(region.kept for region in last.regions) / (L * last.samples)
    made["a_h"] = (last.stem.kept + last.head.kept) / last.samples
    activations = sum(region.activations for region in last.regions)
    backward = sum(region.backward for region in last.regions)
    if activations and backward:
        made["x"] = min(1.0, activations / backward)
    K, between = len(plan.regions), 0.0
    made["o_c"] = CELL_OPS[plan.cell] * RATES["cpu"].forward
    if last.between is not None and last.between.forward and K > 1:
        between = last.between.forward + last.between.backward
        flops = 2 * found["gamma"] * found["r"] ** 2 * last.samples * found["T"]
        made["o_c"] = max(0.0, between / (1 + g) / (K - 1) - flops / s)
    # what the bounded model takes beside the dense one and the cells, over its regions; forms add the FLOPs themselves
    extra = (last.whole.forward + last.whole.backward - last.dense - between) / (1 + g)
    made["o_i"] = max(0.0, extra / K - _interface_flops(plan, found) * last.samples / s)
    return made


def _interface_flops(plan: Plan, found: dict[str, float]) -> float:
    """FLOPs of a region's interface for a sample, as the closed form of its schedule has them."""
    if plan.interface == "token":
        return token_flops(found["r"], found["D"], found["T"])
    return pooled_flops(found["r"], found["D"]) if plan.interface in ("pooled", "chunked") else 0.0


def _line(samples: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Fixed seconds and seconds a sample; neither is negative."""
    if len(samples) > 1 and samples[-1] > samples[0]:
        slope = (seconds[-1] - seconds[0]) / (samples[-1] - samples[0])
        fixed = seconds[-1] - slope * samples[-1]
        if slope > 0 and fixed > 0:
            return fixed, slope
        if slope <= 0:
            return seconds[-1] * 0.999, max(seconds[-1] * 0.001 / samples[-1], math.ulp(1.0))
    return 0.0, max(seconds[-1] / samples[-1], math.ulp(1.0))
