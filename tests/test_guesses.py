"""The memory of a parallel forward: the same inputs, a regression for others, and no trouble with odd batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lbi_compile.guesses import Memory

K, R = 5, 4


def latents(m: Tensor, slopes: Tensor) -> Tensor:
    """Linear in `m_1` `[N, R]`."""
    return torch.cat([m[None], 1.0 + m @ slopes])


def test_latents_that_are_linear_in_the_first_are_learned() -> None:
    memory, slopes = Memory(), torch.randn(K - 2, R, R)
    first = torch.randn(8, R)
    constant = memory.guess([first], lambda: first, K - 1)
    assert torch.equal(constant, first.expand(K - 1, -1, -1))
    for _ in range(60):
        m = torch.randn(32, R)
        memory.keep([m], latents(m, slopes))
    m = torch.randn(7, R)
    found, expected = memory.guess([m], lambda: m, K - 1), latents(m, slopes)
    assert torch.equal(found[0], m)
    assert (found - expected).norm() < 0.2 * (expected - expected.mean(1, keepdim=True)).norm()


def test_the_same_inputs_give_their_latents_until_they_are_written_to() -> None:
    memory, x, found = Memory(), torch.randn(3, 6), torch.randn(K - 1, 3, R)
    memory.keep([x, 2], found)
    assert memory.guess([x, 2], lambda: found[0], K - 1) is found
    for leaves in ([x, 3], [x.clone(), 2], [2, x], [x]):
        assert memory.guess(leaves, lambda: found[0], K - 1) is not found
    x.add_(1)
    assert memory.guess([x, 2], lambda: found[0], K - 1) is not found


def test_one_sample_alike_samples_none_and_infinite_ones() -> None:
    for some in (torch.randn(K - 1, 1, R), torch.ones(K - 1, 6, R), torch.randn(K - 1, 0, R)):
        memory = Memory()
        memory.keep([], some)
        m = torch.randn(4, R)
        assert memory.guess([m], lambda m=m: m, K - 1).isfinite().all()
    memory.keep([], torch.full((K - 1, 2, R), torch.inf))
    assert memory.guess([m], lambda: m, K - 1).isfinite().all()


def test_narrow_latents_are_guessed_in_float32() -> None:
    memory, m = Memory(), torch.randn(4, R).bfloat16()
    assert memory.guess([m], lambda: m, K - 1).dtype == torch.float32
