"""The memory of a parallel forward: the same inputs, a regression for others, and no trouble with odd batches."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lbi_compile.guesses import Memory, features

K, R = 5, 4


def first(m: Tensor, width: int = 3) -> Callable[[], tuple[Tensor, Tensor]]:
    """Gives `m_1` and a canvas of which nothing can be learned."""
    return lambda: (m, torch.zeros(len(m), width))


def latents(m: Tensor, slopes: Tensor) -> Tensor:
    """Linear in `m_1` `[N, R]`."""
    return torch.cat([m[None], 1.0 + m @ slopes])


def test_latents_that_are_linear_in_the_first_are_learned() -> None:
    memory, slopes = Memory(), torch.randn(K - 2, R, R)
    start = torch.randn(8, R)
    constant = memory.guess([start], first(start), K - 1)
    assert torch.equal(constant, start.expand(K - 1, -1, -1))
    for _ in range(60):
        m = torch.randn(32, R)
        memory.guess([m], first(m), K - 1)
        memory.keep([m], latents(m, slopes))
    m = torch.randn(7, R)
    found, expected = memory.guess([m], first(m), K - 1), latents(m, slopes)
    assert torch.equal(found[0], m)
    assert (found - expected).norm() < 0.2 * (expected - expected.mean(1, keepdim=True)).norm()


@pytest.mark.parametrize("between", [(), (5,), (2, 3)])
def test_latents_that_are_linear_in_the_canvas_are_learned(between: tuple[int, ...]) -> None:
    memory, slopes = Memory(), torch.randn(K - 1, 6, R)

    def sample(n: int) -> tuple[Tensor, Tensor]:
        """Latents, and a canvas from which they are computed: axes between are averaged, shift and scale drop out."""
        mean = torch.nn.functional.layer_norm(torch.randn(n, 6), (6,))
        noise = torch.randn(n, *between, 6)
        if between:
            noise -= noise.flatten(1, -2).mean(1).view(n, *[1] * len(between), 6)
        return mean @ slopes, 3 * mean.view(n, *[1] * len(between), 6) + 1 + noise * bool(between)

    for _ in range(60):
        m, canvas = sample(32)
        memory.guess([canvas], functools.partial(tuple, (torch.zeros_like(m[0]), canvas)), K - 1)
        memory.keep([canvas], m)
    m, canvas = sample(9)
    found = memory.guess([canvas], lambda: (m[0], canvas), K - 1)
    assert (found[1:] - m[1:]).norm() < 0.2 * m[1:].norm()


def test_a_canvas_of_other_samples_or_too_wide_is_no_feature() -> None:
    m = torch.randn(6, R)
    assert features(m, torch.randn(6, 3)).shape == (6, R + 3)
    for canvas in (torch.randn(2, 3), torch.randn(6), torch.randn(6, 2000)):
        assert torch.equal(features(m, canvas), m)


def test_the_same_inputs_give_their_latents_until_they_are_written_to() -> None:
    memory, x, found = Memory(), torch.randn(3, 6), torch.randn(K - 1, 3, R)
    memory.keep([x, 2], found)
    assert memory.guess([x, 2], first(found[0]), K - 1) is found
    for leaves in ([x, 3], [x.clone(), 2], [2, x], [x]):
        assert memory.guess(leaves, first(found[0]), K - 1) is not found
    x.add_(1)
    assert memory.guess([x, 2], first(found[0]), K - 1) is not found


def test_one_sample_alike_samples_none_and_infinite_ones() -> None:
    for some in (torch.randn(K - 1, 1, R), torch.ones(K - 1, 6, R), torch.randn(K - 1, 0, R)):
        memory = Memory()
        memory.guess([], first(some[0]), K - 1)
        memory.keep([], some)
        m = torch.randn(4, R)
        assert memory.guess([m], first(m), K - 1).isfinite().all()
    infinite, m = torch.full((K - 1, 2, R), torch.inf), torch.randn(4, R)
    memory.guess([], first(infinite[0]), K - 1)
    memory.keep([], infinite)
    assert memory.guess([m], first(m), K - 1).isfinite().all()


def test_narrow_latents_are_guessed_in_float32() -> None:
    memory, m = Memory(), torch.randn(4, R).bfloat16()
    assert memory.guess([m], first(m), K - 1).dtype == torch.float32
