"""Closed forms of schedules that train the model as it is: one device, data parallel, and three pipelines.

Below, F is a forward and G = g F the backward of one stage on a micro-batch, S and H forwards of stem and head, and
h a message of `B T D e / M` bytes from stage to stage.
"""

from __future__ import annotations

import sympy
from sympy import Max

from . import form as f
from .form import DENSE, Form
from .symbols import B, L, M, Workload, a, a_h, beta, e, g, kappa, n, p, p_h, p_s, u, x, z

# Bytes of a bucket of gradients that DistributedDataParallel reduces at once.
BUCKET = 25 * 2**20
# More than so many leave hardly anything to hide, and would make a simulation of large models long.
MOST_BUCKETS = 16
_ZERO = sympy.Integer(0)


def _always(work: Workload) -> str | None:
    return None


def _stages(work: Workload) -> str | None:
    if work.n > work.L:
        return f"{work.n} stages of {work.L} layers"
    return f"{work.M} micro-batches of {work.B} samples" if work.M > work.B else None


def _replicas(work: Workload) -> str | None:
    return f"{work.n} devices and {work.B} samples: some would have none" if work.n > work.B else None


def _one() -> Form:
    """`(1 + g) (S + L F_layer + H)`: forward and backward, one after another; nothing is sent."""
    step = (1 + g) * (f.stem(B) + L * f.layer(B) + f.head(B))
    return Form(
        "one",
        "one device",
        DENSE,
        seconds=step,
        busy=step,
        flops=(1 + g) * f.model_flops,
        sent=_ZERO,
        memory=f.held + B * (L * a + a_h),
        refuses=_always,
        source="definition",
    )


def _data() -> Form:
    """Every device trains all layers on `B / n` samples; gradients are summed bucket by bucket during the backward.

    The backward makes q buckets one after another, in `G / q` seconds each, and the link reduces them in turn: q jobs
    pass two servers (:func:`lbi_compile.cost.form.tandem`). An all-reduce of a bucket of b bytes takes
    `2 ceil(log2 n) alpha + 2 (n - 1) / n b / beta` (Rabenseifner). Buckets hold 25 MiB, or a
    16th of all gradients where that is more.
    """
    forward = f.stem(B / n) + L * f.layer(B / n) + f.head(B / n)
    size = f.parameters * e
    buckets = sympy.Min(sympy.ceiling(size / BUCKET), MOST_BUCKETS)
    made, reduced = g * forward / buckets, f.reduce(size / buckets)
    return Form(
        "data",
        "data parallel",
        DENSE,
        seconds=forward + f.tandem(made + reduced, Max(made, reduced), buckets),
        busy=(1 + g) * forward,
        flops=(1 + g) * f.model_flops,
        sent=f.reduce_sent(size),
        memory=f.held + B / n * (L * a + a_h),
        refuses=_replicas,
        source="Li et al., PyTorch Distributed, 2020; Rabenseifner, 2004",
    )


_stage = u * L / n * f.layer(f.part)  # F of the largest stage
_ends = Max(f.stem(f.part), f.head(f.part))
_all = L * f.layer(f.part) + f.stem(f.part) + f.head(f.part)  # one micro-batch through all stages
_message = f.canvas / M
_busy = (1 + g) * M * _all / n
_sent = 2 * (n - 1) * f.canvas  # activations one way, their cotangents the other
_weights = z * e * (p * L / n * u + Max(p_s, p_h))
_kept = a * L / n * u + a_h


def _pipeline(name: str, title: str, seconds: sympy.Expr, alive: sympy.Expr, source: str) -> Form:
    return Form(
        name,
        title,
        DENSE,
        seconds=seconds,
        busy=_busy,
        flops=(1 + g) * f.model_flops,
        sent=_sent,
        memory=_weights + _kept * f.part * alive,
        refuses=_stages,
        source=source,
    )


def _gpipe() -> Form:
    """All forwards, then all backwards; every stage keeps the activations of all M micro-batches.

    Each half is a tandem queue of n stages and, between them, n - 1 links:
    `S + n F + H + (n - 1) h + (M - 1) max(F + max(S, H), B T D e / (M beta))`, and g times the compute of it on the way
    back. Exact with equal stages and one of stem or head; with both it takes them as if at the same stage in `max`.
    No activations are recomputed, as in ``torch.distributed.pipelining``. Bytes: `2 (n - 1) B T D e`.
    """
    under_way, moved = (n - 1) * f.hop(_message), _message / beta
    forward = f.tandem(_all + under_way, Max(_stage + _ends, moved))
    backward = f.tandem(g * _all + under_way, Max(g * (_stage + _ends), moved))
    return _pipeline(
        "gpipe",
        "GPipe",
        forward + backward,
        M,
        "Huang et al., GPipe, 2019",
    )


def _alternating(saved: sympy.Expr = _ZERO, off_path: sympy.Expr = _ZERO) -> sympy.Expr:
    """Seconds of a schedule that alternates forwards and backwards.

    ``saved`` is what it fills of the bubble, ``off_path`` the part of it that a single micro-batch need not wait for.

    The last stage is never idle once reached: M (F + G), after n - 1 stages' forwards and before as many backwards. A
    stage lets in another micro-batch only when one has come back, so the way there and back, 2 (n - 1) messages, is
    waited for anew by every n micro-batches; within the last such round, of t = M - n (ceil(M / n) - 1), all but two
    wait for a message there and one back more. So many messages lie on the longest path of the graph of tasks; the
    count equals the simulation's for every n and M tried. Where a link is slower than a stage it sets the pace
    instead, M messages one after another in each direction, of which all but the first and the last cross one that
    comes back: a lower bound.
    """
    turns = sympy.ceiling(M / n)
    last = M - n * (turns - 1)
    messages = 2 * (n - 1) * turns + 2 * Max(0, last - 2)
    compute = (1 + g) * (_all + (M - 1) * (_stage + _ends)) + messages * f.hop(_message) - saved
    link = (1 + g) * _all + 2 * (n - 1) * f.hop(_message) + (M - 1) * kappa * _message / beta - off_path
    return Max(compute, link)


def _one_f_one_b() -> Form:
    """Every stage alternates a forward and a backward, so that at most n micro-batches are alive at a stage.

    Without messages `(n - 1 + M) (F + G)`, as GPipe; messages are waited for more often (:func:`_alternating`).
    """
    return _pipeline(
        "1f1b",
        "1F1B",
        _alternating(),
        sympy.Min(M, n),
        "Narayanan et al., PipeDream, 2019, and Megatron-LM, 2021 (flush)",
    )


def _zero_bubble() -> Form:
    """1F1B whose backward of parameters, `W = (1 - x) G`, waits until a stage would be idle (ZB-H1).

    With n micro-batches alive, as 1F1B has, the bubble `(n - 1) (F + G)` shrinks to `(n - 1) (F + x G - W)`: a stage's
    W are in nobody's way on the path back, which saves n - 1 of them, and n - 1 more fill what is left; of fewer
    micro-batches, `M - 1`. Exact for `F = x G = W` and M up to n; for more micro-batches the order that the simulation
    finds leaves up to two W more.
    """
    weights = (1 - x) * g * _stage  # W
    off_path, filled = (n - 1) * weights, (sympy.Min(M, n) - 1) * weights
    return _pipeline(
        "zero-bubble",
        "zero bubble",
        _alternating(off_path + filled, off_path),
        sympy.Min(M, n),
        "Qi et al., Zero bubble pipeline parallelism, 2023",
    )


DENSE_FORMS = (_one(), _data(), _gpipe(), _one_f_one_b(), _zero_bubble())
