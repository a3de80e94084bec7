"""Positions: which outputs have them, by fixed and by symbolic sizes, and how later ones of an input are changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from lbi_compile.passes.layouts import Layout
from lbi_compile.passes.positions import Outputs, later_inputs, outputs_along
from tests.by_hand import ByHand, symbolic

IDS = torch.int64


def along(
    canvas: Any, *sinks: Any, leaves: Sequence[Any] = (), first: Sequence[Any] = (), made_by: Any = torch.relu
) -> tuple[Outputs, ...]:
    """Outputs with positions of a graph with these values; ``first`` are outputs that are no sinks."""
    by_hand = ByHand()
    inputs = [by_hand.input(f"x{i}", leaf) for i, leaf in enumerate(leaves)]
    middle = by_hand.call("canvas", *inputs, value=canvas, target=made_by)
    others = [by_hand.call(f"other{i}", middle, value=value) for i, value in enumerate(first)]
    results = [by_hand.call(f"out{i}", middle, value=value) for i, value in enumerate(sinks)]
    gm = by_hand.output(*others, *results)
    return outputs_along(gm, by_hand.live(*results), middle, batch=None)


def axes(canvas: Any, sink: Any, leaves: Sequence[Any] = ()) -> tuple[int, ...] | None:
    found = along(canvas, sink, leaves=leaves)
    return found[0].axes if found else None


# --- the canvas's positions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("canvas", "sink", "expected"),
    [
        ((2, 5, 3), (2, 5, 4), (1,)),
        ((2, 5, 3), (2, 4, 5), None),  # fixed sizes may be equal by chance: only the canvas's own dim counts
        ((2, 5, 3), (2, 5), None),  # nor in a matrix, whose dim may be the classes
        ((2, 5, 3), (2, 6, 4), None),
        ((2, 3, 4, 5), (2, 7, 4, 5), (2, 3)),
        ((2, 3, 4, 5), (2, 4, 5, 7), (1, 2)),  # two sizes in order are no chance
        ((2, 3, 4, 5), (2, 5, 4, 7), None),
        ((2, 3, 4, 5), (2, 4, 5), None),
        ((2, 3, 4, 5), (2, 4), None),
        ((2, 3), (2, 3), None),
        ((2, 3), (2, 3, 4), None),
        ((2,), (2, 3), None),
        ((), (2, 3), None),
    ],
)
def test_fixed_sizes(canvas: tuple[int, ...], sink: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    assert axes(canvas, sink) == expected


def test_positions_of_the_canvas_may_be_its_last_dim() -> None:
    found = along((2, 3, 5), (2, 5, 4), (2, 7, 5), made_by=torch.ops.aten.group_norm.default)
    assert [(one.sink.name, one.axes, one.canvas) for one in found] == [("out1", (2,), Layout(0, 1, 3))]


@pytest.mark.parametrize(
    ("canvas", "sink", "expected"),
    [
        ((2, 5, 3), (2, 5), (1,)),
        ((2, 5, 3), (2, 7, 5), (2,)),
        ((2, 5, 3), (5, 7, 3), None),  # dim 0 counts samples
        ((2, 3, 4, 5), (2, 4, 5), (1, 2)),
        ((2, 3, 4, 5), (2, 7, 6, 4, 5), (3, 4)),
        ((2, 3, 4, 5), (2, 5, 4), None),
    ],
)
def test_symbols_are_the_same_positions_wherever_they_stand(
    canvas: tuple[int, ...], sink: tuple[int, ...], expected: tuple[int, ...] | None
) -> None:
    fake = symbolic()
    assert axes(fake(*canvas), fake(*sink)) == expected


def test_the_record_of_an_output_of_the_canvas() -> None:
    (found,) = along((2, 3, 4, 5), (2, 7, 4, 5), leaves=[torch.empty(2, 4, dtype=IDS)], first=[(2, 7, 4, 5)])
    assert (found.sink.name, found.index, found.axes) == ("out0", 1, (2, 3))
    assert (found.length, found.canvas) == (20, Layout(0, 1, 4))
    assert (found.inputs, found.size) == ((), None)  # no single axis that an input could have


def test_the_record_of_an_output_of_one_axis() -> None:
    fake = symbolic()
    (found,) = along(fake(2, 5, 3), fake(2, 5), leaves=[fake(2, 6, 3), fake(2, 5, dtype=IDS), fake(2, 5, 7)])
    assert (found.axes, found.length, found.canvas) == ((1,), 5, Layout(0, 2, 3))
    assert found.inputs == ((1, 1), (2, 1))
    assert found.size == str(found.sink.meta["val"].shape[1])
    assert not found.size.isdigit()


# --- an input's positions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "sequence"),
    [
        (torch.empty(2, 7, dtype=IDS), True),
        (torch.empty(2, 7, 3), True),
        (torch.empty(2, 7, 3, dtype=IDS), True),
        (torch.empty(2, 7), False),  # features
        (torch.empty(7, dtype=IDS), False),
        (torch.empty(2, 7, 3, 4), False),
        (torch.empty(2, 7, 3, 4, dtype=IDS), False),
        (torch.empty(2, 6, dtype=IDS), False),
        (7, False),
        (None, False),
    ],
)
def test_which_inputs_are_sequences(leaf: Any, sequence: bool) -> None:
    found = along((2, 4), (2, 7, 9), leaves=[None, leaf])
    assert [(one.axes, one.inputs, one.canvas, one.length, one.size) for one in found] == (
        [((1,), ((1, 1),), None, 7, "7")] if sequence else []
    )


def test_an_output_without_features_needs_a_symbol() -> None:
    fake = symbolic()
    assert axes((2, 4), (2, 7), [torch.empty(2, 7, dtype=IDS)]) is None
    assert axes((2, 4), fake(2, 7), [fake(2, 7, dtype=IDS)]) == (1,)
    assert axes((2, 4), fake(7), [fake(2, 7, dtype=IDS)]) is None
    assert axes((2, 4), (), [fake(2, 7, dtype=IDS)]) is None


def test_a_later_input_may_be_the_one_with_the_symbol() -> None:
    fake = symbolic()
    assert axes((2, 4), fake(2, 7), [fake(2, 6, dtype=IDS), fake(2, 7), fake(2, 7, dtype=IDS)]) == (1,)


# --- folding ------------------------------------------------------------------------------------------------------


def output(axes: tuple[int, ...] = (1,), *, length: int = 8, index: int = 0, leaves: Sequence[int] = (0,)) -> Outputs:
    node = fx.Graph().placeholder("x")
    return Outputs(node, index, axes, length, None, tuple((leaf, 1) for leaf in leaves), None)


@pytest.mark.parametrize(
    ("axes", "shape", "at"),
    [
        ((1,), (2, 5, 3), lambda x: x),
        ((1,), (2, 5), lambda x: x),
        ((2,), (2, 3, 5), lambda x: x.transpose(1, 2)),
        ((2, 3), (2, 3, 4, 5), lambda x: x.flatten(2).transpose(1, 2)),
        ((1, 2), (2, 4, 5, 3, 6), lambda x: x.flatten(1, 2)),
    ],
)
def test_positions_stand_behind_the_samples(
    axes: tuple[int, ...], shape: tuple[int, ...], at: Callable[[Tensor], Tensor]
) -> None:
    value = torch.arange(torch.Size(shape).numel()).reshape(shape)
    assert torch.equal(output(axes).fold(value), at(value))


# --- later positions of an input ----------------------------------------------------------------------------------


def reads(*pairs: tuple[int, int]) -> Callable[[list[Any]], list[Tensor]]:
    """Position p of the output is position p of input 0, plus position q of it for every pair (p, q)."""

    def run(leaves: list[Any]) -> list[Tensor]:
        out = leaves[0].clone()
        for p, q in pairs:
            out[:, p] += leaves[0][:, q]
        return [out]

    return run


SEQUENCES = {"floats": torch.linspace(1, 2, 16).reshape(2, 8), "integers": torch.arange(16).reshape(2, 8)}


@pytest.mark.parametrize("leaf", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize(
    ("pairs", "sees"), [([], False), ([(7, 0)], False), ([(0, 1)], True), ([(3, 4)], True), ([(6, 7)], True)]
)
def test_a_look_ahead_is_seen_at_the_first_the_middle_and_the_last_place(
    leaf: Tensor, pairs: list[tuple[int, int]], sees: bool
) -> None:
    pair = frozenset({(0, 0)})
    assert later_inputs(reads(*pairs), [leaf], [output()]) == ((pair, frozenset()) if sees else (frozenset(), pair))


@pytest.mark.parametrize("leaf", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize(("size", "places"), [(8, [1, 4, 7]), (3, [1, 2]), (2, [1]), (1, [])])
def test_later_positions_alone_are_changed_and_integers_keep_their_range(
    leaf: Tensor, size: int, places: list[int]
) -> None:
    leaf, other, given = leaf[:, :size], torch.ones(3), []
    kept = leaf.clone()

    def run(leaves: list[Any]) -> list[Tensor]:
        assert not torch.is_grad_enabled()
        given.append(leaves)
        return [leaves[0].clone()]

    found = later_inputs(run, [leaf, other], [output(length=size)])
    assert found == (frozenset(), frozenset({(0, 0)} if places else ()))
    assert torch.equal(leaf, kept)
    (first, same), *changed = given
    assert torch.equal(first, kept)
    assert same is other
    assert len(changed) == len(places)
    for t, (new, same) in zip(places, changed, strict=True):
        assert same is other
        assert torch.equal(new[:, :t], kept[:, :t])
        assert (new[:, t:] != kept[:, t:]).any(0).any()
        if not leaf.is_floating_point():
            assert kept.min() <= new.min()
            assert new.max() <= kept.max()


@pytest.mark.parametrize("mask", [torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 8, dtype=IDS)])
def test_what_cannot_be_changed_tells_nothing(mask: Tensor) -> None:
    run = reads((0, 1))
    assert later_inputs(lambda leaves: run([leaves[0].long()]), [mask], [output()]) == (frozenset(), frozenset())


def test_zeros_are_changed() -> None:
    assert later_inputs(reads((0, 1)), [torch.zeros(2, 8)], [output()])[0] == {(0, 0)}


def test_every_output_and_input_is_a_pair_of_its_own() -> None:
    """Output 1 is causal in input 0 and reads ahead in input 2; output 0 has positions of input 2 alone."""

    def run(leaves: list[Any]) -> list[Tensor]:
        first, _, second = leaves
        return [second, first.cumsum(1) + second.flip(1)]

    leaves = [SEQUENCES["floats"], None, SEQUENCES["floats"] + 1]
    outputs = [output(index=0, leaves=[2]), output(index=1, leaves=[0, 2])]
    assert later_inputs(run, leaves, outputs) == ({(1, 2)}, {(1, 0), (0, 2)})


def test_without_positions_nothing_runs() -> None:
    def run(leaves: list[Any]) -> list[Tensor]:
        raise AssertionError("nothing to compare")

    assert later_inputs(run, [torch.ones(2, 8)], [output(leaves=[])]) == (frozenset(), frozenset())
