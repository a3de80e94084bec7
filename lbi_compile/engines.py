"""Engines: how the adjoints of a bounded model are solved. All give the same gradients."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import OptionError

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
        batched: Operators that run once for several regions.
    """

    name: str
    why: str
    jacobians: int = 0
    unrolled: tuple[tuple[str, str], ...] = ()
    batched: int = 0

    def __str__(self) -> str:
        text = f"{self.name} ({self.why})"
        if self.unrolled:
            text += "; unrolled over r: " + ", ".join(op for op, _ in self.unrolled)
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
