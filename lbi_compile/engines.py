"""Engines: how the adjoints of a bounded model are solved. All give the same gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import DoubleBackwardError, OptionError

AUTO, AUTOGRAD, CHAIN, SCAN = "auto", "autograd", "chain", "scan"
REQUESTS = (AUTO, AUTOGRAD, CHAIN, SCAN)


@dataclass(frozen=True, slots=True)
class Engine:
    """What solved the adjoints of the last call, and why that engine.

    Attributes:
        name: ``"autograd"`` (the oracle), ``"chain"`` (region after region), ``"scan"`` (Jacobians, then one suffix
            scan), or ``"none"`` for a call that needed no gradient.
        why: The reason, one sentence.
        jacobians: Interface Jacobians the scan combines.
        unrolled: Operators of the backward that were run once per cotangent because they cannot be batched, with the
            reason.
        parts: Into how many parts the indices of the scan are cut, one after another, so that Jacobians stay within
            ``jacobian_bytes``; the largest number where there are several scans.
        rows: How many rows of a Jacobian are computed at a time for the same reason; 0 for all of them.
        over: Why Jacobians take more memory than that, one sentence a scan.
        batched: Operators that run once for several regions.
        unbatched: Operators of regions that are alike which yet run once for each of them, with the reason.
    """

    name: str
    why: str
    jacobians: int = 0
    unrolled: tuple[tuple[str, str], ...] = ()
    parts: int = 1
    rows: int = 0
    over: tuple[str, ...] = ()
    batched: int = 0
    unbatched: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        text = f"{self.name} ({self.why})"
        if self.unrolled:
            text += "; unrolled over r: " + ", ".join(op for op, _ in self.unrolled)
        if self.parts > 1:
            text += f"; Jacobians in {self.parts} parts of the indices"
        if self.rows:
            text += f"; {self.rows} row(s) of a Jacobian at a time"
        if self.over:
            text += "; more memory than jacobian_bytes: " + "; ".join(self.over)
        if self.unbatched:
            text += "; not batched over regions: " + ", ".join(op for op, _ in self.unbatched)
        return text


def check_request(request: str) -> str:
    """Return ``request`` if it names an engine or ``"auto"``.

    Raises:
        OptionError: It does not.
    """
    if request not in REQUESTS:
        raise OptionError(
            f"backward={request!r}", expected=f"one of {', '.join(REQUESTS)}", do="pass one of these engines"
        )
    return request


def choose(request: str, *, boundaries: int) -> Engine:
    """Settle which engine runs a model with this many latents between regions, as far as it is settled beforehand.

    ``auto`` is autograd where there is no Jacobian to form, and else a matter of cost: see ``lbi_compile.auto``.

    Args:
        request: ``"auto"`` or the name of an engine.
        boundaries: Latents that cross.
    """
    if request == AUTO:
        if boundaries == 0:
            return Engine(AUTOGRAD, "auto: nothing crosses between regions")
        if boundaries == 1:
            return Engine(AUTOGRAD, "auto: one latent crosses, so there is no Jacobian and nothing to scan")
        return Engine(AUTO, "at the first training steps, by the cost model, and by their time where that is close")
    if request == SCAN and boundaries < 2:
        return Engine(SCAN, f"asked for; {boundaries} latent(s) cross, so there is no Jacobian and nothing to scan")
    return Engine(request, "asked for")


def _refuse_double_backward(grad: Tensor) -> None:
    """Hook on the outputs of the scan, whose backward is compiled for first derivatives."""
    if torch.is_grad_enabled():
        raise DoubleBackwardError(
            "create_graph=True through the scan backward",
            expected="first derivatives only",
            do='use bounded.with_engine("autograd") for gradients of gradients',
        )


def once(value: Any) -> Any:
    """Let an output of the scan be differentiated once: a second time raises :class:`DoubleBackwardError`."""
    # a leaf here is a parameter the model returns, which belongs to others too
    if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
        value.register_hook(_refuse_double_backward)
    return value
