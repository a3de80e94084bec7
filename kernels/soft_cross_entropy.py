"""Triton form of the soft-label cross entropy: one sweep over the classes forward, one backward, no softmax kept.

Importing this file needs Triton. The oracle is :mod:`lbi_compile.kernels.soft_cross_entropy_reference`, which has the
same signature.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from lbi_compile.errors import DoubleBackwardError

# Classes per step: wide enough to hide a load, and 16 numbers a thread at eight warps.
_MAX_BLOCK = 4096


@triton.jit
def forward_kernel(
    logits,  # [N, C]
    prior,  # [N, C]
    index,  # [N]
    loss,  # [N]
    lse,  # [N], log of the sum of exponentials
    mass,  # [N], sum of the target
    C,
    logits_row,
    logits_class,
    prior_row,
    prior_class,
    hard,
    flat,
    soft,
    HAS_PRIOR: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: the running maximum, sum of exponentials and product with the target, all relative to the maximum."""
    exact = tl.float64 if loss.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0).to(tl.int64)  # N * C passes 2^31 at training sizes
    wanted = -1
    if HAS_INDEX:
        wanted = tl.load(index + n)
    top = tl.full((), float("-inf"), exact)
    total = tl.full((), 0.0, exact)
    product = tl.full((), 0.0, exact)
    weight = tl.full((), 0.0, exact)
    entropy = tl.full((), 0.0, exact)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        live = c < C
        z = tl.load(logits + n * logits_row + c.to(tl.int64) * logits_class, mask=live, other=float("-inf")).to(exact)
        above = tl.maximum(top, tl.max(z, 0))
        base = tl.where(above == float("-inf"), 0.0, above)
        shift = tl.where(top == float("-inf"), 0.0, top - base)
        t = tl.where(c == wanted, hard, 0.0).to(exact) + flat
        if HAS_PRIOR:
            q = tl.load(prior + n * prior_row + c.to(tl.int64) * prior_class, mask=live, other=0.0).to(exact)
            t += soft * q
            entropy += tl.sum(tl.where(q > 0, q * tl.log(tl.where(q > 0, q, 1.0)), 0.0), 0)
        t = tl.where(live, t, 0.0)
        total = total * tl.where(top == float("-inf"), 0.0, tl.exp(shift)) + tl.sum(tl.exp(z - base), 0)
        # relative to the maximum nothing cancels; a class without a target may have a logit of minus infinity
        product = product + shift * weight + tl.sum(tl.where(t > 0, t * (z - base), 0.0), 0)
        weight += tl.sum(t, 0)
        top = above
    row = weight * tl.log(total) - product
    if HAS_PRIOR:
        row += soft * entropy
    if HAS_INDEX:
        row = tl.where(wanted >= C, float("nan"), row)  # no such class: loud, as an assertion on the device would be
        row = tl.where(wanted < 0, 0.0, row)
    tl.store(loss + n, row)
    tl.store(lse + n, top + tl.log(total))
    tl.store(mass + n, weight)


@triton.jit
def backward_kernel(
    grad,  # [N]
    logits,  # [N, C]
    prior,  # [N, C]
    index,  # [N]
    lse,  # [N]
    mass,  # [N]
    out,  # [N, C], contiguous
    C,
    grad_row,
    logits_row,
    logits_class,
    prior_row,
    prior_class,
    hard,
    flat,
    soft,
    HAS_PRIOR: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of classes of one row: ``grad * (mass * softmax - target)``."""
    exact = tl.float64 if lse.dtype.element_ty == tl.float64 else tl.float32
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = c < C
    g = tl.load(grad + n * grad_row).to(exact)
    wanted = -1
    if HAS_INDEX:
        wanted = tl.load(index + n)
        g = tl.where(wanted < 0, 0.0, g)
    z = tl.load(logits + n * logits_row + c.to(tl.int64) * logits_class, mask=live, other=float("-inf")).to(exact)
    t = tl.where(c == wanted, hard, 0.0).to(exact) + flat
    if HAS_PRIOR:
        t += soft * tl.load(prior + n * prior_row + c.to(tl.int64) * prior_class, mask=live, other=0.0).to(exact)
    value = g * (tl.load(mass + n) * tl.exp(z - tl.load(lse + n)) - t)
    value = tl.where(g == 0, 0.0, value)  # what is not counted stays out, whatever its logits are
    tl.store(out + n * C + c, value.to(out.dtype.element_ty), mask=live)


def soft_cross_entropy(
    logits: Tensor,
    *,
    prior: Tensor | None = None,
    index: Tensor | None = None,
    hard: float = 0.0,
    flat: float = 0.0,
    soft: float = 0.0,
) -> Tensor:
    """Row losses on the device; see :func:`lbi_compile.kernels.soft_cross_entropy_reference.soft_cross_entropy`.

    Args:
        logits: ``[N, C]``, any strides.
        prior: ``[N, C]`` probabilities, taken as constant; ``None`` for none.
        index: ``[N]`` classes; a row of a negative class has loss and gradient zero, one of C or above is no number.
        hard: Weight of the class.
        flat: Weight of every class.
        soft: Weight of the prior.

    Returns:
        ``[N]``, float64 for float64 logits, else float32. It can be differentiated once.

    Raises:
        DoubleBackwardError: From the backward, where a gradient is differentiated again.
    """
    prior = None if prior is None or not soft else prior.detach()
    return _SoftCrossEntropy.apply(logits, prior, index, hard, flat, soft)


class _SoftCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, prior: Tensor | None, index: Tensor | None, hard: float, flat: float, soft: float
    ) -> Tensor:
        N, C = logits.shape
        exact = logits.dtype if logits.dtype == torch.float64 else torch.float32
        loss, lse, mass = (torch.empty(N, dtype=exact, device=logits.device) for _ in range(3))
        ctx.scales, ctx.block = (hard, flat, soft), min(_MAX_BLOCK, 1 << (C - 1).bit_length())
        if N:
            forward_kernel[(N,)](
                logits,
                logits if prior is None else prior,
                logits if index is None else index,
                loss,
                lse,
                mass,
                C,
                *logits.stride(),
                *((0, 0) if prior is None else prior.stride()),
                *ctx.scales,
                HAS_PRIOR=prior is not None,
                HAS_INDEX=index is not None,
                BLOCK=ctx.block,
                num_warps=_warps(ctx.block),  # pyright: ignore[reportCallIssue]  an option of Triton's launcher
            )
        ctx.save_for_backward(logits, prior, index, lse, mass)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                "the gradient of a gradient of the fused cross entropy",
                expected="first derivatives only",
                do="drop create_graph=True, or use the form in kernels/soft_cross_entropy_reference.py",
            )
        logits, prior, index, lse, mass = ctx.saved_tensors
        N, C = logits.shape
        out = torch.empty((N, C), dtype=logits.dtype, device=logits.device)
        if N:
            backward_kernel[(N, triton.cdiv(C, ctx.block))](
                grad,
                logits,
                logits if prior is None else prior,
                logits if index is None else index,
                lse,
                mass,
                out,
                C,
                *grad.stride(),
                *logits.stride(),
                *((0, 0) if prior is None else prior.stride()),
                *ctx.scales,
                HAS_PRIOR=prior is not None,
                HAS_INDEX=index is not None,
                BLOCK=ctx.block,
                num_warps=_warps(ctx.block),  # pyright: ignore[reportCallIssue]
            )
        return out, None, None, None, None, None


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))
