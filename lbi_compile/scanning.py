"""The scan engine: the bounded model compiled with a backward that is one suffix scan, once for each kind of call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import engines
from ._torch import dispatch_mode_active, fresh_code
from .backend import compile_errors, eager_backend
from .errors import EngineError
from .forward import varying
from .passes.insert import Program
from .passes.scan_backward import ScanRecord
from .running import each

if TYPE_CHECKING:
    from .bounded import BoundedModule


def scan(
    bounded: BoundedModule, program: Program, leaves: list[Any], *, taps: bool, pins: Tensor | None, why: str
) -> tuple[Any, engines.Engine]:
    """Run a bounded model so that its backward is the scan's.

    Args:
        bounded: The model.
        program: What it runs.
        leaves: Inputs of the call.
        taps: Give outputs and latents of the regions too.
        pins: Latents that were solved for; ``None`` where regions run one after another.
        why: Why this engine.

    Returns:
        Outputs, ``h`` and ``m``; and the engine, with what the compiler made of the backward.

    Raises:
        EngineError: It cannot be compiled, or not here.
    """
    if dispatch_mode_active():
        raise EngineError(
            "the scan engine under a TorchDispatchMode, which torch.compile does not trace",
            expected="a forward outside of dispatch modes",
            do='enter the mode around the backward only, or use bounded.with_engine("chain")',
        )
    known = bounded._compiled
    # torch 2.11: Dynamo does not notice a parameter frozen or thawed in place and would run the stale graph
    key = (id(program), taps, pins is None, tuple(p.requires_grad for p in bounded.parameters()))
    with (
        contextlib.nullcontext() if key in known else bounded._gate.compiling,
        bounded._checks_of(program).marked_sizes(leaves),
        varying(pins),
    ):
        compiled, record = known.get(key) or _compile(bounded, program, taps)
        with compile_errors(record, do='use backward="chain" (same gradients)'):
            flat, hs, ms = compiled(bounded, leaves, pins)
        known[key] = compiled, record
    engine = engines.Engine(
        engines.SCAN,
        why,
        record.jacobians,
        unrolled=tuple(sorted(record.unrolled.items())),
        parts=max(record.parts, default=1),
        rows=min((rows for rows, r in zip(record.rows, record.r, strict=True) if rows < r), default=0),
        over=record.over,
        batched=record.batched.groups,
        unbatched=tuple(sorted(record.batched.unbatched.items())),
    )
    out = [engines.once(leaf) for leaf in flat], tuple(map(engines.once, hs)), tuple(each(engines.once, m) for m in ms)
    return out, engine


def _compile(bounded: BoundedModule, program: Program, taps: bool) -> tuple[Callable[..., Any], ScanRecord]:
    record, options = ScanRecord(), bounded._options

    def scanned(module: BoundedModule, leaves: list[Any], pins: Tensor | None) -> Any:
        return module._run(program, leaves, marked=True, taps=taps, pins=pins)

    backend = eager_backend(record, batched=options.batch_regions, jacobian_bytes=options.jacobian_bytes)
    return torch.compile(fresh_code(scanned), backend=backend, fullgraph=True), record
