"""Probes: measure on real numbers how positions of a result depend on positions of an input.

Contract: a function of one float tensor in, a frozen verdict out; the random state is put back. Gradients find what no
single change of a value shows, changes find what has no gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lbi_compile.errors import OptionError

POSITION_WISE, CAUSAL, ANTICAUSAL, MIXED = "position-wise", "causal", "anticausal", "mixed"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How output positions along an axis depend on input positions.

    Attributes:
        kind: ``"position-wise"`` (output t reads input t only), ``"causal"`` (inputs up to t), ``"anticausal"`` (inputs
            from t on) or ``"mixed"``.
        how: ``"static"`` where rules decided, ``"probe"`` where gradients were measured.
        why: The reason in a sentence.
        node: The operator that mixes, or that no rule covers, where one is to blame.
    """

    kind: str
    how: str
    why: str
    node: fx.Node | None = None


def probe_axis(
    fn: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    axis_in: int,
    axis_out: int,
    seeds: int = 3,
    kinds: Collection[str] = (POSITION_WISE, CAUSAL, ANTICAUSAL),
) -> Verdict:
    """Measure how output positions of ``fn`` depend on input positions: vector-Jacobian products and exact zeros.

    Each seed probes another position t (middle, first, last, then random ones) with a random cotangent on t alone, then
    halves of the positions (over all seeds every pair of positions is asked about), or, once some position reads
    another, all positions up to a cut and all after it: the gradient must be exactly zero at the positions that the
    verdict excludes. The first seed uses ``inputs``, the others scale each element by about a tenth, so that no dead
    unit hides a path. Every run of ``fn`` sees the same random numbers. A gradient says nothing about values that flow
    through integers or detached tensors.

    Args:
        fn: Maps a float tensor to a float tensor.
        inputs: Its argument, with at least 2 positions; no gradient flows into it.
        axis_in: Dim of the argument.
        axis_out: Dim of the result.
        seeds: Positions probed, at least 3.
        kinds: Kinds that make a difference to the caller: probing ends when all of them are refuted.

    Returns:
        The verdict, ``how="probe"``; ``"mixed"`` where a gradient is NaN, sizes differ or all ``kinds`` are refuted.

    Raises:
        OptionError: Fewer than 3 seeds.

    Example:
        >>> probe_axis(lambda x: x.cumsum(1), torch.randn(2, 5, 3), axis_in=1, axis_out=1).kind
        'causal'
    """
    if seeds < 3:
        raise OptionError(f"seeds={seeds}", expected="at least 3", do="one probed position proves too little")
    size = inputs.shape[axis_in]
    if size < 2:
        return Verdict(MIXED, "probe", "an axis of size 1 has no other position to compare with")
    left = set(kinds)
    reached = False
    with _same_random_numbers(inputs.device) as rewind:
        for seed, at in enumerate(_positions(size, seeds)):
            generator = torch.Generator().manual_seed(seed)
            x = inputs.detach().clone()
            if seed:
                x = x * (1 + 0.1 * torch.randn(x.shape, generator=generator)).to(x)
            rewind()
            with torch.enable_grad():
                y = fn(x.requires_grad_().clone())  # a copy, because fn may write to its argument
            if y.shape[axis_out] != size:
                return Verdict(MIXED, "probe", f"{size} input positions, but {y.shape[axis_out]} output positions")
            for kind, cotangent_at in _questions(left, seed, seeds, at, size, generator):
                if not left or (kind is not None and kind not in left):
                    continue
                reads = _reads(y, x, cotangent_at, axis_in, axis_out, generator)
                if reads is None:
                    return Verdict(MIXED, "probe", f"the gradient of position {at} is NaN")
                reached |= bool(reads.any())
                if bool((reads & ~cotangent_at).any()):
                    left.discard(kind or POSITION_WISE)
                if kind is None:
                    left -= {CAUSAL} if bool(reads[at + 1 :].any()) else set()
                    left -= {ANTICAUSAL} if bool(reads[:at].any()) else set()
            del y  # the graph of this run makes room for the next
            if not left:
                return Verdict(MIXED, "probe", "gradients reach positions before and after the probed ones")
    if not reached:
        return Verdict(POSITION_WISE, "probe", f"no gradient reaches the input ({seeds} cotangents)")
    if POSITION_WISE in left:
        return Verdict(POSITION_WISE, "probe", f"exactly zero gradient from all other positions ({seeds} positions)")
    if left == {CAUSAL}:
        return Verdict(CAUSAL, "probe", f"exactly zero gradient from all later positions ({seeds} positions)")
    if left == {ANTICAUSAL}:
        return Verdict(ANTICAUSAL, "probe", f"exactly zero gradient from all earlier positions ({seeds} positions)")
    return Verdict(MIXED, "probe", "some positions have gradient from others, seen too rarely to tell the direction")


def _positions(size: int, seeds: int) -> list[int]:
    """The positions to probe. The first and the last one show a dependence that wraps around."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    order = list(dict.fromkeys([size // 2, 0, size - 1, *order]))
    return [order[i % size] for i in range(seeds)]


def _questions(
    left: set[str], seed: int, seeds: int, at: int, size: int, generator: torch.Generator
) -> Iterator[tuple[str | None, Tensor]]:
    """Where to put cotangents, and which kind a gradient anywhere else refutes (``None``: look on which side)."""
    where = torch.arange(size)
    yield None, where == at
    # Two positions differ in a bit of their index: halves by each bit, over all seeds, ask about every pair.
    for bit in range(seed, (size - 1).bit_length(), seeds):
        for value in (0, 1):
            yield POSITION_WISE, (where >> bit) & 1 == value
    if POSITION_WISE not in left:
        for cut in {min(at, size - 2), int(torch.randint(size - 1, (), generator=generator))}:
            yield CAUSAL, where <= cut
            yield ANTICAUSAL, where > cut


def _reads(y: Tensor, x: Tensor, at: Tensor, axis_in: int, axis_out: int, generator: torch.Generator) -> Tensor | None:
    """Input positions with a gradient from the output positions ``at``; ``None`` where a gradient is NaN."""
    nothing = torch.zeros_like(at)
    if not y.requires_grad:
        return nothing
    shape = [1] * y.dim()
    shape[axis_out] = -1
    noise = torch.randn(y.shape, generator=generator, dtype=torch.float32)
    cotangent = torch.where(at.view(shape), noise, 0.0).to(y)
    (gradient,) = torch.autograd.grad(y, x, cotangent, retain_graph=True, allow_unused=True)
    if gradient is None:
        return nothing
    if bool(gradient.isnan().any()):
        return None
    return (gradient != 0).movedim(axis_in, 0).flatten(1).any(1).cpu()


def sees_later(fn: Callable[[Tensor], Tensor], inputs: Tensor, *, axis_in: int, axis_out: int) -> bool:
    """Whether changing later positions of the input changes an earlier position of the result by more than rounding.

    Complements ``probe_axis``: a dependence through integers or detached tensors (a routing decision, a statistic) has
    no gradient. Every run sees the same random numbers.

    Args:
        fn: Maps a float tensor to a float tensor.
        inputs: Its argument.
        axis_in: Dim of the argument.
        axis_out: Dim of the result.

    Example:
        >>> sees_later(lambda x: x - x.detach().mean(1, keepdim=True), torch.randn(2, 5, 3), axis_in=1, axis_out=1)
        True
    """
    return contradicts(CAUSAL, fn, inputs, axis_in=axis_in, axis_out=axis_out)


def contradicts(kind: str, fn: Callable[[Tensor], Tensor], inputs: Tensor, *, axis_in: int, axis_out: int) -> bool:
    """Whether a change of the input at positions that ``kind`` excludes changes the result by more than rounding.

    Positions are changed in groups: for ``"position-wise"`` halves by every bit of the index, so that every pair is
    asked about, for the others all positions on the far side of a cut. Changed positions are once turned around and
    once made copies of unchanged ones, which sends them where those are routed.

    Args:
        kind: ``"position-wise"``, ``"causal"`` or ``"anticausal"``.
        fn: Maps a float tensor to a float tensor with as many positions.
        inputs: Its argument.
        axis_in: Dim of the argument.
        axis_out: Dim of the result.

    Example:
        >>> shifted = lambda x: x - x.detach().mean(0)
        >>> contradicts("position-wise", shifted, torch.randn(4, 3), axis_in=0, axis_out=0)
        True
    """
    with _same_random_numbers(inputs.device) as rewind, torch.no_grad():

        def run(x: Tensor) -> Tensor:
            rewind()
            return fn(x).movedim(axis_out, 0)

        expected = run(inputs.detach().clone()).clone()
        for kept in _kept(kind, inputs.shape[axis_in]):
            for change in (_turned, _copied):
                got = run(change(inputs.detach(), kept, axis_in))
                where = kept.to(got.device)
                if _differ(got[where], expected[where]):
                    return True
    return False


def _differ(a: Tensor, b: Tensor) -> bool:
    """By more than rounding: lists of other lengths (tokens of an expert) may be summed in another order."""
    apart = a != b
    if not bool(apart.any()):
        return False
    size = b.double().nan_to_num(0, 0, 0).square().mean().sqrt()
    distance = (a[apart].double() - b[apart].double()).abs()
    return not bool((distance <= min(256 * torch.finfo(b.dtype).eps, 0.1) * size).all())


def _kept(kind: str, size: int) -> Iterator[Tensor]:
    """Masks of positions that may not notice when all others change."""
    where = torch.arange(size)
    if kind == POSITION_WISE:
        for bit in range((size - 1).bit_length()):
            for value in (0, 1):
                yield (where >> bit) & 1 == value
    else:
        for cut in sorted({1, size // 2, size - 1} & set(range(1, size))):
            yield where < cut if kind == CAUSAL else where >= cut


def _turned(x: Tensor, kept: Tensor, axis: int) -> Tensor:
    """Other numbers of about the same size at all positions that are not kept, in another order."""
    others = (~kept).nonzero().flatten().to(x.device)
    return x.index_copy(axis, others, x.index_select(axis, others.flip(0)) * -1.5 + 0.5)


def _copied(x: Tensor, kept: Tensor, axis: int) -> Tensor:
    """Copies of kept positions at all others."""
    others = (~kept).nonzero().flatten().to(x.device)
    models = kept.nonzero().flatten().to(x.device)
    return x.index_copy(axis, others, x.index_select(axis, models[torch.arange(len(others)) % len(models)]))


@contextlib.contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[Callable[[], None]]:
    """Gives a function that puts the random state back to what it is now, and calls it at the end."""
    on_cpu = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> None:
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)

    try:
        yield rewind
    finally:
        rewind()
