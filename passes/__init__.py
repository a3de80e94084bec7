"""Passes over captured graphs and joint graphs; each file is one pass, named after it.

A pass takes a ``torch.fx.GraphModule`` of aten operators whose nodes carry ``meta["val"]`` (what ``torch.export`` and
``make_fx`` give) and returns a frozen record, or new graphs; the graph itself is left alone. One can be called alone::

    from lbi_compile import passes

    live = passes.liveness.liveness(gm)                             # what depends on an input and on a parameter
    cost = passes.costs.costs(gm, example=inputs)                   # FLOPs and bytes of every node
    _, main = passes.lanes.main_path(live, cost.flops)
    points = passes.separators.separators(live, main=main)          # where one tensor carries everything
    cut = passes.partition.partition(live, points, regions=4, cost=cost.flops, flops=cost.flops).cut
    program = passes.insert.insert(gm, live=live, cut=cut)          # stem, regions and head as small graphs

``examples/own_backend.py`` does this inside a ``torch.compile`` backend.
"""

from __future__ import annotations

from . import (
    axes,
    costs,
    critical_path,
    evaluate,
    insert,
    lanes,
    layouts,
    liveness,
    names,
    partition,
    positions,
    scan_backward,
    separators,
    validate,
    vertex_cut,
    windows,
)

__all__ = [
    "axes",
    "costs",
    "critical_path",
    "evaluate",
    "insert",
    "lanes",
    "layouts",
    "liveness",
    "names",
    "partition",
    "positions",
    "scan_backward",
    "separators",
    "validate",
    "vertex_cut",
    "windows",
]
