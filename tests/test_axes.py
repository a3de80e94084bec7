"""Axes: static proofs against what results really depend on, probes against known functions, and the two together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.export import Dim

from lbi_compile.errors import BatchCouplingError, OptionError
from lbi_compile.passes.axes import Verdict, batch_coupling, classify, coupling_error, probe_axis, trace_axis
from lbi_compile.passes.axis_calls import AxisState
from lbi_compile.passes.costs import costs
from tests.random_graphs import Builder, changed, grow

aten = torch.ops.aten


# --- programs -----------------------------------------------------------------------------------------------------


@dataclass
class Program:
    """A captured model and the part of it from ``source`` to its first output."""

    gm: fx.GraphModule
    x: Tensor
    source: fx.Node

    def __post_init__(self) -> None:
        order = list(self.gm.graph.nodes)
        self.sink: fx.Node = self.gm.graph.output_node().all_input_nodes[0]
        self.nodes = [n for n in order[order.index(self.source) + 1 :] if n.op == "call_function"]
        self.shapes = costs(self.gm, example=(self.x,)).shape
        self._kept = _Keep(self.gm)
        with torch.no_grad():
            self._kept.run(self.x)
        self.values = dict(self._kept.env)

    def run(self, value: Tensor) -> Tensor:
        """The nodes on real numbers."""
        self._kept.env = {**self.values, self.source: value}
        for node in self.nodes:
            self._kept.env[node] = self._kept.run_node(node)
        return self._kept.env[self.sink]

    def ask(self, axis: int, *, measure: bool = False) -> Verdict:
        """``classify`` along an axis of input and output."""
        extra: dict[str, Any] = {"fn": self.run, "example": self.values[self.source]} if measure else {}
        ends: dict[str, Any] = {"source": self.source, "sink": self.sink, "shapes": self.shapes}
        return classify(self.nodes, axis_in=axis, axis_out=axis, **ends, **extra)


class _Keep(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)


def program(model: nn.Module, x: Tensor, *, training: bool = True, dims: int = 0, source: str = "") -> Program:
    """Capture; the first ``dims`` axes are dynamic; ``source`` is the node whose name starts so, else the input."""
    shapes = ({i: Dim.DYNAMIC for i in range(dims)},) if dims else None
    exported = torch.export.export(model.train(training), (x,), dynamic_shapes=shapes, strict=False)
    gm = exported.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    nodes = list(gm.graph.nodes)
    found = next(n for n in nodes if (n.name.startswith(source) if source else n.op == "placeholder"))
    return Program(gm, x, found)


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class FlatMLP(nn.Module):
    """A transformer's MLP the way GPT-2 runs it: on ``[B*T, D]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        y = self.norm(x).view(-1, d)
        return x + self.drop(self.down(F.gelu(self.up(y)))).view(b, t, d)


class GPT2(nn.Module):
    """A GPT-2 of two blocks that returns its logits."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes: dict[str, Any] = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 16}
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, bos_token_id=1, eos_token_id=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


# --- static proofs ------------------------------------------------------------------------------------------------


def _kept_index(state: AxisState, shape: torch.Size, size: int) -> Tensor:
    """Axis position of every element by the definition of ``AxisState``."""
    index = torch.arange(shape[state.dim]) // state.stride % size
    return index.view([-1 if i == state.dim else 1 for i in range(len(shape))])


def _trace(build: Builder, axis: int) -> Mapping[fx.Node, AxisState]:
    shapes = {node: tuple(v.shape) if isinstance(v, Tensor) else None for node, v in build.values.items()}
    for node, value in build.values.items():
        node.meta["val"] = value
    nodes = [node for node in build.graph.nodes if node.op == "call_function"]
    return trace_axis(nodes, source=build.source, axis=axis, shapes=shapes)


def _check(gm: fx.GraphModule, build: Builder) -> None:
    """Every state against what changes when the source does, and a proof for the output against the probe."""
    sink = gm.graph.output_node().all_input_nodes[0]
    writes = any("_." in str(node.target) for node in gm.graph.nodes)
    for axis, size in enumerate(build.x.shape):
        states = _trace(build, axis)
        for position in range(size):
            for node, mask in changed(gm, build, axis=axis, position=position).items():
                state = states.get(node)
                if state is None or state.kind == "mixed":
                    continue
                allowed = torch.zeros_like(mask)
                if state.kind == "at":
                    allowed |= _kept_index(state, mask.shape, size) == position
                assert not (mask & ~allowed).any(), f"axis {axis} of {node} is no {state}:\n{gm.graph}"
        last = states[sink]
        if last.kind == "at" and last.stride == 1 and build.values[sink].shape[last.dim] == size and not writes:
            constants = [value.clone() for value in build.constants]
            found = probe_axis(partial(_call_with, gm, constants), build.x, axis_in=axis, axis_out=last.dim)
            assert found.kind == "position-wise" or "NaN" in found.why, f"{found}\n{gm.graph}"


def _call_with(gm: fx.GraphModule, constants: list[Tensor], x: Tensor) -> Tensor:
    return gm(x, *constants)


def _check_random(data: st.DataObject) -> None:
    sizes = data.draw(st.sampled_from([(2, 3, 4), (3, 5, 2), (2, 2, 2), (4, 3), (3, 2, 2, 4), (6, 2, 3)]))
    _check(*grow(sizes, data.draw(st.integers(1, 7)), lambda options: data.draw(st.sampled_from(list(options)))))


_PROPERTY: Any = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@given(st.data())
@settings(max_examples=100, **_PROPERTY)
def test_static_proofs_hold_on_random_graphs(data: st.DataObject):
    _check_random(data)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=3000, **_PROPERTY)
def test_static_proofs_hold_on_many_random_graphs(data: st.DataObject):
    _check_random(data)


# One call on x [2, 3, 4]. Where the result holds each axis of x: a dim, "dim/stride", "-" for mixed, "a" for absent.
CALLS: dict[str, tuple[str, Callable[[Builder, fx.Node], fx.Node | None]]] = {
    "relu": ("0 1 2", lambda b, x: b.call(aten.relu.default, x)),
    "add, broadcast": ("1 2 3", lambda b, x: b.call(aten.add.Tensor, x, b.constant(5, 2, 1, 4))),
    "add, crossed": (
        "0 - 3",
        lambda b, x: b.call(
            aten.add.Tensor, b.call(aten.unsqueeze.default, x, 1), b.call(aten.unsqueeze.default, x, 2)
        ),
    ),
    "where": ("0 1 2", lambda b, x: b.call(aten.where.self, b.call(aten.gt.Scalar, x, 1.0), x, x)),
    "maximum of two": ("0 1 2", lambda b, x: b.call(aten.max.other, x, x)),
    "maximum of all": ("- - -", lambda b, x: b.call(aten.max.default, x)),
    "masked_fill": ("0 1 2", lambda b, x: b.call(aten.masked_fill.Scalar, x, b.call(aten.gt.Scalar, x, 1.0), 0.0)),
    "prelu": ("0 1 2", lambda b, x: b.call(aten.prelu.default, x, b.constant(3))),
    "dropout": ("0 1 2", lambda b, x: b.call(aten.dropout.default, x, 0.5, True)),
    "tril": ("0 1 2", lambda b, x: b.call(aten.tril.default, x)),
    "to": ("0 1 2", lambda b, x: b.call(aten.to.dtype, x, torch.float32)),
    "type_as": ("a a a", lambda b, x: b.call(aten.type_as.default, b.constant(2), x)),
    "copy in place": ("1 2 3", lambda b, x: b.call(aten.copy_.default, b.constant(5, 2, 3, 4), x)),
    "zeros_like": ("a a a", lambda b, x: b.call(aten.zeros_like.default, x)),
    "full_like": ("a a a", lambda b, x: b.call(aten.full_like.default, x, 2.0)),
    "item": ("- - -", lambda b, x: b.call(aten.item.default, b.call(aten.sum.default, x))),
    "linear": ("0 1 -", lambda b, x: b.call(aten.linear.default, x, b.constant(5, 4), b.constant(5))),
    "linear with x as its weight": (
        "- 1 -",
        lambda b, x: b.call(aten.linear.default, b.constant(6, 4), b.call(aten.select.int, x, 0, 1)),
    ),
    "addmm of a flattened batch": (
        "0/3 0 -",
        lambda b, x: b.call(aten.addmm.default, b.constant(5), b.call(aten.view.default, x, [6, 4]), b.constant(4, 5)),
    ),
    "matmul": ("1 2 -", lambda b, x: b.call(aten.matmul.default, x, b.constant(5, 2, 4, 6))),
    "matmul from the left": ("0 - 2", lambda b, x: b.call(aten.matmul.default, b.constant(5, 3), x)),
    "matmul with a vector": ("0 1 -", lambda b, x: b.call(aten.matmul.default, x, b.constant(4))),
    "bmm with itself": ("0 - -", lambda b, x: b.call(aten.bmm.default, x, b.call(aten.transpose.int, x, 1, 2))),
    "einsum": ("2 0 -", lambda b, x: b.call(aten.einsum.default, "btd,de->teb", [x, b.constant(4, 5)])),
    "einsum, ellipsis": ("0 1 -", lambda b, x: b.call(aten.einsum.default, "...d,d->...", [x, b.constant(4)])),
    "einsum, no arrow": ("- - -", lambda b, x: b.call(aten.einsum.default, "btd", [x])),
    "embedding": (
        "0 1 2",
        lambda b, x: b.call(
            aten.embedding.default, b.constant(9, 5), b.call(aten.to.dtype, b.call(aten.abs.default, x), torch.int64)
        ),
    ),
    "attention over itself": (
        "0 - -",
        lambda b, x: b.call(aten.scaled_dot_product_attention.default, x, x, x),
    ),
    "attention to constants": (
        "0 1 -",
        lambda b, x: b.call(aten.scaled_dot_product_attention.default, x, b.constant(2, 5, 4), b.constant(2, 5, 6)),
    ),
    "attention with grouped queries": (
        "0 - -",
        lambda b, x: b.call(
            aten.scaled_dot_product_attention.default,
            b.constant(2, 6, 5, 4),
            b.call(aten.unsqueeze.default, x, 2),
            b.call(aten.unsqueeze.default, x, 2),
            enable_gqa=True,
        ),
    ),
    "layer_norm": ("0 1 -", lambda b, x: b.call(aten.layer_norm.default, x, [4], b.constant(4), b.constant(4))),
    "rms_norm of two dims": ("0 - -", lambda b, x: b.call(aten.rms_norm.default, x, [3, 4])),
    "group_norm": ("0 - -", lambda b, x: b.call(aten.group_norm.default, x, 3)),
    "instance_norm": (
        "0 1 -",
        lambda b, x: b.call(aten.instance_norm.default, x, None, None, None, None, True, 0.1, 1e-5, False),
    ),
    "batch_norm, training": (
        "- 1 -",
        lambda b, x: b.call(aten.batch_norm.default, x, None, None, None, None, True, 0.1, 1e-5, False),
    ),
    "batch_norm, evaluation": (
        "0 1 2",
        lambda b, x: b.call(
            aten.batch_norm.default, x, None, None, b.constant(3), b.constant(3), False, 0.1, 1e-5, False
        ),
    ),
    "softmax": ("0 - 2", lambda b, x: b.call(aten.softmax.int, x, -2)),
    "cumsum": ("0 - 2", lambda b, x: b.call(aten.cumsum.default, x, 1)),
    "topk": ("- 1 2", lambda b, x: b.item(b.call(aten.topk.default, x, 1, 0), 0)),
    "sort": ("0 1 -", lambda b, x: b.item(b.call(aten.sort.default, x), 0)),
    "mean": ("0 - 1", lambda b, x: b.call(aten.mean.dim, x, [1])),
    "mean, kept": ("0 - 2", lambda b, x: b.call(aten.mean.dim, x, [-2], True)),
    "sum of all": ("- - -", lambda b, x: b.call(aten.sum.default, x)),
    "max over a dim": ("- 0 1", lambda b, x: b.item(b.call(aten.max.dim, x, 0), 0)),
    "var": ("0 - -", lambda b, x: b.call(aten.var.correction, x, [1, 2], correction=0)),
    "conv1d": ("0 - -", lambda b, x: b.call(aten.conv1d.default, x, b.constant(5, 3, 3), None, [1], [1])),
    "conv1d, pointwise": ("0 - 2", lambda b, x: b.call(aten.conv1d.default, x, b.constant(5, 3, 1))),
    "conv1d, strided": ("0 - -", lambda b, x: b.call(aten.conv1d.default, x, b.constant(5, 3, 1), None, [3])),
    "conv1d, same": ("0 - 2", lambda b, x: b.call(aten.conv1d.padding, x, b.constant(5, 3, 1), None, [1], "same")),
    "conv1d without a batch": ("- - -", lambda b, x: b.call(aten.conv2d.default, x, b.constant(5, 2, 2, 2))),
    "avg_pool1d": ("0 1 -", lambda b, x: b.call(aten.avg_pool1d.default, x, [2])),
    "upsample": ("0 1 -", lambda b, x: b.call(aten.upsample_nearest1d.default, x, [8])),
    "gru_cell": (
        "0 -",
        lambda b, x: b.call(
            aten.gru_cell.default,
            b.call(aten.select.int, x, 2, 0),
            b.constant(2, 5),
            b.constant(15, 3),
            b.constant(15, 5),
        ),
    ),
    "flatten, unflatten": (
        "0 1 2",
        lambda b, x: b.call(aten.view.default, b.call(aten.flatten.using_ints, x, 0, 1), [2, 3, 4]),
    ),
    "flatten all": ("0/12 0/4 0", lambda b, x: b.call(aten.flatten.using_ints, x)),
    "view across": ("- - 1", lambda b, x: b.call(aten.view.default, x, [3, 8])),
    "view that splits a dim": ("0 1 -", lambda b, x: b.call(aten.view.default, x, [2, 3, 2, 2])),
    "view as another type": ("- - -", lambda b, x: b.call(aten.view.dtype, x, torch.float32)),
    "unsqueeze": ("0 2 3", lambda b, x: b.call(aten.unsqueeze.default, x, 1)),
    "transpose": ("2 1 0", lambda b, x: b.call(aten.transpose.int, x, 0, -1)),
    "permute": ("1 2 0", lambda b, x: b.call(aten.permute.default, x, [2, 0, 1])),
    "movedim": ("2 0 1", lambda b, x: b.call(aten.movedim.int, x, 0, 2)),
    "t": ("1 0", lambda b, x: b.call(aten.t.default, b.call(aten.select.int, x, 2, 0))),
    "mT": ("0 2 1", lambda b, x: b.call(aten.mT.default, x)),
    "expand": ("1 2 3", lambda b, x: b.call(aten.expand.default, x, [5, -1, -1, -1])),
    "expand_as": ("a a a", lambda b, x: b.call(aten.expand_as.default, b.constant(4), x)),
    "repeat": ("1 2 3", lambda b, x: b.call(aten.repeat.default, x, [2, 1, 3, 1])),
    "repeat_interleave": ("0 1/2 2", lambda b, x: b.call(aten.repeat_interleave.self_int, x, 2, 1)),
    "repeat_interleave of all": ("- - -", lambda b, x: b.call(aten.repeat_interleave.self_int, x, 2)),
    "slice": ("0 - 2", lambda b, x: b.call(aten.slice.Tensor, x, 1, 1, 3)),
    "slice of all": ("0 1 2", lambda b, x: b.call(aten.slice.Tensor, x, 1, 0, 2**62)),
    "nothing left": (
        "a a a",
        lambda b, x: b.call(aten.view.default, b.call(aten.slice.Tensor, x, 1, 0, 0), [0, 7]),
    ),
    "select": ("0 - 1", lambda b, x: b.call(aten.select.int, x, 1, -1)),
    "unbind": ("- 0 1", lambda b, x: b.item(b.call(aten.unbind.int, x), 1)),
    "split": ("0 1 -", lambda b, x: b.item(b.call(aten.split.Tensor, x, 2, -1), 1)),
    "chunk": ("0 1 -", lambda b, x: b.item(b.call(aten.chunk.default, x, 2, 2), 0)),
    "index_select": ("0 - 2", lambda b, x: b.call(aten.index_select.default, x, 1, b.constant(7, high=3))),
    "flip": ("0 - 2", lambda b, x: b.call(aten.flip.default, x, [1])),
    "roll": ("0 - 2", lambda b, x: b.call(aten.roll.default, x, [1], [1])),
    "roll of all": ("- - -", lambda b, x: b.call(aten.roll.default, x, [1])),
    "unfold": ("0 - 2", lambda b, x: b.call(aten.unfold.default, x, 1, 2, 1)),
    "cat": ("0 - 2", lambda b, x: b.call(aten.cat.default, [x, b.constant(2, 1, 4)], 1)),
    "cat of different axes": (
        "- - 1",
        lambda b, x: b.call(
            aten.cat.default, [b.call(aten.flatten.using_ints, x, 0, 1), b.call(aten.select.int, x, 0, 0)]
        ),
    ),
    "stack": ("0 2 3", lambda b, x: b.call(aten.stack.default, [x, b.constant(2, 3, 4)], 1)),
    "pad, replicate": ("0 1 -", lambda b, x: b.call(aten.pad.default, x, [0, 4], "replicate")),
    "pad": ("0 - 2", lambda b, x: b.call(aten.constant_pad_nd.default, x, [0, 0, 1, -1])),
    "gather": ("0 - 2", lambda b, x: b.call(aten.gather.default, x, 1, b.constant(2, 3, 4, high=3))),
    "gather of a part": ("- - 2", lambda b, x: b.call(aten.gather.default, x, 1, b.constant(1, 3, 4, high=3))),
    "scatter_add": (
        "0 - 2",
        lambda b, x: b.call(aten.scatter_add.default, x, 1, b.constant(2, 3, 4, high=3), b.constant(2, 3, 4)),
    ),
    "index": ("0 - 3", lambda b, x: b.call(aten.index.Tensor, x, [None, b.constant(5, 6, high=3)])),
    "index, apart": (
        "- 1 -",
        lambda b, x: b.call(aten.index.Tensor, x, [b.constant(5, high=2), None, b.constant(5, high=4)]),
    ),
    "index, apart and not in front": (
        "1 - 2",
        lambda b, x: b.call(
            aten.index.Tensor,
            b.call(aten.unsqueeze.default, x, 3),
            [None, b.constant(5, high=3), None, b.constant(5, high=1)],
        ),
    ),
    "index by a mask": (
        "- - -",
        lambda b, x: b.call(aten.index.Tensor, x, [b.call(aten.gt.Scalar, b.constant(2), 0.0)]),
    ),
    "view_as_complex": (
        "0 1/2 -",
        lambda b, x: b.call(aten.view_as_complex.default, b.call(aten.view.default, x, [2, 6, 2])),
    ),
    "no rule": ("- - -", lambda b, x: b.call(aten.cov.default, b.call(aten.select.int, x, 0, 0))),
    "relu in place": ("0 1 2", lambda b, x: b.call(aten.relu_.default, b.call(aten.mul.Tensor, x, 2.0))),
}


@pytest.mark.parametrize("name", CALLS)
def test_rules_of_single_calls(name: str):
    expected, call = CALLS[name]
    build = Builder((2, 3, 4))
    node = call(build, build.source)
    assert node is not None, "the call does not run"
    build.graph.output(node)
    found = [_short(_trace(build, axis)[node]) for axis in range(3)]
    assert found[: len(expected.split())] == expected.split()
    if isinstance(build.values[node], Tensor):
        _check(fx.GraphModule(nn.Module(), build.graph), build)


def _short(state: AxisState) -> str:
    if state.kind != "at":
        return {"absent": "a", "mixed": "-"}[state.kind]
    return str(state.dim) if state.stride == 1 else f"{state.dim}/{state.stride}"


def test_names_the_first_operator_without_a_rule():
    build = Builder((2, 3, 4))
    strange = build.call(aten.cummax.default, build.call(aten.diagonal.default, build.source, 0, 1, 2), 0)
    assert strange is not None
    state = _trace(build, 0)[strange]
    assert state.kind == "mixed"
    assert state.node is strange.args[0]
    assert state.why == "aten.diagonal: no rule covers it"


def test_an_axis_of_size_one_cannot_be_followed():
    build = Builder((2, 1))
    node = build.call(aten.relu.default, build.source)
    assert node is not None
    assert _trace(build, 1)[node].kind == "mixed"
    assert _trace(build, -2)[node] == AxisState("at", dim=0)


def test_a_write_through_a_view_spoils_what_follows():
    """``buffer[:, 0] = x`` in pieces: the buffer did not depend on x when it was made."""
    build = Builder((2, 3))
    buffer = build.call(aten.zeros.default, [3, 2, 3], dtype=torch.float64)
    view = build.call(aten.select.int, buffer, 1, 0)
    piece = build.call(aten.select.int, build.source, 0, 0)
    write = build.call(aten.copy_.default, view, piece)
    after = build.call(aten.mul.Tensor, buffer, 2.0)
    assert None not in (view, write, after)
    states = _trace(build, 1)
    assert states[buffer].kind == "absent"  # type: ignore[index]
    assert states[after].kind == "mixed"  # type: ignore[index]
    assert states[after].node is write  # type: ignore[index]


def test_a_write_that_keeps_the_axis_spoils_nothing():
    build = Builder((2, 3))
    double = build.call(aten.mul.Tensor, build.source, 2.0)
    build.call(aten.relu_.default, build.call(aten.view.default, double, [6]))
    build.call(aten.add_.Tensor, build.constant(4), 1)
    after = build.call(aten.mul.Tensor, double, 2.0)
    assert _trace(build, 0)[after] == AxisState("at", dim=0)  # type: ignore[index]


def test_random_draws_before_the_source_do_not_carry_it():
    build = Builder((2, 3))
    noise = build.call(aten.rand_like.default, build.source)
    out = build.call(aten.matmul.default, noise, build.constant(3, 3))
    assert _trace(build, 0)[out].kind == "absent"  # type: ignore[index]


# --- probe --------------------------------------------------------------------------------------------------------


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


# --- captured models ----------------------------------------------------------------------------------------------


def test_encoder_layer_mixes_positions_and_keeps_samples_apart():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    found = program(layer, torch.randn(3, 5, 8), dims=2)
    assert found.ask(0) == Verdict("position-wise", "static", "every operator on the way keeps the positions apart")
    unsure = found.ask(1)
    assert (unsure.kind, unsure.how) == ("mixed", "static")
    assert unsure.node is not None
    assert "scaled_dot_product_attention" in unsure.node.name
    measured = found.ask(1, measure=True)
    assert (measured.kind, measured.how, measured.node) == ("mixed", "probe", unsure.node)


def test_causal_attention_is_measured_to_be_causal():
    def causal(x: Tensor) -> Tensor:
        heads = x.view(3, 5, 2, 4).transpose(1, 2)
        return x + F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).reshape(3, 5, 8)

    found = program(Apply(causal), torch.randn(3, 5, 8))
    assert found.ask(0).kind == "position-wise"
    assert found.ask(1, measure=True).kind == "causal"
    assert found.ask(1).kind == "mixed"


def test_flattened_linear_layers_are_position_wise():
    found = program(FlatMLP(6), torch.randn(3, 5, 6), dims=2)
    states = trace_axis(found.nodes, source=found.source, axis=1, shapes=found.shapes)
    (flat,) = [state for node, state in states.items() if node.name == "linear"]
    assert flat == AxisState("at", dim=0, stride=1)
    states = trace_axis(found.nodes, source=found.source, axis=0, shapes=found.shapes)
    (flat,) = [state for node, state in states.items() if node.name == "linear"]
    assert flat == AxisState("at", dim=0, stride=5)
    for axis in (0, 1):
        assert found.ask(axis) == Verdict(
            "position-wise", "static", "every operator on the way keeps the positions apart"
        )
    assert found.ask(2).kind == "mixed"


def test_gpt2_keeps_samples_apart_and_is_causal():
    found = program(GPT2(), torch.randint(0, 11, (3, 5)), source="dropout")
    assert found.ask(0).how == "static"
    assert found.ask(0).kind == "position-wise"
    assert found.ask(1, measure=True).kind == "causal"


def test_gpt2_mlp_is_a_finish():
    found = program(GPT2(), torch.randint(0, 11, (3, 5)), source="dropout")
    adds = [n for n in found.nodes if n.name.startswith("add") and n.meta["nn_module_stack"].__len__() == 4]
    residual, end = adds[:2]  # after the attention and after the MLP of the first block
    between = found.nodes[found.nodes.index(residual) + 1 : found.nodes.index(end) + 1]
    verdict = classify(between, source=residual, sink=end, axis_in=1, axis_out=1, shapes=found.shapes)
    assert (verdict.kind, verdict.how) == ("position-wise", "static")


def test_an_axis_that_leaves_in_another_dim_is_not_position_wise():
    found = program(Apply(lambda x: x.transpose(0, 1) * 2), torch.randn(3, 5))
    assert found.ask(0).why == "the axis leaves aten.mul as dim 1 of [5, 3]; unsure counts as mixed"
    ends: dict[str, Any] = {"source": found.source, "sink": found.sink, "shapes": found.shapes}
    assert classify(found.nodes, axis_in=0, axis_out=1, **ends).kind == "position-wise"
    assert classify(found.nodes, axis_in=0, axis_out=-1, **ends).kind == "position-wise"


def test_a_repeated_axis_is_not_the_axis():
    found = program(Apply(lambda x: x.repeat(1, 2)), torch.randn(3, 5))
    assert found.ask(1).kind == "mixed"
    assert found.ask(0).kind == "position-wise"


def test_a_value_that_ignores_the_source():
    found = program(Apply(lambda x: torch.zeros_like(x) + 1), torch.randn(3, 5))
    assert found.ask(1) == Verdict("position-wise", "static", "does not depend on the source")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cumsum", "causal"), ("reversed cumsum", "anticausal"), ("flip", "mixed"), ("roll", "mixed"), ("mean", "mixed")],
)
def test_unsure_rules_are_measured(name: str, expected: str):
    found = program(Apply(PROBES[name][1]), torch.randn(3, 5, 4))
    assert found.ask(1, measure=True).kind == expected
    assert found.ask(1).kind == "mixed"
    assert found.ask(0) == found.ask(0, measure=True)


def test_what_no_rule_covers_is_measured():
    found = program(Apply(lambda x: torch.diagonal_scatter(x, x.diagonal(0, 1, 2) * 2, 0, 1, 2)), torch.randn(3, 5, 4))
    assert found.ask(0).kind == "mixed"
    assert found.ask(0, measure=True).how == "probe"
    assert found.ask(0, measure=True).kind == "position-wise"
    assert found.ask(0, measure=True).node is None


# --- samples ------------------------------------------------------------------------------------------------------


def _coupling(found: Program, **extra: Any) -> Verdict:
    return batch_coupling(found.nodes, source=found.source, sink=found.sink, shapes=found.shapes, **extra)


def _norm_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))


def test_batch_norm_couples_samples_in_training_only():
    found = program(_norm_net(), torch.randn(5, 4), dims=1)
    calls = []
    verdict = _coupling(found, fn=lambda x: calls.append(x) or found.run(x), example=torch.randn(5, 4))
    assert (verdict.kind, verdict.how, calls) == ("mixed", "static", [])
    assert verdict.node is not None
    error = coupling_error(verdict.node)
    assert isinstance(error, BatchCouplingError)
    assert error.found.startswith("aten.batch_norm in 1 (")
    assert error.found.endswith(") mixes the samples of a batch")
    assert 'backward="chain", which needs no independent samples' in error.do
    assert "LayerNorm" in error.do
    assert _coupling(program(_norm_net(), torch.randn(5, 4), training=False)).kind == "position-wise"


def test_other_couplings_are_found_and_named():
    found = program(Apply(lambda x: x - x.cumsum(0)), torch.randn(5, 4))
    verdict = _coupling(found, fn=found.run, example=found.x)
    assert (verdict.kind, verdict.how) == ("mixed", "probe")
    assert verdict.node is not None
    error = coupling_error(verdict.node)
    assert "aten.cumsum" in error.found
    assert __file__ in error.found
    assert "LayerNorm" not in error.do


def test_convolutions_keep_samples_apart():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))
    found = program(model, torch.randn(4, 3, 6, 6), dims=1)
    assert _coupling(found) == Verdict("position-wise", "static", "every operator on the way keeps the positions apart")
