"""``python -m tests.compile_table``: every interface, readout and engine under ``torch.compile(fullgraph=True)``.

One row each: graph breaks, graphs after four batch sizes, seconds until the first step is done, the largest error of a
gradient in float64 against plain autograd in eager, and how often the compiled backward calls the suffix scan.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import lbi_compile
from lbi_compile import BoundedModule
from lbi_compile.errors import LBIError
from lbi_compile.verify import relative_errors
from tests.cases import Inputs, call, gradients, in_float64, project, with_batch

INTERFACES: dict[str, tuple[str, dict[str, Any]]] = {
    "token, linear": ("transformer", {"interface": "token", "cell": "linear"}),
    "token, GRU": ("transformer", {"interface": "token", "cell": "gru"}),
    "chunked": ("transformer", {"interface": "chunked", "r": 8}),
    "token+chunked": ("transformer", {"interface": "token+chunked", "cell": "linear", "r": 8}),
    "pooled": ("mlp", {"interface": "pooled"}),
    "identity": ("transformer", {"interface": "identity"}),
    "zero": ("transformer", {"interface": "zero"}),
    "self": ("transformer", {"interface": "self"}),
}
SCANS = {"token+chunked": 2, "identity": 0, "zero": 0, "self": 0}
READOUTS, ENGINES = ("sum", "last"), ("autograd", "chain", "scan")
BATCHES = (3, 4, 5, 7)


class Found(NamedTuple):
    """One row.

    Attributes:
        interface: With its cell.
        readout: ``"sum"`` or ``"last"``.
        engine: ``"scan"`` with ``backend="lbi"``, the others with Inductor.
        refused: Why it cannot be, else empty.
        breaks: Graph breaks.
        graphs: Dynamo's graphs after all batch sizes: 1 is no recompile.
        seconds: From the call of ``torch.compile`` to the end of the first step.
        error: Largest relative error of a gradient, over parameters and batch sizes.
        scans: Calls of the suffix scan in the code of the first step.
    """

    interface: str
    readout: str
    engine: str
    refused: str = ""
    breaks: int = 0
    graphs: int = 0
    seconds: float = 0.0
    error: float = 0.0
    scans: int = 0

    @property
    def ok(self) -> bool:
        """As it should be: one graph, exact, and a scan just where latents cross and the engine is one."""
        wanted = SCANS.get(self.interface, 1) if self.engine == "scan" else 0
        return bool(self.refused) or (
            not self.breaks and self.graphs == 1 and self.error <= 1e-10 and self.scans == wanted
        )


def without_dropout(name: str, depth: int) -> tuple[nn.Module, Inputs]:
    """A model of ``tests.cases``; Inductor draws other masks than eager."""
    model, inputs = in_float64(name, depth=depth)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    return model, inputs


def row(interface: str, readout: str, engine: str) -> Found:
    """Compile and run one."""
    name, options = INTERFACES[interface]
    found = Found(interface, readout, engine)
    torch._dynamo.reset()
    counters.clear()
    model, inputs = without_dropout(name, 4)
    try:
        bounded = lbi_compile.transform(model, inputs, regions=4, readout=readout, **{"r": 4, **options})
    except LBIError as error:
        return found._replace(refused=type(error).__name__)
    expected = {size: gradients(bounded, with_batch(inputs, size), "autograd") for size in BATCHES}
    with bounded.with_engine(engine if engine != "scan" else "auto"):
        backend: dict[str, Any] = {"backend": "lbi"} if engine == "scan" else {}
        start = time.perf_counter()
        compiled = torch.compile(bounded, fullgraph=True, dynamic=True, **backend)
        worst, code = 0.0, list[str]()
        for size in BATCHES:
            data = with_batch(inputs, size)
            if size == BATCHES[0]:  # `run_and_get_code` resets Dynamo
                try:
                    got, code = run_and_get_code(lambda data=data: step(bounded, compiled, data))
                except BackendCompilerFailed as error:
                    if not isinstance(error.inner_exception, LBIError):
                        raise
                    return found._replace(refused=type(error.inner_exception).__name__)
                found = found._replace(seconds=time.perf_counter() - start)
            else:
                got = step(bounded, compiled, data)
            worst = max(worst, *relative_errors(got, expected[size]).values())
    return found._replace(
        breaks=sum(counters["graph_break"].values()),
        graphs=counters["stats"]["unique_graphs"],
        error=worst,
        scans=sum(text.count("torch.ops.lbi.suffix_scan.default(") for text in code),
    )


def step(bounded: BoundedModule, compiled: Any, inputs: Inputs) -> dict[str, Any]:
    """Gradients of one step of the compiled module."""
    bounded.zero_grad()
    project(call(compiled, inputs)).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in bounded.named_parameters()}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("interfaces", nargs="*", help=f"of {'; '.join(INTERFACES)}")
    parser.add_argument(
        "--json", type=Path, help="write the rows to this file; those that stand there are not run again"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(options.json.read_text()) if options.json is not None and options.json.exists() else []
    known = {one[:3]: one for one in (Found(**{name: row[name] for name in Found._fields}) for row in kept)}
    for key in itertools.product(options.interfaces or INTERFACES, READOUTS, ENGINES):
        if key not in known:
            known[key] = row(*key)
            print(known[key], file=sys.stderr, flush=True)
            if options.json is not None:
                made = [one._asdict() | {"ok": one.ok} for one in known.values()]
                options.json.write_text(json.dumps(made, indent=1) + "\n")
    table = Table("interface", "readout", "engine", "breaks", "graphs", "compile", "error", "scans", "")
    for found in known.values():
        counts = [str(found.breaks), str(found.graphs), f"{found.seconds:.0f} s", f"{found.error:.0e}"]
        counts += [str(found.scans)]
        numbers = [""] * len(counts) if found.refused else counts
        table.add_row(*found[:3], *numbers, found.refused or ("" if found.ok else "NOT OK"))
    Console(width=100).print(table)
    return not all(one.ok for one in known.values())


if __name__ == "__main__":
    sys.exit(main())
