"""``lbi-compile plan --devices``: from a model to costs of schedules and advice."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bench import plot
from .capture import as_inputs
from .cost import links, measure
from .cost.advice import advise, rows, sweep
from .cost.symbols import Workload
from .errors import OptionError
from .hooked.plan import is_hooked
from .plan import Plan
from .render.cost import Outlook, OutlookView, draw
from .simulate import Link


@dataclass(frozen=True, slots=True)
class Planner:
    """The options of the planner, read.

    Attributes:
        devices: n.
        link: Between them.
        flops: FLOP/s of one; ``None`` to measure here.
        memory: Bytes of one; ``None`` for as much as it takes.
        Ks, rs: Of a sweep; both empty for none.
        picture: Where to draw; ``None`` for nowhere.
        simulate: Simulate too.
    """

    devices: int
    link: Link
    flops: float | None
    memory: float | None
    Ks: tuple[int, ...]
    rs: tuple[int, ...]
    picture: Path | None
    simulate: bool

    @classmethod
    def of(cls, options: argparse.Namespace) -> Planner:
        """Read the options of the command.

        Raises:
            OptionError: One of them cannot be read.
        """
        swept = _letters(options.sweep or ())
        picture = None if options.plot is None else Path(options.plot)
        plot.check(picture)
        return cls(
            options.devices,
            links.link(options.link or "nvlink", options.latency),
            None if options.flops is None else links.rate(options.flops),
            None if options.device_memory is None else _gibibytes(options.device_memory),
            swept.get("K", ()),
            swept.get("r", ()),
            picture,
            options.simulate,
        )

    def __call__(self, model: nn.Module, inputs: Any, plan: Plan) -> Outlook:
        """Find the numbers of a step, put them into the forms, and advise.

        Args:
            model: The model.
            inputs: Example inputs; their samples are the batch.
            plan: How it is cut.
        """
        work, source = self._workload(model, inputs, plan)
        table = rows(work, self.link, memory=self.memory, simulated=self.simulate)
        points = ()
        if self.Ks or self.rs:
            points = sweep(work, self.link, Ks=self.Ks or (work.K,), rs=self.rs or (work.r,))
        return Outlook(work, self.link, source, table, points, advise(table, work, self.link))

    def view(self, outlook: Outlook) -> OutlookView:
        """What to print."""
        return OutlookView(outlook)

    def draw(self, outlook: Outlook) -> None:
        """Draw where that was asked for."""
        if self.picture is not None:
            draw(outlook, self.picture)

    def _workload(self, model: nn.Module, inputs: Any, plan: Plan) -> tuple[Workload, str]:
        from . import transform

        if is_hooked(plan):
            raise OptionError(
                "a model that is cut by hooks, whose parts cannot be counted or run one by one",
                expected="a model that torch.export captures",
                do="measure it with `lbi-compile bench` instead",
            )
        parameters = sum({id(p): p.numel() for p in model.parameters()}.values())
        meta = any(p.is_meta for p in model.parameters())
        if meta and self.flops is None:
            raise OptionError("a model on the meta device without --flops", expected="FLOP/s", do="say --flops 300T")
        bounded = transform(model, inputs, regions=plan, r=plan.r, credit=plan.credit)
        program, leaves = bounded.programs[-1], as_inputs(model, inputs).leaves
        letters = measure.sizes(bounded, program, leaves)
        if self.flops is not None:
            work = measure.workload(
                plan, letters, devices=self.devices, parameters=parameters, s=self.flops
            )  # fmt: skip
            return work, "as given; nothing was measured"
        timings = [measure.measure(bounded, program, part) for part in _batches(plan, leaves)]
        work = measure.workload(plan, letters, devices=self.devices, parameters=parameters, timings=timings)
        threads = torch.get_num_threads()
        return work, f"measured here on {threads} thread(s)" if not _on_gpu(leaves) else "measured here"


def _on_gpu(leaves: Sequence[Any]) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in leaves)


def _batches(plan: Plan, leaves: Sequence[Any]) -> list[list[Any]]:
    """The batch, and half of it before where the model takes batches of other sizes."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    B = int(tensors[0].shape[0]) if tensors else 1
    if B < 2 or "batch" not in plan.dynamic:
        return [list(leaves)]
    half = [
        leaf[: B // 2] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == B else leaf for leaf in leaves
    ]
    return [half, list(leaves)]


def _letters(texts: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
    found = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        if name not in ("K", "r") or not all(part.isdigit() and int(part) for part in numbers.split(",")):
            raise OptionError(f"--sweep {text}", expected="K=2,4,8 and r=8,16", do="write it so")
        found[name] = tuple(dict.fromkeys(int(part) for part in numbers.split(",")))
    return found


def _gibibytes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise OptionError(f"--device-memory {text}", expected="GiB above 0", do="write for example 80")
    return number * 2**30
