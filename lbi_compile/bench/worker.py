"""One rank of ``bench parallel``: ``python -m lbi_compile.bench.worker SETTINGS.json OUT.json`` under torchrun's names.

It makes contestants, checks their gradients, lets them take turns with all other ranks, and writes what it measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lbi_compile.cost import measure
from lbi_compile.distributed.ranks import Ranks

from . import controls, slowlink
from .check import judge
from .contestants import Arena, Contestant
from .stacks import Sizes


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Run all batches; gives a record of this rank.

    Args:
        settings: ``sizes`` (fields of ``Sizes``), ``batches``, ``names``, ``micro_batches``, ``rounds``, ``seed``,
            ``reduce``, ``head``, ``timeout`` in seconds, ``speeds`` of links in Mb/s and their ``ends``.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=settings["timeout"]))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("region",))
    sizes = Sizes(**settings["sizes"])
    cells = [cell for samples in settings["batches"] for cell in _cells(sizes, samples, mesh, settings)]
    dist.barrier()
    dist.destroy_process_group()
    return {"cells": cells}


def _cells(sizes: Sizes, samples: int, mesh: Any, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One batch, a cell for each speed of the links."""
    arena = Arena(sizes, samples, mesh, settings["seed"])
    ranks = Ranks(mesh.get_group("region"))
    contestants, models = _contestants(arena, settings)
    errors = {one.name: _error(one) for one in contestants}
    sent = {one.name: _all(one.sent) if not one.alone else 0.0 for one in contestants}
    fewest = max(1, samples // max(settings["micro_batches"], default=1))
    timings = {name: _timings(arena, model, fewest) for name, model in models.items()}
    speeds, idle = list(settings["speeds"]), {}
    for mbit in speeds:
        _limit(settings["ends"], mbit, ranks)
        idle[mbit] = controls.idle_link(ranks, _everywhere)
    draw, order = random.Random(settings["seed"]), [*contestants, *controls.controls(arena)]
    for one in order:  # once before it counts
        _time(one)
    seconds: dict[Any, dict[str, list[float]]] = {mbit: {one.name: [] for one in order} for mbit in speeds}
    # all speeds in every round: what else the machine does changes from minute to minute
    for _ in range(settings["rounds"]):
        draw.shuffle(order)
        draw.shuffle(speeds)
        for mbit in speeds:
            _limit(settings["ends"], mbit, ranks)
            for one in order:
                seconds[mbit][one.name].append(_time(one))
    _limit(settings["ends"], None, ranks)
    after = {one.name: _error(one) for one in contestants}
    worst = {name: max(errors[name], after[name]) for name in errors}
    return [
        {
            "samples": samples,
            "mbit": mbit,
            "link": controls.link(idle[mbit], seconds[mbit], dist.get_world_size())._asdict(),
            "crowding": controls.crowding(seconds[mbit]),
            "contestants": [
                {
                    "name": one.name,
                    "form": one.form,
                    "baseline": one.baseline,
                    "micro_batches": one.micro_batches,
                    "head_on_last": one.head_on_last,
                    "error": worst[one.name],
                    "sent": sent[one.name],
                    "seconds": seconds[mbit][one.name],
                }
                for one in contestants
            ],
            "workloads": {name: made for name, made in timings.items() if made is not None},
        }
        for mbit in settings["speeds"]
    ]


def _limit(ends: Sequence[tuple[str, str]], mbit: float | None, ranks: Ranks) -> None:
    """Links of another speed from here on, and windows of TCP that suit it."""
    if ends:
        dist.barrier()
        if dist.get_rank() == 0:
            slowlink.limit(ends, mbit)
        dist.barrier()
        ranks.all_reduce(torch.zeros(controls.LARGE // 4), "control")


def _contestants(arena: Arena, settings: dict[str, Any]) -> tuple[list[Contestant], dict[str, Any]]:
    names: Sequence[str] = settings["names"]
    found: list[Contestant | None] = [arena.one_dense()]
    models, given = {}, {name: settings[name] for name in ("reduce", "head")}
    for name in ("token", "pooled", "chunked", "sid"):
        if name in names:
            bounded = models[name] = arena.bounded(name)
            found += [arena.one_bounded(name, bounded), arena.spread(name, bounded, **given)]
    if "ddp" in names:
        found.append(arena.replicas())
    for kind in ("gpipe", "1f1b"):
        if kind in names:
            found += [arena.pipeline(kind, M) for M in settings["micro_batches"] if arena.samples >= M]
    return [one for one in found if one is not None], models


def _error(one: Contestant) -> float:
    """Largest relative error of a gradient on any rank."""
    dist.barrier()
    if not one.alone or dist.get_rank() == 0:
        one.step()
    check = judge(one.gradients(), one.expected, dtype=torch.float32, oracle="one process")
    skip = one.alone and dist.get_rank() > 0
    return max(_everywhere(0.0 if skip else check.error))


def _all(count: Any) -> float:
    """A sum over ranks."""
    dist.barrier()
    return sum(_everywhere(count()))


def _everywhere(value: float) -> list[float]:
    found = [0.0] * dist.get_world_size()
    dist.all_gather_object(found, float(value))
    return found


def _time(one: Contestant | controls.Control) -> float:
    """Seconds from when all ranks are there to when the last one is through."""
    dist.barrier()
    start = time.perf_counter()
    if not one.alone or dist.get_rank() == 0:
        one.step()
    return max(_everywhere(time.perf_counter() - start))


def _timings(arena: Arena, bounded: Any, fewest: int) -> dict[str, Any] | None:
    """Numbers of the closed forms, measured on the first rank while the others wait."""
    made = None
    if arena.rank == 0:
        program = bounded.programs[-1]
        found = []
        # down to what a micro-batch has, so that what a pass takes whatever its batch is measured and not guessed
        for samples in sorted({fewest, max(2, arena.samples)}):
            x, _ = arena.sizes.batch(samples, arena.seed + 1)
            found.append(measure.measure(bounded, program, [x], rounds=15))
        letters = measure.sizes(bounded, program, [arena.x])
        count = sum(p.numel() for p in arena.dense.parameters())
        work = measure.workload(
            bounded.plan, letters, devices=arena.world, parameters=count, timings=found
        )  # fmt: skip
        made = dataclasses.asdict(work)
    dist.barrier()
    return made


if __name__ == "__main__":
    record = main(json.loads(Path(sys.argv[1]).read_text()))
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(record))
    sys.stdout.flush()
    sys.stderr.flush()
    # threads of Gloo that still run when the interpreter takes everything down can abort the process
    os._exit(0)
