"""What ``verify`` found: a frozen record that prints as a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ablation import Ablation
    from .diagnostics import JacobianNorms


@dataclass(frozen=True, slots=True)
class Check:
    """One check of ``verify``.

    Attributes:
        name: What was looked at, for example ``"gradients"``.
        ok: Whether it held; ``None`` where it does not apply to this model.
        detail: What was measured, or why it does not apply.
    """

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """What ``verify`` found about a bounded model.

    Attributes:
        ok: Every check that applies held.
        max_rel_error: Largest relative gradient error over all parameters and inputs, in float64.
        tolerance: Largest error that passes.
        engine: Engine whose gradients were compared with plain autograd.
        worst: Name and relative error of the five worst gradients, worst first.
        leak: An output position depends on later input positions where the original does not; ``None`` where the model
            has no position axis.
        batch_independent: No sample of a batch changes another one's latents; ``None`` where no Jacobian asks for it.
        lanes: Each boundary and the number of tensors that cross it in the original model.
        jacobian_norms: Spectral norm of each ``J_k`` in the order of ``k``, the largest over its independent indices.
        product_norms: Spectral norm of the running product as adjoints meet it: first the last ``J_k`` alone, last the
            product of all.
        checks: Everything that was looked at.
        first_boundary: ``k`` of the first entry of the norms: 1 for the token interface, which has no ``m_0``, else 0.
        more_norms: The same of the latent per position where it crosses beside one of chunks.
        ablations: What spoiled latents change, where that was asked for.
    """

    ok: bool
    max_rel_error: float
    tolerance: float
    engine: str
    worst: tuple[tuple[str, float], ...]
    leak: bool | None
    batch_independent: bool | None
    lanes: tuple[tuple[str, int], ...]
    jacobian_norms: tuple[float, ...]
    product_norms: tuple[float, ...]
    checks: tuple[Check, ...]
    first_boundary: int = 0
    more_norms: tuple[JacobianNorms, ...] = ()
    ablations: tuple[Ablation, ...] = ()

    def __str__(self) -> str:
        # Rendering is rich's, which a program that only reads `.ok` need not import.
        from .render.report import page

        return page(self)
