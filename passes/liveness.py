"""Liveness: which nodes carry gradient from an input through a parameter, and what each node must wait for.

Contract: a captured graph (operators of the training dialect, not functional) in, a frozen record out; the graph is
left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lbi_compile._torch import FakeTensorMode, pytree
from lbi_compile.errors import NoFloatPathError

INPUT, CONSTANT, PARAMETER, PARAMETER_ONLY, LIVE, NUMBER = (
    "input",
    "constant",
    "parameter",
    "parameter-only",
    "live",
    "number",
)


@dataclass(frozen=True, slots=True)
class Liveness:
    """What flows where.

    Attributes:
        kind: For every node but the output one of ``"input"`` (depends on inputs, not on parameters), ``"constant"``,
            ``"parameter"``, ``"parameter-only"``, ``"live"`` (depends by value on an input and on a parameter), and
            ``"number"`` (no tensor: sizes, asserts).
        waits: For every node the nodes that must run before it: its arguments, and by storage the writes it reads,
            the writes it overwrites and the reads it must not disturb.
        live: Live nodes in program order.
        sinks: Live differentiable outputs of the model.
    """

    kind: Mapping[fx.Node, str]
    waits: Mapping[fx.Node, tuple[fx.Node, ...]]
    live: tuple[fx.Node, ...]
    sinks: tuple[fx.Node, ...]


def liveness(gm: fx.GraphModule, *, trainable: frozenset[str] | None = None) -> Liveness:
    """Classify the nodes of a captured graph.

    Every float ``nn.Parameter`` counts as trainable, frozen or not, so that thawing one later needs no new capture.

    Args:
        gm: Captured graph; ``node.meta["val"]`` holds its values.
        trainable: Names of the attributes that count as trainable; by default every float parameter.

    Returns:
        The record.

    Raises:
        NoFloatPathError: No output depends on an input and on a parameter.
    """
    if trainable is None:
        trainable = frozenset(n for n, p in gm.named_parameters(remove_duplicate=False) if p.is_floating_point())
    waits = dependences(gm)
    kind: dict[fx.Node, str] = {}
    random_live = False
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            kind[node] = INPUT
        elif node.op == "get_attr":
            kind[node] = PARAMETER if str(node.target) in trainable else CONSTANT
        elif not _tensors(node):
            kind[node] = NUMBER
        else:
            kind[node] = _join({kind[before] for before in waits[node]})
            # a random draw may neither be repeated in two regions nor move ahead of an earlier live one
            if is_random(node) and (kind[node] == PARAMETER_ONLY or random_live):
                kind[node] = LIVE
            random_live |= is_random(node) and kind[node] == LIVE
    output = gm.graph.output_node()
    trained = _with_gradient(kind, waits)
    sinks = tuple(
        dict.fromkeys(
            node for node in output.all_input_nodes if kind[node] == LIVE and node in trained and is_float_tensor(node)
        )
    )
    if not sinks:
        raise NoFloatPathError(
            f"{len(output.all_input_nodes)} outputs; none takes a gradient to a trainable parameter and reads an input",
            expected="at least one float output computed from an input and a parameter",
            do="check that the model has float parameters and that its output is not detached, computed under no_grad, "
            "or an argmax",
        )
    return Liveness(kind, waits, tuple(n for n, k in kind.items() if k == LIVE), sinks)


def _with_gradient(kind: Mapping[fx.Node, str], waits: Mapping[fx.Node, tuple[fx.Node, ...]]) -> set[fx.Node]:
    """The nodes from which a gradient reaches a trainable parameter: unlike values, it stops at a detach."""
    found: set[fx.Node] = set()
    for node, what in kind.items():
        name = getattr(node.target, "__name__", "")
        # the exporter wraps what runs under no_grad into an operator that names the mode first
        stops = name.startswith("detach") or (name == "wrap_with_set_grad_enabled" and node.args[0] is False)
        passes = what not in (NUMBER, PARAMETER) and not stops
        if what == PARAMETER or (passes and any(before in found for before in waits[node])):
            found.add(node)
    return found


def _join(kinds: set[str]) -> str:
    if LIVE in kinds:
        return LIVE
    if kinds & {PARAMETER, PARAMETER_ONLY}:
        return LIVE if INPUT in kinds else PARAMETER_ONLY
    return INPUT if INPUT in kinds else CONSTANT


def is_random(node: fx.Node) -> bool:
    """The operator draws random numbers when it runs (a dropout in training mode, not one in evaluation mode)."""
    tags = getattr(node.target, "tags", ())
    name = getattr(node.target, "__name__", "")
    if torch.Tag.nondeterministic_seeded not in tags and not name.startswith(("dropout", "feature_dropout", "alpha_")):
        return "scaled_dot_product" in name and _argument(node, "dropout_p", 4, 0.0) != 0.0
    if "dropout" in name:
        return bool(_argument(node, "train", 2, True)) and _argument(node, "p", 1, 0.5) != 0.0
    return "scaled_dot_product" not in name or _argument(node, "dropout_p", 4, 0.0) != 0.0


def _argument(node: fx.Node, name: str, position: int, default: Any) -> Any:
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def is_float_tensor(node: fx.Node) -> bool:
    """The node gives one floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def is_mutating(node: fx.Node) -> bool:
    """The operator writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    if value is None and node.op == "call_function":
        # in-place operators whose result nobody reads carry no value
        return [a.meta["val"] for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)] * is_mutating(
            node
        )
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def dependences(gm: fx.GraphModule) -> Mapping[fx.Node, tuple[fx.Node, ...]]:
    """What each node waits for: arguments, then read/write order on shared storage.

    Exported graphs are not functional: an operator may write into a view that another node reads by another name.
    Storages are found by running the graph on fake tensors; a graph without a writing operator needs no run.
    """
    arguments = {node: tuple(node.all_input_nodes) for node in gm.graph.nodes}
    if not any(is_mutating(node) for node in gm.graph.nodes):
        return arguments
    order = _StorageOrder(gm)
    order.run_fake()
    return {
        node: tuple(dict.fromkeys((*before, *sorted(order.extra.get(node, ()), key=order.position.__getitem__))))
        for node, before in arguments.items()
    }


class _StorageOrder(fx.Interpreter):
    """Runs the graph on fake tensors and notes which node last wrote, and which since read, every storage."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.extra: dict[fx.Node, set[fx.Node]] = {}
        self.position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self._written: dict[int, fx.Node] = {}
        self._read: dict[int, set[fx.Node]] = {}
        self._mode = next(
            (v.fake_mode for n in gm.graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode")),
            None,
        ) or FakeTensorMode(allow_non_fake_inputs=True)

    def run_fake(self) -> None:
        inputs = [node.meta.get("val") for node in self.module.graph.find_nodes(op="placeholder")]  # type: ignore[union-attr]
        with self._mode, torch.no_grad():
            self.run(*inputs, enable_io_processing=False)

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self._mode.from_tensor(value) if isinstance(value, (Tensor, nn.Parameter)) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return None  # the exporter's guard module: it reads nothing

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function":
            self._note(n)
        return super().run_node(n)

    def _note(self, node: fx.Node) -> None:
        written: set[int] = set()
        if is_mutating(node):
            schema = node.target._schema  # type: ignore[union-attr]
            for argument, value in zip(schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written |= {s for a in _nodes(value) for s in _storages(self.env[a])}
        extra: set[fx.Node] = set()
        for before in node.all_input_nodes:
            for storage in _storages(self.env[before]):
                if storage in self._written:
                    extra.add(self._written[storage])
                if storage not in written:
                    self._read.setdefault(storage, set()).add(node)
        for storage in written:
            extra |= self._read.pop(storage, set())
            self._written[storage] = node
        if extra - {node}:
            self.extra[node] = extra - {node}


def _nodes(value: Any) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node)]


def _storages(value: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}
