"""Memory and critical path of a training step by depth: ``python examples/depth_scaling.py``.

A residual MLP of K blocks, one a region, under backpropagation, exact credit (LBI), SID and HBLL. Memory is what
autograd keeps for the backward at a time, parameters left out, measured while a step runs. The critical path is counted
on the graphs of that step: calls of blocks (under HBLL also of its encoder and maps) that depend on each other going
forward, and outputs of blocks that depend on each other going back. HBLL takes as many sweeps as it ever does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from command import Say, at_least_one, parser_of, study
from digits import CLASSES
from models.residual import ResidualMLP
from result_rows import Rows
from torch import Tensor, nn

import lbi_compile
from lbi_compile import HBLL, SID
from lbi_compile.credit.check import Depth, Saved, steps

HOME = Path(__file__).parent / "results" / "depth_scaling"
BACKPROP = "backprop"
RULES: dict[str, Callable[[int], dict[str, Any]]] = {
    BACKPROP: lambda depth: {},
    "LBI, autograd": lambda depth: {"interface": "pooled", "backward": "autograd"},
    "SID, parallel": lambda depth: {"credit": SID(schedule="parallel")},
    "SID, sequential": lambda depth: {"credit": SID(schedule="sequential")},
    "HBLL": lambda depth: {"credit": HBLL(sweeps=(depth - 1).bit_length())},
}


def waits(loss: Tensor, outputs: Sequence[Tensor]) -> int:
    """How many of ``outputs`` lie behind each other on the longest way of the gradient of ``loss``.

    Args:
        loss: Where the gradient starts.
        outputs: Values with a graph.
    """
    marked = {output.grad_fn for output in outputs}
    longest: dict[Any, int] = {}
    pending: list[Any] = [loss.grad_fn]
    while pending:
        node = pending[-1]
        later = [after for after, _ in node.next_functions if after is not None]
        missing = [after for after in later if after not in longest]
        if missing:
            pending += missing
            continue
        pending.pop()
        longest[node] = (node in marked) + max((longest[after] for after in later), default=0)
    return longest[loss.grad_fn]


def measure(rule: str, depth: int, *, width: int, batch: int) -> dict[str, int]:
    """One training step.

    Args:
        rule: One of ``RULES``.
        depth: Blocks and regions K.
        width: Width D.
        batch: Samples B.

    Returns:
        ``bytes`` kept at most, ``forward`` and ``backward`` steps that wait for each other.
    """
    torch.manual_seed(0)
    model: Any = ResidualMLP(width, width=width, depth=depth, classes=CLASSES)
    x, y = torch.randn(batch, width), torch.randint(0, CLASSES, (batch,))
    counted = blocks = list(model.blocks)
    if rule != BACKPROP:
        model = lbi_compile.transform(model, x, regions=depth, **RULES[rule](depth))
        counted, blocks = steps(model), list(model.regions)
    local = rule != BACKPROP and model.credit is not None

    def loss() -> Tensor:
        return model.local_loss(x, target=y) if local else F.cross_entropy(model(x), y)

    loss().backward()  # whatever is made at the first call
    with Saved(model.parameters()) as saved:
        loss().backward()
    with Depth(counted) as path:
        value = loss()
        forward = path.of(value)
    return {"bytes": saved.peak, "forward": forward, "backward": _backward(blocks, loss)}


def _backward(blocks: Sequence[nn.Module], loss: Callable[[], Tensor]) -> int:
    """Blocks whose backwards wait for each other, those that are run again inside the backward too."""
    outputs: list[Tensor] = []

    def note(module: nn.Module, args: Any, out: Any) -> None:
        outputs.append(out[1] if isinstance(out, tuple) else out)

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        value = loss()
        made = len(outputs)
        found = waits(value, [output for output in outputs if output.requires_grad])
        value.backward()
    finally:
        for handle in handles:
            handle.remove()
    # regions that are run again inside the backward run one after another, by design
    return found + len(outputs) - made


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: kept memory and steps that wait, by rule and depth."""
    depths = sorted({row["what"]["depth"] for row in rows})
    lines = ["| | " + " | ".join(f"K = {depth}" for depth in depths) + " |", "|---|" + "---|" * len(depths)]
    shown: list[tuple[str, Callable[[dict[str, int]], str]]] = [
        ("KiB kept", lambda found: f"{found['bytes'] / 1024:,.0f}"),
        ("steps that wait", lambda found: f"{found['forward']} + {found['backward']}"),
    ]
    for words, cell in shown:
        for rule in dict.fromkeys(row["what"]["rule"] for row in rows):
            of = {row["what"]["depth"]: row["found"] for row in rows if row["what"]["rule"] == rule}
            cells = [cell(of[depth]) if depth in of else "" for depth in depths]
            lines.append(f"| {rule}: {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_of(__doc__, home=HOME)
    made.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32, 64], metavar="K")
    made.add_argument("--width", type=int, default=64, metavar="D")
    made.add_argument("--batch", type=int, default=128, metavar="B")
    return made


def compare(options: argparse.Namespace, rows: Rows, say: Say) -> str:
    """Measure all rules at all depths; returns the table."""
    sizes = {"width": options.width, "batch": options.batch}
    at_least_one(*options.depths, *sizes.values())
    for depth in options.depths:
        for rule in RULES:
            what = {"rule": rule, "depth": depth, **sizes}
            found = rows.measured(what, lambda rule=rule, depth=depth: measure(rule, depth, **sizes))
            say(f"{rule}, K = {depth}: {found}")
    return table(rows.asked())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return study("depth_scaling", parser(), arguments, compare)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
