"""Closed forms of schedules that train a bounded model, or its regions by losses of their own.

They are what :mod:`lbi_compile.distributed` runs. Below, q = ceil(K / n) regions stand on a device, F is the forward of
a region with its interface on all samples, G = g F its backward, S and H forwards of stem and head, which every device
runs, and `Q(x)`, `A(x)` an all-gather and an all-reduce of x bytes. What the schedules share:

* Readout. Summed, `A(B T D e)`, and every region has a cotangent of its own; of the last region, a broadcast of as
  much, and no other has one. With the head on the last device alone (eta = 1) the loss is all that is broadcast.
* Canvas. Every region reads it. Its cotangents are summed over devices before the stem's backward, or the stem's
  gradients after it, whichever is less: `A(min(B T D, p_s) e)`.
* Parts of an all-gather are as large as the largest, so that with regions that do not divide evenly, or of which the
  last has nothing to say, `n q` of them are sent and not K or K - 1.
"""

from __future__ import annotations

import sympy
from sympy import Expr, Max, Min

from . import form as f
from .form import BOUNDED, LOCAL, Form
from .symbols import (
    B,
    C,
    D,
    J,
    K,
    L,
    M,
    T,
    Workload,
    a,
    a_h,
    beta,
    e,
    eta,
    g,
    gamma,
    n,
    o_c,
    o_i,
    p,
    p_c,
    p_h,
    p_s,
    p_v,
    pooled_flops,
    r,
    rho,
    rounds,
    s,
    tau,
    token_flops,
    u,
    w_h,
    x,
    z,
)

_q = sympy.ceiling(K / n)
_last = K - _q * (n - 1)  # regions on the last device
_POOLED_FLOPS, _TOKEN_FLOPS = pooled_flops(r, D), token_flops(r, D, T)


def _regions(work: Workload) -> str | None:
    if work.K > work.L:
        return f"{work.K} regions of {work.L} layers"
    return f"{work.n} devices and {work.K} regions: some would have none" if work.n > work.K else None


def _positions(work: Workload) -> str | None:
    return _regions(work) or ("no positions, of which each could have a latent" if work.T == 1 else None)


def _micro_batched(work: Workload) -> str | None:
    return _regions(work) or (f"{work.M} micro-batches of {work.B} samples" if work.M > work.B else None)


def _region(samples: Expr, flops: Expr, *, mean: bool = False) -> Expr:
    """Seconds of the forward of the largest region, or of the mean one, with its interface."""
    return (1 if mean else u) * (L / K) * f.layer(samples) + o_i + flops * samples / s


def _interfaces(flops: Expr) -> Expr:
    return K * flops * B


_canvas_back = Min(f.canvas, p_s * e)
_ends = (1 + g) * (f.stem(B) + f.head(B))
_end_flops = (1 + g) * n * B * (f.w_s + w_h)
_heads = 1 - eta + eta / n  # heads a device runs, on average
_pooled_ends = (1 + g) * (f.stem(B) + _heads * f.head(B))
_pooled_end_flops = (1 + g) * n * B * (f.w_s + _heads * w_h)
_layer_flops = B * L * f.w
_latent = B * r * e
_position_latent = B * T * r * e
_told = (1 - eta) * f.canvas + eta * e  # what the last device broadcasts
_readout = rho * f.reduce(f.canvas) + (1 - rho) * f.broadcast(_told)
_readout_sent = rho * f.reduce_sent(f.canvas) + (1 - rho) * f.broadcast_sent(_told)
# Parameters of a device's regions, and of stem and head, which all devices have; what a backward keeps of them.
_weights = z * e * (p * L / K * _q * u + p_s + p_h)
_kept = B * (a * L / K * _q * u + a_h)


def _cascade(region: Expr, message: Expr, *, back: bool = False) -> Expr:
    """A forward that hands latents from device to device in M micro-batches, or a backward that hands adjoints back.

    A tandem queue of n devices with q regions each and the links between them.
    """
    scale = g if back else 1
    on_device = scale * _q * region
    return f.tandem(n * on_device + (n - 1) * f.hop(message / M), Max(on_device, message / M / beta))


def _chain() -> Form:
    """Latents forward, adjoints back, device after device, `B r e` bytes each; no Jacobians.

    `S + n q F + (n - 1) (alpha + B r e / beta)` for one micro-batch, readout, `(1 + g) H`, the same way back with G,
    the canvas, g S. With M micro-batches both ways are pipelines; the loss is taken once, of all samples.
    """
    region = _region(f.part, _POOLED_FLOPS)
    seconds = (
        _ends + _cascade(region, _latent) + _readout + _cascade(region, _latent, back=True) + f.reduce(_canvas_back)
    )
    return Form(
        "chain",
        "LBI pooled, chain",
        BOUNDED,
        seconds=seconds,
        busy=_pooled_ends + (1 + g) * M * K / n * _region(f.part, _POOLED_FLOPS, mean=True),
        flops=(1 + g) * (_layer_flops + _interfaces(_POOLED_FLOPS)) + _pooled_end_flops,
        sent=2 * (n - 1) * _latent + _readout_sent + f.reduce_sent(_canvas_back),
        memory=_weights + _kept,
        refuses=_micro_batched,
        source="latent bounded interfaces, without their scan",
    )


def _scan() -> Form:
    """Latents forward, then Jacobians and own cotangents on all devices at once, one gather of both, one scan.

    1. `S`, then latents in M micro-batches from device to device, as in the chain.
    2. Jacobians of each device's regions together, on all devices but the last: `X = x g q (L / K) (o + r w B / s)`, r
       cotangents of activations side by side. The device before the last begins them a device's forward and a message
       earlier than the last ends, and they run while the readout is summed: `max(readout, X - q F - alpha - B r e /
       (M beta))`. Between two devices the seed is the adjoint, and there are none.
    3. `(1 + g) H` on all devices, and b, the cotangent that reaches a device's latent by the readout: `x G q`. With the
       head on the last device, the others' Jacobians run beside all of that.
    4. `Q(n B (r^2 + r) e)` of J and b, n - 1 of them needed; n - 1 steps of the scan on every device, of
       `o_c + 2 r^2 B / s`.
    5. `G q` on all devices, with the adjoints; the canvas; g S.

    With one micro-batch and free messages it beats the chain with `n > 1 + x (r + 1) - 1 / g` devices: `(n - 1) G q`
    saved against `X - q F` and `x G q`. On one device it is plain autograd.
    """
    whole = _q * _region(B, _POOLED_FLOPS)
    jacobians = x * g * _q * u * (L / K) * (f.o + r * f.w * B / s)
    earlier = jacobians - _q * _region(f.part, _POOLED_FLOPS) - f.hop(_latent / M)
    exchanged = n * B * (r**2 + r) * e
    scan = (n - 1) * (o_c + 2 * r**2 * B / s)
    heads = (1 + g) * f.head(B) + sympy.Piecewise((x * g * whole, n > 1), (0, True))
    after_it = sympy.Piecewise((Max(_readout, earlier), n > 2), (_readout, True)) + heads
    beside_it = sympy.Piecewise((Max(_readout + heads, earlier), n > 2), (_readout + heads, True))
    seconds = (
        (1 + g) * f.stem(B)
        + _cascade(_region(f.part, _POOLED_FLOPS), _latent)
        + (1 - eta) * after_it
        + eta * beside_it
        + f.gather(exchanged)
        + scan
        + g * whole
        + f.reduce(_canvas_back)
    )
    mean = K / n * _region(B, _POOLED_FLOPS, mean=True)
    pulled = x * g * (rho * (n - 1) + 1 - rho) / n
    busy = (
        _pooled_ends
        + M * K / n * _region(f.part, _POOLED_FLOPS, mean=True)
        + sympy.Piecewise((jacobians / (_q * u) * (K - _last) / n, n > 2), (0, True))
        + sympy.Piecewise((pulled * mean, n > 1), (0, True))
        + scan
        + g * mean
    )
    flops = (
        (1 + g) * (_layer_flops + _interfaces(_POOLED_FLOPS))
        + sympy.Piecewise((pulled * (_layer_flops + _interfaces(_POOLED_FLOPS)), n > 1), (0, True))
        + sympy.Piecewise((x * g * r * _layer_flops * (K - _last) / K, n > 2), (0, True))
        + n * (n - 1) * 2 * r**2 * B
        + _pooled_end_flops
    )
    return Form(
        "scan",
        "LBI pooled, scan",
        BOUNDED,
        seconds=seconds,
        busy=busy,
        flops=flops,
        sent=(n - 1) * _latent + _readout_sent + f.gather_sent(exchanged) + f.reduce_sent(_canvas_back),
        memory=_weights + _kept + n * B * (r**2 + r) * e,
        refuses=_micro_batched,
        source="latent bounded interfaces; suffix scan: Blelloch, 1990",
    )


def _token() -> Form:
    """All regions at once, forward and backward; cells between latents on every device.

    `S + q F`, `Q(n q B T r e)` of what regions say, K - 1 cells of `o_c + 2 gamma r^2 B T / s`, the readout
    `A(B T D e)`, `(1 + g) H`, `q G` with `Q(n q B T r e)` of b on the way, the cells' backward, the canvas, g S.
    """
    region = _region(B, _TOKEN_FLOPS)
    between = (1 + g) * (K - 1) * (o_c + 2 * gamma * r**2 * B * T / s)
    exchanged = n * _q * _position_latent
    seconds = (
        _ends + (1 + g) * _q * region + 2 * f.gather(exchanged) + between + f.reduce(f.canvas) + f.reduce(_canvas_back)
    )
    return Form(
        "token",
        "LBI token",
        BOUNDED,
        seconds=seconds,
        busy=_ends + (1 + g) * K / n * _region(B, _TOKEN_FLOPS, mean=True) + between,
        flops=(1 + g) * (_layer_flops + _interfaces(_TOKEN_FLOPS) + n * (K - 1) * 2 * gamma * r**2 * B * T)
        + _end_flops,
        sent=2 * f.gather_sent(exchanged) + f.reduce_sent(f.canvas) + f.reduce_sent(_canvas_back),
        memory=_weights + _kept + 2 * K * _position_latent,
        refuses=_positions,
        source="this package",
    )


def _sid() -> Form:
    """One cascade of beliefs forward, `B tau C e` bytes from device to device; every region then learns by itself.

    `S`, a cascade of n devices with q regions and q readouts each in M micro-batches, a sum of the losses (one number),
    then `q g (F + H)` on all devices at once. No cotangent crosses but the canvas's. Regions read out by heads as large
    as the model's.
    """
    belief = B * tau * C * e
    # of the table, the stem's gradients have their part already
    shared = sympy.Piecewise(((p_s + p_c) * e, p_s * e < f.canvas), (f.canvas + (p_c + p_v) * e, True))
    region = _region(f.part, 2 * D * C * tau) + f.head(f.part)
    learn = g * _q * M * region
    seconds = (
        (1 + g) * f.stem(B) + _cascade(region, belief) + f.reduce(e) + learn + f.reduce(shared)
    )  # fmt: skip
    mean = _region(f.part, 2 * D * C * tau, mean=True) + f.head(f.part)
    return Form(
        "sid",
        "SID",
        LOCAL,
        seconds=seconds,
        busy=(1 + g) * (f.stem(B) + M * K / n * mean),
        flops=(1 + g) * (_layer_flops + _interfaces(2 * D * C * tau) + n * B * f.w_s + K * B * w_h),
        sent=(n - 1) * belief + f.reduce_sent(e) + f.reduce_sent(shared),
        memory=_weights + _kept + (_q - 1) * B * a_h,
        refuses=_micro_batched,
        source="this package, after Synergistic Information Distillation",
    )


def _hbll() -> Form:
    """Proposals down a tree, J Jacobi sweeps of all regions at once, posteriors down the tree, then all regions learn.

    `S`, `2 ceil(log2 K) + 2` levels of small maps, which every device computes, J sweeps of `q F` and
    `Q(n q B tau r e)` each, `q F`, another `Q(n q B tau r e)` of what regions emit for the maps to learn from, a sum of
    the losses (one number), the backward `q G`, `(1 + g) H` on the device of the last region, the canvas, g S.
    """
    latents = n * _q * B * tau * r * e
    region = _region(B, _POOLED_FLOPS)
    tree = (2 * rounds(K) + 2) * o_c * (1 + g)
    seconds = (
        _ends
        + tree
        + J * (_q * region + f.gather(latents))
        + (1 + g) * _q * region
        + f.gather(latents)
        + f.reduce(e)
        + f.reduce(_canvas_back)
    )
    mean = _region(B, _POOLED_FLOPS, mean=True)
    return Form(
        "hbll",
        "HBLL",
        LOCAL,
        seconds=seconds,
        busy=(1 + g) * (f.stem(B) + f.head(B) / n) + tree + (1 + g + J) * K / n * mean,
        flops=(1 + g + J) * (_layer_flops + _interfaces(_POOLED_FLOPS)) + (1 + g) * B * (n * f.w_s + w_h),
        sent=(J + 1) * f.gather_sent(latents) + f.reduce_sent(e) + f.reduce_sent(_canvas_back),
        memory=_weights + _kept + 2 * K * B * tau * r * e,
        refuses=_regions,
        source="this package, after Hierarchical Block-Local Learning",
    )


BOUNDED_FORMS = (_chain(), _scan(), _token(), _sid(), _hbll())
