"""What a schedule costs, as formulas: the record, its parts that schedules share, and numbers put into it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import sympy
from sympy import Expr

from lbi_compile.simulate import Link

from .symbols import (
    LETTERS,
    B,
    D,
    L,
    M,
    T,
    Workload,
    alpha,
    beta,
    bits,
    e,
    kappa,
    n,
    o,
    o_h,
    o_s,
    p,
    p_h,
    p_s,
    rounds,
    s,
    w,
    w_h,
    w_s,
    z,
)


class Estimate(NamedTuple):
    """A schedule in numbers.

    Attributes:
        seconds: Of one training step, from the batch to the gradients of all parameters where they are needed.
        busy: Of them, in which a device computes, on average over devices.
        flops: Of all devices.
        sent: Bytes that all devices send.
        memory: Bytes on the fullest device: parameters, gradients, optimizer, activations, Jacobians.
    """

    seconds: float
    busy: float
    flops: float
    sent: float
    memory: float

    @property
    def waiting(self) -> float:
        """Share of the devices' time in which they wait."""
        return 1 - self.busy / self.seconds


# What a schedule trains: the model as it is, the bounded model by its gradient, or regions by losses of their own.
DENSE, BOUNDED, LOCAL = "dense", "bounded", "local"


@dataclass(frozen=True)
class Form:
    """What a schedule costs, as formulas in the letters of :data:`lbi_compile.cost.MEANING`.

    Attributes:
        name: Short name.
        title: What it is, in a few words.
        trains: ``"dense"``, ``"bounded"`` or ``"local"``.
        seconds, busy, flops, sent, memory: As in :class:`Estimate`.
        refuses: Tells from the numbers why the schedule is not possible, or gives ``None``.
        source: Who described it.
    """

    name: str
    title: str
    trains: str
    seconds: Expr
    busy: Expr
    flops: Expr
    sent: Expr
    memory: Expr
    refuses: Callable[[Workload], str | None]
    source: str

    @functools.cached_property
    def _compiled(self) -> Callable[..., Sequence[float]]:
        forms = [self.seconds, self.busy, self.flops, self.sent, self.memory]
        names = {"Max": max, "Min": min, "ceiling": math.ceil, "rounds": bits}
        return sympy.lambdify(LETTERS, forms, modules=[names, "math"], cse=True)

    def __call__(self, work: Workload, link: Link) -> Estimate:
        """Put numbers into the formulas.

        Args:
            work: Of the training step.
            link: Between devices.
        """
        numbers = work.numbers(link)
        return Estimate(*map(float, self._compiled(*(numbers[letter.name] for letter in LETTERS))))


# -- compute

part = B / M  # samples of a micro-batch


def layer(samples: Expr) -> Expr:
    """Seconds of a layer's forward: what it takes whatever the batch, and its FLOPs at the device's rate."""
    return o + w * samples / s


def stem(samples: Expr) -> Expr:
    """Seconds of the stem's forward."""
    return o_s + w_s * samples / s


def head(samples: Expr) -> Expr:
    """Seconds of the head's forward."""
    return o_h + w_h * samples / s


model_flops = B * (L * w + w_s + w_h)  # of a forward
parameters = L * p + p_s + p_h
held = parameters * z * e  # bytes of all parameters with what belongs to them


# -- messages


def hop(size: Expr) -> Expr:
    """Seconds from the start of sending ``size`` bytes to a neighbour to their arrival."""
    return alpha + size / beta


def gather(size: Expr) -> Expr:
    """Seconds until all devices have ``size`` bytes of which each had an n-th.

    `ceil(log2 n)` rounds, in which every device sends `(n - 1) / n` of the whole together: Bruck et al., 1997, and
    Thakur et al., "Optimization of collective communication operations in MPICH", 2005, section 4.1. Two devices have
    but each other, and their messages cross.
    """
    return _exchange(size) * sympy.Piecewise((kappa, sympy.Eq(n, 2)), (1, True)) + rounds(n) * alpha


def reduce(size: Expr) -> Expr:
    """Seconds of an all-reduce of ``size`` bytes: a reduce-scatter and an all-gather (Rabenseifner, 2004).

    In parts so small that none stands in the way of another: Gloo's reaches its link's speed in both directions.
    """
    return 2 * (rounds(n) * alpha + _exchange(size))


def _exchange(size: Expr) -> Expr:
    return (n - 1) / n * size / beta


def gather_sent(size: Expr) -> Expr:
    """Bytes all devices send in an all-gather."""
    return (n - 1) * size


def reduce_sent(size: Expr) -> Expr:
    """Bytes all devices send in an all-reduce."""
    return 2 * gather_sent(size)


# -- pipelines


def tandem(total: Expr, slowest: Expr, jobs: Expr = M) -> Expr:
    """Seconds until ``jobs`` equal jobs have passed servers in a row, each of which takes one job at a time.

    `total + (jobs - 1) slowest`, exact where every job takes as long as the others at a server: the slowest one, once
    reached, is never idle (a deterministic tandem queue; Friedman, "Reduction methods for tandem queuing systems",
    1965).

    Args:
        total: Seconds of one job at all servers, and under way between them.
        slowest: Seconds at the slowest server.
        jobs: Their number.
    """
    return total + (jobs - 1) * slowest


canvas = B * T * D * e  # bytes of the canvas, and of anything of its shape


def broadcast(size: Expr) -> Expr:
    """Seconds until all devices have ``size`` bytes of one of them: `ceil(log2 n)` rounds of a binomial tree."""
    return rounds(n) * hop(size)


def broadcast_sent(size: Expr) -> Expr:
    """Bytes all devices send in a broadcast."""
    return (n - 1) * size
