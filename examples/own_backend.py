"""A torch.compile backend of your own that asks the partitioner where to cut: ``python examples/own_backend.py``.

Passes need no model, only a graph: the backend below turns what Dynamo gives it into aten operators, finds lanes that
divide it into even regions, checks that the regions run one after another give the model's own output, and prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lbi_compile import passes

REGIONS = 3


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def cutting_backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Print where the graph can be cut; run it as it is."""
    graph = make_fx(gm, tracing_mode="real")(*example_inputs)
    inputs = graph.graph.find_nodes(op="placeholder")
    parameters = {n.name for n, x in zip(inputs, example_inputs, strict=True) if isinstance(x, nn.Parameter)}

    live = passes.liveness.liveness(graph, trainable=frozenset(parameters))
    cost = passes.costs.costs(graph, example=tuple(example_inputs))
    _, main = passes.lanes.main_path(live, cost.flops)
    points = passes.separators.separators(live, main=main)
    found = passes.partition.partition(live, points, regions=REGIONS, cost=cost.flops, flops=cost.flops)
    print(f"{len(live.live)} live nodes, {len(points)} one-lane separators, canvas {found.canvas.name}")
    for k, lanes in enumerate(found.cut.lanes, start=1):
        print(f"boundary {k}:", *(f"{lane.name} {list(lane.meta['val'].shape)}" for lane in lanes))

    program = passes.insert.insert(graph, live=live, cut=found.cut)
    (expected,) = gm(*example_inputs)
    (got,) = program.run(list(example_inputs))
    assert torch.equal(got, expected)
    print("the pieces in order give the model's output bit for bit")
    return gm.forward


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), *(Block(32) for _ in range(6)), nn.Linear(32, 4))
    compiled = torch.compile(model, backend=cutting_backend)
    print(f"output {list(compiled(torch.randn(16, 8)).shape)}")


if __name__ == "__main__":
    main()
