"""Axis rules of indices, sorts, tables and recurrent nets: single calls, random graphs, batches of routed tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.axis_checks import brief, check, module, single_call, trace
from tests.layer_graphs import grow_layers
from tests.random_graphs import Builder

aten = torch.ops.aten


def _best(b: Builder, x: fx.Node, dim: int) -> Any:
    """Indices that x itself decides: `[2, 3]` for the last dim."""
    return b.call(aten.argmax.default, x, dim)


def _recurrent(b: Builder, x: fx.Node, kind: str, result: int, *, first: bool, layers: int = 1, hx: Any = None) -> Any:
    """A net with one hidden number a layer on `[2, 3, 4]`."""
    gates = {"lstm": 4, "gru": 3, "rnn_tanh": 1}[kind]
    weights = []
    for layer in range(layers):
        weights += [b.constant(gates, 1 if layer else 4), b.constant(gates, 1)]
    state = b.constant(layers, 2 if first else 3, 1) if hx is None else hx
    states = [state, b.constant(*b.values[state].shape)] if kind == "lstm" else state
    call = getattr(aten, kind).input
    return b.item(b.call(call, x, states, weights, False, layers, 0.0, True, False, first), result)


def _into_itself(b: Builder, index: Any) -> fx.Node | None:
    return b.call(aten.index.Tensor, index, [None, index])


# One call on x [2, 3, 4]. Where the result holds each axis of x: see ``brief``.
CALLS: dict[str, tuple[str, Callable[[Builder, fx.Node], fx.Node | None]]] = {
    "argsort": ("0 - 2", lambda b, x: b.call(aten.argsort.default, x, 1)),
    "sort, stable": ("- 1 2", lambda b, x: b.item(b.call(aten.sort.stable, x, stable=True, dim=0), 1)),
    "msort": ("- 1 2", lambda b, x: b.call(aten.msort.default, x)),
    "topk": ("0 1 -", lambda b, x: b.item(b.call(aten.topk.default, x, 2), 1)),
    "kthvalue": ("0 1 -", lambda b, x: b.item(b.call(aten.kthvalue.default, x, 2), 0)),
    "kthvalue of samples": ("- 0 1", lambda b, x: b.item(b.call(aten.kthvalue.default, x, 2, 0), 1)),
    "one_hot": ("0 1 -", lambda b, x: b.call(aten.one_hot.default, _best(b, x, 2), 5)),
    "bucketize": ("0 1 2", lambda b, x: b.call(aten.bucketize.Tensor, x, b.constant(5))),
    "isin": ("0 1 2", lambda b, x: b.call(aten.isin.Tensor_Tensor, x, b.constant(5))),
    "embedding": ("0 1 -", lambda b, x: b.call(aten.embedding.default, b.constant(5, 7), _best(b, x, 2))),
    "gather by own indices": (
        "0 1 -",
        lambda b, x: b.call(aten.gather.default, x, 2, b.call(aten.argsort.default, x, 2)),
    ),
    "gather by indices of samples": (
        "- 1 2",
        lambda b, x: b.call(aten.gather.default, x, 0, b.call(aten.argsort.default, x, 0)),
    ),
    "gather from a table": (
        "0 - 2",
        lambda b, x: b.call(aten.gather.default, b.constant(2, 9, 4), 1, b.call(aten.argsort.default, x, 1)),
    ),
    "take_along_dim": (
        "0 - 2",
        lambda b, x: b.call(aten.take_along_dim.default, x, b.call(aten.argsort.default, x, 1), 1),
    ),
    "take_along_dim of all": (
        "- - -",
        lambda b, x: b.call(aten.take_along_dim.default, x, b.constant(5, high=24)),
    ),
    "scatter a value": (
        "0 1 -",
        lambda b, x: b.call(aten.scatter.value, x, 2, b.call(aten.argsort.default, x, 2), 0.5),
    ),
    "scatter_reduce": (
        "0 - 2",
        lambda b, x: b.call(aten.scatter_reduce.two, b.constant(2, 5, 4), 1, b.constant(2, 3, 4, high=5), x, "amax"),
    ),
    "index_select by own indices": (
        "1/3 1 -",
        lambda b, x: b.call(
            aten.index_select.default, b.constant(5, 7), 1, b.call(aten.flatten.using_ints, _best(b, x, 2))
        ),
    ),
    "index_select of x by own indices": (
        "- - -",
        lambda b, x: b.call(aten.index_select.default, x, 2, b.call(aten.select.int, _best(b, x, 2), 0, 0)),
    ),
    "index_add": (
        "0 - 2",
        lambda b, x: b.call(aten.index_add.default, b.constant(2, 5, 4), 1, b.constant(3, high=5), x),
    ),
    "index_add to x": (
        "0 - 2",
        lambda b, x: b.call(aten.index_add.default, x, 1, b.constant(5, high=3), b.constant(2, 5, 4)),
    ),
    "index_add by own indices": (
        "- - -",
        lambda b, x: b.call(
            aten.index_add.default,
            b.constant(5, 7),
            0,
            b.call(aten.flatten.using_ints, _best(b, x, 2)),
            b.constant(6, 7),
        ),
    ),
    "index_copy": (
        "0 1 -",
        lambda b, x: b.call(aten.index_copy.default, b.constant(2, 3, 5), 2, b.constant(4, high=5), x),
    ),
    "index_fill": ("- 1 2", lambda b, x: b.call(aten.index_fill.int_Scalar, x, 0, b.constant(1, high=2), 0.0)),
    "index, table of experts": (
        "0 1 -",
        lambda b, x: b.call(aten.index.Tensor, b.constant(5, 7, 8), [_best(b, x, 2)]),
    ),
    "index, second dim of a table": (
        "1 2 -",
        lambda b, x: b.call(aten.index.Tensor, b.constant(8, 5, 7), [None, _best(b, x, 2)]),
    ),
    "index, two lists": (
        "0 1 -",
        lambda b, x: b.call(aten.index.Tensor, b.constant(5, 6, 7), [_best(b, x, 2), b.constant(3, high=6)]),
    ),
    "index, a list beside a table": (
        "1 - -",
        lambda b, x: b.call(
            aten.index.Tensor,
            b.constant(4, 6, 7),
            [_best(b, b.call(aten.select.int, x, 1, 0), 1), b.constant(5, 2, high=6)],
        ),
    ),
    "index, two lists apart": (
        "0 1 -",
        lambda b, x: b.call(aten.index.Tensor, b.constant(5, 6, 7), [_best(b, x, 2), None, b.constant(3, high=7)]),
    ),
    "index, two own lists that differ": (
        "- 0 -",
        lambda b, x: b.call(
            aten.index.Tensor,
            b.constant(9, 9),
            [_best(b, b.call(aten.select.int, x, 0, 0), 1), _best(b, b.call(aten.select.int, x, 0, 1), 1)],
        ),
    ),
    "index_put by a mask of x": (
        "- - -",
        lambda b, x: b.call(aten.index_put.default, x, [b.call(aten.gt.Scalar, x, 1.0)], b.constant()),
    ),
    "index into itself": ("- - -", lambda b, x: _into_itself(b, b.call(aten.remainder.Scalar, _best(b, x, 2), 2))),
    "index_put": (
        "0 - 2",
        lambda b, x: b.call(aten.index_put.default, x, [None, b.constant(2, high=3)], b.constant(2, 2, 4)),
    ),
    "index_put of x": (
        "0 - 2",
        lambda b, x: b.call(aten.index_put.default, b.constant(2, 9, 4), [None, b.constant(3, high=9)], x, True),
    ),
    "index_put, apart": (
        "- 1 -",
        lambda b, x: b.call(
            aten.index_put.default,
            b.constant(2, 3, 4),
            [b.constant(5, high=2), None, b.constant(5, high=4)],
            b.call(aten.select.int, b.call(aten.select.int, x, 2, 0), 0, 0),
        ),
    ),
    "index_put, apart, in x": (
        "- 1 -",
        lambda b, x: b.call(
            aten.index_put.default, x, [b.constant(5, high=2), None, b.constant(5, high=4)], b.constant(5, 3)
        ),
    ),
    "index_put by own indices": (
        "- - -",
        lambda b, x: b.call(aten.index_put.default, b.constant(5, 7), [_best(b, x, 2)], b.constant(7)),
    ),
    "cdist": ("0 1 -", lambda b, x: b.call(aten.cdist.default, x, b.constant(5, 4))),
    "cdist of itself": ("0 - -", lambda b, x: b.call(aten.cdist.default, x, x)),
    "lstm": ("0 - -", lambda b, x: _recurrent(b, x, "lstm", 0, first=True)),
    "lstm, two layers": ("0 - -", lambda b, x: _recurrent(b, x, "lstm", 0, first=True, layers=2)),
    "lstm, last state": ("1 - -", lambda b, x: _recurrent(b, x, "lstm", 1, first=True)),
    "lstm, last cell": ("1 - -", lambda b, x: _recurrent(b, x, "lstm", 2, first=True)),
    "lstm, time first": ("- 1 -", lambda b, x: _recurrent(b, x, "lstm", 0, first=False)),
    "gru": ("0 - -", lambda b, x: _recurrent(b, x, "gru", 0, first=True)),
    "gru, time first, last state": ("- 1 -", lambda b, x: _recurrent(b, x, "gru", 1, first=False)),
    "gru, x as first state": (
        "0 - -",
        lambda b, x: _recurrent(
            b,
            b.constant(2, 5, 4),
            "gru",
            0,
            first=True,
            hx=b.call(aten.mean.dim, b.call(aten.view.default, x, [1, 2, 12]), [2], True),
        ),
    ),
    "rnn": ("- 1 -", lambda b, x: _recurrent(b, x, "rnn_tanh", 0, first=False)),
}


@pytest.mark.parametrize("name", CALLS)
def test_rules_of_single_calls(name: str):
    expected, call = CALLS[name]
    build, node, found = single_call(call)
    gm = module(build, node)
    assert found == expected.split()
    if isinstance(build.values[node], Tensor) and build.values[node].is_floating_point():
        check(gm, build)


@pytest.mark.parametrize("first", [True, False])
def test_a_value_given_twice_carries_its_axis_twice(first: bool):
    """As inputs it has its samples in one dim, as first states in another."""
    build = Builder((2, 2, 2))
    weights = [build.constant(6, 2) for _ in range(4)]
    found = build.call(aten.gru.input, build.source, build.source, weights, False, 2, 0.0, True, False, first)
    out = build.item(found, 0)
    assert out is not None
    states = [brief(trace(build, axis)[out]) for axis in range(3)]
    assert states == ["-", "-" if first else "1", "-"]
    check(module(build, out), build)


def _check_states(seeds: range) -> None:
    for seed in seeds:
        draw = random.Random(seed)
        shape = draw.choice([(2, 3, 4), (3, 2, 4), (2, 4, 2), (4, 3, 2), (2, 6, 4)])
        build = grow_layers(shape, draw.randint(1, 6), lambda options, d=draw: d.choice(list(options)))
        check(module(build, build.tensors()[-1]), build)


def test_static_proofs_hold_on_random_graphs():
    _check_states(range(100))


@pytest.mark.slow
def test_static_proofs_hold_on_many_random_graphs():
    _check_states(range(100, 3000))
