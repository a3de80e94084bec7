"""The ``bench`` command: its arguments, and what it runs."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from lbi_compile import sources
from lbi_compile.errors import OptionError
from lbi_compile.render.text import show

from . import cases, environment, plot, scan, step, transform
from .check import TOLERANCE
from .compare import Cell, Terms
from .record import Record
from .report import RecordView

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}


def run(options: argparse.Namespace, arguments: Sequence[str]) -> bool:
    """Run a bench, print its tables and write what was asked for.

    Args:
        options: As :mod:`lbi_compile.bench.arguments` reads them.
        arguments: As they were typed, for the record.

    Returns:
        Whether every check passed.

    Raises:
        OptionError: An option does not exist or does not fit.
    """
    if options.json is not None and not options.json.parent.is_dir():
        raise OptionError(f"--json {options.json}", expected="a file in a folder that exists", do="make the folder")
    if options.bench == "parallel":
        return _parallel(options, arguments)
    plot.check(options.plot)
    device = _device(options.device)
    made: dict[str, Any] = {}
    settings: dict[str, Any] = {"device": str(device), "threads": options.threads, "seed": options.seed}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    with environment.threads(options.threads):
        if options.bench == "transform":
            made["costs"] = _transform(options)
        else:
            terms = _terms(options, device)
            settings |= {
                "dtype": options.dtype,
                "rounds": options.rounds,
                "clock": options.clock,
                "cuda graphs": options.cuda_graphs,
            }
            with environment.empty_compile_cache():
                if device.type == "cuda" and options.bench == "scan":
                    made["copy_bandwidth"] = scan.copy_bandwidth(terms)
                made["cells"] = (_scan if options.bench == "scan" else _step)(options, terms)
    record = Record(
        options.bench,
        all(cell.ok for cell in made.get("cells", ())),
        environment.command(arguments),
        date,
        environment.machine(device),
        environment.versions(),
        settings,
        **made,
    )
    show(RecordView(record))
    if options.json is not None:
        record.write(options.json)
    if options.plot is not None:
        plot.draw(record, options.plot)
    return record.ok


def _terms(options: argparse.Namespace, device: torch.device) -> Terms:
    if options.dtype not in _DTYPES:
        raise OptionError(f"--dtype {options.dtype}", expected=f"one of {', '.join(_DTYPES)}", do="name one")
    if options.cuda_graphs and device.type != "cuda":
        raise OptionError("--cuda-graphs on a CPU", expected="a CUDA device", do="leave it out")
    return Terms(
        options.rounds,
        device,
        _DTYPES[options.dtype],
        options.compile_limit,
        options.memory,
        options.seed,
        _clock(options, device),
    )


def _clock(options: argparse.Namespace, device: torch.device) -> Callable[[], float]:
    if options.clock == "wall":
        return time.perf_counter
    if device.type == "cuda" or options.threads > 1:
        raise OptionError(
            f"--clock process on {device} with {options.threads} thread(s)",
            expected="one thread on a CPU: of more, and of a GPU, the processor's time says nothing",
            do="use --clock wall",
        )
    return time.process_time


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda without a CUDA device", expected="a GPU that torch can use", do="use cpu")
    return torch.device(name)


def _chosen(options: argparse.Namespace, names: Sequence[str]) -> tuple[str, ...]:
    wanted = tuple(names) if options.variants is None else tuple(options.variants)
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise OptionError(f"--variants {', '.join(unknown)}", expected=f"some of {', '.join(names)}", do="name those")
    return wanted


def _warm_compiler(device: torch.device) -> None:
    """Compile something small, so that the first variant does not pay for what is done once a process."""
    x = torch.ones(4, device=device, requires_grad=True)
    torch.compile(lambda x: (x.sin() + 1).sum())(x).backward()
    torch.compiler.reset()


def _scan(options: argparse.Namespace, terms: Terms) -> tuple[Cell, ...]:
    only = _chosen(options, scan.NAMES)
    if any(compiled for name, *_, compiled in scan.FORMS if name in only):
        _warm_compiler(terms.device)
    return scan.cells(
        K=options.regions, N=options.indices, r=options.r, terms=terms, only=only, cuda_graphs=options.cuda_graphs
    )


def _step(options: argparse.Namespace, terms: Terms) -> tuple[Cell, ...]:
    only = _chosen(options, step.NAMES)
    lengths = (None,) if options.case == cases.MLP else options.length
    sizes = [cases.Size(batch, length) for batch in options.batch for length in lengths]
    made = cases.make(options.case, _shape(options, options.case), sizes=sizes, interface=options.interface)
    if any(form.inductor for form in step.FORMS if form.name in only):
        _warm_compiler(terms.device)
    return tuple(step.cell(case, terms=terms, only=only, cuda_graphs=options.cuda_graphs) for case in made)


def _shape(options: argparse.Namespace, name: str) -> cases.Shape:
    given = {field: getattr(options, field) for field in cases.Shape._fields}
    return cases.DEFAULTS[name]._replace(**{field: value for field, value in given.items() if value is not None})


def _transform(options: argparse.Namespace) -> tuple[transform.Cost, ...]:
    torch.manual_seed(options.seed)
    kind, _, name = options.model.rpartition(":")
    if kind != "case":
        model, inputs = sources.load(
            options.model, overrides=dict(options.set), batch=options.batch, length=options.length
        )
        return transform.costs(model, inputs, regions=options.regions or 8, r=options.r or 16)
    if name not in cases.NAMES:
        raise OptionError(f"case:{name}", expected=f"case:{' or case:'.join(cases.NAMES)}", do="name one")
    sizes = [cases.Size(options.batch, options.length)]
    (case,) = cases.make(name, _shape(options, name), sizes=sizes)
    here = {"dtype": torch.float32, "device": torch.device("cpu")}
    model, inputs = case.model(**here, seed=options.seed), case.inputs(**here)
    return transform.costs(model, inputs, regions=case.starts, r=case.r, interface=case.interface)


def _parallel(options: argparse.Namespace, arguments: Sequence[str]) -> bool:
    from . import parallel, parallel_view, slowlink  # sympy and torch.distributed take a while to import

    names = options.variants or [name for name in parallel.NAMES if name not in parallel.OTHERS[options.case]]
    sizes = parallel.sizes(options.case, **{name: getattr(options, name) for name in parallel.ASKED})
    given = {"ranks": options.ranks, "batches": options.batch, "names": names, "rounds": options.rounds}
    given |= {
        "micro_batches": options.micro_batches,
        "seed": options.seed,
        "reduce": options.reduce,
        "head": options.head,
    }
    date, delay = datetime.now(UTC).isoformat(timespec="seconds"), options.delay / 1e3
    if options.mbit is None and not delay:
        meetings = parallel.run(sizes, **given)
    else:
        meetings = ()
        # a free link to compare with has no delay; and a relay carries at one speed
        speeds = options.mbit or (None,)
        for group in [(mbit,) for mbit in speeds] if delay else [speeds]:
            held = 0.0 if group == (None,) and options.mbit else delay
            with slowlink.limited(options.ranks, group[0], held) as places:
                found = parallel.run(sizes, **given, places=places, speeds=group)
            meetings += tuple(dataclasses.replace(one, delay=held) for one in found)
    record = parallel_view.Record(
        environment.command(arguments),
        date,
        environment.machine(torch.device("cpu")),
        environment.versions(),
        {**sizes._asdict(), **given},
        meetings,
    )
    show(parallel_view.RecordView(record))
    if options.json is not None:
        record.write(options.json)
    return record.ok
