"""Measure one model of the zoo: ``python -m tests.zoo.measure NAME ENGINE ...`` prints its row as JSON, last."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor, nn

import lbi_compile
from lbi_compile import CaptureError, LBIError, Plan
from lbi_compile.analysis import analyse
from lbi_compile.capture import Capture, as_inputs, capture, undisturbed
from lbi_compile.options import Options
from tests.zoo.models import ZOO, Entry
from tests.zoo.table import Row

REGIONS = (2, 4, 8)
# regions of the model that is verified and trained: the first of these that can be cut
TRIED = (4, 3, 2)
# relative distance of float32 gradients whose operators run in another order
FAITHFUL = 1e-4
ENGINES = ("scan", "chain")


def measure(entry: Entry, engines: Sequence[str] = ENGINES) -> Row:
    """Everything the table says about one model.

    Args:
        entry: The model.
        engines: Engines to try in turn until one is exact.

    Returns:
        A record of plain values. ``status`` is ``"green"`` where the gradients of an engine are exact and training
        steps are sound, ``"refused: Class: ..."`` where the package says that it cannot, else ``"red: ..."``.
    """
    start = time.perf_counter()
    row: Row = {"name": entry.name, "family": entry.family, "limit": entry.limit, "regions": {}, "refusals": {}}
    try:
        _measure(entry, engines, row)
    except LBIError as error:
        row["status"] = f"refused: {_said(error)}"
    except Exception as error:  # any other exception is a fault, of the package or of the zoo
        row["status"] = f"red: {_said(error)}"
        row["traceback"] = traceback.format_exc().splitlines()[-12:]
    row["seconds"] = time.perf_counter() - start
    return row


def _measure(entry: Entry, engines: Sequence[str], row: Row) -> None:
    model, inputs = entry.build()
    row["parameters"] = sum(p.numel() for p in model.parameters())
    found = None
    with _timed(row, "capture_s"), contextlib.suppress(CaptureError):
        found = capture(model, as_inputs(model, inputs))
    if found is not None:
        row["dynamic"], row["nodes"] = list(found.dynamic), len(found.graph_module.graph.nodes)
        row["unfaithful"] = unfaithful(model, found)
        if not row["unfaithful"] <= FAITHFUL:
            row["status"] = f"red: the captured graph has another gradient, off by {row['unfaithful']:.1e}"
            return
    plans = {k: _plan(entry, found, k, row) for k in REGIONS}
    for k in TRIED:
        plan = plans[k] if k in plans else _plan(entry, found, k, row)
        if plan is not None:
            break
    else:
        row["status"] = f"refused: {row['refusals']['2']}"
        return
    _describe(plan, row)
    row["engines"] = {}
    for engine in engines:
        said = _verify(entry, k, engine, row)
        row["engines"][engine] = said
        if said == "exact":
            break
    wrong = [f"{engine}: {said}" for engine, said in row["engines"].items() if not said.startswith("refused: ")]
    if wrong == [f"{row['engine']}: exact"]:
        row["status"] = "green"
    else:
        row["status"] = f"red: {wrong[0]}" if wrong else row["engines"][row["engine"]]
    if row["status"] == "green" and not row["steps_sound"]:
        row["status"] = f"red: losses {row['losses']}"


def _plan(entry: Entry, found: Capture | None, k: int, row: Row) -> Plan | None:
    """What ``lbi_compile.plan`` gives, of the capture that is already there if the exporter made one."""
    model, inputs = entry.build()
    options = Options(
        regions=k, r=16, interface="auto", cell="auto", readout="auto", backward="auto", allow_leak=False, seed=0
    )
    try:
        plan = lbi_compile.plan(model, inputs, regions=k) if found is None else analyse(model, found, options).plan
    except LBIError as error:
        row["regions"][str(k)], row["refusals"][str(k)] = type(error).__name__, _said(error)
        return None
    row["regions"][str(k)] = "ok"
    return plan


def _describe(plan: Plan, row: Row) -> None:
    flops = [region.part.flops for region in plan.regions]
    # child modules are cut without a graph, and so without this pass
    separators = next((record.result for record in plan.passes if record.name == "separators"), "")
    places = re.match(r"\d+", separators)
    row |= {
        "k": len(plan.regions),
        "places": int(places[0]) if places else None,
        "lanes": max(len(crossing) for crossing in plan.crossings),
        "balance": max(flops) * len(flops) / sum(flops) if sum(flops) else None,
        "interface": plan.interface if plan.cell is None else f"{plan.interface}, {plan.cell}",
        "readout": plan.readout,
        "passes_s": sum(record.seconds for record in plan.passes),
    }


def _verify(entry: Entry, k: int, engine: str, row: Row) -> str:
    """Exact, refused, or what is wrong; fills the row."""
    model, inputs = entry.build()
    row["engine"] = engine
    try:
        bounded = lbi_compile.transform(model, inputs, regions=k, backward=engine)
        with _timed(row, "verify_s"):
            report = lbi_compile.verify(bounded, inputs, tolerance=entry.limit)
        row["error"], row["worst"] = report.max_rel_error, report.worst[0][0] if report.worst else None
        row["failed"] = [f"{check.name}: {check.detail}" for check in report.checks if check.ok is False]
        if not report.max_rel_error <= entry.limit:
            return f"gradient of {row['worst']} off by {report.max_rel_error:.1e}"
        if row["failed"]:
            return row["failed"][0]
        row["losses"] = losses(bounded, inputs)
        row["steps_sound"] = all(map(math.isfinite, row["losses"])) and len(set(row["losses"])) == len(row["losses"])
    except LBIError as error:
        return f"refused: {_said(error)}"
    except Exception as error:
        row["traceback"] = traceback.format_exc().splitlines()[-12:]
        return _said(error)
    return "exact"


def unfaithful(model: nn.Module, found: Capture) -> float:
    """Distance of the gradient of the captured graph from that of the model itself, relative, in their own precision.

    The engines are compared with each other on the captured graph; this says whether the graph is the model.
    """
    gradients = []
    for program in (model, found.graph_module):
        with undisturbed(model):
            torch.manual_seed(7)
            loss = objective(program(*found.inputs.args, **found.inputs.kwargs))
            wanted = [p for p in model.parameters() if p.requires_grad]
            got = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([gradient.double().flatten() for gradient in got]))
    own, captured = gradients
    return float((captured - own).norm() / own.norm())


def losses(model: nn.Module, inputs: Any, *, steps: int = 2, rate: float = 0.01) -> list[float]:
    """Loss before and after each SGD step towards fixed random outputs; every forward draws the same numbers."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    found = []
    for step in range(steps + 1):
        torch.manual_seed(7)
        out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        loss = objective(out)
        found.append(float(loss.detach()))
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return found


def objective(out: Any) -> Tensor:
    """Mean squared distance of every float output from fixed random numbers."""
    leaves = torch.utils._pytree.tree_leaves(out)
    total = torch.zeros((), dtype=torch.float64)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad:
            target = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            total = total + (leaf.double() - target).square().mean()
    return total


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0].removeprefix('found: ')[:300]}"


@contextlib.contextmanager
def _timed(row: Row, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    row[name] = time.perf_counter() - start


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(json.dumps(measure(ZOO[sys.argv[1]], sys.argv[2:] or ENGINES)))
