"""``backward="auto"``: a cost model rules engines out, and a race over the first training steps settles the rest.

The race is run by the user's own steps: each takes the next engine's turn, and since all engines give the same
gradients nothing has to be run twice, copied or put back. Random numbers, buffers, hooks and ``.grad`` are those of an
ordinary step; only the time of some of the first steps is another.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from .engines import AUTOGRAD, CHAIN, SCAN
from .plan import Plan

# The model is good to about this factor; an engine that it puts further behind is not tried.
SLACK = 2.0
# One that has to be compiled first, for many seconds, is tried only where it is put ahead of the others by so much.
COMPILED_SLACK = 0.95
# Timed steps per engine, after one that is not counted, in which compilers run and caches fill. Of three the median was
# once a fifth off, beside other work on the machine.
ROUNDS = 5
# Calls in a row that nobody differentiated, after which the cost model decides.
MOST_MISSES = 20
# Set to 1 to keep decisions in the user's cache directory, or to the path of a file.
VARIABLE = "LBI_COMPILE_AUTO_CACHE"
_VERSION = 1


# Operators of an interface for each latent: of the pooled one encoder, decoder, gate and norm, all of them between one
# latent and the next; of the token one encoder and decoder beside the cell.
POOLED_OPS, TOKEN_OPS = 12, 5
CELL_OPS = {None: 2, "linear": 2, "gru": 12}


class Rates(NamedTuple):
    """What a device takes, in seconds and FLOP/s, to within :data:`SLACK`.

    Attributes:
        forward: An operator of an eager forward, recorded by autograd.
        backward: Its backward.
        graph: An operator of a compiled graph that runs operator by operator.
        stacked: One that runs for all regions at once.
        apart: What each region's share of a stacked operator costs beside: operands are put together, results taken
            apart.
        marker: A boundary of the chain, forward and backward.
        scan: One step of the suffix scan.
        flops: Floating-point operations per second in small products.
        wide: The same where r cotangents share a product's weights.
    """

    forward: float
    backward: float
    graph: float
    stacked: float
    apart: float
    marker: float
    scan: float
    flops: float
    wide: float


# One thread of a busy server, fitted to steps of the bench's cases; an H100-class GPU, where the first four are
# estimates of what the host takes to launch.
RATES = {
    "cpu": Rates(
        forward=1e-5,
        backward=1.4e-5,
        graph=1.1e-5,
        stacked=2.1e-5,
        apart=6e-6,
        marker=2e-5,
        scan=1e-5,
        flops=4e10,
        wide=1.2e11,
    ),
    "cuda": Rates(
        forward=9e-6,
        backward=1.2e-5,
        graph=8e-6,
        stacked=8e-6,
        apart=4e-6,
        marker=2.5e-5,
        scan=1e-7,
        flops=2e13,
        wide=2e13,
    ),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the cost of a step depends on.

    Attributes:
        regions: K.
        latents: Latents that cross.
        r: Latent width.
        nodes: Operators of all regions' forwards.
        flops: Their FLOPs at the sizes of the call.
        slice_nodes: Operators between one latent and the next, over all regions: all of them where the latent enters at
            the start of a region, those of the cells alone for the token interface.
        slice_flops: Their FLOPs.
        batched: Equal regions run as one graph with a leading K axis.
        parallel: So do their forwards (no latent enters before a region's end).
        device: ``"cpu"`` or ``"cuda"``.
    """

    regions: int
    latents: int
    r: int
    nodes: int
    flops: float
    slice_nodes: int
    slice_flops: float
    batched: bool
    parallel: bool
    device: str


def facts_of(
    plan: Plan, leaves: Sequence[Any], *, latents: int, splits: bool, batched: bool, device: torch.device
) -> Facts:
    """Read the facts off a plan; FLOPs grow with the size of the first input.

    Args:
        plan: Of the bounded model.
        leaves: Input leaves of the call.
        latents: Latents that cross.
        splits: The latent enters between body and finish, so that only cells stand between latents.
        batched: Equal regions run as one graph.
        device: Where it runs.
    """
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    captured = math.prod(plan.inputs[0][1]) if plan.inputs else 0
    scale = first.numel() / captured if first is not None and captured else 1.0
    nodes = sum(region.part.nodes for region in plan.regions)
    flops = scale * sum(region.part.flops for region in plan.regions)
    if splits:
        gates = 3 if plan.cell == "gru" else 1
        indices = 0 if first is None else first.numel() / (first.shape[-1] if first.is_floating_point() else 1)
        slice_nodes, slice_flops = CELL_OPS[plan.cell] * latents, 2.0 * gates * plan.r**2 * indices * latents
        nodes += TOKEN_OPS * latents + slice_nodes
    else:
        nodes += POOLED_OPS * latents
        nodes += (TOKEN_OPS + CELL_OPS[plan.cell]) * latents if plan.interface == "token+chunked" else 0
        slice_nodes, slice_flops = nodes, flops
    return Facts(
        len(plan.regions), latents, plan.r, nodes, flops, slice_nodes, slice_flops, batched, splits, device.type
    )


def predict(facts: Facts) -> dict[str, float]:
    """Seconds of forward and backward under each engine.

    With n operators, F FLOPs, of which n' and F' lie between latents, L latents and K regions: autograd takes
    `n (o_f + o_b) + 3 F / f`; the chain adds `L o_m`. The scan takes `n (p + q) + 3 F / f` for forward and parameters,
    and `n' j + 2 r F' / f_r + (L - 1) o_s` for Jacobians and scan. With regions one by one p, q and j are `o_g`, `o_b`
    and `2 o_b`. Where they are batched q is `o_K / K + o_a` and j `2 o_K / K + o_a / 2`, as Jacobians stay together;
    p is q where no region's forward waits for another's. A product's two cotangents cost twice its forward.

    Args:
        facts: Of the model and the call.

    Example:
        >>> cost = predict(Facts(8, 8, 4, 100, 1e6, 100, 1e6, batched=False, parallel=False, device="cpu"))
        >>> min(cost, key=cost.get)
        'autograd'
    """
    rate = RATES.get(facts.device, RATES["cpu"])
    work = 3 * facts.flops / rate.flops
    plain = facts.nodes * (rate.forward + rate.backward) + work
    forward, backward, slices = rate.graph, rate.backward, 2 * rate.backward
    if facts.batched:
        share = rate.stacked / facts.regions
        backward, slices = share + rate.apart, 2 * share + rate.apart / 2
        forward = backward if facts.parallel else forward
    launches = facts.nodes * (forward + backward)
    jacobians = facts.slice_nodes * slices + 2 * facts.r * facts.slice_flops / rate.wide
    steps = max(facts.latents - 1, 0) * rate.scan
    return {
        AUTOGRAD: plain,
        CHAIN: plain + facts.latents * rate.marker,
        SCAN: launches + work + jacobians + steps,
    }


def narrow(cost: Mapping[str, float], *, compiled: Sequence[str] = (SCAN,)) -> tuple[str, ...]:
    """Engines worth a try, the most promising first.

    Args:
        cost: Predicted seconds by engine, of those that can run.
        compiled: Engines that have to be compiled first.

    Example:
        >>> narrow({"chain": 1.0, "scan": 0.6}), narrow({"chain": 1.0, "scan": 0.9})
        (('scan', 'chain'), ('chain',))
    """
    cost = dict(cost)
    if AUTOGRAD in cost:
        cost.pop(CHAIN, None)  # the same work and markers on top: no measurement can favour it
    least = min((value for name, value in cost.items() if name not in compiled), default=math.inf)
    slack = {name: COMPILED_SLACK if name in compiled else SLACK for name in cost}
    return tuple(sorted((name for name in cost if cost[name] <= slack[name] * least), key=lambda name: cost[name]))


@dataclass(frozen=True, slots=True)
class Decision:
    """Which engine, and why.

    Attributes:
        engine: Its name.
        why: The reason, one sentence.
        seconds: Median of its and the others' timed steps; empty where none were timed.
    """

    engine: str
    why: str
    seconds: Mapping[str, float]


class Race:
    """Engines take turns at real training steps until each was timed :data:`ROUNDS` times.

    Args:
        cost: Predicted seconds by engine, of those that can run.
        known: The outcome of an earlier race of the same kind.

    Attributes:
        decision: The outcome; ``None`` while the race is on.

    Example:
        >>> race = Race({"chain": 1.0, "scan": 0.6})
        >>> while race.decision is None:
        ...     name = race.turn()
        ...     race.record(name, 2.0 if name == "chain" else 1.0)
        >>> race.decision.engine
        'scan'
    """

    def __init__(self, cost: Mapping[str, float], *, known: Decision | None = None) -> None:
        self._cost = dict(cost)
        self._seconds: dict[str, list[float]] = {name: [] for name in narrow(cost)}
        self._misses = 0
        self.decision = known
        if known is None:
            self._close()

    @property
    def why(self) -> str:
        """The reason for the engine whose turn it is, one sentence."""
        if self.decision is not None:
            return self.decision.why
        done = sum(len(numbers) for numbers in self._seconds.values())
        return f"auto: its turn in a race of {', '.join(self._seconds)}, {done} steps done"

    def settle(self, why: str) -> None:
        """Let the cost model decide now; ``why`` tells what forbids a race."""
        if self.decision is None:
            first = next(iter(self._seconds))
            self.decision = Decision(first, f"auto: {_guess(first)}; {why}", {})

    def turn(self) -> str:
        """The engine that runs the next step: the one timed least often so far."""
        if self.decision is not None:
            return self.decision.engine
        return min(self._seconds, key=lambda name: len(self._seconds[name]))

    def record(self, engine: str, seconds: float) -> None:
        """A step of ``engine`` took so long; the first one of each does not count."""
        if self.decision is None and engine in self._seconds:
            self._seconds[engine].append(seconds)
            self._misses = 0
            self._close()

    def miss(self) -> None:
        """A step could not be timed, such as a forward that was never differentiated."""
        self._misses += 1
        if self._misses >= MOST_MISSES:
            self.settle(f"{self._misses} calls gave nothing to time")

    def drop(self, engine: str, why: str) -> None:
        """``engine`` cannot run; ``why`` is told with the decision."""
        if self.decision is None and engine in self._seconds and len(self._seconds) > 1:
            del self._seconds[engine]
            self._cost.pop(engine)
            self._close(f"; {engine} cannot run: {why}")

    def _close(self, note: str = "") -> None:
        if len(self._seconds) == 1:
            (only,) = self._seconds
            others = ", ".join(
                f"{name} {cost / self._cost[only]:.1f}x" for name, cost in self._cost.items() if name != only
            )
            behind = f", which predicts {others} the time" if others else ""
            self.decision = Decision(only, f"auto: {_guess(only)}{behind}{note}", {})
        elif all(len(numbers) > ROUNDS for numbers in self._seconds.values()):
            medians = {name: statistics.median(numbers[1:]) for name, numbers in self._seconds.items()}
            best = min(medians, key=lambda name: medians[name])
            told = ", ".join(f"{name} {value * 1e3:.3g} ms" for name, value in medians.items())
            self.decision = Decision(best, f"auto: the fastest of {ROUNDS} timed steps each: {told}", medians)


def _guess(engine: str) -> str:
    return f"{engine} by the cost model"


class Stopwatch:
    """Times forward and backward of one step from outside: what lies between them, such as the loss, is left out.

    The backward counts from the first gradient of an output to the last gradient of a parameter or input. Its hooks
    are there until then, until the forward's graph is gone, or until :meth:`cancel`.

    Args:
        device: Where the step runs.
        done: Called with the seconds once the backward has run.
    """

    def __init__(self, device: torch.device, done: Callable[[float], None]) -> None:
        self._mark = _event if device.type == "cuda" else time.perf_counter
        self._done = done
        self._handles: list[Any] = []
        self._times: list[Any] = [self._mark()]

    def forward_ended(self, outputs: Sequence[Any], leaves: Sequence[Any]) -> bool:
        """The forward has ended.

        Args:
            outputs: What it gave; only tensors with a gradient count.
            leaves: Parameters and inputs, likewise.

        Returns:
            Whether there is a backward to wait for.
        """
        self._times.append(self._mark())
        starts = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
        ends = [value for value in leaves if isinstance(value, Tensor) and value.requires_grad]
        if not starts or not ends:
            return False
        self._handles.append(register_multi_grad_hook(starts, lambda _: self._times.append(self._mark()), mode="any"))
        self._handles.append(register_multi_grad_hook(ends, lambda _: self._finish(), mode="all"))
        # a forward that nobody differentiates: hooks left on parameters would slow every other backward through them,
        # and have autograd copy each gradient
        if starts[0].grad_fn is not None:
            alive = _Alive()
            weakref.finalize(alive, self.cancel).atexit = False
            starts[0].grad_fn.metadata[_ALIVE] = alive  # pyright: ignore[reportIndexIssue]  a property
        return True

    def cancel(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def _finish(self) -> None:
        if len(self._times) == 3 and self._handles:
            start, end, first = self._times
            last = self._mark()
            self.cancel()
            self._done(_between(start, end) + _between(first, last))


# A graph's node holds this under this name for as long as it lives.
_ALIVE = "lbi_compile.auto"


class _Alive:
    """An object that can be referred to weakly."""


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def key(*, program: str, leaves: Sequence[Any], engines: Sequence[str], device: torch.device) -> str:
    """What a decision holds for: the program, sizes up to powers of two, dtypes, device, threads and torch.

    Args:
        program: Names what runs, such as the hash of a plan with the mode.
        leaves: Of the call.
        engines: Those that can run.
        device: Where.
    """
    sizes = [
        (str(leaf.dtype), [max(size - 1, 0).bit_length() for size in leaf.shape])
        for leaf in leaves
        if isinstance(leaf, Tensor)
    ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    text = json.dumps([program, sizes, list(engines), name, torch.__version__])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Store:
    """Decisions by key, in memory, and in a file too where one is named.

    Args:
        path: The file; ``None`` for memory alone.

    Example:
        >>> store = Store()
        >>> store.put("k", Decision("chain", "because", {}))
        >>> store.get("k").engine
        'chain'
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known = {} if path is None else _read(path)

    def get(self, key: str) -> Decision | None:
        return self._known.get(key)

    def put(self, key: str, decision: Decision) -> None:
        self._known[key] = decision
        if self._path is None:
            return
        # what other processes decided meanwhile is kept; a reader sees the old file or the new one, never a part
        self._known = _read(self._path) | self._known
        text = json.dumps({"version": _VERSION, "decisions": {key: asdict(one) for key, one in self._known.items()}})
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text)
            part.replace(self._path)
        except OSError as error:
            warnings.warn(f"{self._path}: {error.strerror}; the decision is kept in memory alone", stacklevel=2)


def _read(path: Path) -> dict[str, Decision]:
    try:
        found = json.loads(path.read_text())
        if found["version"] != _VERSION:
            return {}
        return {key: Decision(**one) for key, one in found["decisions"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"{path} cannot be read ({error}); engines are timed anew", stacklevel=3)
        return {}


def store_path(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where decisions are kept between processes: nowhere, unless :data:`VARIABLE` is set.

    Example:
        >>> store_path({}), store_path({"LBI_COMPILE_AUTO_CACHE": "auto.json"}).name
        (None, 'auto.json')
    """
    value = environment.get(VARIABLE, "")
    if value in ("", "0"):
        return None
    if value != "1":
        return Path(value)
    home = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lbi_compile" / "auto.json"
