"""The letters of the closed forms, and the numbers they stand for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from sympy import Expr, Symbol

from lbi_compile.errors import OptionError
from lbi_compile.simulate import Link


def _positive(name: str) -> Symbol:
    return Symbol(name, positive=True)


def _count(name: str) -> Symbol:
    return Symbol(name, positive=True, integer=True)


K, r, B, T, D, L = map(_count, ["K", "r", "B", "T", "D", "L"])
n, M = _count("n"), _count("M")
s, beta, alpha, kappa = _positive("s"), _positive("beta"), _positive("alpha"), _positive("kappa")
w, w_s, w_h = _positive("w"), _positive("w_s"), _positive("w_h")
o, o_s, o_h, o_i, o_c = map(_positive, ("o", "o_s", "o_h", "o_i", "o_c"))
g, x, u = _positive("g"), _positive("x"), _positive("u")
p, p_s, p_h = _positive("p"), _positive("p_s"), _positive("p_h")
p_c, p_v = _positive("p_c"), _positive("p_v")
a, a_h = _positive("a"), _positive("a_h")
e, z, gamma, rho, eta, J = map(_positive, ("e", "z", "gamma", "rho", "eta", "J"))
C, tau = _count("C"), _count("tau")
MEANING: Mapping[Symbol, str] = {
    K: "regions",
    r: "latent width",
    B: "samples of a step, over all devices",
    T: "positions of a sample (1 where it has none)",
    D: "numbers of the canvas at a position",
    L: "layers between stem and head",
    n: "devices",
    M: "micro-batches",
    s: "FLOP/s of a device",
    beta: "bytes/s of a link, in each direction",
    alpha: "seconds a message is under way beside its bytes",
    kappa: "time of two messages between the same two devices that cross, over that of one: 1 where both ways are free",
    w: "FLOPs of a layer's forward for a sample",
    w_s: "FLOPs of the stem's forward for a sample",
    w_h: "FLOPs of the head's forward for a sample, with the loss",
    o: "seconds of a layer's forward whatever the batch",
    o_s: "seconds of the stem's forward whatever the batch",
    o_h: "seconds of the head's forward whatever the batch",
    o_i: "seconds of one region's encoder and decoder, forward, whatever the batch",
    o_c: "seconds of one step over latents (a cell, a step of the scan) whatever the batch",
    g: "time of a backward over that of its forward",
    x: "share of a backward that cotangents of activations take; the rest is that of parameters",
    u: "largest region over the mean one",
    p: "parameters of a layer",
    p_s: "parameters of the stem",
    p_h: "parameters of the head",
    p_c: "of them, those that all regions read out by under SID (0 where each has its own)",
    p_v: "parameters of the stem's table that beliefs enter by under SID (0 where each region has its own)",
    a: "bytes a layer keeps for its backward, for a sample",
    a_h: "bytes stem and head keep for their backward, for a sample",
    e: "bytes of a number",
    z: "numbers held for a parameter: itself, its gradient, the optimizer's",
    C: "classes, or tokens",
    tau: "positions with logits of their own: T in a language model, 1 in a classifier",
    gamma: "gates of the token interface's cell: 1 linear, 6 GRU (three, each reading z and m)",
    rho: "1 where all regions are read out, near 0 where the last one is",
    eta: "1 where the last device alone has the head of pooled latents, and sends the loss; 0 where all have it",
    J: "Jacobi sweeps of HBLL",
}


@dataclass(frozen=True, slots=True)
class Workload:
    """One training step of a model: a number for every letter but those of the link.

    Attributes:
        K, r, B, T, D, L, n, M, s, w, w_s, w_h, o, o_s, o_h, o_i, o_c, g, x, u, p, p_s, p_h, p_c, p_v, a, a_h, e, z,
            C, tau, gamma, rho, eta, J: See :data:`MEANING`.

    Example:
        >>> work = transformer(D=256, L=8, T=256, B=4, vocabulary=256, n=2)
        >>> work.parameters
        6450176
    """

    K: int
    r: int
    B: int
    T: int
    D: int
    L: int
    n: int
    s: float
    w: float
    p: float
    M: int = 1
    w_s: float = 0.0
    w_h: float = 0.0
    o: float = 0.0
    o_s: float = 0.0
    o_h: float = 0.0
    o_i: float = 0.0
    o_c: float = 0.0
    g: float = 2.0
    x: float = 0.5
    u: float = 1.0
    p_s: float = 0.0
    p_h: float = 0.0
    p_c: float = 0.0
    p_v: float = 0.0
    a: float = 0.0
    a_h: float = 0.0
    e: int = 4
    z: float = 4.0
    C: int = 1
    tau: int = 1
    gamma: float = 1.0
    rho: float = 1.0
    eta: float = 0.0
    J: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 1 if field.name in _WHOLE else 0
            if not value >= least or not math.isfinite(value) or (field.name in _WHOLE and value != int(value)):
                raise OptionError(
                    f"{field.name}={value!r} ({meaning(field.name)})",
                    expected="a whole number from 1 on" if least else "a finite number from 0 on",
                    do="give such a number",
                )
        if self.eta and self.rho:
            raise OptionError(
                f"eta={self.eta!r} with rho={self.rho!r} (a head on the last device that reads all regions)",
                expected="rho=0: a sum has a cotangent for the regions of every device",
                do="leave eta out",
            )
        if not self.s > 0:
            raise OptionError(f"s={self.s!r} ({MEANING[s]})", expected="a number above 0", do="measure it")

    @property
    def parameters(self) -> float:
        """Of the whole dense model."""
        return self.L * self.p + self.p_s + self.p_h

    def layer(self, samples: float) -> float:
        """Seconds of a layer's forward on ``samples``."""
        return self.o + self.w * samples / self.s

    def stem(self, samples: float) -> float:
        """Seconds of the stem's forward on ``samples``."""
        return self.o_s + self.w_s * samples / self.s

    def head(self, samples: float) -> float:
        """Seconds of the head's forward on ``samples``."""
        return self.o_h + self.w_h * samples / self.s

    def numbers(self, link: Link) -> dict[str, float]:
        """All letters by name."""
        return {**dataclasses.asdict(self), "beta": link.bandwidth, "alpha": link.latency, "kappa": link.crossing}


_WHOLE = frozenset(("K", "r", "B", "T", "D", "L", "n", "M", "e", "C", "tau"))
LETTERS = tuple(sorted(MEANING, key=str))


def meaning(name: str) -> str:
    """What a letter stands for, by its name."""
    return next(text for symbol, text in MEANING.items() if symbol.name == name)


# Forward FLOPs of a transformer block for a sample: 12 D^2 products of its weights and 2 T D of scores and of values
# for every position, two FLOPs each (Kaplan et al., "Scaling laws for neural language models", 2020, table 1).
TRANSFORMER_LAYER: Expr = T * (24 * D**2 + 4 * T * D)
# Its parameters: four D x D of attention, two D x 4D of the MLP, their biases, two norms.
TRANSFORMER_PARAMETERS: Expr = 12 * D**2 + 13 * D
# Numbers it keeps for its backward for a sample, with fused attention (no T x T matrix): Korthikanti et al., "Reducing
# activation recomputation in large transformer models", 2022, section 4, give 34 bytes of 16-bit numbers for T D.
TRANSFORMER_KEPT: Expr = 17 * T * D


def pooled_flops(r: Any, D: Any) -> Any:
    """FLOPs of a pooled interface's forward at a boundary: an encoder D -> 4 r -> r and a decoder r -> 4 r -> D.

    Example:
        >>> pooled_flops(16, 64)
        20480
    """
    return 16 * r * (r + D)


def token_flops(r: Any, D: Any, T: Any) -> Any:
    """FLOPs of a token interface's forward at a boundary: an encoder D -> r and a decoder r -> D at every position."""
    return 4 * T * D * r


def transformer(
    *, D: int, L: int, T: int, B: int, vocabulary: int, n: int, K: int | None = None, r: int = 16, **others: float
) -> Workload:
    """A decoder-only transformer language model from its sizes alone.

    Args:
        D: Width.
        L: Layers.
        T: Positions.
        B: Samples of a step.
        vocabulary: Tokens.
        n: Devices.
        K: Regions; by default one for each device, at most one for each layer.
        r: Latent width.
        others: Letters with another number than this gives them, such as ``s`` (1e12).

    Example:
        >>> transformer(D=768, L=12, T=1024, B=8, vocabulary=50257, n=4).w / 1e9
        17.7...
    """
    sizes = [(symbol("D"), D), (symbol("T"), T)]
    layer, kept, count = (
        float(form.subs(sizes)) for form in (TRANSFORMER_LAYER, TRANSFORMER_KEPT, TRANSFORMER_PARAMETERS)
    )
    numbers: dict[str, float] = {
        "s": 1e12,
        "w": layer,
        "w_h": 2 * T * D * vocabulary,
        "p": int(count),
        "p_s": (vocabulary + T) * D,
        "p_h": 0,  # tied with the stem
        "a": 4 * kept,
        "a_h": 8 * T * vocabulary,
        "C": vocabulary,
        "tau": T,
        **others,
    }
    return Workload(
        K=K or min(n, L),
        r=r,
        B=B,
        T=T,
        D=D,
        L=L,
        n=n,
        **numbers,  # pyright: ignore[reportArgumentType]  counts are whole
    )


def symbol(name: str) -> Symbol:
    """The symbol of a letter."""
    return next(one for one in MEANING if one.name == name)


class _Rounds(sympy.Function):
    """`ceil(log2 count)`, exact for whole numbers."""

    @classmethod
    def eval(cls, count: Expr) -> Expr | None:
        return sympy.Integer(bits(int(count))) if count.is_Integer else None  # type: ignore[attr-defined]


_Rounds.__name__ = "rounds"  # as formulas print it and compiled ones call it


def rounds(count: Expr) -> Expr:
    """`ceil(log2 count)` in a formula.

    Example:
        >>> rounds(K), rounds(K).subs(K, 5)
        (rounds(K), 3)
    """
    return _Rounds(count)  # pyright: ignore[reportReturnType]  sympy has it made by a metaclass


def bits(count: float) -> int:
    """`ceil(log2 count)`.

    Example:
        >>> bits(1), bits(5), bits(1024)
        (0, 3, 10)
    """
    return (round(count) - 1).bit_length()
