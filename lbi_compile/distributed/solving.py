"""``forward="parallel"`` on ranks: all latents are solved for at once, each rank evaluating its own regions.

An iteration of ``newton.solve`` needs the values `F_{k+1} = f_k(g_k)` of all regions at a guess of the latents, and
their Jacobians. Every rank runs its regions at the guess, none waiting for another, and computes their Jacobians from
the recorded graphs; one all_gather gives all ranks all of them, and the scan over the corrections, the test whether
to go on and the next guess are computed alike on every rank. Beforehand the first rank tells whether the inputs are
those of the call before, whose latents are then the guess, and else broadcasts the first latent, its own to compute,
which the guess starts from.

    bytes of an iteration, all of it together: n q B (R + R^2) e,  q = the most regions of a rank,

of which `(K - 1) B R e` are latents, `(K - 2) B R^2 e` Jacobians and the rest padding (Jacobi's iterations need no
Jacobians, nor do two regions: `n q B R e`).

Then the ranks run their regions once more at the latents found, side by side, and the backward is that of a sequential
forward. Ranks take every decision from the same numbers by the same arithmetic: they have to be machines of one kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..credit.site import written
from ..guesses import Memory
from ..newton import JACOBI, SEQUENTIAL, Solve, default_tolerance, solve
from . import links
from .adjoints import jacobian
from .call import Call

LATENT, JACOBIAN, SAME = "latent", "J", "same inputs"


class Request(NamedTuple):
    """What forward is asked for.

    Attributes:
        method: ``"sequential"``, ``"parallel"``, ``"quasi-newton"`` or ``"jacobi"``.
        tol: Residual that counts as converged; ``None`` for the default.
        max_iters: Most iterations; ``None`` for as many as it takes.
    """

    method: str = SEQUENTIAL
    tol: float | None = None
    max_iters: int | None = None


class Latents:
    """Solves for the latents of the calls of one region-parallel model.

    Args:
        request: What is asked for.

    Attributes:
        record: How the latents of the last call were found.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.record = Solve(SEQUENTIAL, "the model has not been called yet")
        self._memory = Memory()

    def __call__(self, call: Call, like: Tensor) -> Tensor | None:
        """All latents that cross a boundary, the same on every rank.

        Args:
            call: The call, whose stem has run.
            like: A tensor of the shape and dtype of a latent.

        Returns:
            `[K - 1, B, R]`; ``None`` where ranks are to run one after another.
        """
        latents, learns = call.model.plan.regions[1:], torch.is_grad_enabled()
        if self.request.method == SEQUENTIAL or not latents:
            self.record = Solve(SEQUENTIAL, "asked for" if latents else "one region: there is nothing to solve for")
            return None
        with torch.inference_mode(False), torch.no_grad():
            at = _Evaluation(call, like, jacobians=self.request.method != JACOBI and len(latents) > 1)
            guess = self._memory.guess(call.leaves, at.first, len(latents), agree=at.agree)
            tol = self.request.tol or default_tolerance(guess.dtype, len(latents) + 1)
            found, self.record = solve(at, guess, method=self.request.method, tol=tol, max_iters=self.request.max_iters)
        if found is not None and learns:
            self._memory.keep(call.leaves, found)
        return found


class _Evaluation:
    """Values and Jacobians of all regions at a guess.

    Args:
        call: The call.
        like: A tensor of the shape and dtype of a latent.
        jacobians: Compute them.
    """

    def __init__(self, call: Call, like: Tensor, *, jacobians: bool) -> None:
        self.call, self.like, self.jacobians = call, like, jacobians
        model, last = call.model, len(call.model.plan.regions) - 1
        self.shares = links.Shares(
            [sum(k < last for k in model.placement.regions(rank)) for rank in range(call.ranks.size)]
        )
        self.own = [k for k in model.own if k < last]
        # what regions read, cut off from what taught it
        self.values: dict[str, Any] = {name: _plain(value) for name, value in call.regional.items()}
        self.canvas = self.values[call.program.canvas]

    def agree(self, same: bool) -> bool:
        """What the first rank says."""
        ranks = self.call.ranks
        if ranks.size == 1:
            return same
        return bool(ranks.broadcast(torch.tensor([same], dtype=torch.uint8, device=self.canvas.device), 0, SAME))

    def first(self) -> tuple[Tensor, Tensor]:
        """The latent `m_1`, which the first rank computes, and the canvas."""
        ranks = self.call.ranks
        value = self._region(0, None) if ranks.first else torch.empty_like(self.like)
        if ranks.size > 1:
            value = ranks.broadcast(value.to(self.like.dtype), 0, LATENT)
        return value, self.call.model.interface.fold(self.canvas)

    def __call__(self, guess: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[K - 1, B, R]` and `[K - 2, B, R, R]` at a guess `[K - 1, B, R]`; one all_gather."""
        found = []
        for k in self.own:
            before = guess[k - 1].detach().requires_grad_(self.jacobians) if k else None
            with torch.set_grad_enabled(self.jacobians and k > 0):
                after = self._region(k, before).to(guess.dtype)
            blocks = [after.detach()]
            if self.jacobians:
                J = guess.new_zeros(*after.shape, after.shape[-1]) if before is None else jacobian(after, before)
                blocks.append(J.flatten(-2))
            found.append(torch.cat(blocks, -1))
        B, R = guess.shape[1:]
        like = guess.new_zeros(B, R + (R * R if self.jacobians else 0))
        every = torch.stack(self._gather(found, like))
        return every[..., :R], every[1:, :, R:].unflatten(-1, (R, R)) if self.jacobians else None

    def _gather(self, found: list[Tensor], like: Tensor) -> list[Tensor]:
        each = like.shape[0] * self.like.shape[-1] * like.element_size()
        parts = {LATENT: len(found) * each}
        if self.jacobians:
            parts[JACOBIAN] = sum(k > 0 for k in self.own) * each * self.like.shape[-1]
        return self.shares.gather(self.call.ranks, found, like, LATENT, parts=parts)

    def _region(self, k: int, m: Tensor | None) -> Tensor:
        """What region ``k`` says to the next one; random numbers and buffers are then as before."""
        call = self.call
        if m is None:
            m = call.model.interface.initial(call.model.interface.fold(self.canvas))
        pieces = call.program.regions[k]
        with _unwritten(call, k), call.draws.kept(), call.region(k):
            after, _, _ = call.model.regions[k](self.canvas, m, dict(self.values), pieces)
        return after


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.is_inference() else value.detach()


@contextlib.contextmanager
def _unwritten(call: Call, k: int) -> Iterator[None]:
    """Inside, region ``k`` may write to buffers; afterwards they are as before."""
    pieces = call.program.regions[k].body, call.program.regions[k].finish
    owners = [own for piece in pieces if piece is not None for own in written(piece)]
    before = [(getattr(owner, name), getattr(owner, name).clone()) for owner, name in owners]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
