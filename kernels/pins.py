"""Operators of the parallel forward: a latent replaced by its solved value, and the place of an interface Jacobian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lbi_compile._torch import below_autograd, functorch_active
from lbi_compile.errors import EngineError, ScanShapeError

_library = torch.library.Library("lbi", "FRAGMENT")
_library.define("pinned(Tensor m, Tensor value) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "jacobian(Tensor after, Tensor before, int k, int chain) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)

_pinned_op = torch.ops.lbi.pinned.default
_jacobian_op = torch.ops.lbi.jacobian.default


def pinned(m: Tensor, value: Tensor) -> Tensor:
    """``value`` in place of ``m``, with the gradient of ``m``: what reads it no longer waits for ``m``.

    Where ``value`` is what ``m`` comes out as, this is the identity and so are its derivatives. In a compiled graph
    the forward no longer depends on ``m`` (:func:`lbi_compile.passes.scan_backward.erase_markers`).

    Args:
        m: ``[..., R]``, the latent as computed. Its gradient is the cotangent of the result.
        value: ``[..., R]``, the value that was solved for beforehand. It gets no gradient.

    Returns:
        ``[..., R]``, a copy of ``value`` in the dtype of ``m``.

    Raises:
        ScanShapeError: The two differ in shape or device.

    Example:
        >>> m = torch.zeros(1, 2, requires_grad=True)
        >>> pinned(m, torch.ones(1, 2)).sum().backward()
        >>> m.grad.tolist()
        [[1.0, 1.0]]
    """
    return _pinned_op(m, value)


def jacobian(after: Tensor, before: Tensor, k: int, chain: int) -> Tensor:
    """Where a compiled graph is to put ``d after / d before`` of region ``k``; it has no value by itself.

    Args:
        after: ``[..., R]``, marked by ``boundary(after, 2 * k + 1, chain)``.
        before: ``[..., R]``, marked by ``boundary(before, 2 * k, chain)``.
        k: Number of the region.
        chain: Tells calls of bounded models apart.

    Returns:
        ``[..., R, R]``, for every leading index.

    Raises:
        EngineError: It runs, so no compiler has filled it in
            (:func:`lbi_compile.passes.forward_jacobians.forward_jacobians`).

    Example:
        >>> torch.ops.lbi.jacobian(torch.ones(3, 2, device="meta"), torch.ones(3, 2, device="meta"), 0, 0).shape
        torch.Size([3, 2, 2])
    """
    return _jacobian_op(after.detach(), before.detach(), k, chain)


def _check(m: Tensor, value: Tensor) -> None:
    if m.dim() != value.dim() or any(a != b for a, b in zip(m.shape, value.shape, strict=True)):
        raise ScanShapeError(
            f"a latent of shape {list(m.shape)} and a value of shape {list(value.shape)} for it",
            expected="one shape",
            do="solve for the latents of these very inputs",
        )
    if m.device != value.device:
        raise ScanShapeError(
            f"a latent on {m.device} and a value for it on {value.device}",
            expected="one device",
            do="solve where the model runs",
        )


def _value(m: Tensor, value: Tensor) -> Tensor:
    _check(m, value)
    return value.to(m.dtype, copy=True, memory_format=torch.contiguous_format)


def _plain(m: Tensor, value: Tensor) -> Tensor:
    """The same in operators that every transform of ``torch.func`` knows."""
    _check(m, value)
    return torch.where(torch.isfinite(m), m - m.detach(), m.new_zeros(())) + value.to(m.dtype)


class _Pinned(Function):
    @staticmethod
    def forward(ctx: Any, m: Tensor, value: Tensor) -> Tensor:
        with below_autograd():
            return _pinned_op(m, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def jvp(ctx: Any, m: Tensor, value: None) -> Tensor:
        return m.clone()


def _pinned_autograd(m: Tensor, value: Tensor) -> Tensor:
    return _plain(m, value) if functorch_active() else _Pinned.apply(m, value)


def _unfilled(after: Tensor, before: Tensor, k: int, chain: int) -> Tensor:
    raise EngineError(
        f"the place of the Jacobian of region {k}, which no pass has filled in",
        expected="this operator in graphs that forward_jacobians rewrites, and nowhere else",
        do="evaluate regions by lbi_compile's own backend",
    )


def _jacobian_fake(after: Tensor, before: Tensor, k: int, chain: int) -> Tensor:
    return after.new_empty((*after.shape, after.shape[-1]))


_library.impl("pinned", _value, "CompositeExplicitAutograd")
_library.impl("pinned", _pinned_autograd, "Autograd")
torch.library.register_fake(_pinned_op, _value, lib=_library)
_library.impl("jacobian", _unfilled, "CompositeExplicitAutograd")
torch.library.register_fake(_jacobian_op, _jacobian_fake, lib=_library)
