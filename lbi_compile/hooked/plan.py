"""The plan of a model that is cut between child modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

from torch import Tensor, nn

from ..capture import Inputs
from ..errors import CaptureError
from ..naming import class_name
from ..passes.layouts import Layout
from ..plan import Decision, Part, Plan, Point, RegionPlan
from .blocks import Blocks
from .layout import named_shape

OPAQUE = "module"


def is_hooked(plan: Any) -> bool:
    """Whether a plan is cut between child modules: its places are modules, not operators of a graph."""
    return isinstance(plan, Plan) and plan.canvas.op == OPAQUE


def reasons(blocks: Blocks, starts: Sequence[int], asked: bool, refused: CaptureError) -> tuple[Decision, ...]:
    """Why the model is cut where it is.

    Args:
        blocks: Its blocks.
        starts: Blocks that start regions, the first included.
        asked: They were asked for by name.
        refused: Why it is not captured as a graph.
    """
    sizes = [sum(blocks.weights[a:b]) for a, b in _spans(starts, len(blocks.weights))]
    balance = max(sizes) * len(sizes) / max(sum(sizes), 1)
    share = sum(blocks.flops) / max(blocks.total, 1)
    how = "asked for by name" if asked else "the most even cuts"
    made = [
        Decision("capture", "child modules", f"torch.export cannot hold it in a graph: {refused.found}"),
        Decision("dynamic axes", "any", "the model's own forward runs"),
        Decision(
            "blocks",
            f"{blocks.children[0]} .. {blocks.children[-1]}",
            f"{len(blocks.children)} children of one list, with {100 * share:.1f}% of the FLOPs",
        ),
        Decision("canvas", f"input of {blocks.children[0]}", "what the first block is given"),
        Decision(
            "boundaries",
            ", ".join(blocks.children[start] for start in starts[1:]) or "none",
            f"{how}; largest over mean region {balance:.2f}, chosen among {len(blocks.cuts)} places where nothing but"
            " the hidden state passes on the example inputs",
        ),
    ]
    if blocks.idle:
        why = "the example inputs skip these blocks; they count as much as the median of the others"
        made.append(Decision("skipped", ", ".join(blocks.idle), why))
    return tuple(made)


def write_plan(
    model: nn.Module,
    inputs: Inputs,
    blocks: Blocks,
    starts: Sequence[int],
    layout: Layout,
    *,
    interface: str,
    r: int,
    **settled: Any,
) -> Plan:
    """Write down how a model is cut between its blocks.

    A point names a block and says with index 0 what it is given, with index 1 what it gives.

    Args:
        model: The model.
        inputs: The example inputs.
        blocks: Its blocks.
        starts: Blocks that start regions, the first included.
        layout: Layout of the hidden state.
        interface: Kind of interface.
        r: Latent width R.
        settled: The other fields of the plan.
    """
    shape, dtype = blocks.canvas
    sizes = named_shape(shape, layout)

    def point(child: int, index: int) -> Point:
        return Point(blocks.children[child], OPAQUE, index, sizes, str(dtype).removeprefix("torch."))

    latent = shape[layout.batch] * r
    numbers = {"pooled": latent, "chunked": latent, "identity": prod(shape)}.get(interface, 0)
    spans = _spans(starts, len(blocks.children))
    regions = tuple(
        RegionPlan(
            index=k,
            part=_part(model, blocks, blocks.children[a:b], sum(blocks.flops[a:b])),
            start=point(a, 0),
            end=point(b, 0) if b < len(blocks.children) else point(b - 1, 1),
            finish=None,
            own_finish=False,
            forward_bytes=0 if b == len(blocks.children) else numbers * dtype.itemsize,
            backward_bytes=0 if b == len(blocks.children) else numbers * dtype.itemsize,
            residual=False,
            batch_independent=None,
            why=(Decision("residual", "not known", "the region is opaque"),),
        )
        for k, (a, b) in enumerate(spans)
    )
    rest = blocks.total - blocks.stem - sum(blocks.flops)
    return Plan(
        model=class_name(model),
        regions=regions,
        prologue=Part((), 0, 0, 0, 0.0),
        stem=_part(model, blocks, blocks.modules["stem"], blocks.stem),
        head=_part(model, blocks, blocks.modules["head"], rest),
        canvas=point(0, 0),
        interface=interface,
        cell=None,
        r=r,
        dynamic=("batch", "sequence") if layout.positions else ("batch",),
        inputs=_shapes(model, inputs),
        **settled,
    )


def _spans(starts: Sequence[int], size: int) -> list[tuple[int, int]]:
    return list(zip(starts, [*starts[1:], size], strict=True))


def _part(model: nn.Module, blocks: Blocks, paths: Iterable[str], flops: int) -> Part:
    paths = tuple(paths)
    parameters = {id(p): p for path in paths for p in model.get_submodule(path).parameters() if p.requires_grad}
    return Part(paths, 0, sum(p.numel() for p in parameters.values()), flops, flops / max(blocks.total, 1))


def _shapes(model: nn.Module, inputs: Inputs) -> tuple[tuple[str, tuple[int, ...]], ...]:
    names = (*(f"input {i}" for i in range(len(inputs.args))), *inputs.kwargs)
    return tuple(
        (name, tuple(value.shape))
        for name, value in zip(names, (*inputs.args, *inputs.kwargs.values()), strict=True)
        if isinstance(value, Tensor)
    )
