"""The order of nodes: what they wait for first, then groups that are told apart, else as they stand."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from lbi_compile.errors import EngineError
from lbi_compile.passes.ordering import sort


def graph(*edges: str) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """``"c<ab"``: node c reads a and b, which may stand after it; ``"x"``: an input."""
    made, nodes = fx.Graph(), {}
    for edge in edges:
        name = edge[0]
        nodes[name] = made.call_function(torch.add, (), name=name) if "<" in edge else made.placeholder(name)
    for edge in edges:
        if "<" in edge:
            nodes[edge[0]].args = tuple(nodes[name] for name in edge[2:])
    return made, nodes


def order(made: fx.Graph) -> str:
    return "".join(node.name for node in made.nodes)


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        (("x", "a<x", "b<x", "c<ab"), "xabc"),
        (("x", "c<ab", "a<x", "b<x"), "xabc"),
        (("x", "c<b", "b<a", "a<x"), "xabc"),
        (("x", "c<b", "d<x", "b<x"), "xdbc"),  # others keep their places
        (("x", "d<xa", "c<x", "b<c", "a<b"), "xcbad"),
        (("x", "a<xx", "b<aa"), "xab"),
        (("a<", "x", "b<ax"), "xab"),  # inputs first
        (("x", "a<y", "y", "b<x"), "xyab"),
    ],
)
def test_inputs_come_before_their_readers(edges: tuple[str, ...], expected: str) -> None:
    made, _ = graph(*edges)
    sort(made)
    assert order(made) == expected
    made.lint()


def test_the_forward_comes_before_all_others_as_far_as_it_can() -> None:
    made, nodes = graph("x", "a<x", "f<x", "b<a", "g<fb", "h<f")
    sort(made, forward=lambda node: node in {nodes[name] for name in "fgh"})
    assert order(made) == "xfhabg"


def test_marked_nodes_keep_their_order_among_themselves() -> None:
    """``a`` stands before ``b`` and is drawn first, though what it reads comes later."""
    edges = ("x", "a<c", "b<x", "d<x", "c<x")
    made, _ = graph(*edges)
    sort(made)
    assert order(made) == "xbdca"
    made, nodes = graph(*edges)
    sort(made, in_order=lambda node: node in (nodes["a"], nodes["b"]))
    assert order(made) == "xdcab"
    made, _ = graph(*edges)
    sort(made, in_order=lambda node: node.op != "placeholder" and node.name in "bd")
    assert order(made) == "xbdca"


@pytest.mark.parametrize("edges", [("x", "a<bx", "b<a"), ("x", "a<x", "b<ba"), ("a<b", "b<a")])
def test_nodes_that_wait_for_each_other_are_refused_where_they_stand(edges: tuple[str, ...]) -> None:
    made, _ = graph(*edges)
    before = order(made)
    with pytest.raises(EngineError, match="depend on each other"):
        sort(made)
    assert order(made) == before


def test_an_order_that_values_forbid_is_refused() -> None:
    made, nodes = graph("x", "a<b", "b<x")
    with pytest.raises(EngineError):
        sort(made, in_order=lambda node: node in (nodes["a"], nodes["b"]))
