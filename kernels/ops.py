"""The operators of the bounded backward, registered under ``torch.ops.lbi`` when this file is imported.

``suffix_scan`` and ``prefix_scan`` choose a kernel by device: Triton for CUDA, numpy or torch for the CPU (forms.py),
torch elsewhere. ``suffix_products`` and ``prefix_products`` are plain operators (products.py). ``boundary`` and
``boundary_bwd`` are identities that leave a trace in a joint graph. All have fake, autograd and vmap rules.

They are registered with :class:`torch.library.Library` and an autograd kernel of their own, not with ``custom_op`` or
``register_autograd``: markers run in every eager training step, and this is the cheapest of the three (README.md).
Under a ``torch.func`` transform each becomes the plain operators it stands for, which every transform knows.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from lbi_compile._torch import below_autograd, functorch_active, no_autocast
from lbi_compile.errors import DoubleBackwardError, ScanShapeError
from lbi_compile.kernels import cpu_scan, forms, products, reference

_library = torch.library.Library("lbi", "FRAGMENT")
for _schema in ("suffix_scan(Tensor J, Tensor last, Tensor? b)", "prefix_scan(Tensor J, Tensor first, Tensor? b)"):
    # Strides are arguments of the kernels, so Inductor need not copy an input into any order.
    _library.define(f"{_schema} -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
for _schema in ("suffix_products(Tensor J)", "prefix_products(Tensor J)"):
    _library.define(f"{_schema} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
for _schema in ("boundary(Tensor m, int k, int chain)", "boundary_bwd(Tensor g, int k, int chain)"):
    # The output has the strides of the input: what Inductor feeds it has to be what was traced.
    _library.define(f"{_schema} -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

_suffix_op = torch.ops.lbi.suffix_scan.default
_prefix_op = torch.ops.lbi.prefix_scan.default
_boundary_op = torch.ops.lbi.boundary.default
_boundary_bwd_op = torch.ops.lbi.boundary_bwd.default


def suffix_scan(J: Tensor, last: Tensor, b: Tensor | None = None) -> Tensor:
    """Solve the adjoint recursion ``lam[K] = last``, ``lam[k] = J[k]^T lam[k + 1] + b[k]``.

    Differentiable any number of times, exactly: its derivative is a :func:`prefix_scan`.

    Args:
        J: ``[K, N, R, R]``, ``J[k, n, i, j] = d m_{k+1,i} / d m_{k,j}`` of index n. Any strides; a J that is the same
            for every index may be expanded over N and is not copied.
        last: ``[N, R]``, the adjoint of the last latent; or ``[N, S, R]``, S of them that share each J.
        b: ``[K, *last.shape]``, what reaches ``m_k`` by other ways; ``None`` for nothing.

    Returns:
        ``[K + 1, *last.shape]``, contiguous. float64 accumulates in float64, every other dtype in float32.

    Raises:
        ScanShapeError: The tensors do not fit together in shape, dtype or device.

    Example:
        >>> J, last = torch.full((2, 1, 1, 1), 3.0), torch.ones(1, 1)
        >>> suffix_scan(J, last).flatten().tolist()
        [9.0, 3.0, 1.0]

    Source: chain rule over the latents; kernels/README.md.
    """
    return _suffix_op(J, last, b)


def prefix_scan(J: Tensor, first: Tensor, b: Tensor | None = None) -> Tensor:
    """Run the linear recurrence ``m[0] = first``, ``m[k + 1] = J[k] m[k] + b[k]``; transpose of :func:`suffix_scan`.

    Args:
        J: ``[K, N, R, R]``, any strides.
        first: ``[N, R]`` or ``[N, S, R]``.
        b: ``[K, *first.shape]`` or ``None``.

    Returns:
        ``[K + 1, *first.shape]``, contiguous. float64 accumulates in float64, every other dtype in float32.

    Raises:
        ScanShapeError: The tensors do not fit together in shape, dtype or device.

    Example:
        >>> J, first = torch.full((2, 1, 1, 1), 3.0), torch.ones(1, 1)
        >>> prefix_scan(J, first).flatten().tolist()
        [1.0, 3.0, 9.0]

    Source: kernels/README.md.
    """
    return _prefix_op(J, first, b)


def suffix_products(J: Tensor) -> Tensor:
    """All products ``P[K] = I``, ``P[k] = J[K - 1] ... J[k]``; ``P[k] = d m_K / d m_k``.

    They over- or underflow where the true products leave the range of the dtype, and nowhere else.

    Args:
        J: ``[K, N, R, R]``, any strides.

    Returns:
        ``[K + 1, N, R, R]``. float64 accumulates in float64, every other dtype in float32.

    Raises:
        ScanShapeError: ``J`` has another shape or no floating dtype.

    Example:
        >>> suffix_products(torch.full((2, 1, 1, 1), 3.0)).flatten().tolist()
        [9.0, 3.0, 1.0]

    Source: kernels/README.md.
    """
    return torch.ops.lbi.suffix_products(J)


def prefix_products(J: Tensor) -> Tensor:
    """All products ``Q[0] = I``, ``Q[k] = J[k - 1] ... J[0]``; ``Q[k] = d m_k / d m_0``.

    Args:
        J: ``[K, N, R, R]``, any strides.

    Returns:
        ``[K + 1, N, R, R]``. float64 accumulates in float64, every other dtype in float32.

    Raises:
        ScanShapeError: ``J`` has another shape or no floating dtype.

    Example:
        >>> prefix_products(torch.full((2, 1, 1, 1), 3.0)).flatten().tolist()
        [1.0, 3.0, 9.0]

    Source: kernels/README.md.
    """
    return torch.ops.lbi.prefix_products(J)


def boundary(m: Tensor, k: int, chain: int) -> Tensor:
    """Mark a latent where it crosses a boundary; a copy of ``m`` that a joint graph shows, and its gradient too.

    Args:
        m: ``[..., R]``, the latent; every leading axis counts independent indices.
        k: Number of the boundary.
        chain: Tells bounded models in one graph apart.

    Returns:
        ``[..., R]``, equal to ``m``, with its strides where it is dense.

    Raises:
        DoubleBackwardError: From the backward, where a gradient is differentiated again.

    Example:
        >>> boundary(torch.ones(2, 3), 1, 0).sum().item()
        6.0
    """
    return _boundary_op(m, k, chain)


def _check(name: str, J: Tensor, end: Tensor, b: Tensor | None) -> None:
    good = (
        J.dim() == 4
        and end.dim() in (2, 3)
        and J.shape[2] == J.shape[3] == end.shape[-1] >= 1
        and J.shape[1] == end.shape[0]
        and J.dtype.is_floating_point
        and end.dtype == J.dtype
        and end.device == J.device
    )
    if good and b is not None:
        good = b.shape == (J.shape[0], *end.shape) and b.dtype == J.dtype and b.device == J.device
    if not good:
        raise ScanShapeError(
            f"J {_show(J)}, {name} {_show(end)}, b {_show(b)}",
            expected=f"J [K, N, R, R], {name} [N, R] or [N, S, R], b [K, *{name}.shape] or None; R >= 1, one"
            " floating dtype, one device",
            do="give one Jacobian per pair of neighbouring boundaries and per index, and cast all tensors to one dtype",
        )


def _show(x: Tensor | None) -> str:
    return "None" if x is None else f"{list(x.shape)} {x.dtype} on {x.device}"


@functools.cache
def _triton_form() -> types.ModuleType | None:
    try:
        from lbi_compile.kernels import suffix_scan as form
    except ImportError as error:
        warnings.warn(
            f"a scan got CUDA tensors, but triton cannot be imported ({type(error).__name__}: {error}). It runs as"
            " plain torch operators instead: as exact, but K launches instead of one. Install the triton that belongs"
            f" to torch {torch.__version__}.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return form


def _plain(name: str, end_name: str) -> Callable[..., Tensor]:
    scan = getattr(reference, name)

    def kernel(J: Tensor, end: Tensor, b: Tensor | None) -> Tensor:
        _check(end_name, J, end, b)
        return scan(J, end, b)

    return kernel


def _on_cpu(name: str, end_name: str) -> Callable[..., Tensor]:
    scans = {"numpy": getattr(cpu_scan, name), "torch": getattr(reference, name)}

    def kernel(J: Tensor, end: Tensor, b: Tensor | None) -> Tensor:
        _check(end_name, J, end, b)
        K, N, R, _ = J.shape
        vectors = end.shape[1] if end.dim() == 3 else 1
        return scans[forms.choose(K, N, R, dtype=J.dtype, device="cpu", vectors=vectors).name](J, end, b)

    return kernel


def _on_cuda(name: str, end_name: str) -> Callable[..., Tensor]:
    plain = _plain(name, end_name)

    def kernel(J: Tensor, end: Tensor, b: Tensor | None) -> Tensor:
        form = _triton_form()
        if form is None:
            return plain(J, end, b)
        _check(end_name, J, end, b)
        with torch.cuda.device(J.device):  # Triton launches on the current device
            return getattr(form, name)(J, end, b)

    return kernel


def _fake(end_name: str) -> Callable[..., Tensor]:
    def kernel(J: Tensor, end: Tensor, b: Tensor | None) -> Tensor:
        _check(end_name, J, end, b)
        return end.new_empty((J.shape[0] + 1, *end.shape))

    return kernel


def _scan_vmap(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    def rule(
        info: Any, in_dims: tuple[int | None, ...], J: Tensor, end: Tensor, b: Tensor | None
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        shared = in_dims[0] is None  # the vmapped axis joins the vectors that share a Jacobian, which is not copied
        many = end.dim() - (in_dims[1] is not None) == 3

        def fold(x: Tensor, dim: int | None, axis: int) -> Tensor:
            """Make the vmapped axis the outer part of the axis at ``axis``."""
            if dim is None:
                x = x.unsqueeze(axis)
                x = x.expand(*x.shape[:axis], size, *x.shape[axis + 1 :])
            else:
                x = x.movedim(dim, axis)
            return x if shared and not many else x.flatten(axis, axis + 1)

        out = op(
            J if shared else fold(J, in_dims[0], 1),
            fold(end, in_dims[1], int(shared)),
            None if b is None else fold(b, in_dims[2], 1 + shared),
        )
        if shared and not many:
            return out, 2
        axis = 1 + shared
        return out.unflatten(axis, (size, out.shape[axis] // size)), axis

    return rule


def _identity(m: Tensor, k: int, chain: int) -> Tensor:
    return m.clone()


def _identity_vmap(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: tuple[int | None, ...], m: Tensor, k: int, chain: int) -> tuple[Tensor, int]:
        assert in_dims[0] is not None
        return op(m.movedim(in_dims[0], 0), k, chain), 0  # the last axis stays R

    return rule


def _scan_flops(J: Any, end: Any, b: Any = None, *_: Any, out_shape: Any = None, **__: Any) -> int:
    K, N, R, _R = J
    return 2 * K * N * R * R * (end[1] if len(end) == 3 else 1)


class _Suffix(Function):
    @staticmethod
    def forward(ctx: Any, J: Tensor, last: Tensor, b: Tensor | None) -> Tensor:
        with below_autograd():
            lam = _suffix_op(J, last, b)
        ctx.save_for_backward(J, lam)
        return lam

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        J, lam = ctx.saved_tensors
        m = _prefix_op(J, grad[0], grad[1:])
        return _jacobian_grad(ctx, lam, m), m[-1], m[:-1] if ctx.needs_input_grad[2] else None


class _Prefix(Function):
    @staticmethod
    def forward(ctx: Any, J: Tensor, first: Tensor, b: Tensor | None) -> Tensor:
        with below_autograd():
            m = _prefix_op(J, first, b)
        ctx.save_for_backward(J, m)
        return m

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        J, m = ctx.saved_tensors
        lam = _suffix_op(J, grad[-1], grad[:-1])
        return _jacobian_grad(ctx, lam, m), lam[0], lam[1:] if ctx.needs_input_grad[2] else None


def _jacobian_grad(ctx: Any, lam: Tensor, m: Tensor) -> Tensor | None:
    """``dL/dJ[k] = lam[k + 1] m[k]^T``, the same for both scans; vectors that share a Jacobian add up."""
    if not ctx.needs_input_grad[0]:
        return None
    if lam.dim() == 3:
        return lam[1:].unsqueeze(-1) * m[:-1].unsqueeze(-2)
    with no_autocast():
        return lam[1:].mT @ m[:-1]


def _checked_products(form: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def kernel(J: Tensor) -> Tensor:
        if J.dim() != 4 or J.shape[2] != J.shape[3] or not J.dtype.is_floating_point:
            raise ScanShapeError(
                f"J {_show(J)}",
                expected="J [K, N, R, R] of a floating dtype",
                do="give one Jacobian per pair of neighbouring boundaries and per index",
            )
        return form(J)

    return kernel


class _Boundary(Function):
    @staticmethod
    def forward(ctx: Any, m: Tensor, k: int, chain: int) -> Tensor:
        ctx.place = k, chain
        with below_autograd():
            return _boundary_op(m, k, chain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _boundary_bwd_op(grad, *ctx.place), None, None

    @staticmethod
    def jvp(ctx: Any, m: Tensor, k: None, chain: None) -> Tensor:
        return m.clone()


class _BoundaryBwd(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, k: int, chain: int) -> Tensor:
        ctx.place = k, chain
        with below_autograd():
            return _boundary_bwd_op(g, k, chain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        raise DoubleBackwardError(
            f"a gradient that crossed boundary {ctx.place[0]} of a bounded model is differentiated again",
            expected="one backward: the adjoints of the latents are solved, not recorded",
            do="drop create_graph=True, or take this step inside `with bounded.with_engine('autograd'):`",
        )

    @staticmethod
    def jvp(ctx: Any, g: Tensor, k: None, chain: None) -> Tensor:
        return g.clone()


def _autograd(function: type[Function], plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # Always through apply, also without grad mode: it is what carries tangents of forward-mode AD or refuses them.
    def kernel(*args: Any) -> Tensor:
        return plain(*args) if functorch_active() else function.apply(*args)

    return kernel


for _name, _end, _op, _function in (
    ("suffix_scan", "last", _suffix_op, _Suffix),
    ("prefix_scan", "first", _prefix_op, _Prefix),
):
    _library.impl(_name, _plain(_name, _end), "CompositeExplicitAutograd")
    _library.impl(_name, _on_cpu(_name, _end), "CPU")
    _library.impl(_name, _on_cuda(_name, _end), "CUDA")
    _library.impl(_name, _autograd(_function, _plain(_name, _end)), "Autograd")
    torch.library.register_fake(_op, _fake(_end), lib=_library)
    torch.library.register_vmap(_op, _scan_vmap(_op), lib=_library)
    register_flop_formula(_op.overloadpacket)(_scan_flops)

# Composed of plain operators, and so are their fake, autograd and vmap rules and their FLOPs.
for _form in (products.suffix_products, products.prefix_products):
    _library.impl(_form.__name__, _checked_products(_form), "CompositeImplicitAutograd")

for _name, _op, _function in (
    ("boundary", _boundary_op, _Boundary),
    ("boundary_bwd", _boundary_bwd_op, _BoundaryBwd),
):
    _library.impl(_name, _identity, "CompositeExplicitAutograd")
    _library.impl(_name, _autograd(_function, _identity), "Autograd")
    torch.library.register_fake(_op, _identity, lib=_library)
    torch.library.register_vmap(_op, _identity_vmap(_op), lib=_library)
