"""Plan one model of a published size without memory, and print what came out as JSON:

python -m tests.zoo_wide.run gpt2-xl --regions 4 8
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from typing import Any

import torch
from torch import nn

import lbi_compile

from .models import ZOO, on_meta


def record(name: str, regions: list[int]) -> dict[str, Any]:
    """Plan the model called ``name`` for every number of regions.

    Returns:
        ``parameters``, the ``balance_wanted``, ``plans`` (one record for each number of regions), and the peak memory
        of this process so far in MiB, as ``mib``.
    """
    model, inputs = on_meta(name)
    plans = [planned(model, inputs, count) for count in regions]
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "balance_wanted": ZOO[name].balance,
        "plans": plans,
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def planned(model: nn.Module, inputs: dict[str, Any], regions: int) -> dict[str, Any]:
    """Plan ``model`` and say how even the regions are, and what it took.

    Returns:
        ``lanes`` at every boundary, ``balance`` (FLOPs of the largest region over those of the mean one), ``inside``
        (share of the model's FLOPs that lies in regions), ``nodes`` in all parts, seconds of wall and processor time,
        and what was settled; or ``error``.
    """
    wall, processor = time.perf_counter(), time.process_time()
    found: dict[str, Any] = {"regions": regions}
    try:
        plan = lbi_compile.plan(model, inputs, regions=regions)
    except lbi_compile.LBIError as error:
        return {**found, "error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - wall}
    flops = [region.part.flops for region in plan.regions]
    seconds, passes = time.perf_counter() - wall, sum(step.seconds for step in plan.passes)
    return {
        **found,
        "lanes": [len(points) for points in plan.crossings],
        "balance": max(flops) * len(flops) / sum(flops),
        "inside": sum(region.part.share for region in plan.regions),
        "nodes": sum(part.nodes for part in (plan.prologue, plan.stem, plan.head, *(r.part for r in plan.regions))),
        "interface": plan.interface,
        "readout": plan.readout,
        "dynamic": list(plan.dynamic),
        "ends": [region.end.name for region in plan.regions],
        "modules": [list(region.part.modules) for region in plan.regions],
        "seconds": seconds,
        "processor_seconds": time.process_time() - processor,
        "capture_seconds": seconds - passes,
        "passes": {step.name: step.seconds for step in plan.passes},
        "hash": plan.hash,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(ZOO))
    parser.add_argument("--regions", type=int, nargs="+", default=[4, 8])
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    json.dump(record(asked.model, asked.regions), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
