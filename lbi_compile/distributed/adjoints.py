"""Adjoints of the latents between ranks by a scan: every rank solves for all of them from one all_gather.

With `m_j` the latent that enters rank j, `J_j = d m_{j+1} / d m_j` over the regions of rank j, and `b_j` what reaches
`m_j` through rank j's own part of the readout, the adjoints obey ``lambda_j = J_j^T lambda_{j+1} + b_j``. Rank j:

1. forward: runs its regions, sends `m_{j+1}` on, and computes `J_j` from the recorded graph while others still run
   theirs (R cotangents at once; nothing waits for it before the backward);
2. backward: gets the readout's cotangent, pulls it back to `b_j` through activations only;
3. gathers all J and b, and runs the suffix scan, like every rank;
4. runs its backward once, with the readout's cotangent and `lambda_{j+1}`: gradients of its own parameters, and its
   part of the canvas's cotangent. No rank waits for another's backward.

The last rank has no J: its b is the seed of the scan. The first rank needs no b, for nobody sent it a latent. (Its J is
needed for `lambda_0` only, which its own backward computes anyway; it has nothing else to do at that time.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..kernels import ops
from . import links
from .ranks import Ranks

if TYPE_CHECKING:
    from .call import Call


def jacobian(after: Tensor, before: Tensor) -> Tensor:
    """Interface Jacobian of recorded regions that keep samples apart: `[B, R, R]` from latents `[B, R]`.

    Args:
        after: What came out.
        before: What went in.

    Example:
        >>> before = torch.ones(2, 3, requires_grad=True)
        >>> jacobian(before * 2, before)[0].diagonal().tolist()
        [2.0, 2.0, 2.0]
    """
    B, R = after.shape
    if not (after.requires_grad and before.requires_grad):
        return after.new_zeros(B, R, R)
    rows = torch.eye(R, dtype=after.dtype, device=after.device)[:, None].expand(R, B, R)
    (found,) = torch.autograd.grad(after, before, rows, retain_graph=True, is_grads_batched=True, allow_unused=True)
    return after.new_zeros(B, R, R) if found is None else found.transpose(0, 1)


class _Segment:
    """One rank's recorded regions.

    Attributes:
        ranks: The region dimension.
        before: `m_j`.
        after: `m_{j+1}`; ``None`` on the last rank.
        part: Its part of the readout; ``None`` where it has none.
        J: `[B, R, R]`; ``None`` on the last rank.
    """

    def __init__(self, ranks: Ranks, before: Tensor, after: Tensor | None, part: Tensor | None) -> None:
        self.ranks, self.before, self.after, self.part = ranks, before, after, part
        self.J: Tensor | None = None

    def pull_back(self, grad: Tensor | None) -> Tensor | None:
        """`b_j`: the readout's cotangent at `m_j` by way of this rank's own part; ``None`` where it is of no use."""
        if self.ranks.first or grad is None or self.part is None or not self.before.requires_grad:
            return None
        (b,) = torch.autograd.grad(self.part, self.before, grad, retain_graph=True, allow_unused=True)
        return b

    def adjoint(self, grad: Tensor | None) -> Tensor:
        """`lambda_{j+1}`, from the scan over all ranks."""
        B, R = self.before.shape
        b, zero = self.pull_back(grad), self.before.new_zeros(())
        mine: list[tuple[str, Tensor | None, tuple[int, ...]]] = [("seed" if self.ranks.last else "b", b, (B, R))]
        if self.ranks.size > 2:  # between two ranks the seed is the adjoint
            mine.append(("J", self.J, (B, R, R)))
        sizes: dict[str, int] = {}
        block = []
        for what, value, shape in mine:
            block.append((zero.expand(shape) if value is None else value).reshape(B, -1))
            kind = "padding" if value is None else what
            sizes[kind] = sizes.get(kind, 0) + block[-1].numel() * zero.element_size()
        every = self.ranks.all_gather(torch.cat(block, 1), "J and b", parts=sizes)  # [N, B, R + R R]
        b = every[..., :R]
        if self.ranks.size == 2:
            return b[-1]
        adjoints = ops.suffix_scan(every[:-1, :, R:].unflatten(-1, (R, R)), b[-1], b[:-1])  # [N, B, R]
        return adjoints[min(self.ranks.rank + 1, self.ranks.size - 1)]


class _Solve(Function):
    """Forward: the readout. Backward: identity on the own part, and the adjoint of the latent that was sent."""

    @staticmethod
    def forward(
        ctx: Any, segment: _Segment, finish: Any, thread: Tensor, part: Tensor | None, after: Tensor | None
    ) -> Tensor:
        ctx.segment = segment
        return finish()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        links.refuse_double_backward()
        segment = ctx.segment
        own = grad if segment.part is not None else None
        adjoint = segment.adjoint(own)
        return None, None, grad.new_zeros(()), own, None if segment.after is None else adjoint


def solve(
    call: Call, before: Tensor, after: Tensor | None, part: Tensor | None, *, known: bool = False
) -> Tensor | None:
    """Read out what all ranks give, with a backward that solves the adjoints by a scan.

    Args:
        call: The call.
        before: The latent that entered this rank's regions.
        after: The latent that leaves them, to be sent; ``None`` on the last rank.
        part: What this rank gives to the readout; ``None`` where that is nothing.
        known: The next rank knows the latent already.

    Returns:
        What the head reads; ``None`` where this rank has no head. Then the call's thread solves the adjoints.
    """
    ranks, summed = call.ranks, call.model.plan.readout == "sum"
    segment = _Segment(ranks, before, after, part)
    if after is not None and not known:
        ranks.send(after.detach(), ranks.rank + 1, "latent")
    if call.head_on_last:
        if after is not None and ranks.size > 2:
            segment.J = jacobian(after, before)
        own = before.new_zeros(()) if part is None else part.detach()
        total = _Solve.apply(segment, lambda: own, call.thread, part, after)
        if part is None:
            call.thread, total = total, None
        return total
    if summed:
        assert part is not None
        waiting = ranks.start_all_reduce(part.detach(), "readout")
    else:
        value = torch.empty_like(call.canvas) if part is None else part.detach()
        waiting = ranks.start_broadcast(value, ranks.size - 1, "readout")
    if after is not None and ranks.size > 2:
        segment.J = jacobian(after, before)
    total = _Solve.apply(segment, waiting, call.thread, part, after)
    return call.values[call.program.canvas] + total if summed else total
