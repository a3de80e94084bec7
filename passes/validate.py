"""Validate: settle interface, cell and readout, and refuse what would be wrong rather than slow.

Contract: facts found by other passes in, decisions with their reasons out; nothing is changed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx

from lbi_compile.errors import FutureLeakError, InterfaceError, OptionError, ReadoutError
from lbi_compile.passes.liveness import is_mutating
from lbi_compile.plan import Decision

_SAME_VALUE = {
    torch.ops.aten.contiguous.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
}
_SUMS = {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, operator.add}
NOT_LATER = ("causal", "position-wise")
FINISHES = ("auto", "own")


def has_identity_path(start: fx.Node, end: fx.Node, *, memory: Mapping[fx.Node, tuple[fx.Node, ...]]) -> bool:
    """Whether ``end`` is proven to be ``start`` plus something: a path of additions from one to the other.

    Views and copies on the path count as identities where they keep the shape; a dropout, a norm, a scaled addition or
    a value that was written over before it is read does not.

    Args:
        start: Input of the region.
        end: Its output.
        memory: What nodes wait for through memory, as in ``Liveness``.
    """
    pending, seen = [end], set()
    while pending:
        node = pending.pop()
        if node is start:
            return True
        if node in seen:
            continue
        seen.add(node)
        if any(is_mutating(before) for before in memory.get(node, ())):
            continue
        if node.target in _SUMS and node.kwargs.get("alpha", 1) == 1:
            pending += [a for a in node.args[:2] if isinstance(a, fx.Node) and _same_shape(a, node)]
        elif node.target in _SAME_VALUE and isinstance(node.args[0], fx.Node) and _same_shape(node.args[0], node):
            pending.append(node.args[0])
    return False


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    left, right = a.meta.get("val"), b.meta.get("val")
    return left is not None and right is not None and [str(s) for s in left.shape] == [str(s) for s in right.shape]


def settle_interface(
    request: str, cell: str, *, regions: int, rank: int, positions: bool, causal: bool | None, residual: bool
) -> tuple[str, str | None, tuple[Decision, ...]]:
    """Choose interface and cell.

    Args:
        request: What the user asked for, or ``"auto"``.
        cell: ``"auto"``, ``"gru"`` or ``"linear"``.
        regions: Number of regions K.
        rank: Axes of the canvas.
        positions: The output has the canvas's position axis.
        causal: No output position depends on a later one; ``None`` where not known.
        residual: Every region has an identity path from its input to its output.

    Raises:
        InterfaceError: No interface suits the canvas.
    """
    if regions == 1:
        return "none", None, (Decision("interface", "none", "one region: the model itself, bit for bit"),)
    if request == "auto":
        kind, why = _automatic(rank, positions, causal, residual)
    else:
        kind, why = request, "asked for"
    made = [Decision("interface", kind, why)]
    chosen = None
    if kind in ("token", "token+chunked") or (kind == "self" and rank == 3 and positions):
        chosen = "linear" if cell == "auto" else cell
        why = "its Jacobian is the matrix itself, whatever the batch and length" if cell == "auto" else "asked for"
        made.append(Decision("cell", chosen, why))
    elif cell != "auto":
        raise OptionError(
            f"cell={cell!r} with interface={kind!r}",
            expected="a cell only for the interfaces with a latent per position, token and token+chunked",
            do="leave cell out",
        )
    return kind, chosen, tuple(made)


def settle_finish(request: str, *, interface: str, splits: bool) -> bool:
    """Whether every region's finish is the interface's own MLP, whatever its last ops are.

    Args:
        request: ``"auto"`` or ``"own"``.
        interface: What crosses.
        splits: Its latent enters regions at their finish.

    Raises:
        OptionError: It does not, and a finish is asked for.
    """
    if request != "auto" and not splits and interface != "none":
        raise OptionError(
            f"finish={request!r} with interface={interface!r}",
            expected="a finish only for the interfaces with a latent per position, token and token+chunked",
            do="leave finish out",
        )
    return request == "own"


def settle_lanes(request: str, cell: str, *, causal: bool) -> tuple[str, None, tuple[Decision, ...]]:
    """Choose the interface of boundaries with several lanes, or with lanes in another shape than the canvas.

    Args:
        request: What the user asked for, or ``"auto"``.
        cell: ``"auto"``; only the token interface has cells.
        causal: Some lane's positions are those along which the outputs look back only.

    Raises:
        InterfaceError: The interface asked for needs one lane of the canvas's shape at every boundary.
        OptionError: A cell is asked for.
    """
    if cell != "auto":
        raise OptionError(f"cell={cell!r} with several lanes", expected="no cell", do="leave cell out")
    if request == "auto":
        if causal:
            why = "several lanes or shapes cross, and outputs look back only along the positions of some"
            return "chunked", None, (Decision("interface", "chunked", why),)
        return "pooled", None, (Decision("interface", "pooled", "several lanes or shapes cross the boundaries"),)
    if request not in ("pooled", "chunked", "identity"):
        raise InterfaceError(
            f"interface={request!r} at boundaries with several lanes, or with lanes in another shape than the canvas",
            expected="pooled, chunked or identity, which have a form for each lane",
            do='pass interface="auto", or fewer regions so that one lane of the canvas\'s shape crosses each boundary',
        )
    if request == "chunked" and not causal:
        raise InterfaceError(
            "interface='chunked' where no lane has positions along which the outputs look back",
            expected="pooled",
            do='pass interface="auto"',
        )
    return request, None, (Decision("interface", request, "asked for"),)


def _automatic(rank: int, positions: bool, causal: bool | None, residual: bool) -> tuple[str, str]:
    if rank == 2:
        return "pooled", "the canvas [B, D] has no positions"
    if rank != 3:
        raise InterfaceError(
            f"a canvas with {rank} axes",
            expected="a canvas [B, D] or [B, T, D]",
            do='use interface="identity" or "zero", or a model whose blocks work on [B, D] or [B, T, D]',
        )
    if not positions:
        return "pooled", "the output has no position axis"
    if residual:
        return "token", "the output has the canvas's position axis and every region is residual"
    if causal is False:
        return "pooled", "the output has positions, regions are not residual, and the model is not causal"
    return "chunked", "the output has positions, regions are not residual, and nothing may leak from later positions"


def settle_readout(
    request: str, *, interface: str, allowed: tuple[str, ...], regions: int, residual: bool
) -> tuple[str, Decision]:
    """Choose the readout among those under which every parameter can get a gradient.

    Raises:
        OptionError: ``request`` is no readout.
        ReadoutError: Under it some region or interface parameter could never get a gradient.
    """
    if request not in ("auto", "last", "sum"):
        raise OptionError(f"readout={request!r}", expected="auto, last or sum", do="pass one of these")
    if regions == 1:
        return "last", Decision("readout", "last", "one region")
    if request != "auto":
        if request not in allowed:
            raise ReadoutError(
                f"readout={request!r} with interface={interface!r}",
                expected=f"readout {' or '.join(allowed)}: under {request!r} parameters could never get a gradient",
                do="pass readout='auto', or another interface",
            )
        note = "" if residual or request == "last" else "; the regions are not proven residual"
        return request, Decision("readout", request, "asked for" + note)
    if "sum" in allowed and (residual or "last" not in allowed):
        why = "every region adds to its input" if residual else f"the only one interface {interface!r} has"
        return "sum", Decision("readout", "sum", why)
    why = "an identity path from region input to output is not proven" if "sum" in allowed else "the interface's own"
    return "last", Decision("readout", "last", why)


def refuse_leak(*, interface: str, model: str, bounded: str) -> None:
    """Raise where the bounded model lets later positions in and the model does not.

    Args:
        interface: Kind, for the message.
        model: Measured dependence of output positions on canvas positions in the model.
        bounded: The same in the bounded model.

    Raises:
        FutureLeakError: It does.
    """
    if model in NOT_LATER and bounded not in NOT_LATER:
        raise FutureLeakError(
            f"interface={interface!r} on a model whose outputs are {model}: with it they depend on later positions",
            expected="outputs that see no later position than the model's own",
            do='use interface="token", "chunked" or "token+chunked"; allow_leak=True exists only to reproduce published'
            " results",
        )
