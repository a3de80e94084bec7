"""Probes against known functions: gradients, changes of values, random state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lbi_compile.errors import OptionError
from lbi_compile.passes.axis_probes import contradicts, probe_axis, sees_later


def _kind(fn: Callable[[Tensor], Tensor], *shape: int, **options: Any) -> str:
    x = torch.randn(*(shape or (2, 5, 3)))
    return probe_axis(fn, x, **{"axis_in": 1, "axis_out": 1, **options}).kind


def _attention(x: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], **options)[:, 0]


def _backward_window(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :-1] + x


PROBES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "pointwise": ("position-wise", torch.tanh),
    "linear over features": ("position-wise", lambda x: x @ torch.ones(3, 4)),
    "dropout": ("position-wise", lambda x: F.dropout(x, 0.5)),
    "cumsum": ("causal", lambda x: x.cumsum(1)),
    "shift": ("causal", lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1]),
    "window": ("causal", _backward_window),
    "causal attention": ("causal", lambda x: _attention(x, is_causal=True)),
    "reversed cumsum": ("anticausal", lambda x: x.flip(1).cumsum(1).flip(1)),
    "full attention": ("mixed", _attention),
    "flip": ("mixed", lambda x: x.flip(1)),
    "roll": ("mixed", lambda x: x.roll(1, 1)),
    "mean": ("mixed", lambda x: x - x.mean(1, keepdim=True)),
    "nan": ("mixed", lambda x: x * float("nan")),
    "infinite": ("mixed", lambda x: x * float("inf")),
    "infinite sum": ("mixed", lambda x: (x * float("inf")).cumsum(1)),
    "constant": ("position-wise", lambda x: torch.ones_like(x)),
    "detached": ("position-wise", lambda x: x.detach() * 2),
    "unused": ("position-wise", lambda x: x.new_ones(x.shape, requires_grad=True) * 2),
    "writes to its input": ("position-wise", lambda x: x.relu_()),
}


@pytest.mark.parametrize("name", PROBES)
def test_probe_of_known_functions(name: str):
    expected, fn = PROBES[name]
    for size in (2, 5, 8):
        if (name, size) not in {("flip", 2), ("shift", 2)}:
            assert _kind(fn, 2, size, 3) == expected, size


def test_probe_with_different_axes():
    swap = lambda x: x.transpose(0, 1).cumsum(0)  # noqa: E731
    assert _kind(swap, 2, 5, 3, axis_in=1, axis_out=0) == "causal"
    assert _kind(swap, 2, 5, 3, axis_in=-2, axis_out=0) == "causal"
    assert _kind(swap, 2, 5, 3, axis_in=0, axis_out=1) == "position-wise"
    found = probe_axis(swap, torch.randn(2, 5, 3), axis_in=0, axis_out=0)
    assert found.kind == "mixed"
    assert found.why == "2 input positions, but 5 output positions"


def test_probe_finds_one_reader_among_many_positions():
    def reads_one(x: Tensor, reader: int, read: int) -> Tensor:
        return x + F.one_hot(torch.tensor(reader), 32)[:, None] * x[:, read : read + 1]

    for reader, read in [(5, 6), (6, 5), (30, 1), (17, 18), (3, 11), (7, 3)]:
        assert _kind(partial(reads_one, reader=reader, read=read), 1, 32, 2) != "position-wise"


def test_probe_finds_one_late_reader_in_a_causal_function():
    def reads_one(x: Tensor, reader: int, read: int) -> Tensor:
        return F.one_hot(torch.tensor(reader), 32)[:, None] * x[:, read : read + 1]

    assert _kind(lambda x: x.cumsum(1) + reads_one(x, 15, 17), 1, 32, 2) == "mixed"
    assert _kind(lambda x: x.flip(1).cumsum(1).flip(1) + reads_one(x, 17, 15), 1, 32, 2) == "mixed"


def test_probe_counts_a_nan_as_a_dependence():
    def broken(x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(lambda g: torch.where(g == 0, g, float("nan")))
        return y

    found = probe_axis(broken, torch.randn(2, 5), axis_in=1, axis_out=1)
    assert (found.kind, found.why) == ("mixed", "the gradient of position 2 is NaN")


def test_probe_asks_about_other_positions_each_time():
    asked = []

    def watched(x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(lambda g: asked.append(g.any(0).nonzero().flatten().tolist()))
        return y

    probe_axis(watched, torch.randn(2, 11), axis_in=1, axis_out=1, seeds=4)
    single = [positions[0] for positions in asked if len(positions) == 1]
    assert single[:3] == [5, 0, 10]
    assert len(set(single)) == len(single) == 4


def test_probe_of_a_single_position_or_too_few_seeds():
    assert _kind(torch.tanh, 2, 1, 3) == "mixed"
    with pytest.raises(OptionError, match="seeds=2"):
        probe_axis(torch.tanh, torch.randn(2, 3), axis_in=0, axis_out=0, seeds=2)


def test_probe_finds_paths_that_a_dead_unit_hides():
    gate = lambda x: x * torch.relu(x.sum(1, keepdim=True) + 1e-3)  # noqa: E731
    x = torch.randn(1, 6, 4)
    x -= x.mean(1, keepdim=True) + 1e-2  # the sum over positions is just below zero: the gate is shut
    assert not gate(x).any()
    assert probe_axis(gate, x, axis_in=1, axis_out=1).kind == "mixed"


def test_probe_draws_the_same_numbers_each_time_and_puts_the_state_back():
    drawn = []

    def noisy(x: Tensor) -> Tensor:
        drawn.append(torch.rand(3))
        return x * 2

    x = torch.randn(2, 5, requires_grad=True)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert probe_axis(noisy, x, axis_in=1, axis_out=1, seeds=5).kind == "position-wise"
    assert torch.equal(torch.get_rng_state(), state)
    assert len(drawn) == 5
    assert all(torch.equal(values, drawn[0]) for values in drawn)
    assert x.grad is None


def test_probe_puts_the_state_back_after_an_error():
    def broken(x: Tensor) -> Tensor:
        torch.rand(3)
        raise ZeroDivisionError

    x, state = torch.randn(2, 5), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        probe_axis(broken, x, axis_in=1, axis_out=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: x.cumsum(1), False),
        (lambda x: x * x.detach().sum(1, keepdim=True), True),
        (lambda x: x + (x.sum(-1).argmax(1) < 3)[:, None, None], True),
        (lambda x: F.dropout(x, 0.5), False),
        (lambda x: x.flip(1), True),
    ],
)
def test_dependence_without_gradient_is_seen_by_value(fn: Callable[[Tensor], Tensor], expected: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 4)
    state = torch.get_rng_state()
    assert sees_later(fn, x, axis_in=1, axis_out=1) is expected
    assert torch.equal(torch.get_rng_state(), state)


def _detached_mean(x: Tensor) -> Tensor:
    return x * x.detach().mean(0)


def _capacity(x: Tensor) -> Tensor:
    """Two experts with room for two samples each: one sample more than that is dropped."""
    expert = (x.sum(1) > 0).long()
    turn = F.one_hot(expert, 2).cumsum(0).gather(1, expert[:, None])
    return torch.where(turn <= 2, x * (expert[:, None] + 1), 0.0)


def _without_doubles(x: Tensor) -> Tensor:
    """Samples that are met twice are dropped."""
    equal = (x[:, None] == x[None]).all(-1).sum(1)
    return x * (equal == 1)[:, None]


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (torch.tanh, False),
        (_without_doubles, True),
        (lambda x: x @ torch.ones(3, 4), False),
        (lambda x: F.dropout(x, 0.5), False),
        (_detached_mean, True),
        (_capacity, True),
        (lambda x: x + (x.sum() > 1), True),
        (lambda x: x + 1e-9 * x.detach().mean(0), False),
    ],
)
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_changes_of_other_positions_are_seen_by_value(fn: Callable[[Tensor], Tensor], expected: bool, size: int):
    torch.manual_seed(1)
    if fn is not _capacity or size > 3:
        assert contradicts("position-wise", fn, torch.randn(size, 3), axis_in=0, axis_out=0) is expected


@pytest.mark.parametrize("reader", range(6))
@pytest.mark.parametrize("read", range(6))
def test_a_single_reader_is_seen_by_value(reader: int, read: int):
    def fn(x: Tensor) -> Tensor:
        return x + F.one_hot(torch.tensor(reader), 6)[:, None] * x.detach()[read]

    assert contradicts("position-wise", fn, torch.randn(6, 2), axis_in=0, axis_out=0) is (reader != read)


def test_changes_are_seen_in_the_direction_a_kind_excludes():
    back = lambda x: x.detach().cumsum(1)  # noqa: E731
    x = torch.randn(2, 5, 3)
    assert not contradicts("causal", back, x, axis_in=1, axis_out=1)
    assert contradicts("anticausal", back, x, axis_in=1, axis_out=1)
    swapped = lambda x: back(x).transpose(0, 1)  # noqa: E731
    assert not contradicts("causal", swapped, x, axis_in=1, axis_out=0)


def test_a_result_that_is_no_number_contradicts():
    fn = lambda x: torch.where(x.sum() > 0, x, float("nan"))  # noqa: E731
    assert contradicts("position-wise", fn, torch.ones(4, 2), axis_in=0, axis_out=0)
    assert not contradicts("position-wise", lambda x: x / 0, torch.ones(4, 2), axis_in=0, axis_out=0)


def test_another_order_of_a_sum_is_rounding():
    def fn(x: Tensor) -> Tensor:
        terms = [x * scale for scale in torch.linspace(0.1, 1, 100)]
        return torch.stack([sum(terms if x[0] > 0 else terms[::-1], torch.zeros(()))]).squeeze(0)

    x = torch.rand(4) + 0.5
    assert not torch.equal(fn(x)[1:], fn(torch.cat([-x[:1], x[1:]]))[1:])
    assert not contradicts("position-wise", fn, x, axis_in=0, axis_out=0)
